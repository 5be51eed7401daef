//! The search for the scale of scales (`make_qp_quants`), one super-block per lane.

use super::super::search::MAX_EPS;
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
