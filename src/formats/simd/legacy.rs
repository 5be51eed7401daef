//! Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
//!
//! With importance weights lanes are blocks, as in the other searches. Without, there is nothing to sum: extremes and
//! roundings do not depend on the order, so blocks stay in memory order and the compiler vectorizes plain loops over
//! their values (these functions are inlined into entry points that enable the instruction set). Only the scales of
//! sixteen blocks are computed side by side.

use super::super::legacy::{QK, Small, q8_0_block};
use super::super::search::signed_max;
use super::chunk::{Chunk, Job, Kernel, LANES, columns, importance, of_blocks, run, sums_of_squares};
use super::vector::{Mask, Vector};
use super::{affine, rounding, symmetric};
use crate::gguf::GgmlType;
use std::marker::PhantomData;

/// Encodes a four- or five-bit format.
#[inline(always)]
pub(super) fn encode<V: Vector>(format: &'static Small, job: Job<'_>) {
    match job.weights {
        None if format.min => run(PlainMin::<V>(format, PhantomData), job),
        None => run(Plain::<V>(format, PhantomData), job),
        Some(_) => {
            let sigma2 = mean_squares::<V>(job.rows, job.n_per_row);
            run(Weighted::<V> { format, sigma2, per_row: job.n_per_row / QK, lanes: PhantomData }, job);
        }
    }
}

/// Encodes Q8_0, which ignores weights.
#[inline(always)]
pub(super) fn encode_q8_0<V: Vector>(job: Job<'_>) {
    run(Q8::<V>(PhantomData), Job { weights: None, ..job });
}

/// 1 / d, or 0 if d is.
#[inline(always)]
fn reciprocal<V: Vector>(d: V) -> V {
    V::zero().replace(d.ne(V::zero()), V::splat(1.0) / d)
}

/// Truncates a value that is known to be within ±2^30.
#[inline(always)]
fn truncate(v: f32) -> i32 {
    debug_assert!(v.abs() < (1u32 << 30) as f32);
    // SAFETY: callers round values of a block by its own scale, and leave blocks with an infinite scale or reciprocal
    // to the scalar code, so v is finite and within the levels of the format.
    unsafe { v.to_int_unchecked() }
}

/// Minimum and maximum of each of sixteen blocks, one block per lane. Of zeros of both signs any may be taken.
#[inline(always)]
fn extremes<V: Vector>(x: &[[f32; QK]]) -> (V, V) {
    // Each block is folded to the width of a vector, and then the vectors are transposed.
    let (mut mins, mut maxs) = ([0.0f32; LANES * LANES], [0.0f32; LANES * LANES]);
    let mut b = 0;
    while b < LANES {
        let (low, high) = (V::load(&x[b]), V::load(&x[b][LANES..]));
        low.min(high).store(&mut mins[b * LANES..]);
        low.max(high).store(&mut maxs[b * LANES..]);
        b += 1;
    }
    let (mins, maxs) = (columns::<V, LANES>(&mins, LANES), columns::<V, LANES>(&maxs, LANES));
    let (mut min, mut max) = (mins[0], maxs[0]);
    let mut i = 1;
    while i < LANES {
        min = min.min(mins[i]);
        max = max.max(maxs[i]);
        i += 1;
    }
    (min, max)
}

/// The largest magnitude of each of sixteen blocks.
#[inline(always)]
fn max_magnitudes<V: Vector>(x: &[[f32; QK]]) -> V {
    let mut maxs = [0.0f32; LANES * LANES];
    let mut b = 0;
    while b < LANES {
        V::load(&x[b]).abs().max(V::load(&x[b][LANES..]).abs()).store(&mut maxs[b * LANES..]);
        b += 1;
    }
    let mut max = V::zero();
    for column in columns::<V, LANES>(&maxs, LANES) {
        max = max.max(column);
    }
    max
}

struct Q8<V>(PhantomData<V>);

impl<V: Vector> Kernel for Q8<V> {
    const BLOCK: usize = QK;
    const BLOCKS: usize = LANES;

    #[inline(always)]
    fn block_bytes(&self) -> usize {
        GgmlType::Q8_0.block_bytes()
    }

    #[inline(always)]
    fn encode(&self, Chunk { x, out, .. }: Chunk<'_>) {
        let x = x.as_chunks::<QK>().0;
        let scales = max_magnitudes::<V>(x) / V::splat(127.0);
        let (mut bits, mut ids) = ([0u16; LANES], [0.0f32; LANES]);
        scales.store_f16(&mut bits);
        reciprocal(scales).store(&mut ids);
        for (((x, out), bits), id) in x.iter().zip(out.as_chunks_mut::<34>().0).zip(bits).zip(ids) {
            if id.is_infinite() {
                q8_0_block(x, out);
                continue;
            }
            out[..2].copy_from_slice(&bits.to_le_bytes());
            // A local array: the compiler does not see that the output is apart from the input.
            let mut q = [0u8; QK];
            for i in 0..QK {
                let v = x[i] * id;
                // roundf: the largest float below a half rounds half away from zero and nothing else up.
                let half = f32::from_bits((v.to_bits() & 0x8000_0000) | 0x3eff_ffff);
                q[i] = truncate(v + half) as u8;
            }
            out[2..].copy_from_slice(&q);
        }
    }
}

/// Formats without minimum.
struct Plain<V>(&'static Small, PhantomData<V>);

impl<V: Vector> Kernel for Plain<V> {
    const BLOCK: usize = QK;
    const BLOCKS: usize = LANES;

    #[inline(always)]
    fn block_bytes(&self) -> usize {
        self.0.ty.block_bytes()
    }

    #[inline(always)]
    fn encode(&self, Chunk { x, out, .. }: Chunk<'_>) {
        let x = x.as_chunks::<QK>().0;
        let (min, max) = extremes::<V>(x);
        // The value of largest magnitude.
        let mut d = max.replace(min.neg().gt(max), min);
        // Of both signs the first counts, and zeros are +0.
        if !min.neg().ne(max).all() {
            let mut maxs = [0.0f32; LANES];
            for (max, x) in maxs.iter_mut().zip(x) {
                *max = signed_max(x).0;
            }
            d = V::load(&maxs);
        }
        let half = self.0.half();
        let scales = d / V::splat(-half as f32);
        let (mut bits, mut ids) = ([0u16; LANES], [0.0f32; LANES]);
        scales.store_f16(&mut bits);
        reciprocal(scales).store(&mut ids);
        let blocks = x.iter().zip(out.chunks_exact_mut(self.block_bytes())).zip(bits).zip(ids);
        for (((x, out), bits), id) in blocks {
            if id.is_infinite() {
                self.0.plain(x, out);
                continue;
            }
            let mut levels = [0u8; QK];
            for i in 0..QK {
                levels[i] = truncate(x[i] * id + (half as f32 + 0.5)).min(2 * half - 1) as u8;
            }
            self.0.write_bits(bits, 0, &levels, V::fifth_bits(&levels), out);
        }
    }
}

/// Formats with a minimum.
struct PlainMin<V>(&'static Small, PhantomData<V>);

impl<V: Vector> Kernel for PlainMin<V> {
    const BLOCK: usize = QK;
    const BLOCKS: usize = LANES;

    #[inline(always)]
    fn block_bytes(&self) -> usize {
        self.0.ty.block_bytes()
    }

    #[inline(always)]
    fn encode(&self, Chunk { x, out, .. }: Chunk<'_>) {
        let x = x.as_chunks::<QK>().0;
        let (min, max) = extremes::<V>(x);
        let mut mins = [0.0f32; LANES];
        min.store(&mut mins);
        for (min, x) in mins.iter_mut().zip(x) {
            // Of zeros the first counts.
            if *min == 0.0 {
                *min = x.iter().copied().find(|v| *v == 0.0).unwrap_or(*min);
            }
        }
        let top = 2 * self.0.half() - 1;
        let min = V::load(&mins);
        // A maximum of −0 becomes +0, so that a block of zeros has the scale +0.
        let scales = (max + V::zero() - min) / V::splat(top as f32);
        let (mut d_bits, mut m_bits) = ([0u16; LANES], [0u16; LANES]);
        let (mut ds, mut ids) = ([0.0f32; LANES], [0.0f32; LANES]);
        scales.store_f16(&mut d_bits);
        min.store_f16(&mut m_bits);
        scales.store(&mut ds);
        reciprocal(scales).store(&mut ids);
        for (b, (x, out)) in x.iter().zip(out.chunks_exact_mut(self.block_bytes())).enumerate() {
            let (min, id) = (mins[b], ids[b]);
            if id.is_infinite() || ds[b].is_infinite() {
                self.0.plain(x, out);
                continue;
            }
            let mut levels = [0u8; QK];
            for i in 0..QK {
                levels[i] = truncate((x[i] - min) * id + 0.5).min(top) as u8;
            }
            self.0.write_bits(d_bits[b], m_bits[b], &levels, V::fifth_bits(&levels), out);
        }
    }
}

/// Formats with importance weights.
struct Weighted<V> {
    format: &'static Small,
    /// Mean square of each row.
    sigma2: Vec<f32>,
    /// Blocks per row.
    per_row: usize,
    lanes: PhantomData<V>,
}

impl<V: Vector> Kernel for Weighted<V> {
    const BLOCK: usize = QK;
    const BLOCKS: usize = LANES;

    #[inline(always)]
    fn block_bytes(&self) -> usize {
        self.format.ty.block_bytes()
    }

    #[inline(always)]
    fn encode(&self, Chunk { first, x, qw, out, .. }: Chunk<'_>) {
        let values = columns::<V, QK>(x, QK);
        let w = importance(&values, qw, of_blocks(&self.sigma2, first, self.per_row));
        // Scale; minimum; factor and origin of the levels.
        let (mut d, mut m) = ([0.0f32; LANES], [0.0f32; LANES]);
        let (mut iscale, mut origin) = ([0.0f32; LANES], [0.0f32; LANES]);
        if self.format.min {
            let fit = affine::search(&self.format.affine(), &values, &w);
            fit.scale.store(&mut d);
            fit.the_min.neg().store(&mut m);
            fit.iscale.store(&mut iscale);
            fit.origin.store(&mut origin);
        } else {
            let (scale, factor) = symmetric::search::<V, QK, true>(self.format.half(), &values, &w);
            scale.store(&mut d);
            factor.store(&mut iscale);
        }
        let (mut d_bits, mut m_bits) = ([0u16; LANES], [0u16; LANES]);
        V::load(&d).store_f16(&mut d_bits);
        V::load(&m).store_f16(&mut m_bits);
        let blocks = x.as_chunks::<QK>().0.iter().zip(out.chunks_exact_mut(self.block_bytes()));
        for (b, (x, out)) in blocks.enumerate() {
            let mut levels = [0u8; QK];
            if self.format.min {
                rounding::affine_levels::<V>(self.format.affine().nmax, x, iscale[b], origin[b], &mut levels);
            } else {
                rounding::symmetric_levels::<V>(self.format.half(), x, iscale[b], &mut levels);
            }
            self.format.write_bits(d_bits[b], m_bits[b], &levels, V::fifth_bits(&levels), out);
        }
    }
}

/// Σ x² / n of each row, in order, and zeros for the lanes after the last row.
#[inline(always)]
fn mean_squares<V: Vector>(rows: &[f32], n: usize) -> Vec<f32> {
    let count = rows.len() / n;
    let mut out = vec![0.0f32; count + LANES];
    let mut row = 0;
    while row < count {
        if row + LANES <= count {
            let sums = sums_of_squares::<V>(&rows[row * n..], n, n);
            (sums / V::splat(n as f32)).store(&mut out[row..]);
            row += LANES;
        } else {
            out[row] = super::super::kquant::sum_of_squares(&rows[row * n..][..n]) / n as f32;
            row += 1;
        }
    }
    out
}
