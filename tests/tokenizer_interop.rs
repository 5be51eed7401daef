//! The real llama.cpp tokenizes with our vocabularies as the checkpoint's own tokenizer does.
//!
//! Needs `llama-tokenize` in the folder `bin` of `OSTQ_PEERS` (default `~/.cache/ostq-peers`, made by `just peers`) and the
//! shared test models; skipped with a line on stderr where one is missing (a failure if `OSTQ_REQUIRE_PEERS=1`).

mod common;

use std::path::Path;
use std::process::Command;

use common::{peer, shared, write_vocab};
use ostq_convert::arch::metadata::{MetadataOptions, build};
use ostq_convert::checkpoint::Config;
use serde_json::Value as Json;
use tokenizers::Tokenizer;

/// The ids of `text` without special tokens, by llama.cpp.
fn ids(tool: &Path, vocab: &Path, text: &str) -> Vec<u32> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("text");
    std::fs::write(&file, text).unwrap();
    let run =
        Command::new(tool).arg("-m").arg(vocab).arg("-f").arg(&file).args(["--ids", "--no-bos"]).output().unwrap();
    let shown = String::from_utf8_lossy(&run.stdout);
    let line = shown.lines().rev().find(|l| l.starts_with('['));
    let line = line.unwrap_or_else(|| panic!("{shown}{}", String::from_utf8_lossy(&run.stderr)));
    line.trim_matches(['[', ']']).split(", ").filter(|s| !s.is_empty()).map(|s| s.parse().unwrap()).collect()
}

fn vocab_of(folder: &Path, out: &Path) {
    let config = Config::load(folder).unwrap();
    let arch = config.architecture().unwrap();
    let hp = config.hparams(arch).unwrap();
    let built = build(folder, &config, &hp, arch, &MetadataOptions::default()).unwrap();
    write_vocab(out, &built.metadata);
}

#[test]
fn llama_cpp_gives_the_ids_of_the_reference_or_of_tokenizer_json() {
    let Some(shared) = shared() else { return };
    let Some(tool) = peer("llama-tokenize") else { return };
    let goldens: Json =
        serde_json::from_str(&std::fs::read_to_string(shared.join("goldens/tokens.json")).unwrap()).unwrap();
    let texts: Vec<&str> = goldens["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    let dir = tempfile::tempdir().unwrap();
    for model in ["random-llama2", "random-llama3", "random-llama-576", "random-qwen2", "random-llama-f16"] {
        let folder = shared.join("models").join(model);
        let vocab = dir.path().join(format!("{model}.gguf"));
        vocab_of(&folder, &vocab);
        let own = Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
        for (i, text) in texts.iter().enumerate().filter(|(_, t)| !t.is_empty()) {
            // The reference's vocabulary of llama-f16 has useless scores: there tokenizer.json is the judge.
            let wanted: Vec<u32> = match goldens["models"][model].get("ids") {
                Some(ids) if model != "random-llama-f16" => {
                    ids[i].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u32).collect()
                }
                _ => own.encode(*text, false).unwrap().get_ids().to_vec(),
            };
            assert_eq!(ids(&tool, &vocab, text), wanted, "{model}: {text:?}");
        }
    }
}
