//! Real `llama-tokenize`, and how its ids are compared with ours.

use std::path::{Path, PathBuf};
use std::process::Command;

use ostq_convert::gguf::Metadata;
use ostq_convert::tokenizer::encode::TextEncoder;

use crate::common::{peer, write_vocab};

/// Real `llama-tokenize` and a vocabulary.
pub struct LlamaTokenize {
    tool: PathBuf,
    dir: tempfile::TempDir,
    vocab: PathBuf,
}

impl LlamaTokenize {
    pub fn new(metadata: &Metadata) -> Option<LlamaTokenize> {
        let dir = tempfile::tempdir().unwrap();
        let vocab = dir.path().join("vocab.gguf");
        write_vocab(&vocab, metadata);
        Some(LlamaTokenize { tool: peer("llama-tokenize")?, dir, vocab })
    }

    pub fn of(vocab: &Path) -> Option<LlamaTokenize> {
        Some(LlamaTokenize { tool: peer("llama-tokenize")?, dir: tempfile::tempdir().unwrap(), vocab: vocab.into() })
    }

    pub fn ids(&self, text: &str, add_special: bool, parse_special: bool) -> Vec<u32> {
        let file = self.dir.path().join("text");
        std::fs::write(&file, text).unwrap();
        let mut run = Command::new(&self.tool);
        run.arg("-m").arg(&self.vocab).arg("-f").arg(&file).args(["--ids", "--no-escape"]);
        run.args((!add_special).then_some("--no-bos")).args((!parse_special).then_some("--no-parse-special"));
        let output = run.output().unwrap();
        let shown = String::from_utf8_lossy(&output.stdout);
        let line = shown.lines().rev().find(|l| l.starts_with('['));
        let line = line.unwrap_or_else(|| panic!("{shown}{}", String::from_utf8_lossy(&output.stderr)));
        line.trim_matches(['[', ']']).split(", ").filter(|s| !s.is_empty()).map(|s| s.parse().unwrap()).collect()
    }

    /// What `llama-tokenize` prints for its ids: `id -> 'piece'`.
    pub fn shown(&self, text: &str) -> Vec<u8> {
        let file = self.dir.path().join("text");
        std::fs::write(&file, text).unwrap();
        let mut run = Command::new(&self.tool);
        run.arg("-m").arg(&self.vocab).arg("-f").arg(&file).args(["--no-escape", "--no-bos"]);
        run.output().unwrap().stdout
    }

    /// Ours are the same, with special tokens in all four ways.
    pub fn agrees(&self, what: &str, encoder: &TextEncoder, text: &str) {
        for parse_special in [false, true] {
            for add_special in [false, true] {
                let what = format!("{what}, add_special {add_special}, parse_special {parse_special}");
                // llama-tokenize adds special tokens only where bos is one of them
                let ours = encoder.encode(text, add_special && encoder.add_bos(), parse_special);
                assert_same(&what, encoder, text, &ours, &self.ids(text, add_special, parse_special));
            }
        }
    }
}

/// Equal, or the place where they part.
#[track_caller]
pub fn assert_same(what: &str, encoder: &TextEncoder, text: &str, ours: &[u32], theirs: &[u32]) {
    if ours == theirs {
        return;
    }
    let same = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
    let around = |ids: &[u32]| -> Vec<String> {
        let near = ids.iter().skip(same.saturating_sub(4)).take(12);
        near.map(|&id| format!("{id} {:?}", String::from_utf8_lossy(&encoder.piece(id)))).collect()
    };
    let start: String = text.chars().take(60).collect();
    panic!(
        "{what}: {start:?}...: id {same} of {} and {}\n  ours {:?}\ntheirs {:?}",
        ours.len(),
        theirs.len(),
        around(ours),
        around(theirs)
    );
}
