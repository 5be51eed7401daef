//! Text to token ids: equal to llama.cpp's.
//!
//! Always: `fixtures/token-ids.txt`, which holds what real llama.cpp gave for every pre-tokenizer and for the fixtures'
//! vocabularies. With the test bed (`OSTQ_SHARED`) and llama.cpp (`OSTQ_PEERS`): its own vocabularies and their goldens, the test
//! models, whole files of text and random text through real `llama-tokenize`. What is missing is skipped with a line on standard error
//! (a failure if `OSTQ_REQUIRE_PEERS=1`).

#[path = "../common/mod.rs"]
mod common;
mod llama_tokenize;
mod texts;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::program::fixture;
use common::{converter, digest, peer, shared, write_vocab};
use llama_tokenize::{LlamaTokenize, assert_same};
use ostq_convert::gguf::{self, Array, Metadata, Value, value};
use ostq_convert::plan::{Input, Options, Recipe};
use ostq_convert::tokenizer::encode::split::unicode::Class;
use ostq_convert::tokenizer::encode::{EncodeError, TextEncoder};
use ostq_convert::tokenizer::pre::names::NAMES;
use serde_json::Value as Json;
use texts::{Random, folder_metadata, nasty, pairs_vocab, random_unicode, set, tiny_metadata};

fn hash(ids: &[u32]) -> String {
    digest(&ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>())
}

/// `whitespace` by itself is no pre-tokenizer of `gpt2`: llama.cpp aborts at two spaces.
fn text_for(pre: &str) -> String {
    let text = nasty(1, 6000);
    if pre == "whitespace" { text.replace(' ', "\t") } else { text }
}

const TINY: &[&str] = &["tiny", "tiny-llama2", "tiny-llama3", "tiny-qwen3"];

/// Name, number of ids, digest: of every pre-tokenizer on [`pairs_vocab`], of the fixtures' vocabularies on other text.
fn fixture_lines(mut ids: impl FnMut(&str, &Metadata, &str) -> Vec<u32>) -> String {
    let mut lines = String::from(
        "# Made with llama-tokenize of llama.cpp b11434 by tests/token_ids (OSTQ_WRITE_TOKEN_IDS=1): vocabulary, number of ids, digest.\n",
    );
    let mut line = |name: &str, ids: Vec<u32>| lines += &format!("{name} {} {}\n", ids.len(), hash(&ids));
    for pre in NAMES {
        line(pre, ids(pre, &pairs_vocab(pre), &text_for(pre)));
    }
    for name in TINY {
        line(name, ids(name, &tiny_metadata(name), &nasty(2, 3000)));
    }
    lines
}

#[test]
fn every_pre_tokenizer_gives_the_ids_of_llama_cpp() {
    let file = fixture("token-ids.txt");
    if std::env::var_os("OSTQ_WRITE_TOKEN_IDS").is_some() {
        let theirs = fixture_lines(|_, metadata, text| {
            LlamaTokenize::new(metadata).expect("llama-tokenize is needed to write the fixture").ids(text, true, true)
        });
        std::fs::write(&file, theirs).unwrap();
    }
    let wanted = std::fs::read_to_string(&file).unwrap();
    let ours = fixture_lines(|_, metadata, text| {
        let encoder = TextEncoder::from_metadata(metadata).unwrap();
        encoder.encode(text, encoder.add_bos(), true)
    });
    let differ: Vec<_> = wanted.lines().zip(ours.lines()).filter(|(a, b)| a != b).collect();
    assert!(differ.is_empty() && wanted.lines().count() == ours.lines().count(), "{differ:#?}");
}

#[test]
fn every_pre_tokenizer_agrees_with_real_llama_cpp() {
    if peer("llama-tokenize").is_none() {
        return;
    }
    for (i, pre) in NAMES.iter().enumerate() {
        let metadata = pairs_vocab(pre);
        let encoder = TextEncoder::from_metadata(&metadata).unwrap();
        let Some(real) = LlamaTokenize::new(&metadata) else { return };
        let text = nasty(100 + i as u64, 1500);
        let text = if *pre == "whitespace" { text.replace(' ', "\t") } else { text };
        // one of the four ways each: all of them are in the other tests
        let (add_special, parse_special) = (i % 2 == 0, i % 4 < 2);
        let ours = encoder.encode(&text, add_special && encoder.add_bos(), parse_special);
        assert_same(pre, &encoder, &text, &ours, &real.ids(&text, add_special, parse_special));
    }
}

#[test]
fn the_vocabularies_of_llama_cpp_and_their_goldens() {
    let Some(shared) = shared() else { return };
    let Some(tool) = peer("llama-tokenize") else { return };
    let models = tool.parent().unwrap().parent().unwrap().join("llama.cpp/models");
    let (mut vocabularies, mut cases) = (0, 0);
    for entry in std::fs::read_dir(shared.join("goldens/vocab")).unwrap().flatten() {
        let golden: Json = serde_json::from_slice(&std::fs::read(entry.path()).unwrap()).unwrap();
        let name = entry.path().file_stem().unwrap().to_string_lossy().into_owned();
        let file = models.join(format!("ggml-vocab-{name}.gguf"));
        let header = gguf::read(&std::fs::read(&file).unwrap()).unwrap();
        let encoder = TextEncoder::from_metadata(&header.metadata).unwrap_or_else(|e| panic!("{name}: {e}"));
        for case in golden["cases"].as_array().unwrap() {
            let text = case[0].as_str().unwrap();
            let theirs: Vec<u32> = case[1].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u32).collect();
            assert_same(&name, &encoder, text, &encoder.encode(text, false, false), &theirs);
            cases += 1;
        }
        let real = LlamaTokenize::of(&file).unwrap();
        let text = nasty(3, 2000);
        real.agrees(&name, &encoder, &text);
        let mut pieces = Vec::new();
        for id in encoder.encode(&text, false, true) {
            pieces.extend(format!("{id:6} -> '").as_bytes());
            // printf ends at a zero byte
            pieces.extend(encoder.piece(id).split(|&b| b == 0).next().unwrap());
            pieces.extend(b"'\n");
        }
        assert!(real.shown(&text).ends_with(&pieces), "{name}: pieces");
        vocabularies += 1;
    }
    eprintln!("{vocabularies} vocabularies, {cases} cases");
    assert!(vocabularies >= 13 && cases > 500, "{vocabularies} vocabularies, {cases} cases");
}

/// Metadata of a checkpoint: ours, or where the architecture has no table yet, that of the reference.
fn metadata_of(folder: &Path) -> Option<Metadata> {
    if let Ok(metadata) = folder_metadata(folder) {
        return Some(metadata);
    }
    let converter = converter()?;
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("vocab.gguf");
    let run = Command::new(converter).arg(folder).args(["--vocab-only", "--outfile"]).arg(&out).output().unwrap();
    assert!(run.status.success(), "{}: {}", folder.display(), String::from_utf8_lossy(&run.stderr));
    Some(gguf::read(&std::fs::read(out).unwrap()).unwrap().metadata)
}

#[test]
fn the_texts_of_the_test_bed() {
    let Some(shared) = shared() else { return };
    let goldens: Json = serde_json::from_slice(&std::fs::read(shared.join("goldens/tokens.json")).unwrap()).unwrap();
    let texts: Vec<&str> = goldens["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    let larger = std::env::var_os("OSTQ_MODELS").map(PathBuf::from).unwrap_or_default();
    let mut models = 0;
    for (model, golden) in goldens["models"].as_object().unwrap() {
        let folder = if model.starts_with("random-") { shared.join("models") } else { larger.clone() }.join(model);
        if !folder.join("config.json").is_file() {
            eprintln!("SKIPPED: no {model} (set OSTQ_MODELS)");
            continue;
        }
        let Some(mut metadata) = metadata_of(&folder) else {
            eprintln!("SKIPPED: {model}: no table for its architecture, and no converter of llama.cpp");
            continue;
        };
        if model == "random-llama-f16" {
            // the reference's scores, with which the goldens were made
            let scores = value::get(&metadata, "tokenizer.ggml.scores").unwrap().clone();
            let Value::Array(scores) = scores else { panic!("scores") };
            set(&mut metadata, "scores", Value::Array(Array::F32(vec![-1000.0; scores.len()])));
        }
        let encoder = TextEncoder::from_metadata(&metadata).unwrap_or_else(|e| panic!("{model}: {e}"));
        let same = golden["same_as"].as_str().map(|other| &goldens["models"][other]);
        let ids = same.unwrap_or(golden)["ids"].as_array().unwrap();
        assert_eq!(ids.len(), texts.len());
        for (text, ids) in texts.iter().zip(ids) {
            let theirs: Vec<u32> = ids.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u32).collect();
            // goldens were made with llama-tokenize, which parses special tokens
            assert_same(model, &encoder, text, &encoder.encode(text, false, true), &theirs);
        }
        models += 1;
    }
    eprintln!("{models} models, {} texts", texts.len());
    assert!(models >= 9, "{models}");
}

/// Scores from merges: where the reference's are useless, the ids are those of tokenizer.json.
#[test]
fn scores_from_merges_give_the_ids_of_tokenizer_json() {
    let Some(shared) = shared() else { return };
    let goldens: Json = serde_json::from_slice(&std::fs::read(shared.join("goldens/tokens.json")).unwrap()).unwrap();
    let folder = shared.join("models/random-llama-f16");
    let encoder = TextEncoder::from_metadata(&folder_metadata(&folder).unwrap()).unwrap();
    let own = tokenizers::Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
    for text in goldens["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()) {
        let theirs = own.encode(text, false).unwrap().get_ids().to_vec();
        assert_same("random-llama-f16", &encoder, text, &encoder.encode(text, false, true), &theirs);
    }
}

#[test]
fn whole_files_and_random_text() {
    let Some(shared) = shared() else { return };
    if peer("llama-tokenize").is_none() {
        return;
    }
    let larger = std::env::var_os("OSTQ_MODELS").map(PathBuf::from).unwrap_or_default();
    let mut folders = vec![shared.join("models/tiny-llama"), larger.join("smollm2-135m")];
    folders.extend(["random-llama2", "random-llama3", "random-qwen2"].iter().map(|m| shared.join("models").join(m)));
    for folder in folders {
        if !folder.join("config.json").is_file() {
            eprintln!("SKIPPED: no {} (set OSTQ_MODELS)", folder.display());
            continue;
        }
        let metadata = Input::open(&folder, &Options::resolve(Recipe::default()).unwrap()).unwrap().metadata;
        let encoder = TextEncoder::from_metadata(&metadata).unwrap();
        let Some(real) = LlamaTokenize::new(&metadata) else { return };
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        for file in ["calibration.txt", "evaluation.txt"] {
            let text = std::fs::read_to_string(shared.join("text").join(file)).unwrap();
            let theirs = real.ids(&text, true, true);
            assert_same(&name, &encoder, &text, &encoder.encode(&text, encoder.add_bos(), true), &theirs);
        }
        real.agrees(&name, &encoder, &nasty(10, 12_000));
        real.agrees(&name, &encoder, &random_unicode(20, 20_000));
        let runs = [" ", "\n", "a", "\u{4e2d}", "0", "\u{1f600}", "<s>"].map(|c| c.repeat(3000));
        real.agrees(&name, &encoder, &runs.concat());
    }
}

#[test]
fn categories_are_those_of_the_source() {
    let Some(tool) = peer("llama-tokenize") else { return };
    let file = tool.parent().unwrap().parent().unwrap().join("llama.cpp/src/unicode-data.cpp");
    let source = std::fs::read_to_string(file).unwrap();
    let table = |name: &str| source.split(name).nth(1).unwrap().split("};").next().unwrap();
    let number = |hex: &str| u32::from_str_radix(hex.trim().trim_start_matches("0x"), 16).unwrap();
    let ranges: Vec<(u32, u32)> = table("unicode_ranges_flags =")
        .lines()
        .filter_map(|l| l.strip_prefix('{')?.split_once('}')?.0.split_once(','))
        .map(|(start, flags)| (number(start), number(flags)))
        .collect();
    let white: BTreeSet<u32> =
        table("unicode_set_whitespace =").lines().filter_map(|l| l.strip_suffix(',').map(number)).collect();
    assert!(ranges.len() > 2000 && white.len() > 20);
    let category = |flags: u32| match flags {
        1 => Class::UNDEFINED,
        2 => Class::NUMBER,
        4 => Class::LETTER,
        8 => Class::SEPARATOR,
        0x10 => Class::MARK,
        0x20 => Class::PUNCTUATION,
        0x40 => Class::SYMBOL,
        0x80 => Class::CONTROL,
        _ => panic!("{flags:#x}"),
    };
    for pair in ranges.windows(2) {
        for c in (pair[0].0..pair[1].0).filter_map(char::from_u32) {
            let class = Class::of(c);
            assert_eq!(class.category(), category(pair[0].1), "{c:?}");
            assert_eq!(class.whitespace(), white.contains(&(c as u32)), "{c:?}");
        }
    }
}

#[test]
fn hostile_text_takes_time_in_proportion() {
    let start = std::time::Instant::now();
    for name in TINY {
        let encoder = TextEncoder::from_metadata(&tiny_metadata(name)).unwrap();
        for c in ["a", " ", "\n", "<", "1", "\u{4e2d}", "</s>", "<|", "'"] {
            let text = c.repeat((1 << 20) / c.len());
            let pieces: usize = encoder.encode(&text, false, true).iter().map(|&id| encoder.piece(id).len()).sum();
            assert!(pieces >= text.len(), "{name}, {c:?}: {pieces} bytes");
        }
    }
    assert!(start.elapsed().as_secs() < 120, "{:?}", start.elapsed());
}

#[test]
fn pieces_are_the_text() {
    for name in TINY {
        let encoder = TextEncoder::from_metadata(&tiny_metadata(name)).unwrap();
        let text = nasty(5, 500).replace("<unk>", "");
        let ids = encoder.encode(&text, false, true);
        let pieces: Vec<u8> = ids.iter().flat_map(|&id| encoder.piece(id)).collect();
        let pieces = String::from_utf8(pieces).unwrap();
        // SentencePiece sets a space before text, and behind special tokens
        let plain = |t: &str| t.replace([' ', '\u{2581}'], "");
        assert_eq!(plain(&pieces), plain(&text), "{name}");
    }
}

#[test]
fn vocabularies_that_cannot_be_used_are_refused_by_name() {
    let good = tiny_metadata("tiny");
    let refusal = |change: &dyn Fn(&mut Metadata)| {
        let mut metadata = good.clone();
        change(&mut metadata);
        TextEncoder::from_metadata(&metadata).expect_err("it is refused")
    };
    let without = |key: &'static str| refusal(&move |m| m.retain(|(k, _)| k != key));
    for key in ["tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"] {
        assert_eq!(without(key), EncodeError::Missing { key });
    }
    for (model, kind) in
        [("bert", "WordPiece"), ("t5", "Unigram"), ("rwkv", "RWKV"), ("plamo2", "PLaMo"), ("x", "not known")]
    {
        let message = refusal(&|m| set(m, "model", model.into())).to_string();
        assert!(message.contains(&format!("`{model}`")) && message.contains(kind), "{message}");
    }
    let message = refusal(&|m| set(m, "pre", "lama-bpe".into())).to_string();
    assert!(message.contains("`lama-bpe`") && message.contains("`llama-bpe`"), "{message}");
    let message = refusal(&|m| set(m, "bos_token_id", Value::U32(1 << 30))).to_string();
    assert!(message.contains("bos_token_id") && message.contains("1073741824"), "{message}");
    let message = refusal(&|m| set(m, "bos_token_id", Value::I32(1))).to_string();
    assert!(message.contains("of type i32, expected u32"), "{message}");
    let message = refusal(&|m| set(m, "token_type", Value::Array(Array::I32(vec![1; 3])))).to_string();
    assert!(message.contains("3 elements"), "{message}");
    let message = refusal(&|m| set(m, "tokens", Value::strs(["a", "b", "a"]))).to_string();
    assert!(message.contains("tokens 0 and 2"), "{message}");
    let message = refusal(&|m| set(m, "tokens", Value::strs::<&str>([]))).to_string();
    assert!(message.contains("0 elements"), "{message}");
    let message = refusal(&|m| set(m, "merges", "a b".into())).to_string();
    assert!(message.contains("of type string, expected array of string"), "{message}");
}

/// Bytes of a file changed at random: refused, or usable, never a panic.
#[test]
fn damaged_vocabularies_are_refused_or_work() {
    let mut random = Random(9);
    let text = nasty(8, 40);
    let (mut refused, mut usable) = (0, 0);
    for name in ["tiny-llama2", "tiny-llama3"] {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vocab.gguf");
        write_vocab(&file, &tiny_metadata(name));
        let good = std::fs::read(file).unwrap();
        for _ in 0..1500 {
            let mut bytes = good.clone();
            for _ in 0..1 + random.below(6) {
                let at = random.below(bytes.len());
                bytes[at] = random.next() as u8;
            }
            let Ok(header) = gguf::read(&bytes) else { continue };
            match TextEncoder::from_metadata(&header.metadata) {
                Ok(encoder) => {
                    usable += 1;
                    let ids = encoder.encode(&text, true, true);
                    assert!(ids.iter().all(|&id| (id as usize) < encoder.len()));
                }
                Err(error) => {
                    refused += 1;
                    assert!(!error.to_string().is_empty());
                }
            }
        }
    }
    assert!(refused > 20 && usable > 400, "{refused} refused, {usable} usable");
}

#[test]
fn a_fingerprint_tells_vocabularies_apart() {
    let of = |metadata: &Metadata| TextEncoder::from_metadata(metadata).unwrap().fingerprint();
    let [a, b] = ["tiny-llama2", "tiny-llama3"].map(tiny_metadata);
    assert_eq!(of(&a).len(), 64);
    assert_eq!(of(&a), of(&a.clone()));
    assert_ne!(of(&a), of(&b));
    let mut other = b.clone();
    set(&mut other, "pre", "qwen2".into());
    assert_ne!(of(&b), of(&other));
    let mut other = b.clone();
    set(&mut other, "eos_token_id", Value::U32(3));
    assert_eq!(of(&b), of(&other));
    let mut other = b.clone();
    let Some(Value::Array(Array::Str(mut merges))) = value::get(&b, "tokenizer.ggml.merges").cloned() else { panic!() };
    merges.swap(0, 1);
    set(&mut other, "merges", Value::Array(Array::Str(merges)));
    assert_ne!(of(&b), of(&other));
}

#[test]
fn an_encoder_goes_from_thread_to_thread() {
    fn both<T: Send + Sync>(_: &T) {}
    let encoder = TextEncoder::from_metadata(&tiny_metadata("tiny")).unwrap();
    both(&encoder);
    let text = nasty(6, 300);
    let alone = encoder.encode(&text, true, true);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| encoder.encode(&text, true, true))).collect();
        threads.into_iter().for_each(|t| assert_eq!(t.join().unwrap(), alone));
    });
}
