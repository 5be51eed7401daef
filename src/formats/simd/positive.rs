//! The search for the scale of scales (`make_qp_quants`), one super-block per lane.

use super::super::search::MAX_EPS;
use super::chunk::{LANES, columns};
use super::vector::{Mask, Vector};

/// [`make_qp_quants`](super::super::search::make_qp_quants) for `V::LANES` super-blocks of `N` scales. Replaces the
/// values of `x` by their levels (0..=255: negative ones wrap) and returns the scale.
#[inline(always)]
pub(super) fn search<V: Vector, const N: usize>(nmax: i32, x: &mut [V; N], w: &[V; N]) -> V {
    let zero = V::zero();
    let top = V::splat(nmax as f32);
    let mut max = zero;
    for &v in x.iter() {
        max = max.max(v);
    }
    let empty = V::splat(MAX_EPS).gt(max);
    let max = max.replace(empty, V::splat(1.0));
    let mut iscale = top / max;
    let scale = V::splat(1.0) / iscale;
    let mut best_mse = zero;
    let mut i = 0;
    while i < N {
        let diff = x[i] - scale * (iscale * x[i]).nearest().low_byte();
        best_mse = best_mse + w[i] * diff * diff;
        i += 1;
    }
    let mut is = -4;
    while is <= 4 {
        let iscale_is = V::splat(0.1 * is as f32 + nmax as f32) / max;
        let scale_is = V::splat(1.0) / iscale_is;
        let mut mse = zero;
        let mut i = 0;
        while i < N {
            let diff = x[i] - scale_is * (iscale_is * x[i]).nearest().min(top);
            mse = mse + w[i] * diff * diff;
            i += 1;
        }
        let better = best_mse.gt(mse);
        best_mse = best_mse.replace(better, mse);
        iscale = iscale.replace(better, iscale_is);
        is += if is == -1 { 2 } else { 1 };
    }
    let mut levels = [zero; N];
    let (mut sumlx, mut suml2) = (zero, zero);
    let mut i = 0;
    while i < N {
        let l = (iscale * x[i]).nearest().min(top);
        levels[i] = l.low_byte();
        sumlx = sumlx + w[i] * x[i] * l;
        suml2 = suml2 + w[i] * l * l;
        i += 1;
    }
    let mut pass = 0;
    while pass < 5 {
        let mut changed = false;
        let mut i = 0;
        while i < N {
            let (wx, old) = (w[i] * x[i], levels[i]);
            let slx = sumlx - wx * old;
            let sl2 = suml2 - w[i] * old * old;
            let l = (x[i] * sl2 / slx).nearest().min(top);
            let new_slx = slx + wx * l;
            let new_sl2 = sl2 + w[i] * l * l;
            let better = (new_slx * new_slx * suml2).gt(sumlx * sumlx * new_sl2);
            let accept = slx.gt(zero) & sl2.gt(zero) & l.ne(old) & better;
            levels[i] = old.replace(accept, l.low_byte());
            sumlx = sumlx.replace(accept, new_slx);
            suml2 = suml2.replace(accept, new_sl2);
            changed |= accept.any();
            i += 1;
        }
        // A lane without a change stays as it is in later passes.
        if !changed {
            break;
        }
        pass += 1;
    }
    let mut i = 0;
    while i < N {
        x[i] = levels[i].replace(empty, zero);
        i += 1;
    }
    zero.replace(suml2.gt(zero), sumlx / suml2).replace(empty, zero)
}

/// The quantized scales and minima of [`LANES`] super-blocks of `N` sub-blocks.
pub(super) struct Quantized<const N: usize> {
    levels: [[[f32; LANES]; N]; 2],
    d: [[f32; LANES]; 2],
}

impl<const N: usize> Quantized<N> {
    /// Scales, minima, `d` and `dmin` of one.
    #[inline(always)]
    pub(super) fn of_block(&self, b: usize) -> ([u8; N], [u8; N], f32, f32) {
        let (mut ls, mut lm) = ([0u8; N], [0u8; N]);
        let mut j = 0;
        while j < N {
            ls[j] = self.levels[0][j][b] as u8;
            lm[j] = self.levels[1][j][b] as u8;
            j += 1;
        }
        (ls, lm, self.d[0][b], self.d[1][b])
    }
}

/// [`search`] for the scales and for the minima of super-blocks, given by sub-block, with the sums of weights.
#[inline(always)]
pub(super) fn scales_and_mins<V: Vector, const N: usize>(
    nmax: i32,
    scales: &[f32],
    mins: &[f32],
    sums: &[f32],
) -> Quantized<N> {
    let mut out = Quantized { levels: [[[0.0; LANES]; N]; 2], d: [[0.0; LANES]; 2] };
    let sums = columns::<V, N>(sums, N);
    let mut k = 0;
    while k < 2 {
        let mut v = columns::<V, N>(if k == 0 { scales } else { mins }, N);
        search(nmax, &mut v, &sums).store(&mut out.d[k]);
        let mut j = 0;
        while j < N {
            v[j].store(&mut out.levels[k][j]);
            j += 1;
        }
        k += 1;
    }
    out
}
