//! The GPU against the processor: losses and gradients of learning, for every structure that the kernels know. Only with the
//! feature `cuda`; without a device it says so and looks at nothing.
#![cfg(feature = "cuda")]

#[path = "common/decoder.rs"]
mod decoder;

use std::path::Path;

use decoder::KINDS;
use ostq_convert::forward::{Activations, Model};
use ostq_convert::learning::LearningError;
use ostq_convert::learning::engine::{Engine, Processor};
use ostq_convert::learning::fake::Fake;
use ostq_convert::learning::gpu::Gpu;
use ostq_convert::learning::network::Network;
use ostq_convert::transform::{Anatomy, Pair};
use ostq_convert::tuning::head::Loss;

const LENGTH: usize = 20;

/// Everything that a step is led by.
fn gradients(engine: &mut dyn Engine) -> Vec<Vec<f64>> {
    let values = engine.values();
    let mut all: Vec<Vec<f64>> =
        values.rotations().map(|r| r.gradient.iter().map(|g| f64::from(*g)).collect()).collect();
    all.extend(values.all_scales().map(|s| s.gradient.clone()));
    all
}

#[test]
fn learning_is_that_of_the_processor() {
    let path = Path::new("memory");
    for kind in KINDS.iter() {
        let (memory, metadata) = (kind.weights(), kind.metadata());
        if memory.tensors.iter().any(|t| t.name.contains("_exps")) {
            continue;
        }
        let model = Model::new(path, &memory, &metadata).unwrap();
        let anatomy = Anatomy::new(path, &memory, &metadata).unwrap();
        let admitted: Vec<Pair> = Pair::ALL.into_iter().filter(|p| anatomy.admits(*p)).collect();
        let start = decoder::random_transforms(&anatomy, &admitted, 3);
        let ids: Vec<u32> = (0..3 * LENGTH).map(|i| ((i * i * 7 + i * 13) % decoder::VOCAB) as u32).collect();
        for (words, loss) in [
            ("w8a16", Loss::Kl),
            ("w8a16", Loss::KlTop(20)),
            ("w8a16", Loss::CrossEntropy),
            ("w8a8kv8", Loss::Kl),
            ("w8a8kv8 online", Loss::Kl),
        ] {
            let mut simulated: ostq_convert::forward::Simulation = words.split(' ').next().unwrap().parse().unwrap();
            simulated.online = words.contains("online");
            let fake = |name: &str, _: usize| Some(Fake::Rows(simulated, name.contains(".ffn_down")));
            let activations = Activations::Simulated(simulated);
            let mut gpu = match Gpu::new(&model, &anatomy, &start, &fake, activations, (LENGTH, 3)) {
                Ok(gpu) => gpu,
                Err(LearningError::Device(why)) => {
                    println!("SKIPPED {}: {why}", kind.name);
                    continue;
                }
                Err(e) => panic!("{}: {e}", kind.name),
            };
            let network = Network::new(&model, &anatomy, &start, &fake, false).unwrap();
            let mut cpu = Processor::new(network, activations, LENGTH, 3).unwrap();
            let (a, b) = (gpu.divergence(&ids).unwrap(), cpu.divergence(&ids).unwrap());
            let name = format!("{} {words} {loss:?}", kind.name);
            assert!((a - b).abs() < 0.02 * b, "{name}: {a} {b}");
            let (a, b) = (gpu.gradients(&ids, loss).unwrap(), cpu.gradients(&ids, loss).unwrap());
            assert!((a - b).abs() < 0.02 * b.abs(), "{name}: {a} {b}");
            for (i, (a, b)) in gradients(&mut gpu).iter().zip(&gradients(&mut cpu)).enumerate() {
                let size = b.iter().map(|v| v * v).sum::<f64>().sqrt();
                let off = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
                // roundings that fall to the other side move single values
                assert!(off < 0.05 * size, "{name}: gradient {i} is off by {off:e} of {size:e}");
            }
        }
    }
}
