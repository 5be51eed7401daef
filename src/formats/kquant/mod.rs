//! The k-quants: super-blocks of 256 values in sub-blocks of 16 or 32, whose scales are quantized as well.
//!
//! Every format works in three stages: a search gives each sub-block a scale (and a minimum), the scales of the
//! super-block are quantized, and the values are rounded again with the quantized scales and packed. The first stage
//! is where the time goes; it is the one that `simd` replaces. The last two stages are shared.

pub(crate) mod q2k;
pub(crate) mod q3k;
pub(crate) mod q4k;
pub(crate) mod q6k;

pub use q2k::Q2K;
pub use q3k::Q3K;
pub use q4k::{Q4K, Q5K};
pub use q6k::Q6K;

use super::search::{Affine, nearest_int};

/// Values per super-block (`QK_K`).
pub(crate) const QK_K: usize = 256;

/// Σ x² of a super-block, in order.
pub(crate) fn sum_of_squares(x: &[f32]) -> f32 {
    let mut sum = 0.0f32;
    for &x in x {
        sum += x * x;
    }
    sum
}

/// Importance of each value: `qw · √(σ² + x²)`.
pub(crate) fn importance(x: &[f32], qw: &[f32], sigma2: f32, w: &mut [f32]) {
    for ((w, &x), &qw) in w.iter_mut().zip(x).zip(qw) {
        *w = qw * (sigma2 + x * x).sqrt();
    }
}

/// Σ w of a sub-block, in order.
pub(crate) fn sum(w: &[f32]) -> f32 {
    let mut sum = 0.0f32;
    for &w in w {
        sum += w;
    }
    sum
}

/// Calls `each` with every super-block of the rows, the weights of its columns, and its bytes.
pub(crate) fn super_blocks<'a>(
    rows: &'a [f32],
    n_per_row: usize,
    weights: Option<&'a [f32]>,
    out: &mut [u8],
    block_bytes: usize,
    mut each: impl FnMut(&'a [f32; QK_K], Option<&'a [f32]>, &mut [u8]),
) {
    let per_row = n_per_row / QK_K;
    let blocks = rows.as_chunks::<QK_K>().0.iter().zip(out.chunks_exact_mut(block_bytes));
    for (i, (x, bytes)) in blocks.enumerate() {
        let column = if per_row == 0 { 0 } else { i % per_row * QK_K };
        each(x, weights.map(|w| &w[column..column + QK_K]), bytes);
    }
}

/// How values become levels once the scales are known; nothing is summed here, so the order is free.
pub(crate) trait Rounding {
    /// Levels `clamp(nearest((x + offset) / d), lo, hi) − lo` of one sub-block.
    fn requantize(x: &[f32], offset: f32, d: f32, lo: i32, hi: i32, levels: &mut [u8]);

    /// IQ4 levels of `id · x`.
    fn iq4_levels(x: &[f32], id: f32, levels: &mut [u8]);
}

/// One value after another.
pub(crate) struct OneByOne;

impl Rounding for OneByOne {
    fn requantize(x: &[f32], offset: f32, d: f32, lo: i32, hi: i32, levels: &mut [u8]) {
        for (l, &x) in levels.iter_mut().zip(x) {
            *l = (nearest_int((x + offset) / d).clamp(lo, hi) - lo) as u8;
        }
    }

    fn iq4_levels(x: &[f32], id: f32, levels: &mut [u8]) {
        for (l, &x) in levels.iter_mut().zip(x) {
            *l = super::iq4::nearest_level(id * x);
        }
    }
}

/// Two bits of each of 256 levels, in the order of Q2_K and Q3_K: byte `32·h + l` holds the levels `128·h + l + 32·k`.
#[inline(always)]
pub(super) fn pack_pairs_of_bits(levels: &[u8; QK_K], qs: &mut [u8]) {
    for (q, l) in qs.chunks_exact_mut(32).zip(levels.chunks_exact(128)) {
        for i in 0..32 {
            q[i] = l[i] | (l[i + 32] << 2) | (l[i + 64] << 4) | (l[i + 96] << 6);
        }
    }
}

/// Calls `value(index, bits)` for the levels that [`pack_pairs_of_bits`] stored.
#[inline(always)]
fn unpack_pairs_of_bits(qs: &[u8], mut value: impl FnMut(usize, u8)) {
    for (half, q) in qs.chunks_exact(32).enumerate() {
        for k in 0..4 {
            for (i, q) in q.iter().enumerate() {
                value(128 * half + 32 * k + i, (q >> (2 * k)) & 3);
            }
        }
    }
}

/// The levels of an affine search, from the iscale and the minimum that gave them.
pub(crate) fn affine_levels(p: &Affine, x: &[f32], iscale: f32, origin: f32, levels: &mut [u8]) {
    for (l, &x) in levels.iter_mut().zip(x) {
        *l = p.level(iscale * (x - origin)) as u8;
    }
}

/// The levels of a search around zero, counted from −nmax; iscale 0 says that all values are zero.
pub(crate) fn symmetric_levels(nmax: i32, x: &[f32], iscale: f32, levels: &mut [u8]) {
    for (l, &x) in levels.iter_mut().zip(x) {
        *l = if iscale == 0.0 { 0 } else { (nearest_int(iscale * x).clamp(-nmax, nmax - 1) + nmax) as u8 };
    }
}
