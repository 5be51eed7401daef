//! Utilisation rates of real weights: the inequalities between the figures hold, and a rotation does what theory says.
//! `fixtures/tiny` always; `tiny-llama` of the shared folder where it is there, with its table on standard error.

mod common;

use std::path::Path;

use common::program::fixture;
use common::shared;
use ostq_convert::linalg::all_threads;
use ostq_convert::plan::{Input, Options, Recipe};
use ostq_convert::transform::qsur::{self, Qsur};
use ostq_convert::transform::qsur_report::{Kind, Report, Row};
use ostq_convert::transform::spread::Spread;

/// Block-diagonal Hadamard matrix of the largest blocks of a power of two, at most 256.
fn hadamard(d: usize) -> Vec<f64> {
    let b = 1 << d.trailing_zeros().min(8);
    let element = |at: usize| {
        let (i, j) = (at / d, at % d);
        let sign = if ((i % b) & (j % b)).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
        if i / b == j / b { sign / (b as f64).sqrt() } else { 0.0 }
    };
    (0..d * d).map(element).collect()
}

/// Figures of the matrices of the first layer, before and after the rotation of their inputs.
fn report(folder: &Path) -> Report {
    let input = Input::open(folder, &Options::resolve(Recipe::default()).unwrap()).unwrap();
    let options = qsur::Options::default();
    let mut rows = Vec::new();
    for (index, t) in input.source.tensors().iter().enumerate() {
        let d = t.row_len() as usize;
        if !t.name.starts_with("blk.0.") || t.rows() == 1 {
            continue;
        }
        let mut w = vec![0f32; t.elements() as usize];
        input.source.read_rows(index, 0..t.rows(), &mut w);
        let w: Vec<f64> = w.into_iter().map(f64::from).collect();
        let spread = Spread::of_rows(&w, d, all_threads()).unwrap();
        let figures = |s: &Spread| s.qsur(&options, all_threads()).unwrap();
        let after = figures(&spread.map(&hadamard(d), all_threads()).unwrap());
        rows.push(Row { name: t.name.clone(), kind: Kind::Weight, before: figures(&spread), after: Some(after) });
    }
    Report { damping: options.damping, rows }
}

fn check(what: &str, report: &Report) {
    assert!(report.rows.len() >= 6, "{what}: {} weights", report.rows.len());
    for r in &report.rows {
        let (before, after) = (r.before, r.after.unwrap());
        for q in [&before, &after] {
            let Qsur { tensor, block, rotation, channel, .. } = *q;
            assert!(0.0 < tensor && tensor <= block && block <= 1.0, "{what} {}: {q:?}", r.name);
            assert!(tensor <= rotation && rotation <= 1.0 && channel <= 1.0, "{what} {}: {q:?}", r.name);
        }
        // a rotation keeps the bound, and whatever it does stays below it
        assert!((after.rotation / before.rotation - 1.0).abs() < 1e-9, "{what} {}", r.name);
        assert!(after.tensor <= before.rotation, "{what} {}", r.name);
    }
}

#[test]
fn figures_of_real_weights() {
    check("tiny", &report(&fixture("tiny")));
    let Some(shared) = shared() else { return };
    let trained = report(&shared.join("models/tiny-llama"));
    check("tiny-llama", &trained);
    eprint!("{}", trained.table());
    // a trained model has columns of different size, which the rotation evens out
    let gain = |f: fn(&Qsur) -> f64| {
        let ratios = trained.rows.iter().map(|r| (f(&r.after.unwrap()) / f(&r.before)).ln());
        (ratios.sum::<f64>() / trained.rows.len() as f64).exp()
    };
    let (tensor, block) = (gain(|q| q.tensor), gain(|q| q.block));
    eprintln!("rotation gains {tensor:.3} with one scale per tensor, {block:.3} with one per 32 columns");
    assert!(tensor > 1.0 && block < tensor, "{tensor} {block}");
}
