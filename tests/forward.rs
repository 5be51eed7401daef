//! The forward pass against transformers' logits (`expected_logits.npz` of the random checkpoints) and real llama.cpp.

mod common;

use std::path::Path;

use common::npz;
use ostq_convert::forward::{Activations, Hidden, Model, Runner, run::Head};
use ostq_convert::gguf::Metadata;
use ostq_convert::plan::{Input, Options, Recipe};
use ostq_convert::source::TensorSource;

fn open(path: &Path) -> Input {
    let options = Options::resolve(Recipe { r#type: Some("q8_0".into()), ..Recipe::default() }).unwrap();
    Input::open(path, &options).unwrap_or_else(|e| panic!("{e}"))
}

/// Logits of every position, `[tokens, vocab]`.
fn logits(path: &Path, source: &dyn TensorSource, metadata: &Metadata, ids: &[u32]) -> Vec<f32> {
    let model = Model::new(path, source, metadata).unwrap_or_else(|e| panic!("{e}"));
    let mut runner = Runner::new(&model, ids.len(), Activations::F32).unwrap();
    let mut hidden = Hidden::Memory(vec![0.0; ids.len() * model.spec.embed]);
    runner.embed(ids, &mut hidden).unwrap();
    for l in 0..model.spec.layers {
        runner.layer_in_place(l, &mut hidden, ids.len(), 1, &mut ()).unwrap();
    }
    let Hidden::Memory(mut x) = hidden else { unreachable!() };
    let mut head = Head::new(&model, Activations::F32, 100 << 10).unwrap();
    let mut out = Vec::new();
    head.logits(&mut x, &mut out, &mut ()).unwrap();
    out
}

/// Largest difference, by the range of the expected values.
fn difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let (low, high) = want.iter().fold((f32::MAX, f32::MIN), |(l, h), &v| (l.min(v), h.max(v)));
    got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / (high - low)
}

/// The logits of a model, and its difference from transformers' ones.
fn against_transformers(shared: &Path, name: &str, path: &Path) -> f32 {
    let folder = shared.join("models").join(name);
    let arrays = npz::read(&folder.join("expected_logits.npz"));
    let ids: Vec<u32> = arrays["ids"].ints().iter().map(|&i| i as u32).collect();
    let input = open(path);
    difference(&logits(path, &*input.source, &input.metadata, &ids), &arrays["logits"].floats())
}

#[test]
fn checkpoints_give_transformers_logits() {
    let Some(shared) = common::shared() else { return };
    for name in [
        "random-llama2",
        "random-llama3",
        "random-llama-sharded",
        "random-llama-fp8",
        "random-llama-f16",
        "random-llama-f32",
        "random-llama-576",
        "random-mistral",
        "random-qwen2",
        "random-qwen3",
    ] {
        let d = against_transformers(&shared, name, &shared.join("models").join(name));
        println!("{name}: {d:.2e} of the range");
        assert!(d < 1e-5, "{name}: {d:e} of the range");
    }
}

/// Architectures that are not converted yet run from the GGUF that the reference converter makes.
#[test]
fn gguf_files_of_other_architectures_give_transformers_logits() {
    let (Some(shared), Some(convert)) = (common::shared(), common::converter()) else { return };
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "random-mixtral",
        "random-qwen3moe",
        "random-smollm3",
        "random-phi3",
        "random-gemma2",
        "random-gemma3",
        "random-granite",
        "random-olmo2",
    ] {
        let out = dir.path().join(format!("{name}.gguf"));
        let run = std::process::Command::new(&convert)
            .arg(shared.join("models").join(name))
            .args(["--outtype", "f32", "--outfile"])
            .arg(&out)
            .output()
            .unwrap();
        assert!(run.status.success(), "{name}: {}", String::from_utf8_lossy(&run.stderr));
        let d = against_transformers(&shared, name, &out);
        println!("{name}: {d:.2e} of the range");
        assert!(d < 1e-5, "{name}: {d:e} of the range");
    }
}

/// Trained models against real llama.cpp, which computes in f32 here: f32 file, f32 cache, no flash attention.
#[test]
fn trained_models_give_llama_cpps_logits() {
    let (Some(shared), Some(tool)) = (common::shared(), common::peer("llama-logits")) else { return };
    let mut models = vec![shared.join("models/tiny-llama")];
    match std::env::var_os("OSTQ_MODELS").map(|m| Path::new(&m).join("smollm2-135m")).filter(|m| m.is_dir()) {
        Some(folder) => models.push(folder),
        None => eprintln!("SKIPPED: no smollm2-135m (set OSTQ_MODELS, `just models`)"),
    }
    let dir = tempfile::tempdir().unwrap();
    for folder in models {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let (gguf, out) = (dir.path().join("model.gguf"), dir.path().join("logits"));
        let run = |command: &mut std::process::Command| {
            let output = command.output().unwrap();
            assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        };
        let ours = env!("CARGO_BIN_EXE_ostq-convert");
        run(std::process::Command::new(ours).arg(&folder).arg(&gguf).args(["--outtype", "f32", "--quiet", "--force"]));
        let ids: Vec<u32> = (0..96).map(|i| 5 + i * 7919 % 8000).collect();
        run(std::process::Command::new(&tool).arg(&gguf).arg(&out).args(ids.iter().map(u32::to_string)));
        let bytes = std::fs::read(&out).unwrap();
        let want: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        // from the checkpoint and from the file
        for path in [&folder, &gguf] {
            let input = open(path);
            let d = difference(&logits(path, &*input.source, &input.metadata, &ids), &want);
            println!("{name}: {d:.2e} of the range");
            assert!(d < 2e-5, "{name}: {d:e} of the range");
        }
    }
}
