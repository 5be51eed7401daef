//! Text that a model writes: the logits of every step against the whole forward pass, draws, and what calibration makes of it.

mod common;

use std::ops::Range;
use std::path::{Path, PathBuf};

use ostq_convert::calibration::words::{Wanted, Words};
use ostq_convert::forward::generate::{Generator, Joints, batch, memory};
use ostq_convert::forward::{Activations, Hidden, Model, Runner, run::Head};
use ostq_convert::gguf::{GgmlType, Metadata, Value};
use ostq_convert::mapped::MappedFile;
use ostq_convert::plan::{Input, Options, Recipe};
use ostq_convert::source::{SourceTensor, TensorSource};
use ostq_convert::tokenizer::encode::TextEncoder;

/// A model with random weights, in memory.
struct Made {
    metadata: Metadata,
    tensors: Vec<SourceTensor>,
    values: Vec<Vec<f32>>,
}

const VOCAB: u64 = 96;

impl Made {
    /// Two layers of width 48, four heads of 16 that share two keys.
    fn new(arch: &str, keys: &[(&str, Value)], parts: &[(&str, &[u64])]) -> Made {
        let key = |k: &str| format!("{arch}.{k}");
        let mut metadata: Metadata = vec![("general.architecture".into(), Value::from(arch))];
        for (k, v) in [
            ("block_count", 2),
            ("embedding_length", 48),
            ("attention.head_count", 4),
            ("attention.head_count_kv", 2),
            ("attention.key_length", 16),
            ("context_length", 256),
        ] {
            metadata.push((key(k), Value::U32(v)));
        }
        metadata.push((key("attention.layer_norm_rms_epsilon"), Value::F32(1e-5)));
        metadata.extend(keys.iter().map(|(k, v)| (key(k), v.clone())));
        let mut made = Made { metadata, tensors: Vec::new(), values: Vec::new() };
        for (name, dims) in [("token_embd", vec![48, VOCAB]), ("output_norm", vec![48]), ("output", vec![48, VOCAB])] {
            made.add(format!("{name}.weight"), dims);
        }
        for l in 0..2 {
            for (name, dims) in parts {
                let name = if name.ends_with(".bias") { name.to_string() } else { format!("{name}.weight") };
                made.add(format!("blk.{l}.{name}"), dims.to_vec());
            }
        }
        made
    }

    fn add(&mut self, name: String, dims: Vec<u64>) {
        let n: u64 = dims.iter().product();
        let mut s = self.tensors.len() as u64 + 1;
        let mut next = || {
            s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (s >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        // norms about 1; matrices such that the outputs are about as large as the inputs, the head's larger
        let scale = if name == "output.weight" { 4.0 } else { 1.0 } * (3.0 / dims[0] as f32).sqrt();
        let values = (0..n).map(|_| if name.contains("norm") { 1.0 + 0.3 * next() } else { scale * next() });
        self.values.push(values.collect());
        self.tensors.push(SourceTensor {
            origin: name.clone(),
            name,
            dims,
            stored: GgmlType::F32,
            file: None,
            position: 0,
            stored_bytes: n * 4,
            is_fp8: false,
            row_group: 1,
        });
    }
}

impl TensorSource for Made {
    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn files(&self) -> &[MappedFile] {
        &[]
    }

    fn read_rows(&self, index: usize, rows: Range<u64>, out: &mut [f32]) {
        let n = self.tensors[index].row_len() as usize;
        out.copy_from_slice(&self.values[index][rows.start as usize * n..rows.end as usize * n]);
    }

    fn copy_rows(&self, index: usize, rows: Range<u64>, out: &mut [u8]) {
        let n = self.tensors[index].row_len() as usize;
        let rows = &self.values[index][rows.start as usize * n..rows.end as usize * n];
        out.copy_from_slice(bytemuck::cast_slice(rows));
    }

    fn release(&self, _: usize, _: Range<u64>) {}
}

const BASE: &[(&str, &[u64])] = &[
    ("attn_q", &[48, 64]),
    ("attn_k", &[48, 32]),
    ("attn_v", &[48, 32]),
    ("attn_output", &[64, 48]),
    ("ffn_gate", &[48, 80]),
    ("ffn_up", &[48, 80]),
    ("ffn_down", &[80, 48]),
];
const NORMS: &[(&str, &[u64])] = &[("attn_norm", &[48]), ("ffn_norm", &[48])];
const POST_NORMS: &[(&str, &[u64])] = &[("post_attention_norm", &[48]), ("post_ffw_norm", &[48])];
const HEAD_NORMS: &[(&str, &[u64])] = &[("attn_q_norm", &[16]), ("attn_k_norm", &[16])];
const BIASES: &[(&str, &[u64])] = &[("attn_q.bias", &[64]), ("attn_k.bias", &[32]), ("attn_v.bias", &[32])];
const FUSED: &[(&str, &[u64])] =
    &[("attn_qkv", &[48, 128]), ("attn_output", &[64, 48]), ("ffn_up", &[48, 160]), ("ffn_down", &[80, 48])];

/// One of everything that layers do.
fn made() -> Vec<Made> {
    let window = ("attention.sliding_window", Value::U32(7));
    let scales = [
        ("embedding_scale", Value::F32(3.0)),
        ("residual_scale", Value::F32(0.5)),
        ("attention.scale", Value::F32(0.3)),
        ("logit_scale", Value::F32(2.0)),
    ];
    let caps =
        [("attn_logit_softcapping", Value::F32(2.0)), ("final_logit_softcapping", Value::F32(5.0)), window.clone()];
    let wide_norms: &[(&str, &[u64])] = &[("attn_q_norm", &[64]), ("attn_k_norm", &[32])];
    vec![
        Made::new("llama", &[], &[BASE, NORMS].concat()),
        Made::new("granite", &scales, &[BASE, NORMS].concat()),
        Made::new("smollm3", &[], &[BASE, NORMS].concat()),
        Made::new("qwen2", &[], &[BASE, NORMS, BIASES].concat()),
        Made::new("qwen3", &[], &[BASE, NORMS, HEAD_NORMS].concat()),
        Made::new("phi3", &[("rope.dimension_count", Value::U32(8))], &[FUSED, NORMS].concat()),
        Made::new("olmo2", std::slice::from_ref(&window), &[BASE, wide_norms, POST_NORMS].concat()),
        Made::new("gemma2", &caps, &[BASE, NORMS, POST_NORMS].concat()),
        Made::new("gemma3", &[window], &[BASE, NORMS, HEAD_NORMS, POST_NORMS].concat()),
    ]
}

fn open(path: &Path) -> Input {
    let options = Options::resolve(Recipe { r#type: Some("q8_0".into()), ..Recipe::default() }).unwrap();
    Input::open(path, &options).unwrap_or_else(|e| panic!("{e}"))
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tiny")
}

fn joints(first: u32) -> Joints {
    Joints { first, ends: Vec::new(), next: None }
}

fn on_threads<T: Send>(n: usize, f: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(f)
}

/// Logits of the whole forward pass over windows of `length` tokens, `[tokens, vocab]`.
fn logits(model: &Model<'_>, tokens: &[u32], length: usize) -> Vec<f32> {
    let mut runner = Runner::new(model, length, Activations::F32).unwrap();
    let mut hidden = Hidden::Memory(vec![0.0; tokens.len() * model.spec.embed]);
    runner.embed(tokens, &mut hidden).unwrap();
    for l in 0..model.spec.layers {
        runner.layer_in_place(l, &mut hidden, tokens.len(), 2, &mut ()).unwrap();
    }
    let Hidden::Memory(mut x) = hidden else { unreachable!() };
    let mut out = Vec::new();
    Head::new(model, Activations::F32, 1 << 30).unwrap().logits(&mut x, &mut out, &mut ()).unwrap();
    out
}

/// Largest difference between the logits of the steps and those of the whole pass over what was written, by their range.
fn difference(model: &Model<'_>, windows: usize, length: usize) -> f32 {
    let mut steps = vec![Vec::new(); length];
    let mut generator = Generator::new(model, length, windows, None).unwrap();
    // another text before: nothing of it may be left in the cache
    generator.write(7..7 + windows, &joints(2), 5, &mut |_, _| {}).unwrap();
    let tokens = generator.write(0..windows, &joints(1), 5, &mut |t, l| steps[t] = l.to_vec()).unwrap();
    let vocab = model.vocab;
    let want = logits(model, &tokens, length);
    let (low, high) = want.iter().fold((f32::MAX, f32::MIN), |(l, h), &v| (l.min(v), h.max(v)));
    let mut worst = 0.0f32;
    for (t, step) in steps[..length - 1].iter().enumerate() {
        assert_eq!(step.len(), windows * vocab);
        for (w, got) in step.chunks_exact(vocab).enumerate() {
            let want = &want[(w * length + t) * vocab..][..vocab];
            worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(worst, f32::max);
        }
    }
    worst / (high - low)
}

#[test]
fn every_step_has_the_logits_of_the_whole_pass() {
    for m in made() {
        let model = Model::new(Path::new("made"), &m, &m.metadata).unwrap_or_else(|e| panic!("{e}"));
        let d = difference(&model, 3, 70);
        println!("{}: {d:.2e} of the range", model.spec.arch);
        assert!(d < 1e-5, "{}: {d:e} of the range", model.spec.arch);
    }
    let mut folders = vec![fixture()];
    if let Some(shared) = common::shared() {
        let all = std::fs::read_dir(shared.join("models")).unwrap().map(|e| e.unwrap().path());
        folders.extend(all.filter(|p| p.file_name().unwrap().to_string_lossy().starts_with("random-")));
    }
    folders.sort();
    for folder in folders {
        let options = Options::resolve(Recipe { r#type: Some("q8_0".into()), ..Recipe::default() }).unwrap();
        // what is not converted yet has no keys here
        let Ok(input) = Input::open(&folder, &options) else { continue };
        let Ok(model) = Model::new(&folder, &*input.source, &input.metadata) else { continue };
        if model.spec.experts == 0 {
            let d = difference(&model, 2, 40);
            println!("{}: {d:.2e} of the range", folder.display());
            assert!(d < 1e-4, "{}: {d:e} of the range", folder.display());
        }
    }
}

#[test]
fn a_window_depends_on_its_number_and_the_seed_alone() {
    for m in made() {
        let model = Model::new(Path::new("made"), &m, &m.metadata).unwrap();
        let write = |threads, windows: Range<usize>, seed| {
            on_threads(threads, || {
                let mut generator = Generator::new(&model, 40, windows.len(), None).unwrap();
                generator.write(windows, &joints(1), seed, &mut |_, _| {}).unwrap()
            })
        };
        let one = write(1, 0..6, 3);
        assert_eq!(write(2, 0..6, 3), one, "{}", model.spec.arch);
        assert_ne!(write(1, 0..6, 4), one);
        assert_ne!(one[..40], one[40..80]);
        // what stands beside it may change the last bits of products, which a draw in thousands sees: not here
        assert!(write(1, 2..6, 3) == one[2 * 40..], "{}", model.spec.arch);
    }
}

#[test]
fn draws_have_the_models_probabilities() {
    let m = &made()[0];
    let model = Model::new(Path::new("made"), m, &m.metadata).unwrap();
    let (windows, vocab) = (4000, model.vocab);
    let mut generator = Generator::new(&model, 2, windows, None).unwrap();
    let mut p = Vec::new();
    let tokens = generator.write(0..windows, &joints(1), 11, &mut |_, l| p = l[..vocab].to_vec()).unwrap();
    let top = p.iter().fold(f32::MIN, |a, &b| a.max(b));
    let total: f64 = p.iter().map(|&l| f64::from(l - top).exp()).sum();
    let mut chi = 0.0;
    for (word, l) in p.iter().enumerate() {
        let expected = f64::from(l - top).exp() / total * windows as f64;
        let found = tokens.chunks_exact(2).filter(|w| w[1] == word as u32).count() as f64;
        chi += (found - expected).powi(2) / expected;
    }
    // 95 degrees of freedom: mean 95, standard deviation 13.8
    assert!((40.0..165.0).contains(&chi), "chi squared {chi}");
}

#[test]
fn texts_are_joined_where_one_ends() {
    let m = &made()[0];
    let model = Model::new(Path::new("made"), m, &m.metadata).unwrap();
    let joints = Joints { first: 1, ends: (40..96).collect(), next: Some(1) };
    let mut generator = Generator::new(&model, 50, 4, None).unwrap();
    let tokens = generator.write(0..4, &joints, 0, &mut |_, _| {}).unwrap();
    let pairs: Vec<&[u32]> = tokens.chunks_exact(50).flat_map(|w| w.windows(2)).collect();
    let after: Vec<u32> = pairs.iter().filter(|p| p[0] >= 40).map(|p| p[1]).collect();
    assert!(after.len() > 20 && after.iter().all(|&t| t == 1), "{after:?}");
    assert!(pairs.iter().filter(|p| p[0] < 40).any(|p| p[1] != 1));
}

#[test]
fn what_cannot_be_written_is_refused() {
    let made = made();
    let model = Model::new(Path::new("made"), &made[0], &made[0].metadata).unwrap();
    let needed = memory(&model, 64, 4);
    assert!(Generator::new(&model, 64, 4, Some(needed)).is_ok());
    let e = Generator::new(&model, 64, 4, Some(needed - 1)).err().unwrap().to_string();
    assert!(e.contains(&format!("{needed} bytes")) && e.contains("made"), "{e}");
    assert!(memory(&model, 64, 8) > needed && memory(&model, 128, 4) > needed && batch(&model, 64, 300) == 150);
    let mut generator = Generator::new(&model, 8, 1, None).unwrap();
    let e = generator.write(0..1, &joints(96), 0, &mut |_, _| {}).unwrap_err().to_string();
    assert!(e.contains("token 96 is not in a vocabulary of 96"), "{e}");
    let Some(shared) = common::shared() else { return };
    let path = shared.join("models/random-qwen3moe");
    let options = Options::resolve(Recipe { r#type: Some("q8_0".into()), ..Recipe::default() }).unwrap();
    let Ok(input) = Input::open(&path, &options) else { return };
    let model = Model::new(&path, &*input.source, &input.metadata).unwrap();
    let e = Generator::new(&model, 8, 1, None).err().unwrap().to_string();
    assert!(e.contains("experts"), "{e}");
}

/// The words of `--calibrate`.
#[test]
fn own_text_fills_what_other_text_leaves() {
    let input = open(&fixture());
    let path = fixture();
    let model = Model::new(&path, &*input.source, &input.metadata).unwrap();
    let encoder = TextEncoder::from_metadata(&input.metadata).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (state, file) = (dir.path().join("state"), dir.path().join("text.txt"));
    std::fs::write(&file, "the rain in Spain ".repeat(40)).unwrap();
    let windows = |words: &[&Path], limit, written: &mut usize| {
        let words: Vec<PathBuf> = words.iter().map(|w| w.to_path_buf()).collect();
        let wanted =
            Wanted { model: &model, encoder: &encoder, length: 32, limit: Some(limit), memory: None, state: &state };
        let words = Words::load(&words).unwrap();
        words.windows(&wanted, &mut |done, _| *written = done).unwrap()
    };
    let (own, mut written) = (Path::new("self"), 0);
    let alone = windows(&[own], 9, &mut written);
    assert_eq!((alone.len(), written), (9 * 32, 9 * 32));
    let bos = encoder.bos().unwrap();
    assert!(alone.chunks_exact(32).all(|w| w[0] == bos));
    // kept: not written again
    written = 0;
    assert_eq!((windows(&[own], 9, &mut written), written), (alone.clone(), 0));
    // behind a file
    let text = windows(&[&file], 1000, &mut written);
    let count = text.len() / 32;
    let both = windows(&[own, &file], count + 5, &mut written);
    let five = windows(&[own], 5, &mut written);
    assert_eq!((&both[..text.len()], &both[text.len()..]), (&text[..], &five[..]));
    assert_eq!(windows(&[own, &file], 3, &mut written), text[..3 * 32]);
    let built_in = windows(&[Path::new("builtin"), own], 6000, &mut written);
    assert_eq!(built_in.len(), 6000 * 32);
    // damage is seen
    assert_eq!(windows(&[own], 9, &mut written), alone);
    let kept = state.join("self.json");
    let whole = std::fs::read_to_string(&kept).unwrap();
    for damaged in [whole[..whole.len() / 2].to_string(), whole.replacen("\"tokens\":[501,", "\"tokens\":[500,", 1)] {
        assert_ne!(damaged, whole);
        std::fs::write(&kept, damaged).unwrap();
        written = 0;
        assert_eq!(windows(&[own], 9, &mut written), alone);
        assert!(written > 0);
    }
    ostq_convert::calibration::words::forget(&state);
    assert!(!kept.exists());
    let e = Words::load(&["builtin".into(), file]).err().unwrap().to_string();
    assert!(e.contains("builtin"), "{e}");
}
