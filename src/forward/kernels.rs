//! Element-wise steps of the forward pass, each one plain Rust loop compiled for every instruction set.
//!
//! No fused multiply-add and a fixed shape of every sum, so that all instruction sets give the same bits.

/// Defines a function whose body is compiled once per instruction set and chosen at run time.
macro_rules! vectorized {
    ($(#[$meta:meta])* pub fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        pub fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                match $crate::formats::simd::isa() {
                    // SAFETY: `isa` gives only what the processor has.
                    $crate::formats::simd::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::formats::simd::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    _ => {}
                }
            }
            body($($arg),*)
        }
    };
}

pub(crate) use vectorized;

/// Lanes of a sum: one AVX-512 register or two of AVX2.
const LANES: usize = 16;

/// `e^x`, relative error below 2e-7 for x in [-87, 88]; outside it is as at the nearer end.
///
/// Cody-Waite reduction by ln 2 and a polynomial of degree 6 (minimax on [-ln2/2, ln2/2]).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let x = x.clamp(-87.0, 88.0);
    let n = x * std::f32::consts::LOG2_E + MAGIC;
    let bits = n.to_bits();
    let n = n - MAGIC;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.0e-1] {
        p = p * r + c;
    }
    let y = p * (r * r) + r + 1.0;
    f32::from_bits(y.to_bits().wrapping_add(bits << 23))
}

/// `tanh x`, absolute error below 3e-7.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    // 1 - 2 / (e^2x + 1), from the side where nothing cancels; small arguments by the series
    let a = x.abs().min(20.0);
    let e = exp(-2.0 * a);
    let large = (1.0 - e) / (1.0 + e);
    let s = a * a;
    let small = a * (1.0 - s * (1.0 / 3.0 - s * (2.0 / 15.0 - s * (17.0 / 315.0))));
    (if a < 0.1 { small } else { large }).copysign(x)
}

/// Sum of the lanes in a fixed order.
#[inline(always)]
fn total(lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    let mut lanes = lanes;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

vectorized! {
    /// `out = x / sqrt(mean(x²) + eps) * weight` (RMSNorm, Zhang & Sennrich 2019). All of one length.
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let mut sums = [0.0f32; LANES];
        let (chunks, tail) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for (s, v) in sums.iter_mut().zip(chunk) {
                *s += v * v;
            }
        }
        let mut sum = total(sums);
        for v in tail {
            sum += v * v;
        }
        let scale = 1.0 / (sum / x.len() as f32 + eps).sqrt();
        for ((o, v), w) in out.iter_mut().zip(x).zip(weight) {
            *o = v * scale * w;
        }
    }
}

vectorized! {
    /// `gate = silu(gate) * up`: x / (1 + e^-x).
    pub fn silu_mul(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = *g / (1.0 + exp(-*g)) * u;
        }
    }
}

vectorized! {
    /// `gate = gelu(gate) * up`, the tanh form (Hendrycks & Gimpel 2016).
    pub fn gelu_mul(gate: &mut [f32], up: &[f32]) {
        const SQRT_2_OVER_PI: f32 = 0.797_884_6;
        for (g, u) in gate.iter_mut().zip(up) {
            let x = *g;
            *g = 0.5 * x * (1.0 + tanh(SQRT_2_OVER_PI * x * (1.0 + 0.044_715 * x * x))) * u;
        }
    }
}

vectorized! {
    /// `x = cap * tanh(x / cap)`: logit soft-capping (Gemma 2).
    pub fn soft_cap(x: &mut [f32], cap: f32) {
        for v in x {
            *v = cap * tanh(*v / cap);
        }
    }
}

vectorized! {
    /// `x += y`.
    pub fn add(x: &mut [f32], y: &[f32]) {
        for (a, b) in x.iter_mut().zip(y) {
            *a += b;
        }
    }
}

vectorized! {
    /// `x += y * scale`.
    pub fn add_scaled(x: &mut [f32], y: &[f32], scale: f32) {
        for (a, b) in x.iter_mut().zip(y) {
            *a += b * scale;
        }
    }
}

vectorized! {
    /// `x *= scale`.
    pub fn scale(x: &mut [f32], factor: f32) {
        for a in x {
            *a *= factor;
        }
    }
}

vectorized! {
    /// Largest value; negative infinity for nothing.
    pub fn max(x: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (chunks, tail) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for (m, v) in lanes.iter_mut().zip(chunk) {
                *m = if *v > *m { *v } else { *m };
            }
        }
        tail.iter().chain(&lanes).fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m })
    }
}

vectorized! {
    /// `x = e^(x - max)`; the sum of the results.
    pub fn exp_minus(x: &mut [f32], max: f32) -> f32 {
        let mut sums = [0.0f32; LANES];
        let (chunks, tail) = x.as_chunks_mut::<LANES>();
        for chunk in chunks {
            for (s, v) in sums.iter_mut().zip(chunk) {
                *v = exp(*v - max);
                *s += *v;
            }
        }
        let mut sum = total(sums);
        for v in tail {
            *v = exp(*v - max);
            sum += *v;
        }
        sum
    }
}

/// Softmax of a row in place.
pub fn softmax(x: &mut [f32]) {
    let max = max(x);
    let sum = exp_minus(x, max);
    scale(x, 1.0 / sum);
}

vectorized! {
    /// No NaN and no infinity.
    pub fn all_finite(x: &[f32]) -> bool {
        let mut bad = 0u32;
        for v in x {
            bad |= u32::from(v.to_bits() & 0x7f80_0000 == 0x7f80_0000);
        }
        bad == 0
    }
}

vectorized! {
    /// Sum of the values' bits, each mixed with its place.
    pub fn checksum(x: &[f32]) -> u64 {
        let mut sum = 0u64;
        for (i, v) in x.iter().enumerate() {
            sum = sum.wrapping_add(u64::from((v.to_bits() ^ i as u32).wrapping_mul(0x9e37_79b1)));
        }
        sum
    }
}

vectorized! {
    /// Largest size.
    pub fn abs_max(x: &[f32]) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let (chunks, tail) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for (m, v) in lanes.iter_mut().zip(chunk) {
                *m = if v.abs() > *m { v.abs() } else { *m };
            }
        }
        tail.iter().chain(&lanes).fold(0.0, |m, v| if v.abs() > m { v.abs() } else { m })
    }
}

vectorized! {
    /// `x = round(x * inverse) * step`, to nearest, ties to even; `x * inverse` stays below 2^22.
    pub fn round_scaled(x: &mut [f32], inverse: f32, step: f32) {
        const MAGIC: f32 = 12_582_912.0;
        for v in x {
            *v = ((*v * inverse + MAGIC) - MAGIC) * step;
        }
    }
}

vectorized! {
    /// To bf16 (nearest, ties to even) and back, for finite values.
    pub fn to_bf16(x: &mut [f32]) {
        for v in x {
            let bits = v.to_bits();
            *v = f32::from_bits(bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000);
        }
    }
}

vectorized! {
    /// Rotates pairs `(x[2i], x[2i+1])` by the angles whose cosine and sine are given (`GGML_ROPE_TYPE_NORMAL`).
    pub fn rotate_interleaved(x: &mut [f32], cos: &[f32], sin: &[f32]) {
        for ((pair, c), s) in x.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
            *pair = [pair[0] * c - pair[1] * s, pair[0] * s + pair[1] * c];
        }
    }
}

vectorized! {
    /// Rotates pairs `(x[i], x[i + n/2])` (`GGML_ROPE_TYPE_NEOX`).
    pub fn rotate_halves(x: &mut [f32], cos: &[f32], sin: &[f32]) {
        let (a, b) = x.split_at_mut(cos.len());
        for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
            (*a, *b) = (*a * c - *b * s, *a * s + *b * c);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::simd::{Isa, with_isa};

    fn wave(n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 % 1013) as f32 / 506.5 - 1.0) * scale).collect()
    }

    #[test]
    fn exp_and_tanh_are_accurate() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let want = f64::from(x).exp();
            assert!(((f64::from(exp(x)) - want) / want).abs() < 2e-7, "exp({x})");
            let want = f64::from(x * 0.1).tanh();
            assert!((f64::from(tanh(x * 0.1)) - want).abs() < 3e-7, "tanh({})", x * 0.1);
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1e30) < 1e-37);
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        for n in [1, 15, 16, 17, 64, 100] {
            let (x, w) = (wave(n, 3.0), wave(n, 1.5));
            let run = || {
                let mut all = vec![0.0; n];
                rms_norm(&x, &w, 1e-5, &mut all);
                let mut y = x.clone();
                silu_mul(&mut y, &w);
                all.extend(&y);
                y.copy_from_slice(&x);
                gelu_mul(&mut y, &w);
                soft_cap(&mut y, 2.0);
                all.extend(&y);
                softmax(&mut y);
                all.extend(&y);
                all.push(max(&x));
                all.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let scalar = with_isa(Isa::Scalar, run);
            for isa in Isa::available() {
                assert_eq!(with_isa(isa, run), scalar, "{}, length {n}", isa.name());
            }
        }
    }

    #[test]
    fn softmax_adds_up_to_one_and_keeps_ratios() {
        let mut x = vec![1.0f32, 2.0, 3.0, -50.0];
        softmax(&mut x);
        assert!((x.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert!((x[1] / x[0] - std::f32::consts::E).abs() < 1e-5);
    }

    #[test]
    fn rotation_is_a_rotation() {
        let (mut a, mut b) = (vec![1.0, 0.0, 0.0, 2.0], vec![1.0, 0.0, 0.0, 2.0]);
        let (cos, sin) = ([0.0, 1.0], [1.0, 0.0]);
        rotate_interleaved(&mut a, &cos, &sin);
        assert_eq!(a, [0.0, 1.0, 0.0, 2.0]);
        rotate_halves(&mut b, &cos, &sin);
        assert_eq!(b, [0.0, 0.0, 1.0, 2.0]);
    }
}
