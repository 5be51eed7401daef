//! `check` as a user runs it: against itself, against real llama-perplexity, through base files, and what it refuses.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::program;
use serde_json::Value as Json;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny")
}

fn text(dir: &Path) -> PathBuf {
    let path = dir.join("text.txt");
    let words = ["the rain ", "in Spain ", "stays 12 ", "mainly\n", "on the plain. "];
    std::fs::write(&path, (0..2000).map(|i| words[i * i % 7 % 5]).collect::<String>()).unwrap();
    path
}

fn convert(input: &Path, out: &Path, ty: &str) {
    program::run([input.as_os_str(), out.as_os_str(), "--type".as_ref(), ty.as_ref(), "--quiet".as_ref()]).exits(0);
}

fn check(args: &[&std::ffi::OsStr]) -> Json {
    let mut all: Vec<&std::ffi::OsStr> = vec!["check".as_ref()];
    all.extend(args);
    all.extend(["--json", "--quiet"].map(std::ffi::OsStr::new));
    let ran = program::run(all).exits(0);
    serde_json::from_str(&ran.stdout).unwrap()
}

macro_rules! os {
    ($($e:expr),* $(,)?) => { &[$(AsRef::<std::ffi::OsStr>::as_ref(&$e)),*] };
}

fn figure(report: &Json, model: usize, key: &str) -> f64 {
    report["models"][model]["summary"][key]["value"].as_f64().unwrap()
}

#[test]
fn a_lossless_copy_differs_in_nothing_and_fewer_bits_cost_more() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let file = |n: &str| dir.path().join(n);
    for ty in ["bf16", "q8_0", "q5_0", "q4_0"] {
        convert(&fixture(), &file(&format!("{ty}.gguf")), ty);
    }
    let report = check(os![
        fixture(),
        file("bf16.gguf"),
        file("q8_0.gguf"),
        file("q5_0.gguf"),
        file("q4_0.gguf"),
        "--text",
        text,
        "--ctx",
        "64",
        "--per-tensor",
        "--per-block"
    ]);
    assert_eq!(figure(&report, 0, "kld"), 0.0);
    assert_eq!(figure(&report, 0, "same_top"), 1.0);
    assert_eq!(report["models"][0]["blocks"][0]["relative_difference"].as_f64(), Some(0.0));
    let error = |m: usize, key: &str| {
        let rows = report["models"][m]["tensors"].as_array().unwrap();
        let row = rows.iter().find(|r| r["name"] == "blk.0.ffn_gate.weight").unwrap();
        row[key].as_f64().unwrap()
    };
    assert_eq!(error(0, "relative_error"), 0.0);
    for (better, worse) in [(0, 1), (1, 2), (2, 3)] {
        assert!(figure(&report, better, "kld") < figure(&report, worse, "kld"), "{better} {worse}");
        assert!(error(better, "relative_error") < error(worse, "relative_error"), "{better} {worse}");
        let block = |m: usize| report["models"][m]["blocks"][0]["relative_difference"].as_f64().unwrap();
        assert!(block(better) < block(worse), "{better} {worse}");
    }
    // uniform steps of d: error d²/12 on weights of size d x 127 (8 bits) or d x 8
    assert!(error(1, "relative_error") < 1e-4 && (1e-3..5e-2).contains(&error(3, "relative_error")));
    let base = figure(&report, 0, "ppl");
    assert!(base > 1.0 && (figure(&report, 3, "ppl_base") - base).abs() < 1e-9);
}

#[test]
fn threads_and_memory_change_no_figure() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let q = dir.path().join("q.gguf");
    convert(&fixture(), &q, "q4_k_m");
    let run = |threads: &str, memory: &str| {
        check(os![fixture(), q, "--text", text, "--ctx", "64", "--threads", threads, "--max-memory", memory])
    };
    let one = run("1", "4GiB");
    assert_eq!(one, run("3", "4GiB"));
    assert_eq!(one, run("2", "120MiB"));
}

/// With `--activations ggml` the figures are those of llama.cpp's CPU kernels.
#[test]
fn emulated_kernels_give_llama_perplexitys_figures() {
    let (Some(shared), Some(perplexity)) = (common::shared(), common::peer("llama-perplexity")) else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = |n: &str| dir.path().join(n);
    let types = ["q4_k_m", "q4_0", "q6_k"];
    for ty in ["bf16"].iter().chain(&types) {
        convert(&shared.join("models/tiny-llama"), &file(&format!("{ty}.gguf")), ty);
    }
    let evaluation = shared.join("text/evaluation.txt");
    let llama = |args: &[&std::ffi::OsStr]| {
        let out = Command::new(&perplexity).args(args).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
    };
    let base = file("base");
    llama(os!["-m", file("bf16.gguf"), "-f", evaluation, "--chunks", "8", "--kl-divergence-base", base]);
    let report = check(os![
        file("bf16.gguf"),
        file("q4_k_m.gguf"),
        file("q4_0.gguf"),
        file("q6_k.gguf"),
        "--text",
        evaluation,
        "--chunks",
        "8",
        "--activations",
        "ggml"
    ]);
    // our models against llama.cpp's own log-probabilities
    let against_base = check(os![
        file("q4_k_m.gguf"),
        file("q4_0.gguf"),
        file("q6_k.gguf"),
        "--kl-divergence-base",
        base,
        "--activations",
        "ggml"
    ]);
    for (i, ty) in types.iter().enumerate() {
        let printed = llama(os!["-m", file(&format!("{ty}.gguf")), "--kl-divergence", "--kl-divergence-base", base]);
        let number = |key: &str| {
            let line = printed.lines().find(|l| l.contains(key)).unwrap_or_else(|| panic!("{key}: {printed}"));
            line.split(':').nth(1).unwrap().split_whitespace().next().unwrap().parse::<f64>().unwrap()
        };
        let (kld, ppl) = (number("Mean    KLD"), number("Mean PPL(Q) "));
        for (what, r) in [("direct", &report), ("base file", &against_base)] {
            let (ours_kld, ours_ppl) = (figure(r, i, "kld"), figure(r, i, "ppl"));
            println!("{ty}, {what}: KLD {ours_kld:.6} for {kld:.6}, PPL {ours_ppl:.4} for {ppl:.4}");
            assert!((ours_kld / kld - 1.0).abs() < 0.03, "{ty}, {what}: KLD {ours_kld} for {kld}");
            assert!((ours_ppl / ppl - 1.0).abs() < 0.03, "{ty}, {what}: PPL {ours_ppl} for {ppl}");
        }
    }
}

#[test]
fn a_base_file_stands_in_for_the_reference() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let (q, base) = (dir.path().join("q.gguf"), dir.path().join("base"));
    convert(&fixture(), &q, "q4_0");
    let direct = check(os![fixture(), q, "--text", text, "--ctx", "64", "--save-all-logits", base]);
    let stored = check(os![q, "--kl-divergence-base", base]);
    let (a, b) = (figure(&direct, 0, "kld"), figure(&stored, 0, "kld"));
    assert!((a / b - 1.0).abs() < 1e-2, "{a} {b}");
    assert_eq!(stored["run"]["from_base_file"], true);
    assert_eq!(direct["run"]["positions"], stored["run"]["positions"]);
    program::run(
        ["check", fixture().to_str().unwrap(), "--text", text.to_str().unwrap(), "--save-all-logits"].iter().chain(&[
            base.to_str().unwrap(),
            "--ctx",
            "64",
        ]),
    )
    .exits(2)
    .says("exists");
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let (text, tiny) = (text.to_str().unwrap().to_string(), fixture());
    let tiny = tiny.to_str().unwrap();
    let q = dir.path().join("q.gguf");
    convert(&fixture(), &q, "q8_0");
    let q = q.to_str().unwrap();
    program::run(["check", tiny, q]).exits(2).says("--text");
    program::run(["check", tiny, "--text", &text]).exits(2).says("name a model");
    program::run(["check", tiny, q, "--text", &text, "--ctx", "100000"]).exits(3).says("tokens");
    program::run(["check", tiny, "/nowhere.gguf", "--text", &text]).exits(3).says("/nowhere.gguf");
    program::run(["check", tiny, q, "--text", &text, "--max-memory", "1MiB"]).exits(4).says("needs at least");
    // another vocabulary
    if let Some(shared) = common::shared() {
        let other = shared.join("models/tiny-llama");
        program::run(["check", tiny, other.to_str().unwrap(), "--text", &text]).exits(3).says("cannot be compared");
        // the same size, other tokens
        let other = shared.join("models/random-llama2");
        let third = shared.join("models/random-qwen2");
        program::run(["check", other.to_str().unwrap(), third.to_str().unwrap(), "--text", &text])
            .exits(3)
            .says("cut the text differently");
    }
    // a weight that is NaN, where a copy of the file has been damaged
    let bytes = std::fs::read(q).unwrap();
    let damaged = dir.path().join("damaged.gguf");
    let mut bytes = bytes;
    let end = bytes.len();
    bytes[end - 4096..].fill(0xff);
    std::fs::write(&damaged, &bytes).unwrap();
    let ran = program::run(["check", tiny, damaged.to_str().unwrap(), "--text", &text, "--ctx", "64"]).exits(3);
    assert!(ran.stderr.contains("damaged.gguf") && ran.stderr.contains("NaN"), "{}", ran.stderr);
}

#[test]
fn a_conversion_can_check_itself() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let (out, html) = (dir.path().join("q.gguf"), dir.path().join("q.html"));
    let tiny = fixture();
    let args = [tiny.to_str().unwrap(), out.to_str().unwrap(), "--type", "q4_0", "--ctx", "64", "--check"];
    let ran = program::run(args.iter().chain(&[text.to_str().unwrap(), "--html", html.to_str().unwrap()])).exits(0);
    assert!(ran.stdout.contains("Mean KLD") && out.exists());
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.contains("q.gguf") && !page.contains("<script"));
    let args = [tiny.to_str().unwrap(), out.to_str().unwrap(), "--type", "q4_0", "--force", "--per-tensor"];
    let ran = program::run(args).exits(0);
    assert!(ran.stdout.contains("relative error") && ran.stdout.contains("blk.0.attn_q.weight"), "{}", ran.stdout);
}

/// Weights that are finite but so large that activations are not.
#[test]
fn activations_that_overflow_are_named_by_layer() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for f in std::fs::read_dir(fixture()).unwrap().flatten() {
        std::fs::copy(f.path(), model.join(f.file_name())).unwrap();
    }
    let file = model.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: Json = serde_json::from_slice(&bytes[8..header]).unwrap();
    let range = &json["model.layers.0.mlp.up_proj.weight"]["data_offsets"];
    let (from, to) = (range[0].as_u64().unwrap() as usize, range[1].as_u64().unwrap() as usize);
    // bf16 1.7e38
    bytes[header + from..header + to].as_chunks_mut::<2>().0.iter_mut().for_each(|b| *b = [0x00, 0x7f]);
    std::fs::write(&file, &bytes).unwrap();
    let (model, text) = (model.to_str().unwrap(), text.to_str().unwrap());
    let ran = program::run(["check", fixture().to_str().unwrap(), model, "--text", text, "--ctx", "64"]).exits(3);
    assert!(ran.stderr.contains("layer 0: the activations hold"), "{}", ran.stderr);
    let out = dir.path().join("i.gguf");
    program::run(["calibrate", model, "-f", text, "-c", "64", "-o", out.to_str().unwrap()])
        .exits(3)
        .says("blk.0.ffn_down");
    assert!(!out.exists());
}

/// `--hessian`: tr((W - Q) H (W - Q)ᵀ) / tr(W H Wᵀ), as a plain loop in f64 gives it.
#[test]
fn errors_weighted_by_second_moments_are_those_of_the_formula() {
    use ostq_convert::calibration::hessian_file::HessianFile;
    use ostq_convert::plan::{Input, Options, Recipe};

    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let (hessian, out) = (dir.path().join("h.gguf"), dir.path().join("q.gguf"));
    let imatrix = dir.path().join("i.gguf");
    let fixture = fixture();
    program::run(os!["calibrate", fixture, "-f", text, "--ctx", "64", "--hessian", hessian, "-o", imatrix, "-q"])
        .exits(0);
    convert(&fixture, &out, "q4_0");
    let report = check(os![fixture, out, "--text", text, "--ctx", "64", "--per-tensor", "--hessian", hessian]);
    let file = HessianFile::open(&hessian).unwrap();
    let open = |path: &Path| Input::open(path, &Options::resolve(Recipe::default()).unwrap()).unwrap();
    let values = |input: &Input, name: &str| {
        let index = input.source.tensors().iter().position(|t| t.name == name).unwrap();
        let t = &input.source.tensors()[index];
        let mut values = vec![0f32; t.elements() as usize];
        input.source.read_rows(index, 0..t.rows(), &mut values);
        values
    };
    let (reference, model) = (open(&fixture), open(&out));
    let mut seen = 0;
    for row in report["models"][0]["tensors"].as_array().unwrap() {
        let name = row["name"].as_str().unwrap();
        let Some(entry) = file.entry(name) else {
            assert!(row["weighted_error"].is_null(), "{name}");
            continue;
        };
        let (n, h) = (entry.columns, file.matrix(name, 0).unwrap());
        let (w, q) = (values(&reference, name), values(&model, name));
        let form = |x: &[f64]| -> f64 {
            let cell = |i: usize| (0..n).map(|j| x[i] * h[i * n + j] * x[j]).sum::<f64>();
            (0..n).map(cell).sum()
        };
        let (mut error, mut size) = (0.0, 0.0);
        for (w, q) in w.chunks_exact(n).zip(q.chunks_exact(n)) {
            let w: Vec<f64> = w.iter().map(|v| f64::from(*v)).collect();
            let d: Vec<f64> = w.iter().zip(q).map(|(w, q)| w - f64::from(*q)).collect();
            (error, size) = (error + form(&d), size + form(&w));
        }
        let own = row["weighted_error"].as_f64().unwrap();
        assert!((own - error / size).abs() < 1e-4 * (error / size), "{name}: {own} {}", error / size);
        assert!((own - row["relative_error"].as_f64().unwrap()).abs() > 1e-3 * own, "{name}: H plays no part");
        seen += 1;
    }
    assert!(seen >= 7, "{seen}");
}
