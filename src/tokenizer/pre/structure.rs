//! The pre-tokenizer's name from what tokenizer.json says: its steps and patterns.
//!
//! The hash of the reference depends on the ids of a whole vocabulary, so a model with a new or an extended vocabulary is not
//! recognised though its pre-tokenizer is a known one. What the steps do is what the name stands for (the patterns that
//! llama.cpp keeps per name in `src/llama-vocab.cpp`), so the steps are looked up first. Names that share their steps stand
//! in one row; the hash picks among them.

use serde_json::{Map, Value as Json};

use crate::checkpoint::nearest::distance;

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub(in crate::tokenizer) const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const DEEPSEEK_LETTERS: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";

/// The ByteLevel step without a pattern of its own, and with that of GPT-2.
const BYTES: &str = "bytes";
const WORDS: &str = "words";
const DIGITS: &str = "digits";

/// One kind of pre-tokenizer. The first row that fits counts; `None` fits everything.
struct Row {
    steps: &'static [&'static str],
    normalizer: Option<&'static str>,
    ignore_merges: Option<bool>,
    /// The post-processor puts a special token first.
    bos: Option<bool>,
    /// The most common name first.
    names: &'static [&'static str],
}

const fn row(steps: &'static [&'static str], names: &'static [&'static str]) -> Row {
    Row { steps, normalizer: None, ignore_merges: None, bos: None, names }
}

const LLAMA3_STEPS: &[&str] = &[LLAMA3, BYTES];
const QWEN2_NAMES: &[&str] =
    &["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"];

static ROWS: &[Row] = &[
    Row {
        bos: Some(true),
        ..row(
            LLAMA3_STEPS,
            &[
                "llama-bpe",
                "falcon3",
                "falcon-h1",
                "pixtral",
                "midm-2.0",
                "lfm2",
                "jina-v5-nano",
                "glm4",
                "chatglm-bpe",
                "smaug-bpe",
                "dbrx",
            ],
        )
    },
    Row {
        ignore_merges: Some(true),
        ..row(LLAMA3_STEPS, &["smaug-bpe", "llama-bpe", "falcon3", "falcon-h1", "lfm2", "glm4"])
    },
    row(LLAMA3_STEPS, &["dbrx", "smaug-bpe", "llama-bpe", "chatglm-bpe", "glm4"]),
    row(&[QWEN2, BYTES], QWEN2_NAMES),
    row(&[QWEN35, BYTES], &["qwen35"]),
    Row { bos: Some(true), ..row(&[GPT4O, BYTES], &["llama4", "gpt-4o", "kanana2", "talkie", "minimax-m2"]) },
    row(&[GPT4O, BYTES], &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"]),
    row(&[TEKKEN, BYTES], &["tekken"]),
    Row { normalizer: Some("NFC"), ..row(&[WORDS], &["olmo", "mpt", "gpt-2", "jais", "trillion", "modern-bert"]) },
    row(
        &[WORDS],
        &[
            "gpt-2",
            "phi-2",
            "olmo",
            "mpt",
            "jais",
            "roberta-bpe",
            "jina-v1-en",
            "jina-v2-code",
            "jina-v2-es",
            "jina-v2-de",
            "gigachat",
            "mellum",
            "a.x-4.0",
            "exaone4",
            "granite-docling",
            "trillion",
        ],
    ),
    Row { normalizer: Some("NFC"), ..row(&[DIGITS, WORDS], &["command-r", "refact", "smollm", "starcoder", "exaone"]) },
    row(
        &[DIGITS, WORDS],
        &["smollm", "refact", "starcoder", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
    ),
    row(&["punctuation Contiguous", WORDS, "digit-runs", "[0-9][0-9][0-9]"], &["falcon"]),
    row(
        &[r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3, BYTES],
        &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
    ),
    row(
        &[r"[\r\n]", DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", "[一-龥ࠀ-一가-퟿]+", DIGITS, BYTES],
        &["deepseek-llm"],
    ),
    row(&[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGITS, BYTES], &["deepseek-coder"]),
    row(&[r" ?[^(\s|[.,!?…。，、।۔،])]+", BYTES], &["bloom", "poro-chat", "gpt3-finnish"]),
    row(&[r" ?[^(\s|[.,!?…。，、।۔،])]+", DIGITS, BYTES], &["viking"]),
];

/// Model classes whose name tells names of one row apart.
const CLASSES: &[(&str, &str)] = &[
    ("Granite", "refact"),
    ("GPTBigCode", "refact"),
    ("Starcoder2", "starcoder"),
    ("Cohere", "command-r"),
    ("CodeShell", "codeshell"),
    ("Exaone", "exaone"),
];

/// The pre-tokenizer as tokenizer.json describes it.
#[derive(Debug, PartialEq)]
pub struct Structure {
    steps: Vec<String>,
    normalizer: String,
    ignore_merges: bool,
    bos: bool,
}

impl Structure {
    /// Reads the parts of tokenizer.json that matter here.
    pub fn read(tokenizer: &Map<String, Json>) -> Structure {
        let mut steps = Vec::new();
        flatten(tokenizer.get("pre_tokenizer"), "pretokenizers", 0, &mut |step| steps.push(describe(step)));
        let mut normalizers = Vec::new();
        flatten(tokenizer.get("normalizer"), "normalizers", 0, &mut |step| {
            normalizers.push(text(step, "type").to_string())
        });
        let mut bos = false;
        flatten(tokenizer.get("post_processor"), "processors", 0, &mut |step| {
            bos |= text(step, "type") == "TemplateProcessing"
                && step.get("single").and_then(|s| s.get(0)).is_some_and(|first| first.get("SpecialToken").is_some());
        });
        let ignore_merges =
            tokenizer.get("model").and_then(|m| m.get("ignore_merges")).and_then(Json::as_bool).unwrap_or(false);
        Structure { steps, normalizer: normalizers.join("+"), ignore_merges, bos }
    }

    /// The names that have this structure, the likeliest first.
    pub fn names(&self, class: &str) -> Option<Vec<&'static str>> {
        let row = ROWS.iter().find(|r| {
            r.steps.len() == self.steps.len()
                && r.steps.iter().zip(&self.steps).all(|(a, b)| a == b)
                && r.normalizer.is_none_or(|n| n == self.normalizer)
                && r.ignore_merges.is_none_or(|i| i == self.ignore_merges)
                && r.bos.is_none_or(|b| b == self.bos)
        })?;
        let mut names = row.names.to_vec();
        if let Some((_, hint)) = CLASSES.iter().find(|(c, _)| class.starts_with(c))
            && let Some(at) = names.iter().position(|n| n == hint)
        {
            names[..=at].rotate_right(1);
        }
        Some(names)
    }

    /// The name whose steps differ least from these.
    pub fn nearest(&self) -> &'static str {
        let own = self.steps.join(" then ");
        ROWS.iter().min_by_key(|r| distance(&own, &r.steps.join(" then "))).map_or("gpt-2", |r| r.names[0])
    }

    /// The steps in words, for messages.
    pub fn describe(&self) -> String {
        let shown = self.steps.join(" then ");
        match (shown.is_empty(), shown.char_indices().nth(300)) {
            (true, _) => "no steps".into(),
            (_, Some((at, _))) => format!("{}...", &shown[..at]),
            _ => shown,
        }
    }
}

fn text<'a>(value: &'a Json, key: &str) -> &'a str {
    value.get(key).and_then(Json::as_str).unwrap_or_default()
}

/// Calls `each` for the parts of nested sequences, in order.
fn flatten(value: Option<&Json>, list: &str, depth: usize, each: &mut dyn FnMut(&Json)) {
    match value {
        None | Some(Json::Null) => {}
        Some(v) if text(v, "type") == "Sequence" && depth < 8 => {
            for part in v.get(list).and_then(Json::as_array).into_iter().flatten() {
                flatten(Some(part), list, depth + 1, each);
            }
        }
        Some(v) => each(v),
    }
}

fn describe(step: &Json) -> String {
    match text(step, "type") {
        "ByteLevel" if step.get("use_regex").and_then(Json::as_bool).unwrap_or(true) => WORDS.into(),
        "ByteLevel" => BYTES.into(),
        "Digits" if step.get("individual_digits").and_then(Json::as_bool).unwrap_or(false) => DIGITS.into(),
        "Digits" => "digit-runs".into(),
        "Punctuation" => format!("punctuation {}", text(step, "behavior")),
        "Split" => {
            let pattern = step.get("pattern").and_then(|p| p.get("Regex").or(p.get("String"))).and_then(Json::as_str);
            // Line breaks are written as escapes by some and as themselves by others.
            let pattern = pattern.unwrap_or_default().replace('\r', r"\r").replace('\n', r"\n");
            let inverted = step.get("invert").and_then(Json::as_bool).unwrap_or(false);
            match text(step, "behavior") {
                "Isolated" if !inverted => pattern,
                // "Removed" and inverted: the pattern says what is kept, which comes to the same.
                "Removed" if inverted => pattern,
                other => format!("{other} {inverted} {pattern}"),
            }
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::names::NAMES;
    use super::*;

    fn structure(text: &str) -> Structure {
        let Json::Object(map) = serde_json::from_str(text).unwrap() else { panic!() };
        Structure::read(&map)
    }

    #[test]
    fn every_name_is_one_that_llama_cpp_loads() {
        for name in ROWS.iter().flat_map(|r| r.names) {
            assert!(NAMES.contains(name), "{name}");
        }
    }

    #[test]
    fn steps_are_recognised_in_either_spelling() {
        let split = |regex: &str| serde_json::json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        let bytes = serde_json::json!({"type": "ByteLevel", "use_regex": false});
        let with = |steps: Vec<Json>| {
            structure(&serde_json::json!({"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}).to_string())
        };
        assert_eq!(with(vec![split(LLAMA3), bytes.clone()]).names("").unwrap()[0], "dbrx");
        let literal = DEEPSEEK3.replace(r"\r", "\r").replace(r"\n", "\n");
        let v3 = with(vec![split(r"\p{N}{1,3}"), split("[一-龥\u{3040}-ゟ゠-ヿ]+"), split(&literal), bytes]);
        assert_eq!(v3.names("").unwrap()[0], "deepseek-v3");
        let gpt2 = structure(r#"{"pre_tokenizer": {"type": "ByteLevel"}}"#);
        assert_eq!(gpt2.names("").unwrap()[0], "gpt-2");
        let unknown = with(vec![split(&LLAMA3.replace("{1,3}", "{1,4}"))]);
        assert_eq!(unknown.names(""), None);
        assert_eq!(unknown.nearest(), "llama-bpe");
    }

    #[test]
    fn the_model_class_decides_between_equals() {
        let s = structure(
            r#"{"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, {"type": "ByteLevel"}]}}"#,
        );
        assert_eq!(s.names("LlamaForCausalLM").unwrap()[0], "smollm");
        assert_eq!(s.names("GraniteForCausalLM").unwrap()[0], "refact");
        assert_eq!(s.names("Starcoder2ForCausalLM").unwrap()[..2], ["starcoder", "smollm"]);
    }
}
