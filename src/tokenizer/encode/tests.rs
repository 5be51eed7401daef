//! Small vocabularies, worked out by hand after the source.

use super::*;
use crate::gguf::{Array, Value, value};

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

fn set(metadata: &mut Metadata, key: &str, to: Value) {
    value::set(metadata, &format!("tokenizer.ggml.{key}"), to);
}

fn with(mut metadata: Metadata, key: &str, to: Value) -> Metadata {
    set(&mut metadata, key, to);
    metadata
}

fn types(metadata: Metadata, types: &[i32]) -> Metadata {
    with(metadata, "token_type", Value::Array(Array::I32(types.to_vec())))
}

fn encoder(metadata: &Metadata) -> TextEncoder {
    TextEncoder::from_metadata(metadata).unwrap()
}

fn ids(metadata: &Metadata, text: &str) -> Vec<u32> {
    encoder(metadata).encode(text, false, true)
}

/// 0 `<unk>`, 1 `<s>`, 2 `</s>`, then `tokens`.
fn spm(tokens: &[(&str, f32)]) -> Metadata {
    let first = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)];
    let all: Vec<_> = first.iter().chain(tokens).copied().collect();
    let mut metadata = Metadata::new();
    set(&mut metadata, "model", "llama".into());
    set(&mut metadata, "tokens", Value::strs(all.iter().map(|t| t.0)));
    set(&mut metadata, "scores", Value::Array(Array::F32(all.iter().map(|t| t.1).collect())));
    let kind = |t: &str| match t {
        "<unk>" => UNKNOWN,
        "<s>" | "</s>" => CONTROL,
        t if t.starts_with("<0x") => BYTE,
        _ => NORMAL,
    };
    let kinds: Vec<i32> = all.iter().map(|t| kind(t.0)).collect();
    types(metadata, &kinds)
}

fn bpe(pre: &str, tokens: &[&str], merges: &[&str]) -> Metadata {
    let mut metadata = Metadata::new();
    set(&mut metadata, "model", "gpt2".into());
    set(&mut metadata, "pre", pre.into());
    set(&mut metadata, "tokens", Value::strs(tokens));
    set(&mut metadata, "merges", Value::strs(merges));
    set(&mut metadata, "add_bos_token", Value::Bool(false));
    metadata
}

#[test]
fn the_best_score_merges_first() {
    let letters = |ab: f32, bc: f32| {
        spm(&[("\u{2581}", -9.0), ("a", -9.0), ("b", -9.0), ("c", -9.0), ("ab", ab), ("bc", bc), ("\u{2581}a", -3.0)])
    };
    // _abc: ab merges; _ab and abc are no tokens
    assert_eq!(ids(&letters(-1.0, -2.0), "abc"), [3, 7, 6]);
    // bc merges, then _a
    assert_eq!(ids(&letters(-2.0, -1.0), "abc"), [9, 8]);
    // of equal ones the first; 0 and -0 are equal
    assert_eq!(ids(&letters(-1.0, -1.0), "abc"), [3, 7, 6]);
    assert_eq!(ids(&letters(-0.0, 0.0), "abc"), [3, 7, 6]);
    // aab: the second a takes the b, the first is merged with the space
    assert_eq!(ids(&letters(-1.0, -2.0), "aab"), [9, 7]);
}

#[test]
fn merges_reach_across_spaces_where_a_token_does() {
    let tokens =
        [("\u{2581}", -9.0), ("a", -9.0), ("b", -9.0), ("b\u{2581}", -0.2), ("b\u{2581}a", -0.1), ("\u{2581}a", -3.0)];
    // _b_a: b_ is better than _a, then b_a
    assert_eq!(ids(&spm(&tokens), "b a"), [3, 7]);
    // a_a: no token has a before a space
    assert_eq!(ids(&spm(&tokens), "a a"), [8, 8]);
    assert_eq!(ids(&spm(&tokens[..3]), "b a  "), [3, 5, 3, 4, 3, 3]);
}

#[test]
fn bytes_stand_for_what_is_no_token() {
    let metadata = spm(&[("\u{2581}", -1.0), ("<0xC3>", 0.0), ("<0xA9>", 0.0), ("\n", -1.0)]);
    assert_eq!(ids(&metadata, "\u{e9}"), [3, 4, 5]);
    // a byte without a token: the unknown token, or nothing where there is none
    assert_eq!(ids(&metadata, "x\n"), [3, 0, 6]);
    let encoder = encoder(&metadata);
    assert_eq!((encoder.piece(4), encoder.piece(3), encoder.piece(0)), (vec![0xC3], b" ".to_vec(), b"<unk>".to_vec()));
    assert_eq!((encoder.piece(7), encoder.len()), (vec![], 7));
}

#[test]
fn special_tokens_and_the_space_before_text() {
    let metadata = spm(&[("\u{2581}", -9.0), ("a", -9.0), ("\u{2581}a", -1.0), ("<", -9.0), ("s", -9.0), (">", -9.0)]);
    let e = encoder(&metadata);
    assert_eq!(e.encode("a<s>a", false, true), [5, 1, 5]);
    assert_eq!(e.encode("a<s>a", false, false), [5, 6, 7, 8, 4]);
    assert_eq!(e.encode("a", true, false), [1, 5]);
    assert_eq!((e.encode("", true, true), e.encode("", false, true)), (vec![1], vec![]));
    assert_eq!((e.add_bos(), e.bos(), e.add_eos(), e.eos()), (true, Some(1), false, Some(2)));
    let plain = encoder(&with(metadata.clone(), "add_space_prefix", Value::Bool(false)));
    assert_eq!(plain.encode("a<s>a a", false, true), [4, 1, 4, 5]);
    let both = encoder(&with(metadata, "add_eos_token", Value::Bool(true)));
    assert_eq!(both.encode("a", true, true), [1, 5, 2]);
    assert_eq!(both.encode("a", false, true), [5]);
}

#[test]
fn the_lowest_rank_merges_first() {
    let tokens = ["a", "b", "c", "ab", "bc", "abc", "\u{120}", "\u{120}a"];
    assert_eq!(ids(&bpe("gpt-2", &tokens, &["a b", "b c", "ab c"]), "abc"), [5]);
    assert_eq!(ids(&bpe("gpt-2", &tokens, &["b c", "a b", "ab c"]), "abc"), [0, 4]);
    // of equal ones the first in the word; of a merge that is listed twice the first rank counts
    assert_eq!(ids(&bpe("gpt-2", &["a", "aa"], &["a a"]), "aaaaa"), [1, 1, 0]);
    assert_eq!(ids(&bpe("gpt-2", &tokens, &["a b", "b c", "a b"]), "abc"), [3, 2]);
    // words do not merge
    assert_eq!(ids(&bpe("gpt-2", &tokens, &["\u{120} a", "a \u{120}", "c \u{120}"]), "ca a"), [2, 0, 7]);
    // a merge that gives no token falls back to the letters; a byte that is no token is left out
    assert_eq!(ids(&bpe("gpt-2", &tokens[..3], &["a b", "ab c"]), "abc"), [0, 1, 2]);
    assert_eq!(ids(&bpe("gpt-2", &tokens, &[]), "a\n\u{e9}b"), [0, 1]);
}

#[test]
fn some_take_a_whole_word_that_is_a_token() {
    let tokens = ["a", "b", "c", "ab", "cab", "\u{120}", "\u{120}cab"];
    assert_eq!(ids(&bpe("llama-bpe", &tokens, &["a b"]), "cab cab acab"), [4, 6, 5, 0, 2, 3]);
    assert_eq!(ids(&bpe("qwen2", &tokens, &["a b"]), "cab"), [2, 3]);
}

#[test]
fn byte_pairs_over_characters() {
    let tokens = ["<bos>", "a", "\u{2581}", "\u{2581}a", "\n", "\n\n", "<0xC3>", "<0xA9>", "\u{e4}"];
    let metadata = with(bpe("gemma4", &tokens, &["\u{2581} a"]), "bos_token_id", Value::U32(0));
    // spaces are visible, a run of line feeds is one token, characters without one are bytes
    assert_eq!(ids(&metadata, "a a\n\na\u{e9}\u{e4}"), [1, 3, 5, 1, 6, 7, 8]);
    let e = encoder(&metadata);
    assert_eq!((e.add_bos(), e.encode("a", true, false), e.piece(3)), (true, vec![0, 1], b" a".to_vec()));
    // every word begins with a space
    assert_eq!(ids(&bpe("mmbert", &tokens, &["\u{2581} a"]), "a a\n\na"), [3, 3, 5, 3]);
}

#[test]
fn settings_come_from_the_name() {
    let tokens: Vec<String> = ('a'..='z').map(String::from).collect();
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let read = |pre: &str| {
        let mut metadata = bpe(pre, &tokens, &[]);
        metadata.retain(|(key, _)| key != "tokenizer.ggml.add_bos_token");
        TextEncoder::from_metadata(&metadata).map(|e| (e.add_bos(), e.bos(), e.eos()))
    };
    assert_eq!(read("gpt-2"), Ok((false, Some(11), Some(11))));
    assert_eq!(read("llama-bpe"), Ok((true, Some(11), Some(11))));
    assert_eq!(read("glm4"), Ok((false, None, Some(11))));
    assert_eq!(read(""), Ok((false, Some(11), Some(11))));
    // fewer than twelve tokens: no default
    let few = with(bpe("llama-bpe", &tokens[..4], &[]), "add_bos_token", Value::Bool(true));
    let refused = TextEncoder::from_metadata(&few).unwrap_err();
    assert_eq!(refused, EncodeError::NoToken { name: "bos" });
    assert!(refused.to_string().contains("tokenizer.ggml.bos_token_id"), "{refused}");
}

#[test]
fn the_longest_special_token_first() {
    let tokens = ["a", "<x>", "<x><x>", "x><", "b"];
    let metadata = types(bpe("gpt-2", &tokens, &[]), &[NORMAL, CONTROL, CONTROL, CONTROL, NORMAL]);
    let e = encoder(&metadata);
    // at 1: <x><x>, not the token that begins with it, nor the one that begins within it
    assert_eq!(e.encode("a<x><x>b<x>", false, true), [0, 2, 4, 1]);
    assert_eq!(e.encode("<x><x><x>", false, true), [2, 1]);
    assert_eq!(e.encode("ax><b", false, true), [0, 3, 4]);
    assert_eq!(e.encode("a<x>b", false, false), [0, 4]);
}

#[test]
fn which_tokens_are_special() {
    let tokens = ["a", "<|im_end|>", "<mine>", "<|start|>", "<free>", "<|fim_prefix|>"];
    let kinds = [NORMAL, NORMAL, USER, CONTROL, UNUSED, NORMAL];
    let e = encoder(&types(bpe("gpt-2", &tokens, &[]), &kinds));
    // a normal token that looks like an end is a control token, user-defined ones are always seen, gpt-oss's too
    assert_eq!(e.encode("a<|im_end|><mine><|start|><|fim_prefix|>", false, true), [0, 1, 2, 3, 5]);
    assert_eq!(e.encode("a<|im_end|><mine><|start|><|fim_prefix|>", false, false), [0, 2, 3]);
    // an unused one is no token of a text, and is shown as nothing
    assert_eq!((e.encode("<free>", false, true), e.piece(4)), (vec![0; 0], vec![]));
    // a file that names its infill token has no other
    let named = with(types(bpe("gpt-2", &tokens, &[]), &kinds), "fim_pre_token_id", Value::U32(0));
    assert_eq!(encoder(&named).encode("<|fim_prefix|>", false, true), [0; 0]);
    // o200k_harmony: <|end|> does not end
    let harmony = ["<|return|>", "<|call|>", "<|end|>"];
    let e = encoder(&types(bpe("gpt-2", &harmony, &[]), &[CONTROL; 3]));
    assert_eq!(e.encode("<|end|><|call|>", false, false), [2]);
    let e = encoder(&types(bpe("gpt-2", &harmony[1..], &[]), &[CONTROL; 2]));
    assert_eq!(e.encode("<|end|><|call|>", false, false), [0; 0]);
}

#[test]
fn white_space_beside_special_tokens() {
    let metadata = spm(&[("\u{2581}", -9.0), ("a", -9.0), ("<mask>", 0.0), ("\n", -9.0)]);
    let metadata = types(metadata, &[UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL, CONTROL, NORMAL]);
    let metadata = with(metadata, "add_space_prefix", Value::Bool(false));
    let text = "a \n<mask> \n a </s>";
    assert_eq!(ids(&metadata, text), [4, 3, 6, 5, 3, 6, 3, 4, 3, 2]);
    let mut phi = metadata.clone();
    value::set(&mut phi, "general.name", "My Phi-3 Mini".into());
    assert_eq!(ids(&phi, text), [4, 3, 6, 5, 4, 3, 2]);
    assert_eq!(ids(&phi, "<s> a"), [1, 3, 4]);
    let mask = with(metadata, "pre", "jina-v2-de".into());
    assert_eq!(ids(&mask, text), [4, 5, 3, 6, 3, 4, 3, 2]);
}

#[test]
fn odd_files() {
    let good = bpe("gpt-2", &["a", "b"], &[]);
    // an empty text gets a name, a text ends at its first zero byte
    let tokens = Value::Array(Array::Str(vec![b"".to_vec(), b"a\0b".to_vec()]));
    let e = encoder(&with(good.clone(), "tokens", tokens));
    assert_eq!((e.encode("a", false, false), e.piece(0)), (vec![1], b"[EMPTY_0]".to_vec()));
    let refused = |metadata: &Metadata| TextEncoder::from_metadata(metadata).unwrap_err().to_string();
    let nan = with(spm(&[("a", f32::NAN)]), "add_bos_token", Value::Bool(false));
    assert!(refused(&nan).contains("token 3 (\"a\") has a score that is not a number"), "{}", refused(&nan));
    let byte = types(good.clone(), &[NORMAL, BYTE]);
    assert!(refused(&byte).contains("`<0x00>` to `<0xFF>`"), "{}", refused(&byte));
    let broken = with(good.clone(), "tokens", Value::Array(Array::Str(vec![vec![0xFF], b"b".to_vec()])));
    assert_eq!(ids(&broken, "b"), [1]);
    assert!(refused(&types(broken, &[CONTROL, NORMAL])).contains("not UTF-8"));
    let scores = with(good.clone(), "scores", Value::Array(Array::F32(vec![])));
    assert!(refused(&scores).contains("`tokenizer.ggml.scores` has 0 elements for 2 tokens"), "{}", refused(&scores));
    let mut without = with(good, "pre", "kimi-k2".into());
    without.retain(|(key, _)| key != "tokenizer.ggml.merges");
    assert_eq!(ids(&without, "ab"), [0, 1]);
}
