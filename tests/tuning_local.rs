//! Tuning layer by layer: its losses are those of the written file in the forward pass, the same however it is run.

#[path = "common/decoder.rs"]
mod decoder;

use std::path::Path;
use std::sync::atomic::Ordering;

use decoder::{Memory, Numbers};
use ostq_convert::convert::INTERRUPTED;
use ostq_convert::formats::format;
use ostq_convert::forward::{Activations, Hidden, Model, Runner};
use ostq_convert::gguf::{GgmlType, Metadata, Value};
use ostq_convert::rounding::state::blocks_path;
use ostq_convert::tuning::TuningError;
use ostq_convert::tuning::layer::Rounded;
use ostq_convert::tuning::local::{self, Done, Job, Watch};
use ostq_convert::tuning::run::{Settings, tuned};

const EMBED: usize = 64;
const FF: usize = 96;
const LAYERS: usize = 3;
const VOCAB: usize = 90;
const LENGTH: usize = 16;
const WINDOWS: usize = 40;
const HELD_OUT: usize = 4;
const TYPE: GgmlType = GgmlType::Q4_0;

/// A small decoder that scales its embedding and its branches.
fn model() -> (Memory, Metadata) {
    let mut numbers = Numbers(3);
    let mut m = Memory::default();
    m.matrix(&mut numbers, "token_embd.weight", &[EMBED, VOCAB], 4.0);
    for l in 0..LAYERS {
        let name = |part: &str| format!("blk.{l}.{part}.weight");
        for (part, dims) in [
            ("attn_q", [EMBED, EMBED]),
            ("attn_k", [EMBED, EMBED / 2]),
            ("attn_v", [EMBED, EMBED / 2]),
            ("attn_output", [EMBED, EMBED]),
            ("ffn_gate", [EMBED, FF]),
            ("ffn_up", [EMBED, FF]),
            ("ffn_down", [FF, EMBED]),
        ] {
            m.matrix(&mut numbers, &name(part), &dims, 1.3);
        }
        m.push(&name("attn_norm"), &[EMBED], vec![1.0; EMBED]);
        m.push(&name("ffn_norm"), &[EMBED], vec![1.0; EMBED]);
    }
    m.push("output_norm.weight", &[EMBED], vec![1.0; EMBED]);
    m.matrix(&mut numbers, "output.weight", &[EMBED, VOCAB], 1.0);
    let mut keys: Metadata = vec![("general.architecture".into(), Value::from("granite"))];
    for (k, v) in [
        ("block_count", LAYERS),
        ("embedding_length", EMBED),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("context_length", 64),
    ] {
        keys.push((format!("granite.{k}"), Value::U32(v as u32)));
    }
    for (k, v) in [
        ("residual_scale", 0.4),
        ("embedding_scale", 2.0),
        ("logit_scale", 1.5),
        ("attention.layer_norm_rms_epsilon", 1e-5),
    ] {
        keys.push((format!("granite.{k}"), Value::F32(v)));
    }
    (m, keys)
}

fn tokens() -> Vec<u32> {
    decoder::tokens(WINDOWS * LENGTH, VOCAB)
}

/// The matrices, rounded to nearest.
fn rounded(m: &Memory, name: &str) -> Option<Rounded> {
    let at = m.tensors.iter().position(|t| t.name == name && t.dims.len() == 2)?;
    let (columns, values) = (m.tensors[at].row_len() as usize, &m.values[at]);
    let mut bytes = vec![0; values.len() / TYPE.block_len() * TYPE.block_bytes()];
    format(TYPE).unwrap().encode(values, columns, None, &mut bytes).unwrap();
    Some(Rounded { ty: TYPE, bytes })
}

#[derive(Default)]
struct Seen {
    layers: Vec<Done>,
    stop_after: Option<usize>,
    resumed: Option<usize>,
}

impl Watch for Seen {
    fn layer(&mut self, l: usize, done: Done) {
        self.layers.push(done);
        if self.stop_after == Some(l) {
            INTERRUPTED.store(true, Ordering::Relaxed);
        }
    }

    fn resumed(&mut self, layers: usize) {
        self.resumed = Some(layers);
    }
}

/// Tunes; name, type and bytes of what is then in `state`.
fn tune(
    state: &Path,
    threads: usize,
    keep: bool,
    seen: &mut Seen,
) -> Result<Vec<(String, GgmlType, Vec<u8>)>, TuningError> {
    let (memory, metadata) = model();
    let model = Model::new(Path::new("memory"), &memory, &metadata).unwrap();
    let ids = tokens();
    let job = Job {
        model: &model,
        tokens: &ids,
        held_out: HELD_OUT,
        length: LENGTH,
        rounded: &|name| Ok(rounded(&memory, name)),
        settings: Settings { every: 10, rate: 2e-3, code_rate: 2e-2, ..Settings::new(100, HELD_OUT, false) },
        key: "text".into(),
        keep,
        state,
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let tensors = pool.install(|| local::run(&job, seen))?;
    let read = |name: &str| std::fs::read(blocks_path(state, &tuned(name))).unwrap();
    Ok(tensors.into_iter().map(|(name, ty)| (name.clone(), ty, read(&name))).collect())
}

/// Streams of a model before the first layer and after each.
fn streams(memory: &Memory, metadata: &Metadata) -> Vec<Vec<f32>> {
    let model = Model::new(Path::new("memory"), memory, metadata).unwrap();
    let (ids, count) = (tokens(), WINDOWS * LENGTH * EMBED);
    let mut runner = Runner::new(&model, LENGTH, Activations::F32).unwrap();
    let mut x = Hidden::Memory(vec![0.0; count]);
    runner.embed(&ids, &mut x).unwrap();
    let values = |h: &Hidden| {
        let mut v = vec![0f32; count];
        h.read(0, &mut v).unwrap();
        v
    };
    let mut all = vec![values(&x)];
    for l in 0..LAYERS {
        let mut y = Hidden::Memory(vec![0.0; count]);
        runner.layer(l, &x, &mut y, ids.len(), 4, &mut ()).unwrap();
        all.push(values(&y));
        x = y;
    }
    all
}

/// The error of layer `l` on windows held out, by the textbook.
fn error(float: &[Vec<f32>], own: &[Vec<f32>], l: usize) -> f64 {
    let from = (WINDOWS - HELD_OUT) * LENGTH * EMBED;
    let square = |a: &[f32], b: &[f32]| -> f64 {
        a[from..].iter().zip(&b[from..]).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
    };
    square(&own[l + 1], &float[l + 1]) / square(&float[l + 1], &float[l])
}

fn decoded(ty: GgmlType, bytes: &[u8], out: &mut [f32]) {
    match ty {
        GgmlType::F32 => out.iter_mut().zip(bytes.as_chunks().0).for_each(|(o, b)| *o = f32::from_le_bytes(*b)),
        ty => format(ty).unwrap().decode(bytes, out),
    }
}

/// One test, as the flag of interruption is one.
#[test]
fn layers_come_nearer_and_end_the_same_however_it_is_run() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut seen = Seen::default();
    let whole = tune(&at("a"), 1, true, &mut seen).unwrap();
    assert_eq!(seen.layers.len(), LAYERS);
    assert_eq!(whole.len(), LAYERS * 9, "seven matrices and two norms");

    // the errors are those of models that hold what was written
    let (memory, metadata) = model();
    let float = streams(&memory, &metadata);
    let mut own = memory.clone();
    for t in &memory.tensors {
        if let Some(r) = rounded(&memory, &t.name).filter(|_| t.name.starts_with("blk.") || t.name.starts_with("token"))
        {
            decoded(r.ty, &r.bytes, own.get(&t.name));
        }
    }
    for l in 0..LAYERS {
        // layers before are tuned, this one and those behind are not
        let before = error(&float, &streams(&own, &metadata), l);
        for (name, ty, bytes) in whole.iter().filter(|(n, ..)| n.starts_with(&format!("blk.{l}."))) {
            decoded(*ty, bytes, own.get(name));
        }
        let after = error(&float, &streams(&own, &metadata), l);
        let done = seen.layers[l];
        assert!(
            (done.before / before - 1.0).abs() < 1e-3 && (done.after / after - 1.0).abs() < 1e-3,
            "{l}: {done:?} {before} {after}"
        );
        assert!(done.after < 0.95 * done.before && done.step > 0, "{l}: {done:?}");
    }

    assert!(tune(&at("b"), 2, false, &mut Seen::default()).unwrap() == whole, "threads, and streams in files");
    let mut cut = Seen { stop_after: Some(0), ..Seen::default() };
    assert!(matches!(tune(&at("c"), 2, true, &mut cut), Err(TuningError::Interrupted)));
    INTERRUPTED.store(false, Ordering::Relaxed);
    let mut on = Seen::default();
    assert!(tune(&at("c"), 1, true, &mut on).unwrap() == whole, "interrupted");
    assert_eq!((on.resumed, on.layers.len()), (Some(1), LAYERS - 1));
    // what lies there in place of a tensor is refused, not read
    std::fs::write(blocks_path(&at("c"), &tuned("blk.1.attn_q.weight")), b"other").unwrap();
    let broken = tune(&at("c"), 1, true, &mut Seen::default()).unwrap_err().to_string();
    assert!(broken.contains("blk.1.attn_q.weight"), "{broken}");
}
