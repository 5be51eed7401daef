//! `ostq.*` keys: which version and recipe made a file, from which bytes. Nothing local, no time.
//!
//! Digests of the input are known only when it has been read; the header is laid out before that, so the keys are
//! planned with placeholders of the same length and filled in at the end.

use std::collections::BTreeSet;

use crate::calibration::imatrix::Imatrix;
use crate::gguf::{self, Array, Metadata, Value};
use crate::plan::{Input, PAIRS_KEY, Plan, Recipe, TRANSFORM_KEY};
use crate::transform::{Pair, Transforms};

const SOURCE_DIGESTS: &str = "ostq.source.sha256_pieces";
/// Length of a sha256 in hex.
const HEX: usize = 64;

/// The keys, with placeholders for the digests of the source files.
pub fn keys(input: &Input, recipe: &Recipe, imatrix: Option<&Imatrix>, transforms: Option<&Transforms>) -> Metadata {
    if recipe.no_provenance {
        return Metadata::new();
    }
    let mut keys = Metadata::new();
    keys.push(("ostq.version".into(), Value::from(env!("CARGO_PKG_VERSION"))));
    keys.push(("ostq.recipe".into(), Value::from(recipe.to_portable_toml())));
    if let Some(i) = imatrix {
        keys.push(("ostq.imatrix.sha256".into(), Value::from(i.sha256.as_str())));
    }
    if let Some(t) = transforms {
        let pairs: BTreeSet<Pair> = t.tensors().iter().map(|t| t.1).collect();
        keys.push((TRANSFORM_KEY.into(), Value::from(t.name.as_str())));
        keys.push(("ostq.transform.sha256".into(), Value::from(t.digest().as_str())));
        keys.push((PAIRS_KEY.into(), Value::strs(pairs.iter().map(|p| p.name()))));
    }
    let names: Vec<String> = input
        .source
        .files()
        .iter()
        .map(|f| f.path().file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned()))
        .collect();
    if !names.is_empty() {
        let blank = " ".repeat(HEX);
        keys.push((SOURCE_DIGESTS.into(), Value::strs(names.iter().map(|_| blank.as_str()))));
        keys.push(("ostq.source.files".into(), Value::strs(&names)));
    }
    keys
}

/// True if the plan has a place for the digests of the input.
pub fn is_wanted(metadata: &Metadata) -> bool {
    gguf::value::get(metadata, SOURCE_DIGESTS).is_some()
}

/// Puts the digests into the planned header.
pub fn fill(plan: &mut Plan, hashes: &[String]) {
    for (key, value) in &mut plan.metadata {
        if key == SOURCE_DIGESTS {
            *value = Value::Array(Array::Str(hashes.iter().map(|h| h.as_bytes().to_vec()).collect()));
        }
    }
    let planned = plan.layout.header.len();
    plan.refresh_header().expect("it was laid out before");
    assert_eq!(plan.layout.header.len(), planned, "placeholders have the length of digests");
}
