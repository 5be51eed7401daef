//! The `tokenizers` library behind a wall: it panics on some files that it loads, and a checkpoint must not be able to.

use std::panic::{AssertUnwindSafe, catch_unwind};

use serde_json::{Map, Value as Json};
use tokenizers::Tokenizer;

use super::pre;

/// A loaded tokenizer.json.
pub struct Library(Tokenizer);

impl Library {
    /// Loads `text`, which was parsed as `parsed`.
    pub fn load(text: &str, parsed: &Map<String, Json>) -> Result<Library, String> {
        check_templates(parsed.get("post_processor"), 0)?;
        guarded(|| {
            let mut tokenizer = Tokenizer::from_bytes(text).map_err(|e| e.to_string())?;
            // `AutoTokenizer.encode` neither truncates nor pads, whatever tokenizer.json says.
            tokenizer.with_truncation(None).map_err(|e| e.to_string())?;
            tokenizer.with_padding(None);
            Ok(Library(tokenizer))
        })
    }

    /// The hash that the reference knows pre-tokenizers by.
    pub fn hash(&self) -> Result<String, String> {
        guarded(|| pre::hash(&self.0))
    }

    /// `text` encoded and decoded again.
    pub fn round_trip(&self, text: &str) -> Result<String, String> {
        guarded(|| {
            let encoding = self.0.encode(text, false).map_err(|e| e.to_string())?;
            self.0.decode(encoding.get_ids(), false).map_err(|e| e.to_string())
        })
    }
}

fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err("the tokenizers library stopped".into()))
}

/// Templates may name only special tokens that they describe: the library takes others and panics when it encodes.
fn check_templates(post_processor: Option<&Json>, depth: usize) -> Result<(), String> {
    let Some(post) = post_processor.filter(|_| depth < 8) else { return Ok(()) };
    for part in post.get("processors").and_then(Json::as_array).into_iter().flatten() {
        check_templates(Some(part), depth + 1)?;
    }
    let items = ["single", "pair"].into_iter().filter_map(|key| post.get(key)?.as_array()).flatten();
    for id in items.filter_map(|item| item.get("SpecialToken")?.get("id")?.as_str()) {
        if post.get("special_tokens").and_then(|s| s.get(id)).is_none() {
            return Err(format!(
                "the post-processor puts `{id}` into texts, but its special_tokens do not describe it"
            ));
        }
    }
    Ok(())
}
