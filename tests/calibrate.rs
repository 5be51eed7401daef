//! Calibration: the same sums as real llama-imatrix, the same for any number of threads, and after any interruption.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;

use ostq_convert::calibration::imatrix_sums::ImatrixSums;
use ostq_convert::calibration::run::{self, Job, Watch};
use ostq_convert::calibration::{fingerprint, windows};
use ostq_convert::convert::INTERRUPTED;
use ostq_convert::forward::Model;
use ostq_convert::plan::{Input, Options, Recipe};
use ostq_convert::tokenizer::encode::TextEncoder;

fn program() -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_ostq-convert"));
    program.env("OSTQ_QUALITY", "exact");
    program
}

fn run_ok(command: &mut Command) -> String {
    let out = command.output().unwrap();
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny")
}

fn text(dir: &Path) -> PathBuf {
    let path = dir.join("text.txt");
    let words = ["the rain ", "in Spain ", "stays 12 ", "mainly\n", "on the plain. "];
    std::fs::write(&path, (0..3000).map(|i| words[i * i % 7 % 5]).collect::<String>()).unwrap();
    path
}

/// Largest difference of E[x²] by the largest value of the same weight and expert, over all weights. `strays`: how many tokens
/// may have gone to another expert.
/// A weight that has strays may differ tenfold: one token of a thousand with squares twenty times the mean.
fn difference(a: &Path, b: &Path, strays: i64) -> f64 {
    let (a, b) = (ImatrixSums::load(a).unwrap(), ImatrixSums::load(b).unwrap());
    assert_eq!(a.entries.keys().collect::<Vec<_>>(), b.entries.keys().collect::<Vec<_>>());
    let mut largest = 0.0f64;
    for (name, x) in &a.entries {
        let y = &b.entries[name];
        let columns = x.in_sum2.len() / x.counts.len();
        assert_eq!(x.counts.len(), y.counts.len(), "{name}");
        let allowance = if x.counts == y.counts { 1.0 } else { 10.0 };
        for (e, (&m, &n)) in x.counts.iter().zip(&y.counts).enumerate() {
            assert!((m - n).abs() <= strays, "{name}, expert {e}: {m} tokens, not {n}");
            let (x, y) = (&x.in_sum2[e * columns..][..columns], &y.in_sum2[e * columns..][..columns]);
            let top = y.iter().fold(0.0f32, |m, v| m.max(*v)) / n as f32;
            for (x, y) in x.iter().zip(y) {
                largest = largest.max(f64::from((x / m as f32 - y / n as f32).abs() / top) / allowance);
            }
        }
    }
    largest
}

/// llama-imatrix keeps keys and values in f16 and, on a bf16 file, rounds activations to bf16: hence not 1e-6.
#[test]
fn sums_are_those_of_llama_imatrix() {
    let Some(shared) = common::shared() else { return };
    let dir = tempfile::tempdir().unwrap();
    for (model, text, ctx, chunks, tolerance) in [
        ("random-llama2", "goldens/tiny-corpus.txt", "128", "1000", 5e-4),
        ("random-llama3", "goldens/tiny-corpus.txt", "128", "1000", 5e-4),
        ("random-llama-576", "goldens/tiny-corpus.txt", "128", "1000", 5e-4),
        ("random-mistral", "goldens/tiny-corpus.txt", "128", "1000", 5e-4),
        ("random-qwen2", "goldens/tiny-corpus.txt", "128", "1000", 5e-4),
        ("random-qwen3", "goldens/tiny-corpus.txt", "128", "1000", 5e-4),
        ("tiny-llama", "text/calibration.txt", "512", "40", 2e-3),
    ] {
        let out = dir.path().join(format!("{model}.gguf"));
        let mut c = program();
        c.arg("calibrate").arg(shared.join("models").join(model)).arg("-o").arg(&out);
        c.arg("-f").arg(shared.join(text)).args(["--ctx", ctx, "--chunks", chunks, "-q"]);
        run_ok(&mut c);
        let d = difference(&out, &shared.join("goldens/imatrix").join(format!("{model}.gguf")), 0);
        println!("{model}: {d:.1e} of the largest value");
        assert!(d < tolerance, "{model}: {d:e} of the largest value");
    }
}

/// Experts: each with its own sums.
#[test]
fn experts_have_sums_of_their_own() {
    let (Some(shared), Some(convert)) = (common::shared(), common::converter()) else { return };
    let dir = tempfile::tempdir().unwrap();
    for model in ["random-mixtral", "random-qwen3moe"] {
        let gguf = dir.path().join("model.gguf");
        let mut c = Command::new(&convert);
        run_ok(c.arg(shared.join("models").join(model)).args(["--outtype", "f32", "--outfile"]).arg(&gguf));
        let out = dir.path().join(format!("{model}.imatrix"));
        let mut c = program();
        c.arg("calibrate").arg(&gguf).arg("-o").arg(&out).arg("-f").arg(shared.join("goldens/tiny-corpus.txt"));
        run_ok(c.args(["--ctx", "128", "-q"]));
        // a token whose experts are nearly tied goes to another one where keys are in f16
        let d = difference(&out, &shared.join("goldens/imatrix").join(format!("{model}.gguf")), 3);
        println!("{model}: {d:.1e} of the largest value");
        assert!(d < 5e-3, "{model}: {d:e} of the largest value");
    }
}

#[test]
fn threads_and_batches_change_no_byte() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let mut files = Vec::new();
    for (i, extra) in
        [&["--threads", "1"][..], &["--threads", "3"], &["--threads", "2", "--max-memory", "114MiB"]].iter().enumerate()
    {
        let out = dir.path().join(format!("{i}.gguf"));
        let hessian = dir.path().join(format!("{i}.hessian"));
        let mut c = program();
        c.arg("calibrate").arg(fixture()).arg("-o").arg(&out).arg("--hessian").arg(&hessian).arg("-f").arg(&text);
        run_ok(c.args(["--ctx", "64", "--process-output", "-q"]).args(*extra));
        files.push((std::fs::read(&out).unwrap(), std::fs::read(&hessian).unwrap()));
        assert!(!dir.path().join(format!("{i}.gguf.ostq-state")).exists(), "the state is gone");
    }
    assert!(files[0] == files[1], "threads");
    assert!(files[0].0 == files[2].0, "batches: sums");
    assert!(files[0].1 == files[2].1, "batches: second moments");
}

/// Stops after a number of layers.
struct StopAfter(usize, Vec<usize>);

impl Watch for StopAfter {
    fn layer(&mut self, layers: usize) {
        self.1.push(layers);
        if layers == self.0 {
            INTERRUPTED.store(true, Ordering::Relaxed);
        }
    }

    fn resumed(&mut self, layers: usize) {
        self.1.push(1000 + layers);
    }
}

#[test]
fn an_interrupted_run_goes_on_where_it_stopped() {
    let Some(shared) = common::shared() else { return };
    let path = shared.join("models/random-llama3");
    let options = Options::resolve(Recipe { r#type: Some("COPY".into()), ..Recipe::default() }).unwrap();
    let input = Input::open(&path, &options).unwrap();
    let model = Model::new(&path, &*input.source, &input.metadata).unwrap();
    let encoder = TextEncoder::from_metadata(&input.metadata).unwrap();
    let ids = windows::ids(&encoder, &[windows::read(&shared.join("goldens/tiny-corpus.txt")).unwrap()]);
    let tokens = windows::windows(&encoder, &ids, 64, Some(9)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
    let hessian = |name: &str| dir.path().join(name);
    fn with<'a>(job: &Job<'a>, state: &'a Path, text: &str) -> Job<'a> {
        Job {
            model: job.model,
            tokens: job.tokens,
            length: job.length,
            datasets: job.datasets.clone(),
            fingerprint: job.fingerprint.clone(),
            text: text.into(),
            second: true,
            output: true,
            prior: 0,
            memory: job.memory,
            state,
        }
    }
    let job = Job {
        model: &model,
        tokens: &tokens,
        length: 64,
        datasets: vec!["text".into()],
        fingerprint: fingerprint::fingerprint(&*input.source),
        text: String::new(),
        second: true,
        output: true,
        prior: 0,
        memory: run::memory(&model, (9, 64), true, 1, None).unwrap(),
        state: &whole,
    };
    let mut quiet = StopAfter(99, Vec::new());
    let want = run::run(&with(&job, &whole, "a"), Some((&hessian("whole.h"), false)), &mut quiet).unwrap();
    assert_eq!(quiet.1, [1, 2]);

    let mut stop = StopAfter(1, Vec::new());
    let stopped = run::run(&with(&job, &cut, "a"), Some((&hessian("cut.h"), false)), &mut stop);
    INTERRUPTED.store(false, Ordering::Relaxed);
    assert!(stopped.is_err() && !hessian("cut.h").exists());
    // a kill in the middle of a layer leaves its half-written stream behind
    let target = cut.join("stream-0.f32");
    let size = std::fs::metadata(&target).unwrap().len();
    std::fs::write(&target, vec![0xee; size as usize]).unwrap();
    // another text does not take this state over
    let mut other = StopAfter(99, Vec::new());
    let aside = dir.path().join("aside");
    std::fs::create_dir(&aside).unwrap();
    for f in std::fs::read_dir(&cut).unwrap().flatten() {
        std::fs::copy(f.path(), aside.join(f.file_name())).unwrap();
    }
    run::run(&with(&job, &aside, "b"), None, &mut other).unwrap();
    assert_eq!(other.1, [1, 2], "all over again");

    let mut on = StopAfter(99, Vec::new());
    let got = run::run(&with(&job, &cut, "a"), Some((&hessian("cut.h"), false)), &mut on).unwrap();
    assert_eq!(on.1, [1001, 2]);
    assert!(got == want, "the same sums");
    assert!(std::fs::read(hessian("cut.h")).unwrap() == std::fs::read(hessian("whole.h")).unwrap(), "the same moments");
}

#[test]
fn forgetting_a_state_spares_what_is_not_ours() {
    let dir = tempfile::tempdir().unwrap();
    let mine = dir.path().join("thesis.tex");
    std::fs::write(&mine, "years").unwrap();
    std::fs::write(dir.path().join("state.json"), "{}").unwrap();
    run::forget(dir.path());
    assert!(mine.exists() && !dir.path().join("state.json").exists());
}

#[test]
fn what_cannot_be_calibrated_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let short = dir.path().join("short.txt");
    std::fs::write(&short, "too short").unwrap();
    let binary = dir.path().join("binary.txt");
    std::fs::write(&binary, b"good \xff bad").unwrap();
    for (extra, code, message) in [
        (vec!["-f", short.to_str().unwrap()], 3, "a window needs 512"),
        (vec!["-f", binary.to_str().unwrap()], 3, "not UTF-8 text: byte 5"),
        (vec!["-f", "/nowhere/text.txt"], 3, "/nowhere/text.txt"),
        (vec!["--max-memory", "1MiB"], 4, "needs at least"),
    ] {
        let out =
            program().arg("calibrate").arg(fixture()).arg("-o").arg(dir.path().join("x.gguf")).args(&extra).output();
        let out = out.unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{extra:?}: {stderr}");
        assert!(stderr.contains(message), "{extra:?}: {stderr}");
        assert!(!dir.path().join("x.gguf").exists());
    }
}

/// `--calibrate` of a conversion that rounds to nearest is the same as `calibrate` and `--imatrix`, and goes into the recipe.
#[test]
fn a_conversion_can_calibrate_first() {
    let dir = tempfile::tempdir().unwrap();
    let text = text(dir.path());
    let file = |name: &str| dir.path().join(name);
    let mut c = program();
    run_ok(
        c.arg("calibrate").arg(fixture()).arg("-o").arg(file("i.gguf")).arg("-f").arg(&text).args(["-c", "64", "-q"]),
    );
    let convert = |out: &str, extra: &[&str]| {
        let mut c = program();
        run_ok(c.arg(fixture()).arg(file(out)).args(["--type", "q4_k_m", "-q"]).args(extra))
    };
    convert("two.gguf", &["--imatrix", file("i.gguf").to_str().unwrap(), "--rounding", "nearest"]);
    let recipe = convert(
        "one.gguf",
        &["--calibrate", text.to_str().unwrap(), "--ctx", "64", "--rounding", "nearest", "--print-recipe"],
    );
    assert!(!file("one.gguf.ostq-state").exists());
    let tensors = |name: &str| {
        let list = run_ok(program().arg("inspect").arg(file(name)).args(["--sha256", "--json"]));
        serde_json::from_str::<serde_json::Value>(&list).unwrap()["tensors"].clone()
    };
    assert_eq!(tensors("one.gguf"), tensors("two.gguf"));
    std::fs::write(file("recipe.toml"), recipe).unwrap();
    let mut c = program();
    run_ok(c.arg(fixture()).arg(file("three.gguf")).arg("--recipe").arg(file("recipe.toml")).arg("-q"));
    assert!(std::fs::read(file("one.gguf")).unwrap() == std::fs::read(file("three.gguf")).unwrap());
}
