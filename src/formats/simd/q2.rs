//! Q2_K: lanes are sub-blocks of 16; for the scales of scales, super-blocks.

use super::super::kquant::q2k::{AFFINE, AFFINE_WEIGHTED, finish, scales_plain};
use super::super::kquant::{QK_K, affine_levels};
use super::affine::{self, Fits};
use super::chunk::{Chunk, Job, Kernel, LANES, columns, importance, of_blocks, run, sum, sums_of_squares};
use super::positive;
use super::rounding::Lanewise;
use super::vector::Vector;
use crate::gguf::GgmlType;
use std::marker::PhantomData;

const SUB: usize = 16;
/// Sub-blocks per super-block.
const SUBS: usize = QK_K / SUB;

/// Encodes Q2_K.
#[inline(always)]
pub(super) fn encode<V: Vector>(job: Job<'_>) {
    match job.weights {
        None => run(Plain::<V>(PhantomData), job),
        Some(_) => run(Weighted::<V>(PhantomData), job),
    }
}

struct Plain<V>(PhantomData<V>);

impl<V: Vector> Kernel for Plain<V> {
    const BLOCK: usize = QK_K;
    const BLOCKS: usize = LANES / SUBS;

    #[inline(always)]
    fn block_bytes(&self) -> usize {
        GgmlType::Q2_K.block_bytes()
    }

    #[inline(always)]
    fn encode(&self, Chunk { x, out, .. }: Chunk<'_>) {
        let values = columns::<V, SUB>(x, SUB);
        let mut w = values;
        for w in &mut w {
            *w = w.abs();
        }
        let mut fits = Fits::<LANES>::new();
        fits.store(0, affine::search(&AFFINE, &values, &w));
        let x = x.first_chunk().expect("a super-block");
        let searched =
            |j: usize, l: &mut [u8]| affine_levels(&AFFINE, &x[SUB * j..], fits.iscale[j], fits.origin[j], l);
        finish::<Lanewise<V>>(x, scales_plain(&fits.scale, &fits.the_min), searched, out);
    }
}

struct Weighted<V>(PhantomData<V>);

impl<V: Vector> Kernel for Weighted<V> {
    const BLOCK: usize = QK_K;
    const BLOCKS: usize = LANES;

    #[inline(always)]
    fn block_bytes(&self) -> usize {
        GgmlType::Q2_K.block_bytes()
    }

    #[inline(always)]
    fn encode(&self, Chunk { blocks, x, qw, out, .. }: Chunk<'_>) {
        let mut sigma2 = [0.0f32; LANES];
        (sums_of_squares::<V>(x, QK_K, QK_K) / V::splat(QK_K as f32)).store(&mut sigma2);
        let mut fits = Fits::<{ LANES * SUBS }>::new();
        let mut sums = [0.0f32; LANES * SUBS];
        let mut first = 0;
        while first < blocks * SUBS {
            let values = columns::<V, SUB>(&x[first * SUB..], SUB);
            let w = importance(&values, &qw[first * SUB..], of_blocks(&sigma2, first, SUBS));
            sum(&w).store(&mut sums[first..]);
            fits.store(first, affine::search(&AFFINE_WEIGHTED, &values, &w));
            first += LANES;
        }
        let quantized = positive::scales_and_mins::<V, SUBS>(15, &fits.scale, &fits.the_min, &sums);
        for (b, out) in out.chunks_exact_mut(self.block_bytes()).enumerate() {
            let x = x[b * QK_K..].first_chunk().expect("whole super-blocks");
            let (ls, lm, d, dmin) = quantized.of_block(b);
            let searched = |j: usize, l: &mut [u8]| {
                let at = b * SUBS + j;
                affine_levels(&AFFINE_WEIGHTED, &x[SUB * j..], fits.iscale[at], fits.origin[at], l);
            };
            finish::<Lanewise<V>>(x, (std::array::from_fn(|j| ls[j] | (lm[j] << 4)), d, dmin), searched, out);
        }
    }
}
