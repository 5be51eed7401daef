//! Rounding of values once the scales are known, along the block: here lanes are neighbouring values.

use super::super::kquant::Rounding;
use super::chunk::LANES;
use super::vector::Vector;
use std::marker::PhantomData;

/// A vector of values at a time. Blocks are multiples of [`LANES`].
pub(super) struct Lanewise<V>(PhantomData<V>);

impl<V: Vector> Rounding for Lanewise<V> {
    #[inline(always)]
    fn requantize(x: &[f32], offset: f32, d: f32, lo: i32, hi: i32, levels: &mut [u8]) {
        let (offset, d) = (V::splat(offset), V::splat(d));
        let (lo, hi) = (V::splat(lo as f32), V::splat(hi as f32));
        let mut i = 0;
        while i < levels.len() {
            let l = ((V::load(&x[i..]) + offset) / d).nearest().max(lo).min(hi) - lo;
            l.store_bytes(&mut levels[i..]);
            i += LANES;
        }
    }

    #[inline(always)]
    fn iq4_levels(x: &[f32], id: f32, levels: &mut [u8]) {
        let id = V::splat(id);
        let mut i = 0;
        while i < levels.len() {
            (id * V::load(&x[i..])).iq4_level().store_bytes(&mut levels[i..]);
            i += LANES;
        }
    }
}

/// [`affine_levels`](super::super::kquant::affine_levels) of a guarded search.
#[inline(always)]
pub(super) fn affine_levels<V: Vector>(nmax: i32, x: &[f32], iscale: f32, origin: f32, levels: &mut [u8]) {
    let (iscale, origin, top) = (V::splat(iscale), V::splat(origin), V::splat(nmax as f32));
    let mut i = 0;
    while i < levels.len() {
        let l = (iscale * (V::load(&x[i..]) - origin)).max(V::zero()).min(top).round();
        l.store_bytes(&mut levels[i..]);
        i += LANES;
    }
}

/// [`symmetric_levels`](super::super::kquant::symmetric_levels) of finite values.
#[inline(always)]
pub(super) fn symmetric_levels<V: Vector>(nmax: i32, x: &[f32], iscale: f32, levels: &mut [u8]) {
    if iscale == 0.0 {
        levels.fill(0);
        return;
    }
    let (iscale, bottom, top) = (V::splat(iscale), V::splat(-nmax as f32), V::splat((nmax - 1) as f32));
    let mut i = 0;
    while i < levels.len() {
        let l = (iscale * V::load(&x[i..])).round().max(bottom).min(top) - bottom;
        l.store_bytes(&mut levels[i..]);
        i += LANES;
    }
}
