//! The backward pass against PyTorch's gradients (`fixtures/make-gradients.py`).

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::npz;
use ostq_convert::forward::Model;
use ostq_convert::forward::backward::{Fisher, Labels, Windows, fisher, fisher_of};
use ostq_convert::plan::{Input, Options, Recipe};

fn open(path: &Path) -> Input {
    let options = Options::resolve(Recipe { r#type: Some("q8_0".into()), ..Recipe::default() }).unwrap();
    Input::open(path, &options).unwrap_or_else(|e| panic!("{e}"))
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// Largest difference by the largest expected value.
fn difference(got: &[f64], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0.0f64, |m, &v| m.max(f64::from(v).abs()));
    got.iter().zip(want).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max) / largest
}

/// The largest difference over all weights of the model at `path`.
fn against(path: &Path, archive: &Path, scratch: Option<&Path>) -> f64 {
    let arrays = npz::read(archive);
    let ints = |name: &str| arrays[name].ints().iter().map(|&v| v as u32).collect::<Vec<u32>>();
    let (ids, labels, shape) = (ints("ids"), ints("labels"), arrays["shape"].ints());
    let input = open(path);
    let model = Model::new(path, &*input.source, &input.metadata).unwrap();
    let windows = Windows { length: shape[0] as usize, batch: 2, first: shape[1] as usize };
    let got = fisher_of(&model, &ids, windows, Labels::Given(&labels), scratch, &mut |_| {}).unwrap();
    assert_eq!(got.outputs.len(), arrays.len() - 4);
    let mut worst = difference(&got.embedding, &arrays["embedding"].floats());
    for (name, squares) in &got.outputs {
        let key = if name == model.head_name() { "head" } else { name };
        let d = difference(squares, &arrays[key].floats());
        assert!(d < 1e-3, "{}: {name}: {d:e}", path.display());
        worst = worst.max(d);
    }
    worst
}

#[test]
fn the_fixture_has_pytorchs_gradients() {
    let dir = tempfile::tempdir().unwrap();
    for scratch in [None, Some(dir.path())] {
        let d = against(&fixture("tiny"), &fixture("tiny-gradients.npz"), scratch);
        assert!(d < 1e-3, "{d:e}");
    }
}

#[test]
fn every_architecture_has_pytorchs_gradients() {
    let (Some(shared), Some(convert)) = (common::shared(), common::converter()) else { return };
    let Some(python) = convert.ancestors().nth(2).map(|p| p.join("venv/bin/python")).filter(|p| p.is_file()) else {
        eprintln!("SKIPPED: no Python beside {}", convert.display());
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let run = |command: &mut Command| {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    for (name, ours) in [
        ("random-llama3", true),
        ("random-mistral", true),
        ("random-mixtral", false),
        ("random-qwen3moe", false),
        ("random-qwen2", true),
        ("random-qwen3", true),
        ("random-phi3", false),
        ("random-gemma2", false),
        ("random-gemma3", false),
        ("random-olmo2", false),
        ("random-granite", false),
        ("random-smollm3", false),
    ] {
        let folder = shared.join("models").join(name);
        let (archive, gguf) = (dir.path().join(format!("{name}.npz")), dir.path().join(format!("{name}.gguf")));
        run(Command::new(&python).arg(fixture("make-gradients.py")).arg(&folder).arg(&archive));
        if !ours {
            run(Command::new(&convert).arg(&folder).args(["--outtype", "f32", "--outfile"]).arg(&gguf));
        }
        let d = against(if ours { &folder } else { &gguf }, &archive, None);
        println!("{name}: {d:.2e} of the largest");
        assert!(d < 1e-3, "{name}: {d:e} of the largest");
    }
}

fn bits(f: &Fisher) -> Vec<u64> {
    f.outputs.iter().flat_map(|(_, v)| v).chain(&f.embedding).map(|v| v.to_bits()).collect()
}

#[test]
fn threads_change_no_bit_and_seeds_do() {
    let path = fixture("tiny");
    let input = open(&path);
    let model = Model::new(&path, &*input.source, &input.metadata).unwrap();
    let ids: Vec<u32> = (0..330).map(|i| i * 7919 % 500).collect();
    let run = |threads, seed| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| fisher(&model, &ids, 64, 3, 0, seed, &mut |_| {})).unwrap()
    };
    let one = run(1, 1);
    assert_eq!(one.tokens, 320);
    assert!(bits(&run(3, 1)) == bits(&one));
    assert!(bits(&run(1, 2)) != bits(&one));
    // p - onehot: the mean of (p - y)² over labels y is p (1 - p)
    let head: f64 = one.of(model.head_name()).unwrap().iter().sum();
    assert!((0.5..1.5).contains(&head), "{head}");
}

#[test]
fn what_cannot_be_run_is_refused() {
    let path = fixture("tiny");
    let input = open(&path);
    let model = Model::new(&path, &*input.source, &input.metadata).unwrap();
    let refused = |tokens: &[u32], length, first, labels| {
        let windows = Windows { length, batch: 1, first };
        fisher_of(&model, tokens, windows, labels, None, &mut |_| {}).unwrap_err().to_string()
    };
    let sampled = Labels::Sampled(1);
    assert!(refused(&[1; 8], 0, 0, sampled).contains("no position"));
    assert!(refused(&[1; 8], 4, 4, sampled).contains("no position"));
    assert!(refused(&[1; 8], 9, 0, sampled).contains("no window"));
    assert!(refused(&[1; 8], 4, 0, Labels::Given(&[1; 7])).contains("7 labels"));
    assert!(refused(&[1; 4], 4, 0, Labels::Given(&[512; 4])).contains("512"));
    assert!(refused(&[600; 4], 4, 0, sampled).contains("600"));
}
