//! Q3_K: lanes are sub-blocks of 16; for the scale of scales, super-blocks.

use super::super::kquant::q3k::{finish, scales_plain};
use super::super::kquant::{QK_K, symmetric_levels};
use super::super::search::MAX_EPS;
use super::chunk::{Chunk, Job, Kernel, LANES, columns, importance, of_blocks, run, sum, sums_of_squares};
use super::rounding::Lanewise;
use super::symmetric;
use super::vector::{Mask, Vector, Wide};
use crate::gguf::GgmlType;
use std::marker::PhantomData;

const SUB: usize = 16;
/// Sub-blocks per super-block.
const SUBS: usize = QK_K / SUB;
/// Levels go from −`NMAX` to `NMAX − 1`.
const NMAX: i32 = 4;

/// Encodes Q3_K.
#[inline(always)]
pub(super) fn encode<V: Vector>(job: Job<'_>) {
    match job.weights {
        None => run(Plain::<V>(PhantomData), job),
        Some(_) => run(Weighted::<V>(PhantomData), job),
    }
}

struct Plain<V>(PhantomData<V>);

/// Super-blocks searched side by side. The search is one long chain of divisions, so it needs more independent work
/// than one vector has.
const TOGETHER: usize = 2;

impl<V: Vector> Kernel for Plain<V> {
    const BLOCK: usize = QK_K;
    const BLOCKS: usize = TOGETHER * LANES / SUBS;

    #[inline(always)]
    fn block_bytes(&self) -> usize {
        GgmlType::Q3_K.block_bytes()
    }

    #[inline(always)]
    fn encode(&self, Chunk { x, out, .. }: Chunk<'_>) {
        let mut values = columns::<Wide<V, TOGETHER>, SUB>(x, SUB);
        let mut scales = [0.0f32; TOGETHER * LANES];
        search(&mut values).store(&mut scales);
        let mut levels = [[0.0f32; TOGETHER * LANES]; SUB];
        let mut i = 0;
        while i < SUB {
            values[i].store(&mut levels[i]);
            i += 1;
        }
        for (b, out) in out.chunks_exact_mut(self.block_bytes()).enumerate() {
            let x = x[b * QK_K..].first_chunk().expect("whole super-blocks");
            let scales = scales[b * SUBS..].first_chunk().expect("sixteen");
            let searched = |j: usize, l: &mut [u8]| {
                l.iter_mut().zip(&levels).for_each(|(l, levels)| *l = levels[b * SUBS + j] as u8);
            };
            finish::<Lanewise<V>>(x, scales_plain(scales), searched, out);
        }
    }
}

/// [`make_q3_quants`](super::super::search::make_q3_quants) for `V::LANES` sub-blocks. Replaces the values by their
/// levels, counted from −`NMAX`, and returns the scale.
#[inline(always)]
fn search<V: Vector>(x: &mut [V; SUB]) -> V {
    let zero = V::zero();
    let (bottom, top) = (V::splat(-NMAX as f32), V::splat((NMAX - 1) as f32));
    let (max, amax) = symmetric::signed_max(x);
    let empty = V::splat(MAX_EPS).gt(amax);
    let iscale = bottom / max.replace(empty, V::splat(1.0));
    let (mut levels, mut w, mut wx) = ([zero; SUB], [zero; SUB], [zero; SUB]);
    let (mut sumlx, mut suml2) = (zero, zero);
    let mut i = 0;
    while i < SUB {
        let l = (iscale * x[i]).round().max(bottom).min(top);
        levels[i] = l;
        w[i] = x[i] * x[i];
        wx[i] = w[i] * x[i];
        sumlx = sumlx + wx[i] * l;
        suml2 = suml2 + w[i] * l * l;
        i += 1;
    }
    let mut pass = 0;
    while pass < 5 {
        let mut changed = false;
        let mut i = 0;
        while i < SUB {
            let (w, wx, old) = (w[i], wx[i], levels[i]);
            let slx = sumlx - wx * old;
            let sl2 = suml2 - w * old * old;
            let l = (x[i] * sl2 / slx).nearest().max(bottom).min(top);
            let candidate = slx.gt(zero) & l.ne(old);
            // Most values keep their level.
            if candidate.any() {
                let new_slx = slx + wx * l;
                let new_sl2 = sl2 + w * l * l;
                let better = (new_slx * new_slx * suml2).gt(sumlx * sumlx * new_sl2);
                let accept = candidate & new_sl2.gt(zero) & better;
                levels[i] = old.replace(accept, l);
                sumlx = sumlx.replace(accept, new_slx);
                suml2 = suml2.replace(accept, new_sl2);
                changed |= accept.any();
            }
            i += 1;
        }
        // A lane without a change stays as it is in later passes.
        if !changed {
            break;
        }
        pass += 1;
    }
    let mut i = 0;
    while i < SUB {
        x[i] = (levels[i] - bottom).replace(empty, zero);
        i += 1;
    }
    zero.replace(suml2.gt(zero), sumlx / suml2).replace(empty, zero)
}

struct Weighted<V>(PhantomData<V>);

impl<V: Vector> Kernel for Weighted<V> {
    const BLOCK: usize = QK_K;
    const BLOCKS: usize = LANES;

    #[inline(always)]
    fn block_bytes(&self) -> usize {
        GgmlType::Q3_K.block_bytes()
    }

    #[inline(always)]
    fn encode(&self, Chunk { blocks, x, qw, out, .. }: Chunk<'_>) {
        let mut sigma2 = [0.0f32; LANES];
        let squares = sums_of_squares::<V>(x, QK_K, QK_K);
        (V::splat(2.0) * squares / V::splat(QK_K as f32)).store(&mut sigma2);
        let (mut scales, mut iscales) = ([0.0f32; LANES * SUBS], [0.0f32; LANES * SUBS]);
        let mut sums = [0.0f32; LANES * SUBS];
        let mut first = 0;
        while first < blocks * SUBS {
            let values = columns::<V, SUB>(&x[first * SUB..], SUB);
            let w = importance(&values, &qw[first * SUB..], of_blocks(&sigma2, first, SUBS));
            sum(&w).store(&mut sums[first..]);
            let (scale, iscale) = symmetric::search::<V, SUB, true>(NMAX, &values, &w);
            scale.store(&mut scales[first..]);
            iscale.store(&mut iscales[first..]);
            first += LANES;
        }
        let (mut d, mut scale_iscale) = ([0.0f32; LANES], [0.0f32; LANES]);
        let by_block = columns::<V, SUBS>(&scales, SUBS);
        let (scale, iscale) = symmetric::search::<V, SUBS, false>(32, &by_block, &columns::<V, SUBS>(&sums, SUBS));
        scale.store(&mut d);
        iscale.store(&mut scale_iscale);
        for (b, out) in out.chunks_exact_mut(self.block_bytes()).enumerate() {
            let x = x[b * QK_K..].first_chunk().expect("whole super-blocks");
            let mut quantized = [0u8; SUBS];
            symmetric_levels(32, &scales[b * SUBS..], scale_iscale[b], &mut quantized);
            let searched = |j: usize, l: &mut [u8]| {
                symmetric_levels(NMAX, &x[SUB * j..], iscales[b * SUBS + j], l);
            };
            finish::<Lanewise<V>>(x, (quantized, d[b]), searched, out);
        }
    }
}
