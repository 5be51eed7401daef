//! The GPU against the processor: losses, gradients and steps of learning and of tuning, for every structure that the kernels
//! know. Only with the feature `cuda`; where no library or device is found it says so and looks at nothing, unless
//! OSTQ_REQUIRE_GPU is set.
#![cfg(feature = "cuda")]

mod common;
#[path = "common/decoder.rs"]
mod decoder;

use std::collections::BTreeMap;
use std::path::Path;

use common::program::fixture;
use decoder::{KINDS, Kind, Memory};
use ostq_convert::formats::format;
use ostq_convert::forward::{Activations, Model, Simulation};
use ostq_convert::gguf::GgmlType;
use ostq_convert::learning::LearningError;
use ostq_convert::learning::engine::{Engine, Processor};
use ostq_convert::learning::fake::Fake;
use ostq_convert::learning::gpu::Gpu;
use ostq_convert::learning::manifold::Rates;
use ostq_convert::learning::network::Network;
use ostq_convert::plan::{Input, Options, Recipe};
use ostq_convert::transform::{Anatomy, Pair};
use ostq_convert::tuning::TuningError;
use ostq_convert::tuning::blocks::Adam;
use ostq_convert::tuning::engine::Engine as _;
use ostq_convert::tuning::gpu::Passes;
use ostq_convert::tuning::head::Loss;
use ostq_convert::tuning::layer::Rounded;
use ostq_convert::tuning::student::Student;

const LENGTH: usize = 20;
const WINDOWS: usize = 3;
/// What may differ: losses, by a part; gradients, by a part of their own size and of the largest, since some are zero but for
/// rounding.
struct Within {
    loss: f64,
    gradient: f64,
    largest: f64,
}

/// A weight that falls to the other side moves gradients of its matrix.
const WEIGHTS: Within = Within { loss: 0.02, gradient: 0.1, largest: 1e-6 };
/// So does a rounded activation, those of all matrices before it, and here losses are small; most are near, see [`MEDIAN`].
const ACTIVATIONS: Within = Within { loss: 0.02, gradient: 0.5, largest: 1e-4 };
/// Products that round their factors to bf16.
const BF16: Within = Within { loss: 0.05, gradient: 0.2, largest: 1e-4 };
/// Of the differences of all gradients with rounded activations, as parts of their sizes: what half and nine of ten are below
/// (0.1 was seen of nine of ten).
const MEDIAN: f64 = 0.03;
const MOST: f64 = 0.15;
/// Structures that the kernels do not know, and a word of the refusal.
const REFUSED: [(&str, &str); 3] = [("olmo2", "norms"), ("gemma2", "SiLU"), ("gemma3", "SiLU")];

/// True if a test may go without the device for this reason.
fn skips(why: &str) -> bool {
    let absent = why.contains("was not found") || why.contains("no device can be used");
    if absent && std::env::var_os("OSTQ_REQUIRE_GPU").is_none() {
        println!("SKIPPED: {why}");
        return true;
    }
    false
}

fn dense() -> impl Iterator<Item = (&'static Kind, Memory)> {
    let all = KINDS.iter().map(|k| (k, k.weights()));
    all.filter(|(_, m)| !m.tensors.iter().any(|t| t.name.contains("_exps")))
}

fn tokens(windows: usize) -> Vec<u32> {
    (0..windows * LENGTH).map(|i| ((i * i * 7 + i * 13) % decoder::VOCAB) as u32).collect()
}

/// Everything that a step is led by.
fn gradients(engine: &mut dyn Engine) -> Vec<Vec<f64>> {
    let values = engine.values();
    let mut all: Vec<Vec<f64>> =
        values.rotations().map(|r| r.gradient.iter().map(|g| f64::from(*g)).collect()).collect();
    all.extend(values.all_scales().map(|s| s.gradient.clone()));
    all
}

/// Compares losses and gradients over so many windows; the differences of gradients, as parts of their sizes.
fn compare(gpu: &mut dyn Engine, cpu: &mut dyn Engine, windows: usize, loss: Loss, w: &Within, name: &str) -> Vec<f64> {
    let ids = tokens(windows);
    let (a, b) = (gpu.divergence(&ids).unwrap(), cpu.divergence(&ids).unwrap());
    // in f32, whatever the steps are in
    assert!((a - b).abs() < 0.02 * b + 1e-6, "{name}: {a} {b}");
    let (a, b) = (gpu.gradients(&ids, loss).unwrap(), cpu.gradients(&ids, loss).unwrap());
    assert!((a - b).abs() < w.loss * b.abs() + 1e-6, "{name}: {a} {b}");
    let (ours, theirs) = (gradients(gpu), gradients(cpu));
    let size = |g: &[f64]| g.iter().map(|v| v * v).sum::<f64>().sqrt();
    let largest = theirs.iter().map(|g| size(g)).fold(0.0, f64::max);
    let one = |(i, (a, b)): (usize, (&Vec<f64>, &Vec<f64>))| {
        let (off, size) = (a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt(), size(b));
        let most = w.gradient * size + w.largest * largest;
        assert!(size > 0.0 && off < most, "{name}: gradient {i} is off by {off:e} of {size:e}");
        off / size
    };
    ours.iter().zip(&theirs).enumerate().map(one).collect()
}

#[test]
fn learning_is_that_of_the_processor() {
    let path = Path::new("memory");
    let mut off = Vec::new();
    for (kind, memory) in dense() {
        let metadata = kind.metadata();
        let model = Model::new(path, &memory, &metadata).unwrap();
        let anatomy = Anatomy::new(path, &memory, &metadata).unwrap();
        let admitted: Vec<Pair> = Pair::ALL.into_iter().filter(|p| anatomy.admits(*p)).collect();
        let start = decoder::random_transforms(&anatomy, &admitted, 3);
        let (full, again, bf16) =
            (Passes::default(), Passes { bf16: false, again: true }, Passes { bf16: true, again: true });
        for (words, loss, passes) in [
            ("w8a16", Loss::Kl, full),
            ("w8a16", Loss::KlTop(20), again),
            ("w8a16", Loss::CrossEntropy, full),
            ("w8a8kv8", Loss::Kl, again),
            ("w8a8kv8 online", Loss::Kl, full),
            ("q4_0", Loss::Kl, again),
            ("q4_0", Loss::Kl, bf16),
            ("q4_1", Loss::KlTop(20), full),
        ] {
            let simulated: Option<Simulation> = words.split(' ').next().unwrap().parse().ok();
            let simulated = simulated.map(|s| Simulation { online: words.contains("online"), ..s });
            let activations = match simulated {
                Some(s) if s.inputs < 16 => Activations::Simulated(s),
                _ => Activations::F32,
            };
            let fake = |name: &str, columns: usize| match simulated {
                Some(s) => Some(Fake::Rows(s, name.contains(".ffn_down"))),
                None => {
                    let ty = GgmlType::from_name(words).unwrap();
                    columns.is_multiple_of(ty.block_len()).then_some(Fake::Type(ty))
                }
            };
            let name = format!("{} {words} {loss:?} {passes:?}", kind.name);
            let gpu = Gpu::new(&model, &anatomy, &start, &fake, activations, (LENGTH, WINDOWS), passes);
            let refused = REFUSED.iter().find(|(n, _)| *n == kind.name);
            let mut gpu = match (gpu, refused) {
                (Ok(gpu), None) => gpu,
                (Err(LearningError::Device(why)), Some((_, word))) => {
                    assert!(why.contains(word), "{name}: {why}");
                    continue;
                }
                (Err(LearningError::Device(why)), None) if skips(&why) => return,
                (Err(e), _) => panic!("{name}: {e}"),
                (Ok(_), Some(_)) => panic!("{name}: not refused"),
            };
            let network = Network::new(&model, &anatomy, &start, &fake, false).unwrap();
            let mut cpu = Processor::new(network, activations, LENGTH, WINDOWS).unwrap();
            let within = match activations {
                _ if passes.bf16 => &BF16,
                Activations::F32 => &WEIGHTS,
                _ => &ACTIVATIONS,
            };
            let mut differences = compare(&mut gpu, &mut cpu, WINDOWS, loss, within, &name);
            // the weights are made anew from what moved, for fewer windows
            let rates = Rates { step: 1, rotation: 1e-3, scale: 1e-3 };
            cpu.values().step(&rates).unwrap();
            *gpu.values() = cpu.values().clone();
            cpu.fuse().unwrap();
            gpu.fuse().unwrap();
            let name = format!("{name}, moved");
            differences.extend(compare(&mut gpu, &mut cpu, WINDOWS - 1, loss, within, &name));
            if activations != Activations::F32 {
                off.extend(differences);
            }
        }
    }
    off.sort_by(f64::total_cmp);
    let [median, most] = [off[off.len() / 2], off[off.len() * 9 / 10]];
    println!(
        "rounded activations, {} gradients: half off by less than {median:.4} of their size, nine of ten by {most:.4}",
        off.len()
    );
    assert!(median < MEDIAN && most < MOST, "{median} {most}");
}

/// Every matrix of a model, rounded.
fn rounded(model: &Model<'_>, ty: GgmlType) -> BTreeMap<String, Rounded> {
    let source = model.source();
    let mut all = BTreeMap::new();
    for (i, t) in source.tensors().iter().enumerate().filter(|(_, t)| t.dims.len() == 2) {
        let (columns, mut x) = (t.row_len() as usize, vec![0f32; t.elements() as usize]);
        if columns.is_multiple_of(ty.block_len()) {
            source.read_rows(i, 0..t.rows(), &mut x);
            let mut bytes = vec![0; x.len() / ty.block_len() * ty.block_bytes()];
            format(ty).unwrap().encode(&x, columns, None, &mut bytes).unwrap();
            all.insert(t.name.clone(), Rounded { ty, bytes });
        }
    }
    assert!(!all.is_empty(), "{ty}");
    all
}

#[test]
fn tuning_is_that_of_the_processor() {
    let recipe = Recipe { exact: true, ..Recipe::default() };
    let input = Input::open(&fixture("tiny"), &Options::resolve(recipe).unwrap()).unwrap();
    let model = Model::new(Path::new("tiny"), &*input.source, &input.metadata).unwrap();
    for (ty, again) in [(GgmlType::Q4_0, false), (GgmlType::Q4_1, true), (GgmlType::IQ4_NL, false)] {
        let rounded = rounded(&model, ty);
        let student = || Student::new(&model, &rounded, 16, false).unwrap();
        let mut gpu =
            match ostq_convert::tuning::gpu::Gpu::new(student(), (LENGTH, WINDOWS), Passes { bf16: false, again }) {
                Ok(gpu) => gpu,
                Err(TuningError::Device(why)) if skips(&why) => return,
                Err(e) => panic!("{ty}: {e}"),
            };
        let mut cpu = ostq_convert::tuning::engine::Processor::new(&model, student(), LENGTH, WINDOWS).unwrap();
        let ids = tokens(WINDOWS);
        for step in 1..=4 {
            let adam = Adam::new(step, 1e-3, 1e-3);
            let (a, b) = (gpu.step(&ids, &adam).unwrap(), cpu.step(&ids, &adam).unwrap());
            assert!((a - b).abs() < 0.01 * b, "{ty} step {step}: {a} {b}");
        }
        // parameters go here and back without a change
        let before = gpu.loss(&ids).unwrap();
        gpu.pull().unwrap();
        gpu.push().unwrap();
        let after = gpu.loss(&ids).unwrap();
        assert!((before - after).abs() < 1e-5 * before, "{ty}: {before} {after}");
    }
}
