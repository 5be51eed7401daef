//! The search for a scale around zero (`make_qx_quants`), one sub-block per lane.

use super::super::search::MAX_EPS;
use super::vector::{Mask, Vector};

/// The first value of largest magnitude, with its sign; and the magnitude (`signed_max`).
#[inline(always)]
pub(super) fn signed_max<V: Vector, const N: usize>(x: &[V; N]) -> (V, V) {
    let (mut max, mut amax) = (V::zero(), V::zero());
    for &v in x {
        let larger = v.abs().gt(amax);
        max = max.replace(larger, v);
        amax = amax.replace(larger, v.abs());
    }
    (max, amax)
}

/// [`make_qx_quants`](super::super::search::make_qx_quants) for `V::LANES` sub-blocks of `N` values: the scale, and
/// iscale, from which the levels come; both 0 for lanes of zeros. `FINITE` says that all values are.
#[inline(always)]
pub(super) fn search<V: Vector, const N: usize, const FINITE: bool>(nmax: i32, x: &[V; N], w: &[V; N]) -> (V, V) {
    let zero = V::zero();
    let (max, amax) = signed_max(x);
    let empty = V::splat(MAX_EPS).gt(amax);
    let max = max.replace(empty, V::splat(1.0));
    let mut wx = [zero; N];
    let mut i = 0;
    while i < N {
        wx[i] = w[i] * x[i];
        i += 1;
    }
    let (mut best_iscale, mut scale, mut best) = (zero, zero, zero);
    let mut is = -10;
    while is <= 9 {
        // The first candidate is that of 0.
        let first = is == -10;
        let shift = if first { 0.0 } else { 0.1 * is as f32 };
        let iscale = V::splat(-(nmax as f32 + shift)) / max;
        let (mut sumlx, mut suml2) = (zero, zero);
        let mut i = 0;
        while i < N {
            let v = iscale * x[i];
            // Finite values give |v| < nmax + 1, which cannot wrap.
            let l = if FINITE { v.round() } else { v.nearest() };
            let l = l.max(V::splat(-nmax as f32)).min(V::splat((nmax - 1) as f32));
            sumlx = sumlx + wx[i] * l;
            suml2 = suml2 + w[i] * l * l;
            i += 1;
        }
        let this_scale = sumlx / suml2;
        if first {
            best_iscale = iscale;
            scale = zero.replace(suml2.ne(zero), this_scale);
            best = scale * sumlx;
        } else {
            let accept = suml2.gt(zero) & (sumlx * sumlx).gt(best * suml2);
            if accept.any() {
                best_iscale = best_iscale.replace(accept, iscale);
                scale = scale.replace(accept, this_scale);
                best = best.replace(accept, this_scale * sumlx);
            }
        }
        is += if is == -1 { 2 } else { 1 };
    }
    (scale.replace(empty, zero), best_iscale.replace(empty, zero))
}
