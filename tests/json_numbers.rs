//! Numbers in JSON. The crate `gguf-rs` turns `serde_json/arbitrary_precision` on for the whole build; with it a number
//! that goes through serde's buffer (flattened, untagged, internally tagged) is no number any more.

mod common;

use std::path::{Path, PathBuf};

use common::program::{convert, fixture, run};
use ostq_convert::gguf::{self, Value};
use serde::Deserialize;
use serde_json::Value as Json;

fn sources(folder: &Path, all: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, all);
        } else if path.extension().is_some_and(|e| e == "rs") {
            all.push(path);
        }
    }
}

#[test]
fn no_buffered_deserialization_in_the_sources() {
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    assert!(files.len() > 50);
    for file in files {
        let text: String = std::fs::read_to_string(&file).unwrap().split_whitespace().collect();
        for attribute in text.split("#[serde(").skip(1).filter_map(|t| t.split(")]").next()) {
            for word in ["flatten", "untagged", "tag=", "content="] {
                let found = attribute.split(',').any(|a| a == word || a.starts_with(word) && word.ends_with('='));
                assert!(!found, "{}: #[serde({attribute})] cannot hold floats in this build", file.display());
            }
        }
    }
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(untagged)]
enum Untagged {
    Number(f64),
}

#[derive(Debug, Deserialize)]
struct Flattened {
    #[serde(flatten)]
    inner: Inner,
}

#[derive(Debug, Deserialize)]
struct Inner {
    x: f64,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "kind")]
enum Tagged {
    Number { x: f64 },
}

/// Why the rule stands. If this fails, `gguf-rs` (or `serde_json`) has changed and the rule may go.
#[test]
fn buffered_floats_do_not_parse_in_this_build() {
    assert!(serde_json::from_str::<Untagged>("1.5").is_err());
    assert!(serde_json::from_str::<Flattened>(r#"{"x": 1.5}"#).map(|f| f.inner.x).is_err());
    assert!(serde_json::from_str::<Tagged>(r#"{"kind": "Number", "x": 1.5}"#).map(|Tagged::Number { x }| x).is_err());
    // plain ones do
    assert_eq!(serde_json::from_str::<Inner>(r#"{"x": 1.5}"#).unwrap().x, 1.5);
    assert_eq!(Untagged::Number(1.5), Untagged::Number(1.5));
}

#[test]
fn numbers_are_printed_with_their_own_digits() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.gguf");
    let set = "--override-kv a.third=float:0.3333333333333333 --override-kv a.tiny=float:1e-45 --override-kv \
               a.large=float:3.4028234e38 --override-kv a.minus=float:-0.0 --override-kv a.nan=float:nan --override-kv \
               a.inf=float:-inf --override-kv a.int=int:4294967295 --override-kv a.bool=bool:true";
    convert(&fixture("tiny"), &out, &format!("--outtype bf16 --quiet {set}")).exits(0);
    let metadata = gguf::read(&std::fs::read(&out).unwrap()).unwrap().metadata;
    let printed = run(["inspect", "--json", out.to_str().unwrap()]).exits(0).stdout;
    let json: Json = serde_json::from_str(&printed).unwrap();
    let keys = json["metadata"].as_array().unwrap();
    assert_eq!(keys.len(), metadata.len());
    let mut floats = 0;
    for (shown, (key, value)) in keys.iter().zip(&metadata) {
        assert_eq!(shown["key"], *key);
        match value {
            Value::F32(f) if f.is_finite() => {
                let text = shown["value"].to_string();
                assert_eq!(text.parse::<f32>().unwrap().to_bits(), f.to_bits(), "{key}: {text}");
                assert!(text.len() <= 48, "{key}: {text}");
                floats += 1;
            }
            Value::F32(f) => assert_eq!(shown["value"], f.to_string(), "{key}"),
            Value::U32(n) => assert_eq!(shown["value"], *n, "{key}"),
            Value::Bool(b) => assert_eq!(shown["value"], *b, "{key}"),
            _ => {}
        }
    }
    assert!(floats >= 6, "{floats}");
    assert!(printed.contains("0.33333334"), "as f32, not as f64");
    // the plan is JSON, too
    let plan = run(["plan", "--json", fixture("tiny").to_str().unwrap()]).exits(0).stdout;
    let plan: Json = serde_json::from_str(&plan).unwrap();
    let bits =
        plan["tensors"].as_array().unwrap().iter().map(|t| t["bytes"].as_u64().unwrap()).sum::<u64>() as f64 * 8.0;
    let told = plan["bits_per_weight"].as_f64().unwrap();
    assert!((told - bits / plan["weights"].as_f64().unwrap()).abs() < 1e-9);
}
