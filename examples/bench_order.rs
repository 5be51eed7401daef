//! The order of columns in GPTQ: natural against the largest second moment first, inside what shares a scale
//! (docs/quality.md). Inside a sub-block of a scalar grid any order can be stored.
//!
//! `cargo run --release --example bench_order -- MODEL HESSIAN TYPE...`: MODEL is a checkpoint folder or GGUF file, HESSIAN what
//! `calibrate --hessian` wrote for it. For each type and kind of tensor the geometric mean over layers of the error in the norm
//! of the Hessian, with the largest (and with the smallest) first, in parts of that in natural order; GPTQ with descent.

use std::collections::BTreeMap;
use std::path::Path;

use ostq_convert::calibration::hessian_file::HessianFile;
use ostq_convert::formats::grid::Grid;
use ostq_convert::gguf::GgmlType;
use ostq_convert::linalg::{packed_at, packed_len};
use ostq_convert::plan::{Input, Options, Recipe};
use ostq_convert::rounding::{Factor, matrix};

/// Error of rounding `w` \[rows, n\] with the columns in `order`.
fn error(ty: GgmlType, w: &[f32], h: &[f64], order: &[usize]) -> f64 {
    let n = order.len();
    let mut packed = vec![0f64; packed_len(n).expect("it was in memory")];
    for i in 0..n {
        (0..=i).for_each(|j| packed[packed_at(i, j)] = h[order[i] * n + order[j]]);
    }
    let f = Factor::new(&packed, 1, n, 0.01).expect("a Hessian");
    let w: Vec<f32> = w.chunks_exact(n).flat_map(|row| order.iter().map(|&j| row[j])).collect();
    matrix::round(ty.into(), &w, &w, &f).expect("a weight").error
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, hessian, types @ ..] = &args[..] else { panic!("MODEL HESSIAN TYPE...") };
    let input = Input::open(Path::new(model), &Options::resolve(Recipe::default()).unwrap()).expect("a model");
    let file = HessianFile::open(Path::new(hessian)).expect("second moments");
    for ty in types {
        let ty = GgmlType::from_name(ty).expect("a type");
        let grid = Grid::of(ty).expect("a scalar grid");
        let mut logs: BTreeMap<String, Vec<[f64; 2]>> = BTreeMap::new();
        for (index, t) in input.source.tensors().iter().enumerate() {
            let n = t.row_len() as usize;
            let fits = t.name.starts_with("blk.") && t.dims.len() == 2 && n.is_multiple_of(grid.block);
            let Some(h) = file.entry(&t.name).filter(|_| fits).map(|_| file.matrix(&t.name, 0).expect("its moments"))
            else {
                continue;
            };
            let mut w = vec![0f32; t.elements() as usize];
            input.source.read_rows(index, 0..t.rows(), &mut w);
            let natural: Vec<usize> = (0..n).collect();
            let sorted = |largest: bool| {
                let mut order = natural.clone();
                for run in order.chunks_mut(grid.sub) {
                    run.sort_by(|&a, &b| h[a * n + a].total_cmp(&h[b * n + b]));
                    if largest {
                        run.reverse();
                    }
                }
                order
            };
            let plain = error(ty, &w, &h, &natural);
            let ratios = [true, false].map(|largest| (error(ty, &w, &h, &sorted(largest)) / plain).ln());
            let kind = t.name.split('.').nth(2).unwrap_or_default().to_string();
            logs.entry(kind).or_default().push(ratios);
        }
        for (kind, logs) in &logs {
            let mean = |i: usize| (logs.iter().map(|l| l[i]).sum::<f64>() / logs.len() as f64).exp();
            println!("{ty:6} {kind:12} largest first {:.4}, smallest first {:.4}", mean(0), mean(1));
        }
    }
}
