//! Whole files, equal to those of llama.cpp b11434: same keys, same order, same padding, same weights.
//!
//! On a plain clone: `fixtures/tiny` in every type, against the digests in `fixtures/tiny.sha256`. With the shared test
//! bed (`OSTQ_SHARED`, else `../shared`): every variant of every golden of the supported architectures. Types that take
//! minutes, and the larger models, only with `OSTQ_SLOW=1`.

mod common;

use std::path::{Path, PathBuf};

use common::program::{convert, fixture, run, sha256, slow};
use common::{Golden, digest, equal, manifest, shared};
use ostq_convert::gguf;
use serde_json::Value as Json;

#[test]
fn the_fixture_becomes_the_files_of_llama_cpp() {
    let dir = tempfile::tempdir().unwrap();
    let (out, imatrix) = (dir.path().join("out.gguf"), fixture("tiny.imatrix.gguf"));
    let lines = std::fs::read_to_string(fixture("tiny.sha256")).unwrap();
    let mut bad = Vec::new();
    for line in lines.lines() {
        let (sum, args) = line.split_once("  ").unwrap();
        let args = args.replace("tiny.imatrix.gguf", imatrix.to_str().unwrap());
        let ran = convert(&fixture("tiny"), &out, &format!("{args} --force --quiet --no-provenance"));
        let (code, equal) = match sum {
            "refused" => (3, true),
            _ => (0, ran.code == 0 && sha256(&out) == sum),
        };
        if ran.code != code || !equal {
            bad.push(format!("{args}: exit code {}, equal: {equal}, {}", ran.code, ran.stderr));
        }
    }
    assert!(bad.is_empty(), "{} of {}:\n{}", bad.len(), lines.lines().count(), bad.join("\n"));
    assert!(lines.lines().count() > 100);
}

/// What a variant of a golden says.
struct Variant<'a> {
    name: &'a str,
    json: &'a Json,
    /// The variant that it equals, or itself.
    base: &'a Json,
}

impl<'a> Variant<'a> {
    fn all(golden: &'a Json) -> Vec<Variant<'a>> {
        let variants = golden["variants"].as_object().unwrap();
        let base = |json: &'a Json| json["same_as"].as_str().map_or(json, |same| &variants[same]);
        variants.iter().map(|(name, json)| Variant { name, json, base: base(json) }).collect()
    }

    fn is_refused(&self) -> bool {
        self.json.get("error").is_some()
    }

    /// The codebook types: a minute each on a real model.
    fn is_slow(&self) -> bool {
        ["IQ1", "IQ2", "IQ3"].iter().any(|t| self.name.contains(t)) && !self.is_refused()
    }

    /// Our arguments, apart from the input, and whether the input is the q8_0 conversion.
    fn args(&self, golden: &Json, via: &str, imatrix: &Path) -> (Vec<String>, bool) {
        let words = |s: &str| s.split_whitespace().map(str::to_string).collect::<Vec<_>>();
        let Some(quantize) = self.name.strip_prefix("quantize-") else {
            let text = golden["convert"][self.name].as_str().unwrap_or_else(|| panic!("{}", self.name));
            let (flags, name) = text.split_once(" --model-name ").map_or((text, None), |(a, b)| (a, Some(b)));
            let mut args = words(flags);
            args.extend(name.into_iter().flat_map(|n| ["--model-name".to_string(), n.to_string()]));
            return (args, false);
        };
        if let Some(options) = self.json["options"].as_str() {
            let ty = self.json["type"].as_str().unwrap().to_string();
            let from_q8 = self.json["source"] == "convert-q8_0";
            let mut args = [vec!["--type".to_string(), ty], words(options)].concat();
            if !from_q8 {
                args.extend(words(&format!("--via {via}")));
            }
            return (args, from_q8);
        }
        let (name, via) = quantize.strip_suffix("@bf16").map_or((quantize, via), |n| (n, "bf16"));
        let (ty, with_imatrix) = name.strip_suffix("-imatrix").map_or((name, false), |n| (n, true));
        let mut args = words(&format!("--type {ty} --via {via}"));
        if with_imatrix {
            args.extend(["--imatrix".to_string(), imatrix.display().to_string()]);
        }
        (args, false)
    }
}

fn model_folder(shared: &Path, model: &str) -> Option<PathBuf> {
    let own = std::env::var_os("OSTQ_MODELS").map(|m| Path::new(&m).join(model));
    let found = [Some(shared.join("models").join(model)), own].into_iter().flatten().find(|p| p.is_dir());
    if found.is_none() {
        eprintln!("SKIPPED: no {model} (set OSTQ_MODELS to the folder that make-models.py filled)");
    }
    found
}

/// Converts `model` to every variant of its golden.
fn check(model: &str) {
    let Some(shared) = shared() else { return };
    let Some(input) = model_folder(&shared, model) else { return };
    let golden: Json =
        serde_json::from_str(&std::fs::read_to_string(shared.join(format!("goldens/{model}.json"))).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (out, imatrix, q8) = (dir.path().join("o.gguf"), dir.path().join("imatrix.gguf"), dir.path().join("q8.gguf"));
    let stored = shared.join(format!("goldens/imatrix/{model}.gguf"));
    if stored.exists() {
        std::fs::copy(stored, &imatrix).unwrap(); // its name is written into the output
    }
    let real = !model.starts_with("random-");
    let via = if real { "bf16" } else { "f32" };
    let (mut done, mut left_out, mut bad) = (0, 0, Vec::new());
    for v in Variant::all(&golden) {
        if real && v.is_slow() && !slow() {
            left_out += 1;
            continue;
        }
        let (args, from_q8) = v.args(&golden, via, &imatrix);
        if from_q8 && !q8.exists() {
            convert(&input, &q8, "--outtype q8_0 --quiet --no-provenance").exits(0);
        }
        let from = if from_q8 { &q8 } else { &input };
        let paths = [from.to_str().unwrap(), out.to_str().unwrap(), "--force", "--quiet", "--no-provenance"];
        let _ = std::fs::remove_file(&out);
        let ran = run(paths.into_iter().chain(args.iter().map(String::as_str)));
        if v.is_refused() {
            if ran.code != 3 || out.exists() || !ran.stderr.starts_with("error: ") {
                bad.push(format!("{}: should be refused, {ran:?}", v.name));
            }
        } else if ran.code != 0 {
            bad.push(format!("{}: {ran:?}", v.name));
        } else if model == "random-llama-f16" {
            if let Err(why) = same_but_scores(&out, &shared, model, v.json["same_as"].as_str().unwrap_or(v.name)) {
                bad.push(format!("{}: {why}", v.name));
            }
        } else if sha256(&out)[..32] != *v.base["file_sha256"].as_str().unwrap() {
            bad.push(format!("{}: another file than the reference's", v.name));
        }
        done += 1;
    }
    if left_out > 0 {
        eprintln!("SKIPPED: {left_out} variants of {model} that take minutes (OSTQ_SLOW=1 runs them)");
    }
    assert!(bad.is_empty(), "{model}: {} of {done} variants differ:\n{}", bad.len(), bad.join("\n"));
    assert!(done > 0);
}

/// The one intended difference: scores of a SentencePiece vocabulary that is read from tokenizer.json alone, where the
/// reference writes the same number for every token.
fn same_but_scores(out: &Path, shared: &Path, model: &str, variant: &str) -> Result<(), String> {
    let golden = Golden::load(shared, model);
    let bytes = std::fs::read(out).unwrap();
    let header = gguf::read(&bytes).map_err(|e| e.to_string())?;
    let expected = golden.metadata(variant);
    if header.metadata.len() != expected.len() {
        return Err(format!("{} keys, the reference has {}", header.metadata.len(), expected.len()));
    }
    for ((key, value), kv) in header.metadata.iter().zip(expected) {
        let (ty, shown) = manifest(value);
        if key != kv[0].as_str().unwrap() || ty != kv[1].as_str().unwrap() {
            return Err(format!("{key} {ty}, the reference has {kv}"));
        }
        if key != "tokenizer.ggml.scores" && !equal(&shown, &kv[2]) {
            return Err(format!("{key} = {shown}, the reference has {kv}"));
        }
    }
    let expected = golden.tensors(variant);
    if header.tensors.len() != expected.len() {
        return Err(format!("{} tensors, the reference has {}", header.tensors.len(), expected.len()));
    }
    for (t, (name, shape, sum)) in header.tensors.iter().zip(expected) {
        let dims: Vec<u64> = t.dims.iter().rev().copied().collect();
        let data = &bytes[t.offset as usize..(t.offset + t.bytes) as usize];
        if t.name != name || dims != shape || digest(data) != sum {
            return Err(format!("tensor {} {dims:?}, the reference has {name} {shape:?} {sum}", t.name));
        }
    }
    Ok(())
}

macro_rules! models {
    ($($test:ident = $model:literal;)*) => { $(#[test] fn $test() { check($model) })* };
}

models! {
    random_llama2 = "random-llama2";
    random_llama3 = "random-llama3";
    random_llama_sharded = "random-llama-sharded";
    random_llama_fp8 = "random-llama-fp8";
    random_llama_f16 = "random-llama-f16";
    random_llama_f32 = "random-llama-f32";
    random_llama_576 = "random-llama-576";
    random_mistral = "random-mistral";
    random_qwen2 = "random-qwen2";
    random_qwen3 = "random-qwen3";
    tiny_llama = "tiny-llama";
}

#[test]
fn smollm2_135m() {
    if !slow() {
        eprintln!("SKIPPED: smollm2-135m takes minutes (OSTQ_SLOW=1 runs it)");
        return;
    }
    check("smollm2-135m");
    check("smollm2-135m-untied");
}
