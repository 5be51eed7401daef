//! What a model's name says: `org/Base-7B-v0.1-Instruct` taken apart, and names made from parts.
//!
//! Source: `get_model_id_components` and `id_to_title` in `gguf-py/gguf/metadata.py`, `size_label` and `naming_convention` in
//! `gguf-py/gguf/utility.py` of llama.cpp b11434.

use std::sync::LazyLock;

use fancy_regex::Regex;

/// A constant pattern of this module, compiled at first use.
macro_rules! regex {
    ($pattern:literal) => {
        LazyLock::new(|| Regex::new($pattern).expect("a constant pattern"))
    };
}

/// The parts of a model id.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct IdParts {
    /// All of it after the organization.
    pub name: Option<String>,
    pub organization: Option<String>,
    pub basename: Option<String>,
    pub finetune: Option<String>,
    pub version: Option<String>,
    pub size_label: Option<String>,
}

/// How many weights a file holds, as far as its size label needs it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ParamCount {
    total: u128,
    shared: u128,
    /// One expert of every stack.
    expert: u128,
    expert_sum: u64,
    stacks: u64,
}

impl ParamCount {
    /// Counts a tensor of the file by its GGUF name and row-major shape (`GGUFWriter.get_total_parameter_count`). Every
    /// tensor that is written counts, `rope_freqs.weight` too; a `--vocab-only` file counts none.
    pub fn add(&mut self, gguf_name: &str, shape: &[u64]) {
        let size = shape.iter().fold(1u128, |n, &d| n.saturating_mul(d.into()));
        self.total = self.total.saturating_add(size);
        if gguf_name.contains("_exps.") && shape.len() >= 3 {
            let experts = shape[shape.len() - if gguf_name.contains(".bias") { 2 } else { 3 }];
            self.expert = self.expert.saturating_add(size / u128::from(experts.max(1)));
            self.expert_sum = self.expert_sum.saturating_add(experts);
            self.stacks += 1;
        } else {
            self.shared = self.shared.saturating_add(size);
        }
    }

    /// All weights.
    pub fn total(&self) -> u128 {
        self.total
    }

    /// `30M`, `8x7.0B`; `None` without weights.
    pub fn size_label(&self) -> Option<String> {
        let experts = self.expert_sum.checked_div(self.stacks).unwrap_or(0);
        match (self.total, experts) {
            (0, _) => None,
            (_, 0) => Some(rounded(self.total)),
            _ => Some(format!("{experts}x{}", rounded(self.shared.saturating_add(self.expert)))),
        }
    }
}

/// A count in thousands, millions, billions or trillions with two digits or more.
fn rounded(count: u128) -> String {
    let n = count as f64;
    let (scaled, suffix) = match count {
        1_000_000_000_001.. => (n * 1e-12, 'T'),
        1_000_000_001.. => (n * 1e-9, 'B'),
        1_000_001.. => (n * 1e-6, 'M'),
        _ => (n * 1e-3, 'K'),
    };
    let whole = scaled.round_ties_even().to_string();
    let decimals = 2usize.saturating_sub(whole.trim_start_matches('0').len());
    format!("{scaled:.decimals$}{suffix}")
}

/// Words in title case, except those that hold capitals already, numbers and versions. Dashes become spaces.
pub fn title(id: &str) -> String {
    static AS_IS: LazyLock<Regex> = regex!(r"^(v\d+(?:\.\d+)*|\d.*)$");
    let words = id.trim().replace('-', " ");
    let titled = words.split_whitespace().map(|w| {
        let lower = w.chars().any(char::is_lowercase) && !w.chars().any(char::is_uppercase);
        if lower && !is_match(&AS_IS, w) { title_word(w) } else { w.to_string() }
    });
    titled.collect::<Vec<_>>().join(" ")
}

/// Python's `str.title` for a word in lower case: a letter that follows no letter becomes a capital.
fn title_word(word: &str) -> String {
    let mut after_letter = false;
    let mut out = String::with_capacity(word.len());
    for c in word.chars() {
        if after_letter {
            out.push(c)
        } else {
            out.extend(c.to_uppercase())
        }
        after_letter = c.is_lowercase() || c.is_uppercase();
    }
    out
}

/// Which parts of a name a piece between dashes belongs to.
#[derive(Clone, Copy, Default)]
struct Marks {
    basename: bool,
    size_label: bool,
    finetune: bool,
    version: bool,
    kind: bool,
}

impl Marks {
    fn count(self) -> usize {
        [self.basename, self.size_label, self.finetune, self.version, self.kind].iter().filter(|m| **m).count()
    }
}

/// Takes a model id apart. `total`: the number of weights, or 0 if it is not known.
pub fn components(id: &str, total: u128) -> IdParts {
    if id.contains(' ') {
        // A sentence, not an id.
        return IdParts { name: Some(id.to_string()), ..IdParts::default() };
    }
    let (organization, name) = match id.split_once('/') {
        Some((org, name)) => (Some(org).filter(|o| !o.starts_with('.')), name),
        None => (None, id),
    };
    let mut parts: Vec<(String, Marks)> =
        name.split('-').filter(|p| !p.is_empty()).map(|p| (p.to_string(), Marks::default())).collect();
    for (i, (part, marks)) in parts.iter_mut().enumerate() {
        annotate(part, marks, i == 0, total);
    }
    let numeric_size = parts.iter().any(|(p, m)| m.size_label && p.chars().any(char::is_numeric));
    for (part, marks) in &mut parts {
        if numeric_size && part.chars().all(char::is_alphabetic) {
            marks.size_label = false;
        }
    }
    let mut at_start = true;
    for (part, marks) in &mut parts {
        let plain = marks.count() == 0;
        if at_start && ((plain && part.starts_with(char::is_alphabetic)) || marks.version) {
            marks.basename = true;
        } else {
            at_start = false;
            marks.finetune |= plain;
        }
    }
    // Versions that end the name belong to the version, not to the base name.
    for (_, marks) in parts.iter_mut().rev() {
        if !marks.basename || marks.count() < 2 {
            break;
        }
        marks.basename = false;
    }
    let join = |keep: &dyn Fn(&Marks) -> bool, once: bool| {
        let mut kept: Vec<&str> = Vec::new();
        for (part, marks) in &parts {
            if keep(marks) && !(once && kept.contains(&part.as_str())) {
                kept.push(part);
            }
        }
        (!kept.is_empty()).then(|| kept.join("-"))
    };
    let size_label = join(&|m| m.size_label, true);
    let finetune = join(&|m| m.finetune, false);
    let version = join(&|m| m.version && !m.basename, false);
    let telling = size_label.is_some() || finetune.is_some() || version.is_some();
    IdParts {
        name: Some(name.to_string()),
        organization: organization.map(str::to_string),
        basename: join(&|m| m.basename, false).filter(|_| telling),
        finetune,
        version,
        size_label,
    }
}

fn annotate(part: &mut String, marks: &mut Marks, first: bool, total: u128) {
    static VERSION: LazyLock<Regex> = regex!(r"^(?i:(v|iter)?\d+([.]\d+)*)$");
    static KIND: LazyLock<Regex> = regex!(r"^(?i:i?q\d(_\w)*|b?fp?(16|32))$");
    static SIZE: LazyLock<Regex> =
        regex!(r"^(?i:(([A]|\d+[x])?\d+([._]\d+)?[KMBT][\d]?|small|mini|medium|large|x?xl))$");
    static FINETUNE: LazyLock<Regex> = regex!(r"^(?i:chat|instruct|vision|lora)$");
    if is_match(&VERSION, part) {
        marks.version = true;
    } else if is_match(&KIND, part) {
        marks.kind = true;
        *part = part.to_uppercase();
    } else if !first && is_match(&SIZE, part) {
        let (label, context_length) = size(part, total);
        *part = label;
        marks.finetune = context_length;
        marks.size_label = !context_length;
    } else if !first && is_match(&FINETUNE, part) {
        marks.finetune = true;
    }
}

/// A size as it is written in labels (`7b1` is 7.1B), and whether it is too far from `total` to be one: a context length.
fn size(part: &str, total: u128) -> (String, bool) {
    let mut chars: Vec<char> = part.replace('_', ".").chars().collect();
    if let [head @ .., unit, digit] = chars.as_slice()
        && digit.is_ascii_digit()
    {
        chars = [head, &['.', *digit, *unit]].concat();
    }
    let Some((unit, number)) = chars.split_last_mut() else { return (String::new(), false) };
    if number.last().is_some_and(char::is_ascii_digit) && "kmbt".contains(*unit) {
        unit.make_ascii_uppercase();
    }
    let scale = match unit {
        'K' => 1e3,
        'M' => 1e6,
        'B' => 1e9,
        'T' => 1e12,
        _ => 1e-3,
    };
    let number: String = number.iter().collect();
    let far = total > 0
        && number
            .parse::<f64>()
            .is_ok_and(|n| (n * scale - total as f64).abs() > (7 * total.min(u128::MAX / 8) / 8) as f64);
    if far {
        unit.make_ascii_lowercase();
    }
    (format!("{number}{unit}"), far)
}

/// The name of the output file when none is given: `Name-7B-Finetune-v1-Q8_0` (`naming_convention`).
pub fn file_stem(
    name: Option<&str>,
    basename: Option<&str>,
    finetune: Option<&str>,
    version: Option<&str>,
    size_label: Option<&str>,
    encoding: Option<&str>,
    vocab_only: bool,
) -> String {
    let clean = |s: &str| s.trim().replace(' ', "-");
    let stem = basename.or(name).map_or("ggml-model".to_string(), |s| clean(s).replace('/', "-"));
    let mut out = stem;
    for part in [
        size_label.map(str::to_string),
        finetune.map(clean),
        version.map(clean),
        encoding.map(|e| clean(e).to_uppercase()),
    ]
    .into_iter()
    .flatten()
    {
        out = format!("{out}-{part}");
    }
    if vocab_only { format!("{out}-vocab") } else { out }
}

fn is_match(pattern: &Regex, text: &str) -> bool {
    // An error means that backtracking ran out of steps, which these patterns do not reach on names.
    pattern.is_match(text).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each expectation is what `Metadata.get_model_id_components` of b11434 gives.
    #[test]
    fn ids_are_taken_apart() {
        for (id, total, [name, organization, basename, finetune, version, size_label]) in ROWS {
            let own = |s: &Option<&str>| s.map(str::to_string);
            let want = IdParts {
                name: own(name),
                organization: own(organization),
                basename: own(basename),
                finetune: own(finetune),
                version: own(version),
                size_label: own(size_label),
            };
            assert_eq!(components(id, *total), want, "{id} {total}");
        }
    }

    #[rustfmt::skip]
    const ROWS: &[(&str, u128, [Option<&str>; 6])] = &[
        ("Mistral-7B-Instruct-v0.2", 0, [Some("Mistral-7B-Instruct-v0.2"), None, Some("Mistral"), Some("Instruct"), Some("v0.2"), Some("7B")]),
        ("mistralai/Mixtral-8x7B-v0.1", 0, [Some("Mixtral-8x7B-v0.1"), Some("mistralai"), Some("Mixtral"), None, Some("v0.1"), Some("8x7B")]),
        ("meta-llama/Llama-3.2-1B", 1300000, [Some("Llama-3.2-1B"), Some("meta-llama"), Some("Llama-3.2"), Some("1b"), None, None]),
        ("meta-llama/Llama-3.2-1B", 1235000000, [Some("Llama-3.2-1B"), Some("meta-llama"), Some("Llama-3.2"), None, None, Some("1B")]),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494000000, [Some("Qwen2.5-0.5B-Instruct"), Some("Qwen"), Some("Qwen2.5"), Some("Instruct"), None, Some("0.5B")]),
        ("bloom-7b1-chat", 0, [Some("bloom-7b1-chat"), None, Some("bloom"), Some("chat"), None, Some("7.1B")]),
        ("microsoft/Phi-3-mini-4k-instruct", 3800000000, [Some("Phi-3-mini-4k-instruct"), Some("microsoft"), Some("Phi-3"), Some("4k-instruct"), None, Some("mini")]),
        ("Meta-Llama-3-8B", 8000000000, [Some("Meta-Llama-3-8B"), None, Some("Meta-Llama-3"), None, None, Some("8B")]),
        ("smollm2-135m", 134515008, [Some("smollm2-135m"), None, Some("smollm2"), None, None, Some("135M")]),
        ("random-llama3", 1300000, [Some("random-llama3"), None, None, None, None, None]),
        ("My Model 7B v2 Instruct", 0, [Some("My Model 7B v2 Instruct"), None, None, None, None, None]),
        ("./model", 0, [Some("model"), None, None, None, None, None]),
        ("", 0, [Some(""), None, None, None, None, None]),
        ("a/b/c-7B", 0, [Some("b/c-7B"), Some("a"), Some("b/c"), None, None, Some("7B")]),
        ("gpt2-xl-large-1.5B", 0, [Some("gpt2-xl-large-1.5B"), None, Some("gpt2-xl-large"), None, None, Some("1.5B")]),
        ("x-Q4_K_M-fp16-iq2", 0, [Some("x-Q4_K_M-fp16-iq2"), None, None, None, None, None]),
        ("Hermes-2-Pro-Llama-3-8B-DPO", 0, [Some("Hermes-2-Pro-Llama-3-8B-DPO"), None, Some("Hermes-2-Pro-Llama-3"), Some("DPO"), None, Some("8B")]),
        ("v2-3-chat", 0, [Some("v2-3-chat"), None, Some("v2-3"), Some("chat"), None, None]),
        ("tiny--double-7B-7b-13B", 0, [Some("tiny--double-7B-7b-13B"), None, Some("tiny-double"), None, None, Some("7B-13B")]),
        ("7B-Model", 0, [Some("7B-Model"), None, None, Some("7B-Model"), None, None]),
        ("Qwen3-30B-A3B-Thinking-2507", 30500000000, [Some("Qwen3-30B-A3B-Thinking-2507"), None, Some("Qwen3"), Some("Thinking"), Some("2507"), Some("30B-A3B")]),
        ("deepseek-coder-6.7b-base", 0, [Some("deepseek-coder-6.7b-base"), None, Some("deepseek-coder"), Some("base"), None, Some("6.7B")]),
    ];

    #[test]
    fn titles() {
        for (id, want) in TITLES {
            assert_eq!(title(id), *want, "{id}");
        }
    }

    const TITLES: &[(&str, &str)] = &[
        ("smollm2-135m", "Smollm2 135m"),
        ("meta-llama", "Meta Llama"),
        ("random-llama3", "Random Llama3"),
        ("Llama-3.2-1B", "Llama 3.2 1B"),
        ("v2.1-beta", "v2.1 Beta"),
        ("v2x", "V2X"),
        ("deepseek_r1-distill", "Deepseek_R1 Distill"),
        ("HuggingFaceTB", "HuggingFaceTB"),
        ("a1b o'neill", "A1B O'Neill"),
        ("  x--y ", "X Y"),
    ];

    #[test]
    fn labels() {
        for (count, want) in [
            (0, None),
            (999, Some("1.0K")),
            (1_300_000, Some("1.3M")),
            (30_400_000, Some("30M")),
            (134_515_008, Some("135M")),
            (1_000_000, Some("1000K")),
            (7_000_000_001, Some("7.0B")),
            (70_600_000_000, Some("71B")),
        ] {
            let mut params = ParamCount::default();
            params.add("x", &[count]);
            assert_eq!(params.size_label().as_deref(), want, "{count}");
        }
        let mut moe = ParamCount::default();
        moe.add("blk.0.ffn_up_exps.weight", &[8, 1000, 1000]);
        moe.add("output.weight", &[1000, 1000]);
        assert_eq!(moe.size_label().as_deref(), Some("8x2.0M"));
    }
}
