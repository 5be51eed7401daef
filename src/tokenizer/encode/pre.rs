//! `tokenizer.ggml.pre`: what a pre-tokenizer's name means for token ids.
//!
//! In: a name. Out: the stages of the splitting ([`super::split`]) and the settings that llama.cpp derives from the name.
//! Sources: `llama_vocab::impl::load` (names, settings) and `llm_tokenizer_bpe` (expressions) of `src/llama-vocab.cpp`.

use super::split::Stage;
use super::split::runs::{self, Lead, Run, Runs};
use super::split::words::{Cased, Marked, Punctuated, Words};

/// A pre-tokenizer.
#[derive(Clone, Copy, Debug)]
pub struct PreTokenizer {
    pub stages: &'static [Stage],
    /// Merges run over GPT-2's byte alphabet; otherwise over UTF-8.
    pub byte_level: bool,
    /// A word that is a token is that token, whatever the merges say.
    pub ignore_merges: bool,
    /// The default of `add_bos_token`.
    pub add_bos: bool,
    /// `add_bos_token` is taken as true.
    pub force_bos: bool,
    /// Without `bos_token_id` there is no such token; otherwise it is 11.
    pub no_bos: bool,
    /// Spaces become U+2581 first.
    pub escape_spaces: bool,
    /// A run of line feeds that is a token is that token.
    pub line_feeds: bool,
    /// Every word begins with U+2581.
    pub metaspace: bool,
}

const fn plain(stages: &'static [Stage]) -> PreTokenizer {
    PreTokenizer {
        stages,
        byte_level: true,
        ignore_merges: false,
        add_bos: false,
        force_bos: false,
        no_bos: false,
        escape_spaces: false,
        line_feeds: false,
        metaspace: false,
    }
}

/// The pre-tokenizer called `name`, if llama.cpp has it.
pub fn find(name: &str) -> Option<PreTokenizer> {
    let sentencepiece_like = PreTokenizer { byte_level: false, escape_spaces: true, ..plain(LINES) };
    Some(match name {
        "default" => plain(DEFAULT),
        "minicpm5" => PreTokenizer { ignore_merges: true, ..plain(MINICPM5) },
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0" | "lfm2"
        | "jina-v5-nano" => PreTokenizer { ignore_merges: true, add_bos: true, ..plain(LLAMA3) },
        "deepseek-llm" => plain(DEEPSEEK_LLM),
        "deepseek-coder" => plain(DEEPSEEK_CODER),
        "deepseek-v3" | "hunyuan-dense" | "hy_v4" | "joyai-llm" => plain(DEEPSEEK3),
        "spark2_5" => plain(SPARK),
        "youtu" => PreTokenizer { ignore_merges: true, ..plain(YOUTU) },
        "falcon" => plain(FALCON),
        "starcoder" | "refact" | "command-r" | "smollm" | "codeshell" | "exaone" | "minerva-7b" | "mellum2" => {
            plain(DIGITS_GPT2)
        }
        "gpt-2" | "phi-2" | "jina-es" | "jina-de" | "gigachat" | "jina-v2-es" | "jina-v2-de" | "a.x-4.0" | "mellum"
        | "modern-bert" | "jina-v1-en" | "jina-v2-code" | "roberta-bpe" | "exaone4" | "mpt" | "olmo" | "jais"
        | "trillion" | "granite-docling" => plain(GPT2),
        "jais-2" => plain(JAIS2),
        "gemma4" | "granite-embed-multi-311m" => {
            PreTokenizer { force_bos: true, line_feeds: true, ..sentencepiece_like }
        }
        "mmbert" => PreTokenizer { line_feeds: true, metaspace: true, ..sentencepiece_like },
        "sarvam-moe" => sentencepiece_like,
        "whitespace" => PreTokenizer { byte_level: false, ..plain(WHITESPACE) },
        "qwen2" | "deepseek-r1-qwen" | "kormo" | "f2llmv2" | "megrez" | "stablelm2" | "hunyuan" | "solar-open"
        | "grok-2" | "bailingmoe" | "bailingmoe2" | "llada-moe" => plain(QWEN2),
        "qwen35" => plain(QWEN35),
        "dbrx" | "smaug-bpe" => plain(LLAMA3),
        "chatglm-bpe" => PreTokenizer { no_bos: true, ..plain(LLAMA3) },
        "glm4" | "glm5" => PreTokenizer { no_bos: true, ignore_merges: true, ..plain(LLAMA3) },
        "poro-chat" | "bloom" | "gpt3-finnish" => plain(BLOOM),
        "viking" => plain(VIKING),
        "tekken" => PreTokenizer { ignore_merges: true, add_bos: true, ..plain(TEKKEN) },
        "chameleon" => PreTokenizer { add_bos: true, ..plain(CHAMELEON) },
        "exaone-moe" => plain(EXAONE_MOE),
        "gpt-4o" | "llama4" | "kanana2" | "talkie" | "minimax-m2" => plain(GPT4O),
        "granite-embed-multi-97m" => PreTokenizer { ignore_merges: true, ..plain(GRANITE_EMBEDDING) },
        "tiny_aya" | "cohere2moe" => plain(TINY_AYA),
        "superbpe" => plain(SUPERBPE),
        "seed-coder" => plain(SEED_CODER),
        "kimi-k2" => plain(KIMI_K2),
        "ufakzeka" => plain(UFAKZEKA),
        "afmoe" => plain(AFMOE),
        "laguna" => plain(LAGUNA),
        _ => return None,
    })
}

const fn run(runs: &'static [Run]) -> Stage {
    Stage::Runs(Runs(runs))
}

/// `\p{N}`.
const DIGIT: Stage = run(&[Run::times(runs::number, 1, 1)]);
/// `\p{N}{1,3}`.
const THREE_NUMBERS: Stage = run(&[Run::times(runs::number, 1, 3)]);
/// `\p{N}+`.
const NUMBERS: Stage = run(&[Run::of(runs::number)]);
/// `[0-9][0-9][0-9]`.
const THREE_DIGITS: Stage = run(&[Run::times(runs::digit, 3, 3)]);
/// `[\r\n]`.
const LINE_BREAK: Stage = run(&[Run::times(runs::line_break, 1, 1)]);
const HAN_AND_KANA: Stage = run(&[Run::of(runs::han_and_kana)]);
const DEEPSEEK_CJK: Stage = run(&[Run::of(runs::deepseek_cjk)]);
const BLOOM_WORDS: Stage = run(&[Run::after(Lead::Space, runs::bloom)]);
/// `[^\n]+|[\n]+`.
const LINE_RUNS: Stage = run(&[Run::of(runs::not_line_feed), Run::of(runs::line_feed)]);
const PUNCTUATED: Stage = Stage::Punctuated(Punctuated { single_breaks: false });

static DEFAULT: &[Stage] = &[run(&[Run::of(runs::unnamed)]), Stage::Gpt2, NUMBERS, THREE_DIGITS];
static GPT2: &[Stage] = &[Stage::Gpt2];
static DIGITS_GPT2: &[Stage] = &[DIGIT, Stage::Gpt2];
static LLAMA3: &[Stage] = &[Stage::Words(Words::LLAMA3)];
static QWEN2: &[Stage] = &[Stage::Words(Words::QWEN2)];
static QWEN35: &[Stage] = &[Stage::Words(Words::QWEN35)];
static JAIS2: &[Stage] = &[Stage::Words(Words::JAIS2)];
static SEED_CODER: &[Stage] = &[Stage::Words(Words::SEED_CODER)];
static UFAKZEKA: &[Stage] = &[Stage::Words(Words::UFAKZEKA)];
static MINICPM5: &[Stage] = &[THREE_NUMBERS, Stage::Words(Words::MINICPM5)];
static EXAONE_MOE: &[Stage] = &[Stage::Words(Words::EXAONE_MOE)];
static LAGUNA: &[Stage] = &[LINE_RUNS, Stage::Words(Words::QWEN2)];
static TEKKEN: &[Stage] = &[Stage::Cased(Cased::TEKKEN)];
static GPT4O: &[Stage] = &[Stage::Cased(Cased::GPT4O)];
static GRANITE_EMBEDDING: &[Stage] = &[Stage::Cased(Cased::GRANITE)];
static TINY_AYA: &[Stage] = &[Stage::Cut(runs::number_groups), Stage::Marked(Marked { numbers: 3 })];
static KIMI_K2: &[Stage] = &[Stage::Kimi];
static BLOOM: &[Stage] = &[BLOOM_WORDS];
static VIKING: &[Stage] = &[BLOOM_WORDS, DIGIT];
static SUPERBPE: &[Stage] = &[NUMBERS, Stage::Cut(runs::thousands)];
static LINES: &[Stage] = &[LINE_RUNS];
static WHITESPACE: &[Stage] = &[run(&[Run::of(runs::not_white)])];
static DEEPSEEK3: &[Stage] = &[THREE_NUMBERS, HAN_AND_KANA, PUNCTUATED];
static AFMOE: &[Stage] = &[Stage::Cut(runs::number_groups), run(&[Run::of(runs::afmoe)]), PUNCTUATED];
static FALCON: &[Stage] = &[run(&[Run::of(runs::falcon)]), Stage::Gpt2, THREE_DIGITS];
static SPARK: &[Stage] = &[THREE_NUMBERS, HAN_AND_KANA, Stage::Punctuated(Punctuated { single_breaks: true }), DIGIT];
static DEEPSEEK_LLM: &[Stage] = &[
    LINE_BREAK,
    run(&[Run::after(Lead::White, runs::deepseek_letter)]),
    run(&[Run::after(Lead::White, runs::deepseek_symbol)]),
    Stage::Cut(runs::trailing_white),
    DEEPSEEK_CJK,
    NUMBERS,
];
static DEEPSEEK_CODER: &[Stage] = &[
    LINE_BREAK,
    run(&[Run::after(Lead::White, runs::letter)]),
    run(&[Run::after(Lead::White, runs::punctuation)]),
    DEEPSEEK_CJK,
    DIGIT,
];
static YOUTU: &[Stage] = &[
    run(&[Run::of(runs::hangul), Run::of(runs::cjk_punctuation), Run::of(runs::bopomofo), Run::of(runs::han_and_kana)]),
    Stage::Marked(Marked { numbers: 1 }),
];
static CHAMELEON: &[Stage] = &[
    Stage::Cut(runs::sentinels),
    Stage::Cut(runs::images),
    Stage::Cut(runs::indents),
    DIGIT,
    run(&[Run::times(runs::chameleon, 1, 1)]),
    Stage::Gpt2,
];

#[cfg(test)]
mod tests {
    use super::super::split::split;
    use super::*;
    use crate::tokenizer::pre::names::NAMES;

    fn words(name: &str, text: &str) -> Vec<String> {
        split(text, find(name).unwrap().stages).into_iter().map(String::from).collect()
    }

    #[test]
    fn every_name_is_there() {
        let missing: Vec<_> = NAMES.iter().filter(|n| find(n).is_none()).collect();
        assert!(missing.is_empty(), "{missing:?}");
        assert!(find("gpt-3").is_none() && find("").is_none());
    }

    #[test]
    fn nothing_is_lost_by_any_of_them() {
        let text = "I'M  don't\u{a0}\u{3000}x'LL 12345 a1\r\n\r\n \t\u{e9}\u{301}\u{4e2d}\u{6587}\u{30ab}\u{ac00}!?/\n\u{1f600} \u{378}--\u{ff01} ";
        for name in NAMES {
            assert_eq!(words(name, text).concat(), text, "{name}");
            assert!(words(name, "").is_empty(), "{name}");
        }
    }

    #[test]
    fn the_common_ones_by_hand() {
        let text = "it's IT'S 1234  x\n\n  y!\n ";
        assert_eq!(words("gpt-2", text), ["it", "'s", " IT", "'", "S", " 1234", " ", " x", "\n\n ", " y", "!", "\n "]);
        assert_eq!(
            words("smollm", text),
            ["it", "'s", " IT", "'", "S", " ", "1", "2", "3", "4", " ", " x", "\n\n ", " y", "!", "\n "]
        );
        assert_eq!(
            words("llama-bpe", text),
            ["it", "'s", " IT", "'S", " ", "123", "4", " ", " x", "\n\n", " ", " y", "!\n", " "]
        );
        assert_eq!(
            words("qwen2", text),
            ["it", "'s", " IT", "'S", " ", "1", "2", "3", "4", " ", " x", "\n\n", " ", " y", "!\n", " "]
        );
        assert_eq!(
            words("tekken", "camelCase ABCdef \u{416}\u{438}X"),
            ["camel", "Case", " ABCdef", " \u{416}\u{438}", "X"]
        );
        assert_eq!(words("gpt-4o", "I'll 12345!\n/x"), ["I'll", " ", "123", "45", "!\n/", "x"]);
        assert_eq!(
            words("deepseek-v3", "a.b \u{4e2d}\u{6587} (x)"),
            ["a", ".b", " ", "\u{4e2d}\u{6587}", " (", "x", ")"]
        );
        assert_eq!(words("qwen35", "e\u{301}a"), ["e\u{301}a"]);
        assert_eq!(words("qwen2", "e\u{301}a"), ["e", "\u{301}a"]);
    }

    #[test]
    fn long_runs_take_no_time() {
        let start = std::time::Instant::now();
        for name in NAMES {
            for c in [' ', '\n', 'a', 'A', '1', '\'', '!', '\u{301}', '\u{416}', '\u{4e2d}'] {
                let text: String = std::iter::repeat_n(c, 20_000).chain(['x']).collect();
                assert_eq!(words(name, &text).concat().len(), text.len());
            }
        }
        // 92 names, ten texts: a quadratic one would need minutes
        assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
    }
}
