//! Q4_K and Q5_K: lanes are sub-blocks of 32; for the scales of scales, super-blocks.

use super::super::kquant::q4k::{Nibbles, finish, scales_plain};
use super::super::kquant::{QK_K, affine_levels};
use super::affine;
use super::chunk::{Chunk, Job, Kernel, LANES, columns, importance, of_blocks, run, sum, sums_of_squares};
use super::positive;
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

/// The searches of a chunk, by sub-block.
struct Fits<const N: usize> {
    scale: [f32; N],
    the_min: [f32; N],
    iscale: [f32; N],
    origin: [f32; N],
}

impl<const N: usize> Fits<N> {
    #[inline(always)]
    fn new() -> Self {
        Fits { scale: [0.0; N], the_min: [0.0; N], iscale: [0.0; N], origin: [0.0; N] }
    }

    #[inline(always)]
    fn store<V: Vector>(&mut self, first: usize, fit: affine::Fit<V>) {
        fit.scale.store(&mut self.scale[first..]);
        fit.the_min.store(&mut self.the_min[first..]);
        fit.iscale.store(&mut self.iscale[first..]);
        fit.origin.store(&mut self.origin[first..]);
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
            finish(self.0, x, scales_plain(scales, mins), searched, out);
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
    fn encode(&self, Chunk { x, qw, out, .. }: Chunk<'_>) {
        let mut sigma2 = [0.0f32; LANES];
        let squares = sums_of_squares::<V>(x, QK_K, QK_K);
        (V::splat(2.0) * squares / V::splat(QK_K as f32)).store(&mut sigma2);
        let mut fits = Fits::<{ LANES * SUBS }>::new();
        let mut sums = [0.0f32; LANES * SUBS];
        let mut first = 0;
        while first < LANES * SUBS {
            let values = columns::<V, SUB>(&x[first * SUB..], SUB);
            let w = importance(&values, &qw[first * SUB..], of_blocks(&sigma2, first, SUBS));
            sum(&w).store(&mut sums[first..]);
            fits.store(first, affine::search(&self.0.weighted, &values, &w));
            first += LANES;
        }
        let sums = V::load_columns(&sums, SUBS);
        let mut quantized = [[0.0f32; LANES]; 2 * SUBS];
        let mut d = [[0.0f32; LANES]; 2];
        let mut k = 0;
        while k < 2 {
            let mut v = V::load_columns(if k == 0 { &fits.scale } else { &fits.the_min }, SUBS);
            positive::search(63, &mut v, &sums).store(&mut d[k]);
            let mut j = 0;
            while j < SUBS {
                v[j].store(&mut quantized[k * SUBS + j]);
                j += 1;
            }
            k += 1;
        }
        for (b, out) in out.chunks_exact_mut(self.block_bytes()).enumerate() {
            let x = x[b * QK_K..].first_chunk().expect("whole super-blocks");
            let (mut ls, mut lm) = ([0u8; SUBS], [0u8; SUBS]);
            for j in 0..SUBS {
                ls[j] = quantized[j][b] as u8;
                lm[j] = quantized[SUBS + j][b] as u8;
            }
            let searched = |j: usize, l: &mut [u8]| {
                let at = b * SUBS + j;
                affine_levels(&self.0.weighted, &x[SUB * j..], fits.iscale[at], fits.origin[at], l);
            };
            finish(self.0, x, (ls, lm, d[0][b], d[1][b]), searched, out);
        }
    }
}
