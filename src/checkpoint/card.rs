//! The model card: the YAML front matter of README.md.
//!
//! Source: `Metadata.load_model_card` in `gguf-py/gguf/metadata.py` of llama.cpp b11434. Where the reference stops at a card
//! that is no YAML, the card is left out here with a warning: it is not worth a conversion.

use std::path::Path;

use super::yaml::{self, Yaml};
use super::{CheckpointError, json};

/// The fields of a model card; empty if there is none.
#[derive(Clone, Debug)]
pub struct Card {
    fields: Yaml,
}

impl Card {
    /// A card without fields.
    pub fn empty() -> Card {
        Card { fields: Yaml::Map(Vec::new()) }
    }

    /// Reads README.md of `folder`.
    pub fn load(folder: &Path, warnings: &mut Vec<String>) -> Result<Card, CheckpointError> {
        let file = folder.join("README.md");
        if !json::exists(&file)? {
            return Ok(Card::empty());
        }
        let bytes = json::read_bytes(&file)?;
        let Ok(text) = String::from_utf8(bytes) else {
            warnings.push(format!("{}: not UTF-8; the model card is left out", file.display()));
            return Ok(Card::empty());
        };
        Ok(Card::parse(&text).unwrap_or_else(|reason| {
            warnings.push(format!("{}: the model card is left out: {reason}", file.display()));
            Card::empty()
        }))
    }

    /// The card at the beginning of `text`.
    pub fn parse(text: &str) -> Result<Card, String> {
        let Some(front) = front_matter(text.strip_prefix('\u{feff}').unwrap_or(text)) else { return Ok(Card::empty()) };
        match yaml::parse(&front)? {
            fields @ Yaml::Map(_) => Ok(Card { fields }),
            Yaml::Null => Ok(Card::empty()),
            Yaml::Scalar(_) | Yaml::List(_) => Err("its front matter is not a mapping".into()),
        }
    }

    /// A field; null counts as absent.
    pub(super) fn get(&self, key: &str) -> Option<&Yaml> {
        self.fields.get(key).filter(|v| **v != Yaml::Null)
    }

    /// True if the field is there, be it null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.fields.get(key).is_some()
    }
}

/// The lines between a first line `---` and the next one, tabs as two spaces. `None` without such a first line.
fn front_matter(text: &str) -> Option<String> {
    // Python's `str.splitlines`: `\r\n` is one break, and there are more of them than `\n`.
    let breaks = ['\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}'];
    let text = text.replace("\r\n", "\n");
    let mut lines = text.split(breaks);
    if lines.next() != Some("---") {
        return None;
    }
    let front: Vec<&str> = lines.take_while(|l| *l != "---").collect();
    Some(format!("{}\n", front.join("\n")).replace('\t', "  "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn front_matter_only() {
        let card = Card::parse("---\r\nlicense: mit\r\nlanguage:\r\n- no\r\n---\r\nname: not this\r\n").unwrap();
        assert_eq!(card.get("license"), Some(&Yaml::Scalar("mit".into())));
        assert_eq!(card.get("language"), Some(&Yaml::List(vec![Yaml::Scalar("no".into())])));
        assert_eq!(card.get("name"), None);
        assert!(Card::parse("# A title\n---\nlicense: mit\n---\n").unwrap().get("license").is_none());
        assert!(Card::parse("").unwrap().get("license").is_none());
        assert!(Card::parse("---\ntags:\n\t- a\n---\n").unwrap().get("tags").is_some());
        assert!(Card::parse("---\n- a\n---\n").is_err());
        assert!(Card::parse("---\na: b: c\n---\n").is_err());
        assert!(Card::parse("---\nbase_model: null\n---\n").unwrap().has("base_model"));
    }
}
