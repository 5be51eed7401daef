//! Stored elements to f32, row by row.

use crate::checkpoint::Dtype;
use crate::formats::simd::convert;

/// Converts stored little-endian elements to f32. `src.len()` is `out.len()` x element size.
pub fn to_f32(dtype: Dtype, src: &[u8], out: &mut [f32]) {
    assert_eq!(src.len(), out.len() * dtype.bytes());
    match dtype {
        Dtype::F32 => bytemuck::cast_slice_mut(out).copy_from_slice(src),
        Dtype::F16 => convert::f16_to_f32(src, out),
        Dtype::BF16 => convert::bf16_to_f32(src, out),
        Dtype::F64 => each(src, out, |b: [u8; 8]| f64::from_le_bytes(b) as f32),
        Dtype::F8E4M3 => {
            let table = &*F8_E4M3;
            each(src, out, |[b]: [u8; 1]| table[b as usize]);
        }
        Dtype::F8E5M2 => {
            // e5m2 is the upper half of an f16
            each(src, out, |[b]: [u8; 1]| half::f16::from_bits(u16::from(b) << 8).to_f32());
        }
        Dtype::I64 => each(src, out, |b: [u8; 8]| i64::from_le_bytes(b) as f32),
        Dtype::I32 => each(src, out, |b: [u8; 4]| i32::from_le_bytes(b) as f32),
        Dtype::I16 => each(src, out, |b: [u8; 2]| f32::from(i16::from_le_bytes(b))),
        Dtype::I8 => each(src, out, |[b]: [u8; 1]| f32::from(b as i8)),
        Dtype::U8 | Dtype::Bool => each(src, out, |[b]: [u8; 1]| f32::from(b)),
    }
}

fn each<const N: usize>(src: &[u8], out: &mut [f32], f: impl Fn([u8; N]) -> f32) {
    for (o, b) in out.iter_mut().zip(src.as_chunks::<N>().0) {
        *o = f(*b);
    }
}

/// Every value of `float8_e4m3fn`: 4 exponent bits (bias 7), 3 mantissa bits, no infinity, NaN at 0x7f and 0xff.
static F8_E4M3: std::sync::LazyLock<[f32; 256]> = std::sync::LazyLock::new(|| {
    std::array::from_fn(|b| {
        let (e, m) = ((b >> 3) & 15, (b & 7) as f32);
        let v = match (e, b & 7) {
            (15, 7) => f32::NAN,
            (0, _) => m / 8.0 * 2f32.powi(-6),
            _ => (1.0 + m / 8.0) * 2f32.powi(e as i32 - 7),
        };
        if b & 0x80 != 0 { -v } else { v }
    })
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fp8_corner_values() {
        let mut out = [0.0; 6];
        to_f32(Dtype::F8E4M3, &[0x00, 0x80, 0x01, 0x7e, 0x38, 0xb8], &mut out);
        assert_eq!(out, [0.0, -0.0, 2f32.powi(-9), 448.0, 1.0, -1.0]);
        assert!(out[1].is_sign_negative());
        to_f32(Dtype::F8E4M3, &[0x7f], &mut out[..1]);
        assert!(out[0].is_nan());
        to_f32(Dtype::F8E5M2, &[0x3c, 0x7b], &mut out[..2]);
        assert_eq!(out[..2], [1.0, 57344.0]);
    }

    #[test]
    fn unaligned_halves() {
        let bytes = [0xff, 0x00, 0x3c, 0x00, 0xc0];
        let mut out = [0.0; 2];
        to_f32(Dtype::F16, &bytes[1..], &mut out);
        assert_eq!(out, [1.0, -2.0]);
    }
}
