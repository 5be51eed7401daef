//! Magnitudes and sign bytes of a sub-block, one byte per eight elements.

use super::grids::even_signs;
use super::util::c_max;

/// |x|, and per eight elements a byte with a bit for each x < 0 (−0 is not).
pub fn split_signs<const N: usize>(x: &[f32; N]) -> ([f32; N], [u8; 4]) {
    let mut signs = [0; 4];
    let mags = std::array::from_fn(|i| {
        if x[i] >= 0.0 {
            x[i]
        } else {
            signs[i / 8] |= 1 << (i % 8);
            -x[i]
        }
    });
    (mags, signs)
}

/// As [`split_signs`] for types that store seven sign bits of eight: where the number of minus signs is odd, the element
/// with the least `(w·x)·x` changes its sign and its magnitude becomes negative. Bytes hold the seven stored bits.
pub fn split_even_signs<const N: usize>(x: &[f32; N], w: &[f32; N]) -> ([f32; N], [u8; 4]) {
    let (mut mags, mut signs) = split_signs(x);
    for (k, s) in signs.iter_mut().enumerate().take(N / 8) {
        if s.count_ones() % 2 == 1 {
            let cost = |i: usize| w[8 * k + i] * x[8 * k + i] * x[8 * k + i];
            let mut least = (0, cost(0));
            for i in 1..8 {
                let c = cost(i);
                if c < least.1 {
                    least = (i, c);
                }
            }
            mags[8 * k + least.0] = -mags[8 * k + least.0];
            *s ^= 1 << least.0;
        }
        *s &= 127;
    }
    (mags, signs)
}

/// Largest magnitude, `MAX` from element 0 on.
pub fn largest(mags: &[f32]) -> f32 {
    mags[1..].iter().fold(mags[0], |m, &x| c_max(m, x))
}

/// Puts the signs of a byte on eight decoded magnitudes (multiplication by ±1).
pub fn apply(signs: u8, y: &mut [f32]) {
    for (i, y) in y.iter_mut().enumerate() {
        if signs >> i & 1 == 1 {
            *y = -*y;
        }
    }
}

/// As [`apply`], from a 7-bit index.
pub fn apply_even(index: u32, y: &mut [f32]) {
    apply(even_signs(index), y);
}
