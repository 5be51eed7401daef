//! Tuning: gradients against finite differences, every type that has a grid, the same result however it is run.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::program::fixture;
use ostq_convert::convert::INTERRUPTED;
use ostq_convert::formats::format;
use ostq_convert::formats::grid::Grid;
use ostq_convert::forward::{Activations, Model, Runner};
use ostq_convert::gguf::GgmlType;
use ostq_convert::plan::{Input, Options, Recipe};
use ostq_convert::tuning::blocks::{Adam, Blocks};
use ostq_convert::tuning::engine::{Engine, Processor};
use ostq_convert::tuning::layer::Rounded;
use ostq_convert::tuning::run::{self, Device, Done, Job, Settings, Watch};
use ostq_convert::tuning::student::Student;
use ostq_convert::tuning::{TuningError, teacher::Teacher};

/// Reproducible values in (-1, 1).
fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn open() -> Input {
    let recipe = Recipe { exact: true, ..Recipe::default() };
    Input::open(&fixture("tiny"), &Options::resolve(recipe).unwrap()).unwrap()
}

fn rounded(model: &Model<'_>, ty: GgmlType) -> BTreeMap<String, Rounded> {
    let source = model.source();
    let mut all = BTreeMap::new();
    for (i, t) in source.tensors().iter().enumerate().filter(|(_, t)| t.dims.len() == 2) {
        let mut x = vec![0f32; t.elements() as usize];
        source.read_rows(i, 0..t.rows(), &mut x);
        let columns = t.row_len() as usize;
        if !columns.is_multiple_of(ty.block_len()) {
            continue;
        }
        let mut bytes = vec![0; x.len() / ty.block_len() * ty.block_bytes()];
        format(ty).unwrap().encode(&x, columns, None, &mut bytes).unwrap();
        all.insert(t.name.clone(), Rounded { ty, bytes });
    }
    all
}

/// Blocks of every grid are written as they were read, and a step goes down the slope of the textbook.
#[test]
fn blocks_of_every_type_are_read_written_and_moved_downhill() {
    for &ty in GgmlType::ALL.iter().filter(|&&t| Grid::of(t).is_some()) {
        let (rows, columns) = (3, 512);
        let x = values(rows * columns, 5);
        let mut bytes = vec![0; x.len() / ty.block_len() * ty.block_bytes()];
        format(ty).unwrap().encode(&x, columns, None, &mut bytes).unwrap();
        let mut blocks = Blocks::new(ty, &bytes, columns, None).unwrap();
        assert_eq!(blocks.bytes(), bytes, "{ty}");
        let (mut before, mut decoded) = (vec![0f32; x.len()], vec![0f32; x.len()]);
        blocks.values(&mut before);
        format(ty).unwrap().decode(&bytes, &mut decoded);
        let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs().max(1e-2));
        assert!(near(&before, &decoded), "{ty}");

        // with targets, codes are latent and round to the same
        let mut latent = Blocks::new(ty, &bytes, columns, Some(&x)).unwrap();
        assert_eq!(latent.bytes(), bytes, "{ty}");
        // ... and where the codes are not the nearest ones, as GPTQ leaves them
        let noise = values(x.len(), 7);
        let far: Vec<f32> = x.iter().zip(&noise).map(|(x, n)| x + 0.5 * n).collect();
        assert_eq!(Blocks::new(ty, &bytes, columns, Some(&far)).unwrap().bytes(), bytes, "{ty}");
        // many steps against a fixed gradient: the linear loss must fall, and what is written is what was seen
        let g = values(x.len(), 9);
        let loss = |w: &[f32]| w.iter().zip(&g).map(|(w, g)| f64::from(w * g)).sum::<f64>();
        let mut w = before.clone();
        for step in 1..=200 {
            latent.step(&g, &mut w, &Adam::new(step, 1e-3, 5e-3));
        }
        assert!(loss(&w) < loss(&before) - 1.0, "{ty}: {} {}", loss(&w), loss(&before));
        format(ty).unwrap().validate(&latent.bytes()).unwrap();
        format(ty).unwrap().decode(&latent.bytes(), &mut decoded);
        assert!(near(&w, &decoded), "{ty}");
    }
}

/// Slopes of the loss along single parameters, by central differences, against what one step of Adam has gathered.
#[test]
fn gradients_agree_with_finite_differences() {
    let input = open();
    let model = Model::new(Path::new("tiny"), &*input.source, &input.metadata).unwrap();
    let tokens: Vec<u32> = (0..48).map(|i| (i * 37 % 200) as u32).collect();
    let last = Teacher::new(&model, 24, 1).unwrap().last(&tokens).unwrap();
    let rounded = rounded(&model, GgmlType::Q4_0);
    assert!(rounded.len() >= 8);
    let mut runner = Runner::new(&model, 24, Activations::F32).unwrap();
    let mut student = Student::new(&model, &rounded, 0, false).unwrap();
    let loss = |student: &mut Student<'_>, runner: &mut Runner<'_>| {
        student.refresh();
        runner.pass(|pass, _| student.loss(pass, &tokens, &last)).unwrap()
    };
    let before = loss(&mut student, &mut runner);
    // a step of no length leaves 0.1 g in the first moment of every parameter
    let adam = Adam::new(1, 0.0, 0.0);
    let stepped = runner.pass(|pass, _| student.step(pass, &tokens, &last, &adam)).unwrap();
    assert!((stepped - before).abs() < 1e-6 * before, "{stepped} {before}");
    let lengths: Vec<usize> = student.state().iter().map(|v| v.len()).collect();
    let mut tried = 0;
    // kinds of parameters are value, unit, m, v; q4_0 has codes (three vectors, fixed), then scales, offsets, d, m
    for value in 0..lengths.len() - 3 {
        let same = lengths[value] > 0 && lengths[value..value + 4].iter().all(|n| *n == lengths[value]);
        let (g, unit) = {
            let state = student.state();
            // the moments of one step tell where a kind begins: m is 0.1 g, v is 0.05 g²
            let moments = |m: &f32, v: &f32| *m != 0.0 && (v - 5.0 * m * m).abs() <= 1e-3 * v;
            if !same || !state[value + 2].iter().zip(&*state[value + 3]).any(|(m, v)| moments(m, v)) {
                continue;
            }
            assert!(state[value + 1].iter().all(|u| *u >= 0.0));
            (state[value + 2].iter().map(|m| m / 0.1).collect::<Vec<f32>>(), state[value + 1].clone())
        };
        // along the whole vector at once: the slope is Σ g·unit·sign
        let signs: Vec<f32> = values(g.len(), value as u64).iter().map(|v| v.signum()).collect();
        let want: f64 = g.iter().zip(&unit).zip(&signs).map(|((g, u), s)| f64::from(g * u * s)).sum();
        let size: f64 = g.iter().zip(&unit).map(|(g, u)| f64::from(g * u).powi(2)).sum::<f64>().sqrt();
        // far more than the steps of f16
        let h = 0.02f32;
        let mut at = |by: f32| {
            let kept = student.state()[value].clone();
            let moved = kept.iter().zip(&unit).zip(&signs).map(|((v, u), s)| v + by * u * s);
            *student.state()[value] = moved.collect();
            let l = loss(&mut student, &mut runner);
            *student.state()[value] = kept;
            l
        };
        let slope = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * f64::from(h));
        assert!((slope - want).abs() < 0.05 * size.max(want.abs()) + 1e-6, "{value}: {slope} {want} {size}");
        tried += 1;
    }
    assert!(tried > 8, "{tried}");
}

struct Quiet {
    stop_at: Option<usize>,
    resumed: Option<usize>,
}

impl Watch for Quiet {
    fn step(&mut self, step: usize, _: f64) {
        if self.stop_at == Some(step) {
            INTERRUPTED.store(true, Ordering::Relaxed);
        }
    }

    fn held_out(&mut self, _: usize, _: f64, _: bool) {}

    fn resumed(&mut self, step: usize) {
        self.resumed = Some(step);
    }
}

/// Tunes the fixture; the bytes of all tuned tensors.
fn tune(state: &Path, threads: usize, again: bool, watch: &mut Quiet) -> Result<(Done, Vec<u8>), TuningError> {
    let input = open();
    let model = Model::new(Path::new("tiny"), &*input.source, &input.metadata).unwrap();
    let rounded = rounded(&model, GgmlType::Q4_0);
    let tokens: Vec<u32> = (0..24 * 40u32).map(|i| i.wrapping_mul(2_654_435_761) % 201).collect();
    std::fs::create_dir_all(state).unwrap();
    let settings = Settings { every: 3, ..Settings::new(24, 4, false) };
    let job = Job {
        model: &model,
        tokens: &tokens[..24 * 32],
        held_out: &tokens[24 * 32..],
        length: 24,
        rounded: &rounded,
        settings,
        key: "text".into(),
        again,
        device: Device::Cpu,
        save_every: Duration::ZERO,
        state,
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let (done, tensors) = pool.install(|| run::run(&job, watch))?;
    let bytes = tensors
        .iter()
        .flat_map(|(n, _)| std::fs::read(ostq_convert::rounding::state::blocks_path(state, &run::tuned(n))).unwrap());
    Ok((done, bytes.collect()))
}

/// One test, as the flag of interruption is one.
#[test]
fn tuning_lowers_the_loss_and_ends_the_same_however_it_is_run() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let whole = || Quiet { stop_at: None, resumed: None };
    let (done, bytes) = tune(&at("a"), 1, false, &mut whole()).unwrap();
    assert!(done.after < 0.95 * done.before, "{done:?}");
    assert!(tune(&at("b"), 2, true, &mut whole()).unwrap().1 == bytes, "threads, and passes that are run again");
    let mut cut = Quiet { stop_at: Some(11), resumed: None };
    assert!(matches!(tune(&at("c"), 2, false, &mut cut), Err(TuningError::Interrupted)));
    INTERRUPTED.store(false, Ordering::Relaxed);
    let mut on = whole();
    assert!(tune(&at("c"), 1, false, &mut on).unwrap().1 == bytes, "interrupted");
    assert_eq!(on.resumed, Some(9));
}

/// The two engines agree where there is a device.
#[test]
fn a_processor_says_the_same_loss_twice() {
    let input = open();
    let model = Model::new(Path::new("tiny"), &*input.source, &input.metadata).unwrap();
    let rounded = rounded(&model, GgmlType::Q4_0);
    let tokens: Vec<u32> = (0..96).map(|i| i % 200).collect();
    let student = Student::new(&model, &rounded, 16, false).unwrap();
    let mut engine = Processor::new(&model, student, 24, 2).unwrap();
    let (first, second) = (engine.loss(&tokens).unwrap(), engine.loss(&tokens).unwrap());
    assert!(first == second && first > 0.0);
}
