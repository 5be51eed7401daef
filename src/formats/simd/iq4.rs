//! IQ4_NL and IQ4_XS: lanes are sub-blocks of 32.

use super::super::iq4::{TRIES, VALUES, finish_nl, finish_xs};
use super::super::kquant::QK_K;
use super::super::search::MAX_EPS;
use super::chunk::{Chunk, Job, Kernel, LANES, columns, importance, of_blocks, run, squares, sums_of_squares};
use super::rounding::Lanewise;
use super::symmetric::signed_max;
use super::vector::Vector;
use crate::gguf::GgmlType;
use std::marker::PhantomData;

const SUB: usize = 32;
/// Sub-blocks per super-block.
const SUBS: usize = QK_K / SUB;

/// Encodes IQ4_NL.
#[inline(always)]
pub(super) fn encode_nl<V: Vector>(job: Job<'_>) {
    run(Nl::<V>(PhantomData), job);
}

/// Encodes IQ4_XS.
#[inline(always)]
pub(super) fn encode_xs<V: Vector>(job: Job<'_>) {
    run(Xs::<V>(PhantomData), job);
}

/// The search of `quantize_row_iq4_nl_impl` for `V::LANES` sub-blocks: the scales, 0 for lanes of zeros.
#[inline(always)]
fn search<V: Vector>(x: &[V; SUB], w: &[V; SUB]) -> V {
    let zero = V::zero();
    let (max, amax) = signed_max(x);
    let empty = V::splat(MAX_EPS).gt(amax);
    let max = max.replace(empty, V::splat(1.0));
    let lowest = VALUES[0] as f32;
    let (mut d, mut best) = (zero, zero);
    let mut itry = -TRIES - 1;
    while itry <= TRIES {
        let first = itry < -TRIES;
        let id =
            if first { V::splat(1.0) / (max.neg() / V::splat(lowest)) } else { V::splat(itry as f32 + lowest) / max };
        let (mut sumqx, mut sumq2) = (zero, zero);
        let mut i = 0;
        while i < SUB {
            let q = (id * x[i]).iq4_value();
            let wq = w[i] * q;
            sumqx = sumqx + wq * x[i];
            sumq2 = sumq2 + wq * q;
            i += 1;
        }
        let this_d = sumqx / sumq2;
        let positive = sumq2.gt(zero);
        if first {
            d = zero.replace(positive, this_d);
            best = d * sumqx;
        } else {
            let accept = positive & (sumqx * sumqx).gt(best * sumq2);
            d = d.replace(accept, this_d);
            best = best.replace(accept, this_d * sumqx);
        }
        itry += 1;
    }
    d.replace(empty, zero)
}

struct Nl<V>(PhantomData<V>);

impl<V: Vector> Kernel for Nl<V> {
    const BLOCK: usize = SUB;
    const BLOCKS: usize = LANES;

    #[inline(always)]
    fn block_bytes(&self) -> usize {
        GgmlType::IQ4_NL.block_bytes()
    }

    #[inline(always)]
    fn encode(&self, Chunk { x, qw, out, .. }: Chunk<'_>) {
        let values = columns::<V, SUB>(x, SUB);
        let squares = squares(&values);
        let w = if qw.is_empty() {
            squares
        } else {
            let sigma2 = super::chunk::sum(&squares) * V::splat(2.0 / SUB as f32);
            importance(&values, qw, sigma2)
        };
        let mut scales = [0.0f32; LANES];
        search(&values, &w).store(&mut scales);
        for (b, out) in out.chunks_exact_mut(self.block_bytes()).enumerate() {
            finish_nl::<Lanewise<V>>(&x[b * SUB..][..SUB], scales[b], out);
        }
    }
}

struct Xs<V>(PhantomData<V>);

impl<V: Vector> Kernel for Xs<V> {
    const BLOCK: usize = QK_K;
    const BLOCKS: usize = LANES;

    #[inline(always)]
    fn block_bytes(&self) -> usize {
        GgmlType::IQ4_XS.block_bytes()
    }

    #[inline(always)]
    fn encode(&self, Chunk { blocks, x, qw, out, .. }: Chunk<'_>) {
        let mut sigma2 = [0.0f32; LANES];
        if !qw.is_empty() {
            (sums_of_squares::<V>(x, QK_K, QK_K) * V::splat(2.0 / QK_K as f32)).store(&mut sigma2);
        }
        let mut scales = [0.0f32; LANES * SUBS];
        let mut first = 0;
        while first < blocks * SUBS {
            let values = columns::<V, SUB>(&x[first * SUB..], SUB);
            let w = if qw.is_empty() {
                squares(&values)
            } else {
                importance(&values, &qw[first * SUB..], of_blocks(&sigma2, first, SUBS))
            };
            search(&values, &w).store(&mut scales[first..]);
            first += LANES;
        }
        for (b, out) in out.chunks_exact_mut(self.block_bytes()).enumerate() {
            let x = x[b * QK_K..].first_chunk().expect("whole super-blocks");
            finish_xs::<Lanewise<V>>(x, scales[b * SUBS..].first_chunk().expect("eight"), out);
        }
    }
}
