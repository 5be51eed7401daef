//! GPTQ against the textbook, and what must hold on every tensor.

use super::factor::Factor;
use super::matrix::{nearest, round};
use crate::formats::grid::Grid;
use crate::formats::iq::codebook::Codebook;
use crate::gguf::GgmlType;
use crate::linalg;

fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| (0..4).map(|_| next()).sum::<f32>() * 0.05).collect()
}

/// `E[x xᵀ]` of correlated activations with columns of very different sizes.
fn hessian(n: usize, seed: u64) -> Vec<f64> {
    let tokens = 2 * n;
    let x = values(tokens * n, seed);
    let mut mixed = vec![0f64; tokens * n];
    for t in 0..tokens {
        let mut carried = 0.0;
        for j in 0..n {
            carried = 0.7 * carried + f64::from(x[t * n + j]);
            mixed[t * n + j] = carried * (1.0 + 3.0 * ((j * 37 % 11) as f64 / 11.0));
        }
    }
    let mut h = vec![0f64; n * n];
    linalg::syrk_f64(&mut h, &mixed, tokens, n, linalg::Par::Seq);
    h.iter_mut().for_each(|v| *v /= tokens as f64);
    linalg::tests::packed(&h, n)
}

fn identity(n: usize) -> Factor {
    let mut h = vec![0.0; n * n];
    (0..n).for_each(|i| h[i * n + i] = 1.0);
    Factor::new(&linalg::tests::packed(&h, n), 1, n, 0.0).unwrap()
}

fn error(f: &Factor, v: &[f32], t: &[f32]) -> f64 {
    super::refine::errors(f, v, t, &mut Vec::new()).iter().sum()
}

/// GPTQ as its paper has it (Frantar et al. 2023, algorithm 1 without blocks): the inverse Hessian, its upper Cholesky factor,
/// column by column to the nearest of `grid` with a fixed step.
fn textbook(w: &[f32], h: &[f32], n: usize, step: f64, (lo, hi): (f64, f64)) -> Vec<f64> {
    // H⁻¹ by Gauss-Jordan
    let mut a: Vec<Vec<f64>> = (0..n)
        .map(|i| (0..2 * n).map(|j| if j < n { h[i * n + j].into() } else { f64::from(j - n == i) }).collect())
        .collect();
    for i in 0..n {
        let pivot = a[i][i];
        a[i].iter_mut().for_each(|v| *v /= pivot);
        for k in (0..n).filter(|k| *k != i) {
            let (by, row) = (a[k][i], a[i].clone());
            a[k].iter_mut().zip(row).for_each(|(v, r)| *v -= by * r);
        }
    }
    // Uᵀ U = H⁻¹
    let mut u = vec![vec![0f64; n]; n];
    for i in 0..n {
        for j in i..n {
            let sum: f64 = (0..i).map(|k| u[k][i] * u[k][j]).sum();
            let rest = a[i][n + j] - sum;
            u[i][j] = if i == j { rest.sqrt() } else { rest / u[i][i] };
        }
    }
    let mut q = Vec::new();
    for row in w.chunks_exact(n) {
        let mut row: Vec<f64> = row.iter().map(|v| f64::from(*v)).collect();
        for j in 0..n {
            let v = (row[j] / step).round_ties_even().clamp(lo, hi) * step;
            let e = (row[j] - v) / u[j][j];
            (j + 1..n).for_each(|k| row[k] -= e * u[j][k]);
            q.push(v);
        }
    }
    q
}

/// MXFP4's scale is a power of two, so that with one search result for every block the codes are those of the textbook; here
/// Q8_0 with all blocks of one extreme value has one step for all.
#[test]
fn columns_are_those_of_the_textbook() {
    let n = 96;
    let f = Factor::new(&hessian(n, 3), 1, n, 0.01).unwrap();
    let w = values(40 * n, 5);
    let g = Grid::of(GgmlType::Q4_0).unwrap();
    let mut t = super::gptq::Tile::new(&g, &w, n);
    let fixed = crate::formats::search::to_f16_bits(0.03);
    t.heads.iter_mut().for_each(|h| h.d = fixed);
    super::gptq::gptq_tile(&g, &super::levels::AnyLevels::of(g.levels), &f, &mut t, false);
    let step = f64::from(crate::formats::search::from_f16_bits(fixed));
    let book = textbook(&w, &f.h, n, step, (-8.0, 7.0));
    // f32 against f64: a value on a border may fall to the other side, and move what follows a little
    let differ = t.values.iter().zip(&book).filter(|(a, b)| (f64::from(**a) - **b).abs() > 1e-3 * step).count();
    assert!(differ <= 3, "{differ} of {} codes differ", book.len());
}

#[test]
fn the_factor_is_the_upper_one_of_the_inverse() {
    let n = 70;
    let f = Factor::new(&hessian(n, 1), 1, n, 0.01).unwrap();
    // U H Uᵀ = 1 where Uᵀ U = H⁻¹
    for i in 0..n {
        for j in 0..n {
            let mut sum = 0f64;
            for a in i..n {
                for b in j..n {
                    sum += f64::from(f.u[i * n + a]) * f64::from(f.h[a * n + b]) * f64::from(f.u[j * n + b]);
                }
            }
            assert!((sum - f64::from(i == j)).abs() < 1e-3, "{i} {j}: {sum}");
        }
    }
}

#[test]
fn without_correlation_every_code_is_the_nearest() {
    let n = 512;
    let (f, w) = (identity(n), values(20 * 512, 8));
    for g in GgmlType::ALL.iter().filter_map(|&t| Grid::of(t)) {
        let r = round(g.ty.into(), &w, &w, &f).unwrap();
        let (_, plain) = nearest(g.ty, &w, &f).unwrap();
        assert!(r.error <= error(&f, &plain, &w) * (1.0 + 1e-6), "{}", g.ty);
        // no other code of its sub-block is nearer, but in rows that are ggml's (it codes before it rounds the scale to f16):
        // those must not be most of them, or this would say nothing
        assert!(r.rows_nearest <= 10, "{}: {} rows of 20", g.ty, r.rows_nearest);
        for (i, (v, w)) in r.values.iter().zip(&w).enumerate() {
            if r.values[i / n * n..][..n] == plain[i / n * n..][..n] {
                continue;
            }
            let others = r.values[i / g.sub * g.sub..][..g.sub].iter();
            let nearest = others.map(|o| (o - w).abs()).fold(f32::MAX, f32::min);
            assert!((v - w).abs() <= nearest * (1.0 + 1e-4) + 1e-7, "{} at {i}", g.ty);
        }
    }
}

#[test]
fn never_above_nearest_and_well_below_it() {
    // whole panels, and a last one that is shorter
    for n in [512, 544] {
        let rounded = GgmlType::ALL.iter().copied().filter(|t| Grid::of(*t).is_some() || Codebook::of(*t).is_some());
        below_nearest(n, rounded.filter(|t| n.is_multiple_of(t.block_len())));
    }
}

fn below_nearest(n: usize, types: impl Iterator<Item = GgmlType>) {
    let f = Factor::new(&hessian(n, 2), 1, n, 0.01).unwrap();
    let w = values(70 * n, 6);
    for ty in types {
        let r = round(ty.into(), &w, &w, &f).unwrap();
        let own = error(&f, &r.values, &w);
        let (_, plain) = nearest(ty, &w, &f).unwrap();
        let plain = error(&f, &plain, &w);
        assert!((own / r.error - 1.0).abs() < 1e-3, "{ty}: the error that is reported: {own} {}", r.error);
        assert!((plain / r.nearest - 1.0).abs() < 1e-3, "{ty}");
        eprintln!("{ty}: {:.3} of nearest, {} rows", own / plain, r.rows_nearest);
        assert!(own < 0.9 * plain, "{ty}: {own} of {plain}");
    }
}

/// Every block of a row has the row's scale, of GPTQ and of nearest rounding, and GPTQ is well below it.
#[test]
fn rows_can_have_one_scale() {
    let n = 512;
    let f = Factor::new(&hessian(n, 2), 1, n, 0.01).unwrap();
    let w = values(70 * n, 6);
    for ty in [GgmlType::Q4_0, GgmlType::Q5_0, GgmlType::Q8_0, GgmlType::IQ4_NL] {
        let r = round(super::matrix::Form { ty, row_scales: true }, &w, &w, &f).unwrap();
        let heads = |bytes: &[u8]| -> Vec<u16> {
            bytes.chunks_exact(ty.block_bytes()).map(|b| crate::formats::grid::head(ty, b).d).collect()
        };
        for bytes in [&r.bytes, &r.plain] {
            let all = heads(bytes);
            assert!(all.chunks(n / 32).all(|row| row.iter().all(|d| *d == row[0])), "{ty}");
            assert!(all.iter().any(|d| *d != all[0]), "{ty}: rows differ");
        }
        assert_eq!(r.rows_nearest, 0, "{ty}");
        assert!(r.error < 0.9 * r.nearest, "{ty}: {} of {}", r.error, r.nearest);
        let blocks = round(ty.into(), &w, &w, &f).unwrap();
        assert!(blocks.error < r.error, "{ty}: blocks have more to choose");
    }
}

#[test]
fn threads_and_instruction_sets_change_nothing() {
    let n = 512;
    let f = Factor::new(&hessian(n, 4), 1, n, 0.01).unwrap();
    let w = values(130 * n, 7);
    let on = |threads: usize, isa| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let all = GgmlType::ALL.iter().copied().filter(|t| Grid::of(*t).is_some() || Codebook::of(*t).is_some());
        pool.install(|| {
            crate::formats::simd::with_isa(isa, || {
                all.map(|t| round(t.into(), &w, &w, &f).unwrap().bytes).collect::<Vec<_>>()
            })
        })
    };
    let isa = crate::formats::simd::isa();
    let one = on(1, isa);
    assert!(one == on(3, isa));
    for isa in crate::formats::simd::Isa::available() {
        assert!(one == on(1, isa), "{}", isa.name());
    }
}

/// Rows of several laws, and importance that is log-normal: with uncorrelated inputs no row is worse than ggml's.
#[test]
fn without_correlation_no_row_is_worse_than_with_ggml() {
    let n = 512;
    let rows = 200;
    let mut seed = 0x1234_5678_9abc_def1u64;
    let mut uniform = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((seed >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    let mut normal = || (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
    let h: Vec<f64> = (0..n * n).map(|i| if i / n == i % n { (normal() * 1.2).exp() } else { 0.0 }).collect();
    let f = Factor::new(&linalg::tests::packed(&h, n), 1, n, 0.0).unwrap();
    let channels: Vec<f64> = (0..n).map(|j| if j % 61 == 7 { 12.0 } else { 1.0 }).collect();
    let w: Vec<f32> = (0..rows * n)
        .map(|i| {
            let x = match i / n % 4 {
                0 => normal(),
                // Laplace: a normal with an exponential variance
                1 => normal() * (normal().powi(2) + normal().powi(2)).sqrt(),
                // Student's t of four degrees
                2 => normal() / ((0..4).map(|_| normal().powi(2)).sum::<f64>() / 4.0).sqrt(),
                _ => normal() * channels[i % n],
            };
            (0.03 * x) as f32
        })
        .collect();
    let types = GgmlType::ALL.iter().copied().filter(|t| Grid::of(*t).is_some() || Codebook::of(*t).is_some());
    for ty in types {
        let own = round(ty.into(), &w, &w, &f).unwrap();
        let (_, plain) = nearest(ty, &w, &f).unwrap();
        let by_row = |v: &[f32], r: usize| -> f64 {
            let e = |j: usize| f64::from(f.h[j * n + j]) * f64::from(v[r * n + j] - w[r * n + j]).powi(2);
            (0..n).map(e).sum()
        };
        let (mut worse, mut ratio) = (0, 0.0);
        for r in 0..rows {
            let (a, b) = (by_row(&own.values, r), by_row(&plain, r));
            assert!(a <= b * (1.0 + 1e-5), "{ty}: row {r}: {a} of {b}");
            worse += usize::from(a > b * (1.0 - 1e-7));
            ratio += a / b / rows as f64;
        }
        eprintln!("{ty}: {ratio:.4} of ggml's error, {} rows fell back, {worse} are not better", own.rows_nearest);
        // rows that fell back hide a search that is worse
        assert!(own.rows_nearest == 0, "{ty}: {} rows are ggml's", own.rows_nearest);
    }
}
