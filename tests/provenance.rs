//! The `ostq.*` keys of a file made from a file of ours: its own, not those of its source as well.

use std::path::Path;
use std::process::Command;

use serde_json::{Value as Json, json};

/// Our program; its standard output.
fn run(args: &[&str]) -> Vec<u8> {
    let output =
        Command::new(env!("CARGO_BIN_EXE_ostq-convert")).env("OSTQ_QUALITY", "exact").args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn inspect(file: &str) -> Json {
    serde_json::from_slice(&run(&["inspect", file, "--sha256", "--json"])).unwrap()
}

/// Values of the keys called `key`.
fn values<'a>(file: &'a Json, key: &str) -> Vec<&'a Json> {
    file["metadata"].as_array().unwrap().iter().filter(|k| k["key"] == key).map(|k| &k["value"]).collect()
}

#[test]
fn a_file_made_from_ours_names_its_own_source() {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny");
    let tiny = tiny.to_str().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (base, direct, second, bare) = (path("base.gguf"), path("direct.gguf"), path("second.gguf"), path("bare.gguf"));
    run(&[tiny, &base, "--outtype", "bf16"]);
    run(&[tiny, &direct, "-t", "q4_k_m"]);
    run(&[&base, &second, "-t", "q4_k_m"]);
    run(&[&base, &bare, "-t", "q4_k_m", "--no-provenance"]);
    let (base, direct, second, bare) = (inspect(&base), inspect(&direct), inspect(&second), inspect(&bare));
    assert_eq!(second["tensors"], direct["tensors"]);
    assert_eq!(values(&second, "ostq.source.files"), [&json!(["base.gguf"])]);
    assert_eq!(values(&second, "ostq.source.sha256_pieces"), [&json!([base["sha256_pieces"]])]);
    assert_eq!(values(&direct, "ostq.source.files"), [&json!(["model.safetensors"])]);
    assert!(bare["metadata"].as_array().unwrap().iter().all(|k| !k["key"].as_str().unwrap().starts_with("ostq.")));
}
