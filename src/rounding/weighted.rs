//! Nearest rounding with the search of scales that GPTQ has: for a diagonal Hessian it is all that there is to do.
//!
//! Every block takes the scales, integers and minima of least `Σ w (x − v)²` that [`super::search`] finds, ggml's among them, and the
//! nearest codes. `w` is the importance of the columns, damped as a Hessian is.

use super::fit::DAMPING;
use super::levels::{AnyLevels, Levels};
use super::matrix::Form;
use super::search::{self, Head};
use crate::formats::grid::{self, Grid, Parts};
use crate::formats::{self, FormatError};
use crate::forward::kernels::vectorized;

/// Nearest rounding of `rows` of `n` values: with the search of this module where that is asked for, there are weights and the type
/// has a grid; as ggml does otherwise.
pub fn nearest(
    form: Form,
    rows: &[f32],
    n: usize,
    weights: Option<&[f32]>,
    search: bool,
    out: &mut [u8],
) -> Result<(), FormatError> {
    let ones;
    let grid = form.grid();
    // one scale for each row is not ggml's to choose: where nothing is known of columns they weigh alike
    let weights = match (weights.filter(|w| w.iter().any(|v| *v > 0.0)), &grid) {
        (None, Some(g)) if g.row => {
            ones = vec![1f32; n];
            Some(&ones[..])
        }
        (weights, _) => weights,
    };
    if let (Some(w), Some(g)) = (weights, grid)
        && (search || g.row)
        && encode(&g, rows, w, out)
    {
        return Ok(());
    }
    formats::format(form.ty).expect("the plan holds only types that can be encoded").encode(rows, n, weights, out)
}

/// Rounds `rows` of `weights.len()` values to blocks of `g`; false, and nothing done, where no weight is above zero.
pub fn encode(g: &Grid, rows: &[f32], weights: &[f32], out: &mut [u8]) -> bool {
    let mean = weights.iter().map(|w| f64::from(*w)).sum::<f64>() / weights.len().max(1) as f64;
    if !(mean.is_finite() && mean > 0.0) {
        return false;
    }
    let add = (DAMPING * mean) as f32;
    let weights: Vec<f32> = weights.iter().map(|w| w + add).collect();
    encode_rows(g, &AnyLevels::of(g.levels), rows, &weights, out);
    true
}

vectorized! {
    /// Rows one after the other, block by block.
    pub fn encode_rows(g: &Grid, levels: &AnyLevels, rows: &[f32], weights: &[f32], out: &mut [u8]) {
        match *levels {
            AnyLevels::Range(l) => blocks(g, l, rows, weights, out),
            AnyLevels::Table(l) => blocks(g, l, rows, weights, out),
        }
    }
}

#[inline(always)]
fn blocks<L: Levels>(g: &Grid, l: L, rows: &[f32], weights: &[f32], out: &mut [u8]) {
    let mut codes = [0u8; 256];
    let codes = &mut codes[..g.block];
    let parts = weights.chunks_exact(g.block).cycle();
    let mut shared = Head::default();
    for (i, ((x, w), out)) in
        rows.chunks_exact(g.block).zip(parts).zip(out.chunks_exact_mut(g.ty.block_bytes())).enumerate()
    {
        let at = i * g.block;
        if g.row && at.is_multiple_of(weights.len()) {
            shared = search::row(l, &rows[at..at + weights.len()], weights);
        }
        let head = if g.row { shared } else { search::search(g, l, x, w) };
        for sub in 0..g.subs() {
            let (scale, offset) = head.line(g, sub);
            let inverse = if scale != 0.0 { 1.0 / scale } else { 0.0 };
            let own = sub * g.sub..(sub + 1) * g.sub;
            for (code, x) in codes[own.clone()].iter_mut().zip(&x[own]) {
                *code = l.code(l.level((x - offset) * inverse));
            }
        }
        let (scales, offsets) = (&head.scales[..g.subs()], &head.offsets[..g.subs()]);
        grid::pack(g.ty, &Parts { d: head.d, m: head.m, scales, offsets, codes }, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::GgmlType;
    use crate::linalg::tests::values;

    /// Never a larger weighted error than ggml's search, on any block of any type, and a smaller one on the whole.
    #[test]
    fn no_block_is_worse_than_ggml_s() {
        let n = 512;
        for &ty in GgmlType::ALL.iter().filter(|t| Grid::of(**t).is_some()) {
            let x: Vec<f32> = values(6 * n, 3).iter().map(|v| v * v * v * 0.3).collect();
            let importance: Vec<f32> = values(n, 5).iter().map(|v| (2.5 * v).exp()).collect();
            let mean = importance.iter().sum::<f32>() / n as f32;
            let damped: Vec<f32> = importance.iter().map(|w| w + DAMPING as f32 * mean).collect();
            let format = crate::formats::format(ty).unwrap();
            let mut theirs = vec![0u8; x.len() / ty.block_len() * ty.block_bytes()];
            let mut ours = theirs.clone();
            assert!(encode(&Grid::of(ty).unwrap(), &x, &importance, &mut ours));
            format.validate(&ours).unwrap();
            // what ggml makes of each block by itself, with the same weights
            let weights = damped.chunks_exact(ty.block_len()).cycle();
            for ((x, w), out) in x.chunks(ty.block_len()).zip(weights).zip(theirs.chunks_mut(ty.block_bytes())) {
                format.encode(x, ty.block_len(), Some(w), out).unwrap();
            }
            let errors = |bytes: &[u8]| -> Vec<f64> {
                let mut v = vec![0f32; x.len()];
                format.decode(bytes, &mut v);
                let error = |(i, (v, x)): (usize, (&f32, &f32))| f64::from(damped[i % n]) * f64::from(v - x).powi(2);
                let all: Vec<f64> = v.iter().zip(&x).enumerate().map(error).collect();
                all.chunks(ty.block_len()).map(|c| c.iter().sum()).collect()
            };
            let (own, other) = (errors(&ours), errors(&theirs));
            for (a, b) in own.iter().zip(&other) {
                assert!(*a <= b * (1.0 + 1e-4) + 1e-12, "{ty}: {a} {b}");
            }
            let (own, other): (f64, f64) = (own.iter().sum(), other.iter().sum());
            let searched = !matches!(ty, GgmlType::Q8_0 | GgmlType::TQ1_0 | GgmlType::TQ2_0);
            assert!(!searched || own < 0.995 * other, "{ty}: {own} {other}");
        }
        assert!(!encode(&Grid::of(GgmlType::Q4_0).unwrap(), &[0.0; 32], &[0.0; 32], &mut [0; 18]));
    }

    #[test]
    fn rows_come_out_alike_in_any_portions() {
        let (x, w) = (values(512, 7), values(256, 9).iter().map(|v| v * v).collect::<Vec<f32>>());
        for ty in [GgmlType::Q4_K, GgmlType::Q4_0, GgmlType::IQ4_XS] {
            let mut one = vec![0u8; 512 / ty.block_len() * ty.block_bytes()];
            let mut two = one.clone();
            encode(&Grid::of(ty).unwrap(), &x[..256], &w, &mut one[..256 / ty.block_len() * ty.block_bytes()]);
            let half = 256 / ty.block_len() * ty.block_bytes();
            encode(&Grid::of(ty).unwrap(), &x[256..], &w, &mut one[half..]);
            encode(&Grid::of(ty).unwrap(), &x, &w, &mut two);
            assert_eq!(one, two, "{ty}: in any portions");
        }
    }
}
