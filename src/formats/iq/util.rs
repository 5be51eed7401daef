//! Small pieces that the codebook encoders share: rounding, f16 bytes, weights of a sub-block, sub-block scales.

pub(crate) use crate::formats::search::{f16_at, f16_bytes, nearest_int};
use crate::formats::{FormatError, check_decode, check_encode};
use crate::gguf::GgmlType;

/// `MAX(a, b)` of C, which is not `f32::max` for NaN and signed zeros.
#[inline]
pub fn c_max(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// The u32 at byte offset `at`.
pub fn u32_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Index of a sub-scale: `clamp(nearest_int(0.5·(id·scale − 1)), 0, max)`.
#[inline]
pub fn scale_index(id: f32, scale: f32, max: i32) -> u32 {
    nearest_int(0.5 * (id * scale - 1.0)).clamp(0, max) as u32
}

/// Sum of squares, in order.
pub fn sum_of_squares(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |s, v| s + v * v)
}

/// `qw·sqrtf(sigma2 + x²)`, the weights of the sums wherever there is an importance matrix.
pub fn importance<const N: usize>(x: &[f32; N], qw: &[f32; N], sigma2: f32) -> [f32; N] {
    std::array::from_fn(|i| qw[i] * (sigma2 + x[i] * x[i]).sqrt())
}

/// Sub-block `i` of `N` elements.
pub fn sub<const N: usize>(x: &[f32], i: usize) -> &[f32; N] {
    x[N * i..].first_chunk().expect("whole sub-blocks")
}

/// Encodes every block of every row with `block(x, weights, out)`; the weights restart at each row.
pub fn each_block(
    ty: GgmlType,
    rows: &[f32],
    n_per_row: usize,
    weights: Option<&[f32]>,
    out: &mut [u8],
    mut block: impl FnMut(&[f32; 256], Option<&[f32; 256]>, &mut [u8]) -> Result<(), FormatError>,
) -> Result<(), FormatError> {
    let size = ty.block_bytes();
    check_encode(ty, rows, n_per_row, weights, out);
    let out_rows = out.chunks_exact_mut(n_per_row / 256 * size);
    for (row, out) in rows.chunks_exact(n_per_row).zip(out_rows) {
        for (i, (x, out)) in row.as_chunks::<256>().0.iter().zip(out.chunks_exact_mut(size)).enumerate() {
            let w = weights.map(|w| &w.as_chunks::<256>().0[i]);
            block(x, w, out)?;
        }
    }
    Ok(())
}

/// Decodes every block with `block(bytes, out)`.
pub fn decode_blocks(ty: GgmlType, blocks: &[u8], out: &mut [f32], mut block: impl FnMut(&[u8], &mut [f32; 256])) {
    check_decode(ty, blocks, out);
    for (b, y) in blocks.chunks_exact(ty.block_bytes()).zip(out.as_chunks_mut::<256>().0) {
        block(b, y);
    }
}

/// Checks that the scale `d(block)` (bits of an f16) of every block is finite.
pub fn validate_scales(ty: GgmlType, blocks: &[u8], d: impl Fn(&[u8]) -> u16) -> Result<(), FormatError> {
    assert!(blocks.len().is_multiple_of(ty.block_bytes()), "whole blocks");
    match blocks.chunks_exact(ty.block_bytes()).position(|b| d(b) & 0x7c00 == 0x7c00) {
        Some(block) => Err(FormatError::BadScale { block }),
        None => Ok(()),
    }
}
