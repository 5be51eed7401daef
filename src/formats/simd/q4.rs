//! Q4_K and Q5_K: lanes are sub-blocks of 32; for the scales of scales, super-blocks.

use super::super::kquant::q4k::{Nibbles, finish, scales_plain};
use super::super::kquant::{QK_K, affine_levels};
use super::affine::{self, Fits};
use super::chunk::{Chunk, Job, Kernel, LANES, columns, importance, of_blocks, run, sum, sums_of_squares};
use super::positive;
use super::rounding::Lanewise;
use super::vector::Vector;
use std::marker::PhantomData;

const SUB: usize = 32;
/// Sub-blocks per super-block.
const SUBS: usize = QK_K / SUB;

/// Encodes Q4_K or Q5_K.
#[inline(always)]
pub(super) fn encode<V: Vector>(format: &'static Nibbles, job: Job<'_>) {
    match job.weights {
        None => run(Plain::<V>(format, PhantomData), job),
        Some(_) => run(Weighted::<V>(format, PhantomData), job),
    }
}

struct Plain<V>(&'static Nibbles, PhantomData<V>);

impl<V: Vector> Kernel for Plain<V> {
    const BLOCK: usize = QK_K;
    const BLOCKS: usize = LANES / SUBS;

    #[inline(always)]
    fn block_bytes(&self) -> usize {
        self.0.ty.block_bytes()
    }

    #[inline(always)]
    fn encode(&self, Chunk { x, out, .. }: Chunk<'_>) {
        let values = columns::<V, SUB>(x, SUB);
        let mut sum = V::zero();
        for &x in &values {
            sum = sum + x * x;
        }
        let av_x = (sum / V::splat(SUB as f32)).sqrt();
        let mut w = values;
        for w in &mut w {
            *w = av_x + w.abs();
        }
        let mut fits = Fits::<LANES>::new();
        fits.store(0, affine::search(&self.0.plain, &values, &w));
        for (b, out) in out.chunks_exact_mut(self.block_bytes()).enumerate() {
            let at = b * SUBS;
            let x = x[b * QK_K..].first_chunk().expect("whole super-blocks");
            let scales = fits.scale[at..].first_chunk().expect("eight");
            let mins = fits.the_min[at..].first_chunk().expect("eight");
            let searched = |j: usize, l: &mut [u8]| {
                affine_levels(&self.0.plain, &x[SUB * j..], fits.iscale[at + j], fits.origin[at + j], l);
            };
            finish::<Lanewise<V>>(self.0, x, scales_plain(scales, mins), searched, out);
        }
    }
}

struct Weighted<V>(&'static Nibbles, PhantomData<V>);

impl<V: Vector> Kernel for Weighted<V> {
    const BLOCK: usize = QK_K;
    const BLOCKS: usize = LANES;

    #[inline(always)]
    fn block_bytes(&self) -> usize {
        self.0.ty.block_bytes()
    }

    #[inline(always)]
    fn encode(&self, Chunk { blocks, x, qw, out, .. }: Chunk<'_>) {
        let mut sigma2 = [0.0f32; LANES];
        let squares = sums_of_squares::<V>(x, QK_K, QK_K);
        (V::splat(2.0) * squares / V::splat(QK_K as f32)).store(&mut sigma2);
        let mut fits = Fits::<{ LANES * SUBS }>::new();
        let mut sums = [0.0f32; LANES * SUBS];
        let mut first = 0;
        while first < blocks * SUBS {
            let values = columns::<V, SUB>(&x[first * SUB..], SUB);
            let w = importance(&values, &qw[first * SUB..], of_blocks(&sigma2, first, SUBS));
            sum(&w).store(&mut sums[first..]);
            fits.store(first, affine::search(&self.0.weighted, &values, &w));
            first += LANES;
        }
        let quantized = positive::scales_and_mins::<V, SUBS>(63, &fits.scale, &fits.the_min, &sums);
        for (b, out) in out.chunks_exact_mut(self.block_bytes()).enumerate() {
            let x = x[b * QK_K..].first_chunk().expect("whole super-blocks");
            let searched = |j: usize, l: &mut [u8]| {
                let at = b * SUBS + j;
                affine_levels(&self.0.weighted, &x[SUB * j..], fits.iscale[at], fits.origin[at], l);
            };
            finish::<Lanewise<V>>(self.0, x, quantized.of_block(b), searched, out);
        }
    }
}
