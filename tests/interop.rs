//! Real llama.cpp takes our files: it loads them, writes the same text as from files of its own, splits and merges them,
//! and its quantizer writes the same tensors and keys.
//!
//! Its own way is `llama-quantize` on our bf16 conversion: what that holds is compared with the real converter by the
//! golden tests. Needs `OSTQ_PEERS` (default `~/.cache/ostq-peers`, made by `just peers --without-python`); without it the
//! tests skip with a line on stderr, or fail if `OSTQ_REQUIRE_PEERS=1`. `fixtures/tiny` is always tried, the models of the
//! shared folder and of `OSTQ_MODELS` where they are there.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{peer, shared};
use serde_json::Value as Json;

const PROMPT: &str = "Once upon a time there was a little";
const TYPES: &[&str] = &["bf16", "q8_0", "q4_k_m", "q4_0", "iq4_xs", "q3_k_m"];
const IMATRIX_TYPE: &str = "iq2_xs";

/// A checkpoint and its importance matrix.
struct Model {
    name: String,
    folder: PathBuf,
    imatrix: Option<PathBuf>,
}

fn models() -> Vec<Model> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let imatrix = fixtures.join("tiny.imatrix.gguf");
    let mut all = vec![Model { name: "tiny".into(), folder: fixtures.join("tiny"), imatrix: Some(imatrix) }];
    let Some(shared) = shared() else { return all };
    let mut add = |name: &str, folder: PathBuf| {
        let imatrix = shared.join("goldens/imatrix").join(format!("{name}.gguf"));
        all.push(Model { name: name.into(), folder, imatrix: imatrix.is_file().then_some(imatrix) });
    };
    for name in ["tiny-llama", "random-llama2", "random-llama3", "random-qwen2", "random-qwen3", "random-mistral"] {
        add(name, shared.join("models").join(name));
    }
    match std::env::var_os("OSTQ_MODELS").map(|m| Path::new(&m).join("smollm2-135m")).filter(|m| m.is_dir()) {
        Some(folder) => add("smollm2-135m", folder),
        None => eprintln!("SKIPPED: no smollm2-135m (set OSTQ_MODELS, `just models`)"),
    }
    all
}

/// Runs a program that must end well.
fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    output
}

/// Our program.
fn convert(input: &Path, out: &Path, flags: &[&str]) {
    run(Command::new(env!("CARGO_BIN_EXE_ostq-convert"))
        .env("OSTQ_QUALITY", "exact")
        .arg(input)
        .arg(out)
        .args(flags)
        .arg("--quiet"));
}

/// Keys but for `ostq.*` and those with a prefix in `except`, and (type, dims, sha256) of tensors.
fn content(file: &Path, except: &[&str]) -> (BTreeMap<String, Json>, BTreeMap<String, Json>) {
    let shown = run(Command::new(env!("CARGO_BIN_EXE_ostq-convert"))
        .env("OSTQ_QUALITY", "exact")
        .arg("inspect")
        .arg(file)
        .args(["--sha256", "--json"]));
    let json: Json = serde_json::from_slice(&shown.stdout).unwrap();
    let keys = json["metadata"].as_array().unwrap().iter();
    let keys = keys.map(|k| (k["key"].as_str().unwrap().to_string(), k.clone()));
    let keys = keys.filter(|(k, _)| !k.starts_with("ostq.") && !except.iter().any(|e| k.starts_with(e)));
    let tensors = json["tensors"].as_array().unwrap().iter();
    let tensors = tensors.map(|t| {
        assert!(t["sha256"].is_string());
        (t["name"].as_str().unwrap().to_string(), t.clone())
    });
    (keys.collect(), tensors.collect())
}

fn assert_same(what: &str, ours: &Path, theirs: &Path, except: &[&str]) {
    let (our_keys, our_tensors) = content(ours, except);
    let (their_keys, their_tensors) = content(theirs, except);
    assert!(!our_tensors.is_empty());
    assert_eq!(our_tensors.len(), their_tensors.len(), "{what}: number of tensors");
    for (name, tensor) in &their_tensors {
        assert_eq!(our_tensors.get(name), Some(tensor), "{what}: tensor {name}");
    }
    assert_eq!(our_keys, their_keys, "{what}: keys");
}

/// What real llama.cpp writes after the prompt, greedily: the longest of a few runs. The text goes through a log thread that may
/// lose the end of it when the program ends.
fn generate(tool: &Path, model: &Path) -> Vec<u8> {
    let flags = "--temp 0 --seed 1 -n 64 -no-cnv -t 2 --no-display-prompt --no-warmup --ignore-eos --simple-io";
    let mut longest: Vec<u8> = Vec::new();
    for _ in 0..6 {
        let text = run(Command::new(tool).arg("-m").arg(model).args(["-p", PROMPT]).args(flags.split(' '))).stdout;
        let again = text.len() == longest.len() && !text.is_empty();
        if text.len() > longest.len() {
            longest = text;
        }
        if again {
            break;
        }
    }
    longest
}

/// The same text, but for an end that one of them may have lost. On a busy machine a piece in the middle can be lost, too: other
/// files write other text every time, the same ones the same text at least once.
fn assert_same_text(what: &str, tool: &Path, a: &Path, b: &Path) {
    let mut last = String::new();
    for _ in 0..4 {
        let (a, b) = (generate(tool, a), generate(tool, b));
        let both = a.len().min(b.len());
        let text = |t: &[u8]| String::from_utf8_lossy(t).into_owned();
        if both < 32 || 2 * both < a.len().max(b.len()) {
            last = format!("texts of {} and {} bytes", a.len(), b.len());
        } else if a[..both] != b[..both] {
            last = format!("`{}` and `{}`", text(&a), text(&b));
        } else {
            return;
        }
    }
    panic!("{what}: {last}");
}

#[test]
fn the_same_tensors_and_the_same_text_as_from_its_own_quantizer() {
    let (Some(quantize), Some(complete)) = (peer("llama-quantize"), peer("llama-completion")) else { return };
    for model in models() {
        let start = std::time::Instant::now();
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("bf16.gguf");
        convert(&model.folder, &base, &["--outtype", "bf16"]);
        let imatrix = model.imatrix.as_ref();
        if imatrix.is_none() {
            eprintln!("SKIPPED: {}: no imatrix, no {IMATRIX_TYPE}", model.name);
        }
        let cases = TYPES.iter().map(|t| (*t, None)).chain(imatrix.map(|i| (IMATRIX_TYPE, Some(i))));
        for (ty, imatrix) in cases {
            let what = format!("{} as {ty}", model.name);
            let (ours, theirs) = (dir.path().join("ours.gguf"), dir.path().join("theirs.gguf"));
            let mut flags = vec!["--type", ty, "--force"];
            let mut quantizer = Command::new(&quantize);
            if let Some(imatrix) = imatrix {
                flags.extend(["--imatrix", imatrix.to_str().unwrap()]);
                quantizer.arg("--imatrix").arg(imatrix);
            }
            convert(&model.folder, &ours, &flags);
            run(quantizer.arg(&base).arg(&theirs).arg(ty).arg("2"));
            // the reference writes the path of the imatrix as it was given, we write the name
            assert_same(&what, &ours, &theirs, &["quantize.imatrix.file"]);
            assert_same_text(&what, &complete, &ours, &theirs);
            if ty == "bf16" {
                assert_same_text(&format!("{what}, --type and --outtype"), &complete, &ours, &base);
            }
        }
        let types = TYPES.len() + usize::from(imatrix.is_some());
        eprintln!("{}: {types} types, {:.1} s", model.name, start.elapsed().as_secs_f64());
    }
}

#[test]
fn its_splitter_takes_our_file_apart_and_together_again() {
    let (Some(splitter), Some(complete)) = (peer("llama-gguf-split"), peer("llama-completion")) else { return };
    let model = &models()[0];
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole.gguf");
    convert(&model.folder, &whole, &["--type", "q4_k_m"]);
    let part = dir.path().join("part");
    run(Command::new(&splitter).args(["--split", "--split-max-tensors", "8"]).arg(&whole).arg(&part));
    let mut parts: Vec<PathBuf> = std::fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.path()).collect();
    parts.retain(|p| p.file_name().unwrap().to_string_lossy().starts_with("part-"));
    parts.sort();
    assert!(parts.len() > 1, "{parts:?}");
    assert_same_text("split", &complete, &parts[0], &whole);
    let merged = dir.path().join("merged.gguf");
    run(Command::new(&splitter).arg("--merge").arg(&parts[0]).arg(&merged));
    assert_same("merged", &whole, &merged, &["split."]);
}
