//! Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
//!
//! With importance weights lanes are blocks, as in the other searches. Without, there is nothing to sum: extremes and
//! roundings do not depend on the order, so blocks stay in memory order and the compiler vectorizes plain loops over
//! their values (these functions are inlined into entry points that enable the instruction set). Only the scales of
//! sixteen blocks are computed side by side.

use super::super::legacy::{QK, Small, q8_0_block};
use super::chunk::{Chunk, Job, Kernel, LANES, columns, importance, of_blocks, run, sums_of_squares};
use super::vector::Vector;
use super::{affine, symmetric};
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

/// The largest magnitude.
#[inline(always)]
fn max_magnitude(x: &[f32; QK]) -> u32 {
    // Magnitudes of floats that are not NaN are ordered like their bits.
    x.iter().fold(0, |max, v| max.max(v.to_bits() & 0x7fff_ffff))
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
        let mut d = [0.0f32; LANES];
        for (d, x) in d.iter_mut().zip(x) {
            *d = f32::from_bits(max_magnitude(x));
        }
        let scales = V::load(&d) / V::splat(127.0);
        let (mut bits, mut ids) = ([0u16; LANES], [0.0f32; LANES]);
        scales.store_f16(&mut bits);
        reciprocal(scales).store(&mut ids);
        for (((x, out), bits), id) in x.iter().zip(out.as_chunks_mut::<34>().0).zip(bits).zip(ids) {
            if id.is_infinite() {
                q8_0_block(x, out);
                continue;
            }
            out[..2].copy_from_slice(&bits.to_le_bytes());
            let q: &mut [u8; QK] = out.last_chunk_mut().expect("34 bytes");
            for i in 0..QK {
                let v = x[i] * id;
                // roundf: the largest float below a half rounds half away from zero and nothing else up.
                let half = f32::from_bits((v.to_bits() & 0x8000_0000) | 0x3eff_ffff);
                q[i] = truncate(v + half) as u8;
            }
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
        let mut d = [0.0f32; LANES];
        for (d, x) in d.iter_mut().zip(x) {
            let amax = max_magnitude(x);
            let mut first = QK as u32;
            for (i, v) in x.iter().enumerate() {
                first = first.min(if v.to_bits() & 0x7fff_ffff == amax { i as u32 } else { QK as u32 });
            }
            // A block of zeros has the extreme +0 whatever their signs.
            *d = if amax == 0 { 0.0 } else { x[first as usize % QK] };
        }
        let half = self.0.half();
        let scales = V::load(&d) / V::splat(-half as f32);
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
            self.0.write_bits(bits, 0, &levels, out);
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
        let (mut mins, mut maxs) = ([0.0f32; LANES], [0.0f32; LANES]);
        for ((min, max), x) in mins.iter_mut().zip(&mut maxs).zip(x) {
            (*min, *max) = extremes(x);
        }
        let top = 2 * self.0.half() - 1;
        let min = V::load(&mins);
        let scales = (V::load(&maxs) - min) / V::splat(top as f32);
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
            self.0.write_bits(d_bits[b], m_bits[b], &levels, out);
        }
    }
}

/// Minimum and maximum; of equal zeros the first.
#[inline(always)]
fn extremes(x: &[f32; QK]) -> (f32, f32) {
    /// Orders floats as integers, −0 below +0; its own inverse.
    #[inline(always)]
    fn key(bits: u32) -> u32 {
        bits ^ ((((bits as i32) >> 31) as u32) >> 1)
    }
    let (mut min, mut max) = (i32::MAX, i32::MIN);
    for v in x {
        let key = key(v.to_bits()) as i32;
        min = min.min(key);
        max = max.max(key);
    }
    let (mut min, max) = (f32::from_bits(key(min as u32)), f32::from_bits(key(max as u32)));
    if min == 0.0 {
        min = x.iter().copied().find(|v| *v == 0.0).unwrap_or(min);
    }
    (min, max)
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
    fn encode(&self, Chunk { first, x, qw, out }: Chunk<'_>) {
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
                super::super::kquant::affine_levels(&self.format.affine(), x, iscale[b], origin[b], &mut levels);
            } else {
                super::super::kquant::symmetric_levels(self.format.half(), x, iscale[b], &mut levels);
            }
            self.format.write_bits(d_bits[b], m_bits[b], &levels, out);
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
