//! The search for a scale and a minimum (`make_qkx2_quants`, `make_qkx3_quants`), one sub-block per lane.

use super::super::search::Affine;
use super::vector::{Mask, Vector};

/// What the search found, and where its levels come from: level = clamp(nearest(iscale · (x − origin))).
pub(super) struct Fit<V> {
    pub scale: V,
    /// The negated minimum.
    pub the_min: V,
    pub iscale: V,
    pub origin: V,
}

/// The searches of a chunk, by sub-block.
pub(super) struct Fits<const N: usize> {
    pub scale: [f32; N],
    pub the_min: [f32; N],
    pub iscale: [f32; N],
    pub origin: [f32; N],
}

impl<const N: usize> Fits<N> {
    #[inline(always)]
    pub(super) fn new() -> Self {
        Fits { scale: [0.0; N], the_min: [0.0; N], iscale: [0.0; N], origin: [0.0; N] }
    }

    #[inline(always)]
    pub(super) fn store<V: Vector>(&mut self, first: usize, fit: Fit<V>) {
        fit.scale.store(&mut self.scale[first..]);
        fit.the_min.store(&mut self.the_min[first..]);
        fit.iscale.store(&mut self.iscale[first..]);
        fit.origin.store(&mut self.origin[first..]);
    }
}

/// [`make_qkx_quants`](super::super::search::make_qkx_quants) for `V::LANES` sub-blocks of `N` values.
#[inline(always)]
pub(super) fn search<V: Vector, const N: usize>(p: &Affine, x: &[V; N], w: &[V; N]) -> Fit<V> {
    let (mut lowest, mut max) = (x[0], x[0]);
    let mut sum_w = w[0];
    let mut sum_x = sum_w * x[0];
    let mut i = 1;
    while i < N {
        lowest = x[i].min(lowest);
        max = x[i].max(max);
        sum_w = sum_w + w[i];
        sum_x = sum_x + w[i] * x[i];
        i += 1;
    }
    let zero = V::zero();
    let one = V::splat(1.0);
    let nmax = V::splat(p.nmax as f32);
    // min > 0 becomes 0; a zero keeps its sign.
    let mut min = lowest.replace(lowest.gt(zero), zero);
    let ranged = max.gt(min);
    let first_min = min;
    // Lanes without a range get a harmless one: their levels and sums are zero, so they never accept a candidate.
    let range = one.replace(ranged, max - min);
    let first_iscale = nmax / range;
    let mut scale = one / first_iscale;
    let mut best_error = zero;
    let mut i = 0;
    while i < N {
        let l = (first_iscale * (x[i] - min)).nearest().max(zero).min(nmax);
        best_error = best_error + w[i] * loss(p, scale * l + min - x[i]);
        i += 1;
    }
    // An infinite iscale gives level 0 everywhere (NaN and infinity have empty mantissas), as 0 does.
    let infinity = V::splat(f32::INFINITY);
    let mut best_iscale = zero.replace(infinity.gt(first_iscale), first_iscale);
    let mut origin = min;
    let mut levels = [zero; N];
    let mut is = 0;
    while is <= p.nstep {
        let range = one.replace(ranged, max - min);
        let iscale = V::splat(p.rmin + p.rdelta * is as f32 + p.nmax as f32) / range;
        // x − min and its product are monotonic in x, so the extremes tell whether a level can wrap.
        let limit = V::splat(4194303.0);
        let wraps =
            !p.guarded && !(limit.gt((iscale * (max - min)).abs()) & limit.gt((iscale * (lowest - min)).abs())).all();
        let (mut sum_l, mut sum_l2, mut sum_xl) = (zero, zero, zero);
        let mut i = 0;
        while i < N {
            let v = iscale * (x[i] - min);
            // In both forms NaN becomes 0.
            let l = if wraps { v.nearest().max(zero).min(nmax) } else { v.max(zero).min(nmax).round() };
            levels[i] = l;
            let wl = w[i] * l;
            sum_l = sum_l + wl;
            sum_l2 = sum_l2 + wl * l;
            sum_xl = sum_xl + wl * x[i];
            i += 1;
        }
        let det = sum_w * sum_l2 - sum_l * sum_l;
        let this_scale = (sum_w * sum_xl - sum_x * sum_l) / det;
        let this_min = (sum_l2 * sum_x - sum_l * sum_xl) / det;
        let positive = this_min.gt(zero);
        let this_scale = this_scale.replace(positive, sum_xl / sum_l2);
        let this_min = this_min.replace(positive, zero);
        let mut error = zero;
        let mut i = 0;
        while i < N {
            error = error + w[i] * loss(p, this_scale * levels[i] + this_min - x[i]);
            i += 1;
        }
        let accept = det.gt(zero) & best_error.gt(error);
        best_error = best_error.replace(accept, error);
        scale = scale.replace(accept, this_scale);
        best_iscale = best_iscale.replace(accept, iscale);
        origin = origin.replace(accept, min);
        min = min.replace(accept, this_min);
        is += 1;
    }
    Fit {
        scale: zero.replace(ranged, scale),
        the_min: first_min.replace(ranged, min).neg(),
        iscale: zero.replace(ranged, best_iscale),
        origin,
    }
}

/// |diff| or diff².
#[inline(always)]
fn loss<V: Vector>(p: &Affine, diff: V) -> V {
    if p.mad { diff.abs() } else { diff * diff }
}
