//! Utilisation rates of real weights: the inequalities between the figures hold, and the rotation that OSTQuant begins with
//! (WOMI, section 4.3: eigenvectors, then Hadamard) reaches the bound of all rotations.
//! `fixtures/tiny` always; `tiny-llama` of the shared folder where it is there, with its table on standard error.

mod common;

use std::path::Path;

use common::program::fixture;
use common::shared;
use ostq_convert::linalg::{all_threads, eigen, gemm_f64};
use ostq_convert::plan::{Input, Options, Recipe};
use ostq_convert::transform::qsur::{self, Qsur};
use ostq_convert::transform::qsur_report::{Kind, Report, Row};
use ostq_convert::transform::spread::Spread;

/// Hadamard matrix, block-diagonal with the largest power of two that divides `d`.
fn hadamard(d: usize) -> Vec<f64> {
    let b = 1 << d.trailing_zeros();
    let element = |at: usize| {
        let (i, j) = (at / d, at % d);
        let sign = if ((i % b) & (j % b)).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
        if i / b == j / b { sign / (b as f64).sqrt() } else { 0.0 }
    };
    (0..d * d).map(element).collect()
}

/// Eigenvectors of the covariance times Hadamard.
fn womi(s: &Spread) -> Vec<f64> {
    let d = s.dimension();
    let (_, vectors) = eigen(&s.covariance, d, all_threads()).unwrap();
    let columns: Vec<f64> = (0..d * d).map(|at| vectors[at % d * d + at / d]).collect();
    let mut a = vec![0.0; d * d];
    // Hadamard matrices made this way are symmetric
    gemm_f64(&mut a, &columns, &hadamard(d), (d, d, d), all_threads());
    a
}

/// Figures of the matrices of the first layer, before and after their rotation.
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
        let after = figures(&spread.map(&womi(&spread), all_threads()).unwrap());
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
            // but for rounding: where all blocks are alike these are equalities
            let below = |a: f64, b: f64| a <= b * (1.0 + 1e-12);
            assert!(0.0 < tensor && below(tensor, block) && below(block, 1.0), "{what} {}: {q:?}", r.name);
            assert!(below(tensor, rotation) && below(rotation, 1.0), "{what} {}: {q:?}", r.name);
            assert!(below(channel, 1.0), "{what} {}: {q:?}", r.name);
        }
        // a rotation keeps the bound; this one reaches it where Hadamard mixes all columns
        assert!((after.rotation / before.rotation - 1.0).abs() < 1e-9, "{what} {}", r.name);
        if before.dimension.is_power_of_two() {
            assert!((after.tensor / before.rotation - 1.0).abs() < 1e-9, "{what} {}: {after:?}", r.name);
        }
    }
}

#[test]
fn figures_of_real_weights() {
    check("tiny", &report(&fixture("tiny")));
    let Some(shared) = shared() else { return };
    let trained = report(&shared.join("models/tiny-llama"));
    check("tiny-llama", &trained);
    eprint!("{}", trained.table());
    // the others have fewer rows than columns and a Hadamard in pieces: whole blocks without variance, and nothing to compare
    let whole: Vec<&Row> = trained.rows.iter().filter(|r| r.before.dimension.is_power_of_two()).collect();
    let gain = |f: fn(&Qsur) -> f64| {
        let ratios = whole.iter().map(|r| (f(&r.after.unwrap()) / f(&r.before)).ln());
        (ratios.sum::<f64>() / whole.len() as f64).exp()
    };
    let (tensor, block) = (gain(|q| q.tensor), gain(|q| q.block));
    eprintln!("rotation gains {tensor:.3} with one scale per tensor, {block:.3} with one per 32 columns");
    // blocks already follow the columns: what is left for a rotation is less
    assert!(1.0 < block && block < tensor, "{tensor} {block}");
}
