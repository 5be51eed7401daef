//! Learned transforms: the same weights as a conversion fuses, gradients against finite differences, the same result however a
//! run is cut, and a loss that falls.

#[path = "common/decoder.rs"]
mod decoder;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use decoder::{KINDS, Memory, Numbers};
use ostq_convert::forward::backward::layer::Slot;
use ostq_convert::forward::layer::{FeedForward, Linear};
use ostq_convert::forward::{Activations, Model, Runner, Simulation};
use ostq_convert::gguf::{GgmlType, Metadata};
use ostq_convert::learning::engine::Processor;
use ostq_convert::learning::fake::Fake;
use ostq_convert::learning::local;
use ostq_convert::learning::maps::Map;
use ostq_convert::learning::network::{Network, with_scales};
use ostq_convert::learning::run::{self, Done, Job, Settings, Watch};
use ostq_convert::learning::values::{SCALES, Values, scales, scales_mut};
use ostq_convert::transform::set::off_orthogonal;
use ostq_convert::transform::{Anatomy, Pair, TransformedSource, Transforms, preset};
use ostq_convert::tuning::head::{Loss, Target};
use ostq_convert::tuning::teacher::Teacher;

const PATH: &str = "memory";
const LENGTH: usize = 20;

/// Models that have a backward pass.
fn dense() -> impl Iterator<Item = (&'static str, Memory, Metadata)> {
    KINDS
        .iter()
        .map(|k| (k.name, k.weights(), k.metadata()))
        .filter(|(_, m, _)| !m.tensors.iter().any(|t| t.name.contains("_exps")))
}

/// Random transforms of every pair that the model admits.
fn random(model: &Anatomy, seed: u64) -> Transforms {
    let admitted: Vec<Pair> = Pair::ALL.into_iter().filter(|p| model.admits(*p)).collect();
    decoder::random_transforms(model, &admitted, seed)
}

fn tokens(windows: usize) -> Vec<u32> {
    (0..windows * LENGTH).map(|i| ((i * i * 7 + i * 13) % decoder::VOCAB) as u32).collect()
}

fn near(a: &[f32], b: &[f32]) -> bool {
    let size = b.iter().fold(0f32, |m, v| m.max(v.abs())).max(1e-6);
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 2e-5 * size)
}

/// The weights and biases that learning makes are those that a conversion fuses while it reads, for every structure.
#[test]
fn weights_are_those_of_the_conversion() {
    for (name, memory, metadata) in dense() {
        let model = Model::new(Path::new(PATH), &memory, &metadata).unwrap();
        let anatomy = Anatomy::new(Path::new(PATH), &memory, &metadata).unwrap();
        let t = random(&anatomy, 3);
        let network = Network::new(&model, &anatomy, &t, &|_, _| None, false).unwrap();
        let fused = TransformedSource::new(Path::new(PATH), Box::new(memory.clone()), &metadata, Arc::new(t)).unwrap();
        let other = Model::new(Path::new(PATH), &fused, &metadata).unwrap();
        for l in 0..decoder::LAYERS {
            let layer = other.layer(l, Activations::F32).unwrap();
            let FeedForward::Dense { gate, up, down } = &layer.ffn else { panic!("{name}") };
            let wanted: [&Linear; 7] = [&layer.q, &layer.k, &layer.v, &layer.o, gate, up, down];
            for (slot, wanted) in Slot::ALL.into_iter().zip(wanted) {
                let own = network.linear(l, slot);
                assert!(near(&own.weight, &wanted.weight), "{name}: {}", wanted.name);
                match (&own.bias, &wanted.bias) {
                    (Some(a), Some(b)) => assert!(near(a, b), "{name}: bias of {}", wanted.name),
                    (a, b) => assert_eq!(a.is_some(), b.is_some()),
                }
            }
        }
    }
}

/// Without rounding transforms change nothing: the divergence is 0, and no gradient is left of the many that cancel.
#[test]
fn the_function_is_kept_and_gradients_cancel() {
    for (name, memory, metadata) in dense() {
        let model = Model::new(Path::new(PATH), &memory, &metadata).unwrap();
        let anatomy = Anatomy::new(Path::new(PATH), &memory, &metadata).unwrap();
        let ids = tokens(3);
        let last = Teacher::new(&model, LENGTH, 3).unwrap().last(&ids).unwrap();
        let mut runner = Runner::new(&model, LENGTH, Activations::F32).unwrap();
        let target = Target { loss: Loss::CrossEntropy, last: &last, tokens: &ids, length: LENGTH };
        let mut largest = |fake: Option<Fake>, again: bool| -> (f64, f64, f64) {
            let fake = move |_: &str, columns: usize| fake.filter(|_| columns.is_multiple_of(16));
            let mut n = Network::new(&model, &anatomy, &random(&anatomy, 4), &fake, again).unwrap();
            let kld = runner.pass(|pass, _| n.divergence(pass, &ids, &last)).unwrap();
            runner.pass(|pass, _| n.gradients(pass, &ids, &target)).unwrap();
            // along the group: the skew part of G Rᵀ
            let mut skew = 0f64;
            for r in n.values.rotations() {
                let g = |i: usize, j: usize| {
                    (0..r.n).map(|k| f64::from(r.gradient[i * r.n + k]) * r.values[j * r.n + k]).sum::<f64>()
                };
                for (i, j) in (0..r.n * r.n).map(|at| (at / r.n, at % r.n)) {
                    skew = skew.max((g(i, j) - g(j, i)).abs());
                }
            }
            let scale = n.values.all_scales().flat_map(|s| s.gradient.clone()).fold(0f64, |m, g| m.max(g.abs()));
            (kld, skew, scale)
        };
        let rows = Fake::Rows("w4a16".parse().unwrap(), false);
        let (kld, skew, scale) = largest(None, false);
        let (rounded, rounded_skew, rounded_scale) = largest(Some(rows), false);
        assert!(kld < 1e-5 && rounded > 100.0 * kld.max(1e-9), "{name}: {kld:e} {rounded:e}");
        assert!(skew < 1e-3 * rounded_skew, "{name}: {skew:e} {rounded_skew:e}");
        assert!(scale < 1e-3 * rounded_scale, "{name}: {scale:e} {rounded_scale:e}");
        assert_eq!(largest(Some(rows), true), (rounded, rounded_skew, rounded_scale), "{name}: computed again");
    }
}

/// Gradients by rotations and scales of every linear are finite differences of Σ G W'.
#[test]
fn maps_lead_gradients_back() {
    for (name, memory, metadata) in dense() {
        let model = Model::new(Path::new(PATH), &memory, &metadata).unwrap();
        let anatomy = Anatomy::new(Path::new(PATH), &memory, &metadata).unwrap();
        let l = 1;
        let layer = model.layer(l, Activations::F32).unwrap();
        let FeedForward::Dense { gate, up, down } = &layer.ffn else { panic!("{name}") };
        let linears = [&layer.q, &layer.k, &layer.v, &layer.o, gate, up, down];
        for (slot, linear) in Slot::ALL.into_iter().zip(linears) {
            let (map, columns) = (Map::of(slot, l, &anatomy), linear.inputs);
            let mut values = Values::new(&random(&anatomy, 6), &anatomy);
            let mut numbers = Numbers(8);
            let g: Vec<f32> = linear.weight.iter().map(|_| numbers.next() as f32).collect();
            let sum = |v: &Values| -> f64 {
                let w = map.apply(&linear.weight, columns, v, l);
                w.iter().zip(&g).map(|(w, g)| f64::from(*w) * f64::from(*g)).sum()
            };
            map.back(&linear.weight, columns, &g, &mut values, l);
            let (start, h) = (values.clone(), 1.0 / 64.0);
            let close = |slope: f64, own: f64, what: &str| {
                assert!((slope - own).abs() < 2e-2 * (1.0 + own.abs()), "{name} {slot:?} {what}: {slope} {own}");
            };
            for pair in SCALES {
                let Some(s) = scales(&start.layers[l], pair) else { continue };
                for at in (0..s.log.len()).step_by(7) {
                    let moved = |by: f64| {
                        let mut v = start.clone();
                        let s = scales_mut(&mut v.layers[l], pair).unwrap();
                        s.log[at] += by;
                        s.refresh();
                        sum(&v)
                    };
                    close((moved(h) - moved(-h)) / (2.0 * h), s.gradient[at], pair.name());
                }
            }
            for which in 0..=start.layers[l].r_ov.len() {
                let rotation = match which {
                    0 => start.r_res.as_ref(),
                    i => start.layers[l].r_ov.get(i - 1),
                };
                let Some(own) = rotation else { continue };
                for at in (0..own.n * own.n).step_by(own.n * own.n / 9) {
                    let moved = |by: f32| {
                        let mut v = start.clone();
                        match which {
                            0 => v.r_res.as_mut().unwrap().single[at] += by,
                            i => v.layers[l].r_ov[i - 1].single[at] += by,
                        }
                        sum(&v)
                    };
                    let slope = (moved(h as f32) - moved(-h as f32)) / (2.0 * h);
                    close(slope, f64::from(own.gradient[at]), "rotation");
                }
            }
        }
    }
}

#[derive(Default)]
struct Losses(Vec<f64>, usize);

impl Watch for Losses {
    fn step(&mut self, _: usize, loss: f64) {
        self.0.push(loss);
    }
    fn held_out(&mut self, _: usize, _: f64, _: bool) {}
    fn resumed(&mut self, step: usize) {
        self.1 = step;
    }
}

/// One run on the first model.
fn learn(
    state: &Path,
    settings: Settings,
    activations: Activations,
    threads: usize,
    watch: &mut (dyn Watch + Send),
) -> (Done, Transforms) {
    let (_, memory, metadata) = dense().next().unwrap();
    let model = Model::new(Path::new(PATH), &memory, &metadata).unwrap();
    let anatomy = Anatomy::new(Path::new(PATH), &memory, &metadata).unwrap();
    let ids = tokens(30);
    let start = with_scales(preset::womi(&anatomy, &memory, 1).unwrap(), &anatomy);
    let fake = |_: &str, columns: usize| {
        let ty = GgmlType::Q4_0;
        match activations.simulated() {
            Some(s) => Some(Fake::Rows(s, false)),
            None => columns.is_multiple_of(ty.block_len()).then_some(Fake::Type(ty)),
        }
    };
    let network = Network::new(&model, &anatomy, &start, &fake, false).unwrap();
    let mut engine = Processor::new(network, activations, LENGTH, settings.batch).unwrap();
    let (tokens, held_out) = ids.split_at(24 * LENGTH);
    let save_every = Duration::ZERO;
    let key = "a test".into();
    let job = Job { tokens, held_out, length: LENGTH, settings, key, save_every, state };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let (done, made) = pool.install(|| run::run(&job, &mut engine, "mine", watch)).unwrap();
    made.check(&anatomy).unwrap();
    assert!(off_orthogonal(made.r_res.as_ref().unwrap(), model.spec.embed) < 1e-12);
    (done, made)
}

fn settings(steps: usize, loss: Loss) -> Settings {
    Settings { batch: 4, every: 5, rotation: 0.003, ..Settings::new(steps, loss, 7) }
}

#[test]
fn losses_fall_and_runs_repeat() {
    let folder = tempfile::tempdir().unwrap();
    for (loss, words) in
        [(Loss::KlTop(20), "w16a16"), (Loss::Kl, "w4a8"), (Loss::CrossEntropy, "w4a4kv4"), (Loss::KlTop(20), "w4a4kv4")]
    {
        let simulated: Simulation = words.parse().unwrap();
        let activations = match words {
            "w16a16" => Activations::F32,
            _ => Activations::Simulated(Simulation { online: true, ..simulated }),
        };
        let mut losses = Losses::default();
        let state = folder.path().join(format!("{loss:?}{words}"));
        let (done, made) = learn(&state, settings(20, loss), activations, 2, &mut losses);
        println!("{loss:?} {words}: {} -> {} at step {}", done.before, done.after, done.step);
        // four bits of everything are too few for a model of this size to learn its way around
        let falls = words != "w4a4kv4";
        assert!(done.after < if falls { 0.97 } else { 1.0001 } * done.before, "{loss:?} {words}: {done:?}");
        assert!(losses.0.len() == 20 && losses.0.iter().all(|l| l.is_finite()));
        if loss == Loss::KlTop(20) {
            let again =
                learn(&state.with_extension("again"), settings(20, loss), activations, 1, &mut Losses::default());
            assert_eq!((again.0.after, again.1), (done.after, made), "one thread");
        }
    }
}

/// Ends the run at a step, as a kill would.
struct Killer(usize);

impl Watch for Killer {
    fn step(&mut self, step: usize, _: f64) {
        assert!(step < self.0, "killed");
    }
    fn held_out(&mut self, _: usize, _: f64, _: bool) {}
    fn resumed(&mut self, _: usize) {}
}

/// A run that is cut goes on to the same end; one that is done is found again; one of other settings begins anew.
#[test]
fn a_cut_run_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, cut) = (folder.path().join("whole"), folder.path().join("cut"));
    let kind = settings(20, Loss::KlTop(20));
    let wanted = learn(&whole, kind.clone(), Activations::F32, 2, &mut Losses::default());
    let killed = std::panic::catch_unwind(|| learn(&cut, kind.clone(), Activations::F32, 2, &mut Killer(17)));
    assert!(killed.is_err());
    let mut losses = Losses::default();
    let found = learn(&cut, kind.clone(), Activations::F32, 2, &mut losses);
    assert_eq!((losses.1, losses.0.len()), (16, 4));
    assert_eq!((found.0.after, &found.1), (wanted.0.after, &wanted.1));
    let mut losses = Losses::default();
    let again = learn(&cut, kind.clone(), Activations::F32, 2, &mut losses);
    assert_eq!((losses.1, losses.0.len()), (20, 0));
    assert_eq!(again.1, wanted.1);
    let mut losses = Losses::default();
    learn(&cut, Settings { seed: 8, ..kind }, Activations::F32, 2, &mut losses);
    assert_eq!((losses.1, losses.0.len()), (0, 20));
}

#[derive(Default)]
struct Errors(Vec<(f64, f64)>, usize);

impl local::Watch for Errors {
    fn layer(&mut self, _: usize, before: f64, after: f64) {
        self.0.push((before, after));
    }
    fn resumed(&mut self, layers: usize) {
        self.1 = layers;
    }
}

/// Layer by layer: every layer's error falls or stays, the rotation of the stream stays, and threads, files and a cut change
/// nothing.
#[test]
fn layers_learn_by_themselves() {
    let (_, memory, metadata) = dense().next().unwrap();
    let model = Model::new(Path::new(PATH), &memory, &metadata).unwrap();
    let anatomy = Anatomy::new(Path::new(PATH), &memory, &metadata).unwrap();
    let ids = tokens(30);
    let start = with_scales(preset::womi(&anatomy, &memory, 1).unwrap(), &anatomy);
    let fake = |_: &str, _: usize| Some(Fake::Rows("w4a16".parse().unwrap(), false));
    let folder = tempfile::tempdir().unwrap();
    let run = |state: &str, threads: usize, keep: bool, watch: &mut Errors| {
        let job = local::Job {
            model: &model,
            anatomy: &anatomy,
            tokens: &ids,
            held_out: 5,
            length: LENGTH,
            activations: Activations::F32,
            settings: settings(20, Loss::Kl),
            key: "a test".into(),
            keep,
            save_every: Duration::ZERO,
            state: &folder.path().join(state),
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let made = pool.install(|| local::run(&job, &start, &fake, "mine", watch)).unwrap();
        made.check(&anatomy).unwrap();
        made
    };
    let mut errors = Errors::default();
    let made = run("a", 2, true, &mut errors);
    println!("{:?}", errors.0);
    assert_eq!(errors.0.len(), decoder::LAYERS);
    assert!(errors.0.iter().all(|(before, after)| after <= before));
    assert!(errors.0.iter().any(|(before, after)| *after < 0.95 * before), "{:?}", errors.0);
    assert_eq!(made.r_res, start.r_res);
    assert_ne!(made.layers, start.layers);
    assert!(made == run("b", 1, false, &mut Errors::default()), "one thread, streams in files");
    // the last state is that of all layers: nothing is left to do
    let mut again = Errors::default();
    assert!(made == run("a", 2, true, &mut again));
    assert_eq!((again.0.len(), again.1), (0, decoder::LAYERS));
}
