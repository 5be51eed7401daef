//! `tokenizer.ggml.pre`: which splitting of text into words llama.cpp must do before it merges.
//!
//! Found by the structure of tokenizer.json ([`structure`]), refined or contradicted by the hash of the reference
//! ([`hashes`]: a check text is encoded, and the sha256 of the ids as Python prints them is looked up), overridden by `--pre`.

pub mod hashes;
pub mod names;
pub mod structure;

use std::path::Path;

use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

use self::structure::Structure;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::nearest::nearest;

/// A name and where it comes from.
#[derive(Debug, PartialEq)]
pub struct Chosen {
    pub name: String,
    pub reason: String,
    pub warning: Option<String>,
}

/// The sha256 that the reference computes: of `[1, 2, 3]` for the ids of the check text, special tokens included.
pub fn hash(tokenizer: &Tokenizer) -> Result<String, String> {
    let encoding = tokenizer.encode(hashes::CHECK_TEXT, true).map_err(|e| e.to_string())?;
    let ids: Vec<String> = encoding.get_ids().iter().map(u32::to_string).collect();
    let digest = Sha256::digest(format!("[{}]", ids.join(", ")));
    Ok(digest.iter().map(|b| format!("{b:02x}")).collect())
}

/// Chooses the name for the tokenizer of `file`. `class`: `architectures[0]`.
pub fn choose(
    file: &Path,
    structure: &Structure,
    hash: Option<&str>,
    class: &str,
    wanted: Option<&str>,
) -> Result<Chosen, CheckpointError> {
    if let Some(name) = wanted {
        if !names::NAMES.contains(&name) {
            let near = nearest(name, names::NAMES.iter().copied()).unwrap_or_default();
            return Err(CheckpointError::file(
                file,
                format!("--pre {name}: llama.cpp knows no such pre-tokenizer; nearest: {near}"),
            ));
        }
        return Ok(Chosen { name: name.into(), reason: "--pre".into(), warning: None });
    }
    let known = hash.and_then(hashes::find);
    let named = structure.names(class);
    let chosen = |name: &str, reason: String, warning: Option<String>| {
        Ok(Chosen { name: name.into(), reason, warning: warning.map(|w| format!("{}: {w}", file.display())) })
    };
    match (known, named) {
        (Some((name, model)), Some(names)) if names.contains(&name) => {
            chosen(name, format!("pre-tokenizer steps and hash of {model}"), None)
        }
        (Some((name, model)), Some(names)) => chosen(
            name,
            format!("hash of {model}"),
            Some(format!(
                "the ids of the check text say pre-tokenizer `{name}` (as {model}), its steps say `{}`; `{name}` is taken. --pre overrides it",
                names[0]
            )),
        ),
        (Some((name, model)), None) => chosen(name, format!("hash of {model}"), None),
        (None, Some(names)) => chosen(
            names[0],
            "pre-tokenizer steps".into(),
            hash.map(|h| {
                format!("pre-tokenizer `{}` by its steps; the vocabulary is none that llama.cpp lists (hash {h}). --pre overrides it", names[0])
            }),
        ),
        (None, None) => Err(CheckpointError::file(
            file,
            format!(
                "unknown pre-tokenizer (hash {}; steps: {}); nearest known: `{}`. If its splitting of text into words is that of a \
                 known model, name it with --pre",
                hash.unwrap_or("not computed"),
                structure.describe(),
                structure.nearest()
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;

    fn by(structure: &Structure, hash: Option<&str>, wanted: Option<&str>) -> Result<Chosen, String> {
        choose(Path::new("tokenizer.json"), structure, hash, "LlamaForCausalLM", wanted).map_err(|e| e.to_string())
    }

    #[test]
    fn structure_hash_and_override() {
        let steps = json!({"pre_tokenizer": {"type": "ByteLevel"}});
        let gpt2 = Structure::read(steps.as_object().unwrap());
        let phi = "fcace8b9cac38ce847670c970cd5892031a753a1ef381abd1d9af00f713da085";
        let qwen = "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea";
        assert_eq!(by(&gpt2, Some(phi), None).unwrap().name, "phi-2");
        let odd = by(&gpt2, Some(qwen), None).unwrap();
        assert!(odd.name == "qwen2" && odd.warning.is_some());
        let new = by(&gpt2, Some("00"), None).unwrap();
        assert!(new.name == "gpt-2" && new.warning.unwrap().contains("hash 00"));
        assert_eq!(by(&gpt2, Some(phi), Some("llama-bpe")).unwrap().name, "llama-bpe");
        assert!(by(&gpt2, None, Some("lama-bpe")).unwrap_err().contains("nearest: llama-bpe"));
        let unknown = Structure::read(&Map::new());
        let message = by(&unknown, Some("00"), None).unwrap_err();
        assert!(message.contains("hash 00") && message.contains("--pre"), "{message}");
        assert_eq!(by(&unknown, Some(qwen), None).unwrap().name, "qwen2");
    }

    #[test]
    fn the_table_of_hashes_is_well_formed() {
        for (i, (hash, name, _)) in hashes::HASHES.iter().enumerate() {
            assert!(hash.len() == 64 && hashes::HASHES[..i].iter().all(|(h, ..)| h != hash), "{hash}");
            // Names that only other vocabulary types of llama.cpp use (BERT's WordPiece).
            assert!(names::NAMES.contains(name) || name.starts_with("bert-") || name.ends_with("-en"), "{name}");
        }
    }
}
