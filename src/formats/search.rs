//! Scale searches: given the values of one block and their importance, which scale (and minimum) rounds them best.
//!
//! These are the scalar definitions. All arithmetic is f32, left to right, one rounding per operation: the searches
//! compare sums that differ in the last bit, so another order gives other bytes. Integers become f32 where they meet
//! one. Slices of one call have the same length.

/// Blocks whose largest magnitude is below this are all zero (`GROUP_MAX_EPS`).
pub(crate) const MAX_EPS: f32 = 1e-15;

/// `nearest_int` (ggml-quants.c): the nearest integer, ties to even, for |v| <= 4194303.
///
/// Beyond that the result wraps, and NaN or infinity give what their mantissa holds; the searches can get there, so
/// the bits are kept literally.
#[inline(always)]
pub(crate) fn nearest_int(v: f32) -> i32 {
    ((v + 12582912.0).to_bits() & 0x007f_ffff) as i32 - 0x0040_0000
}

/// C's `(int) v` as x86-64 compiles it (`cvttss2si`): NaN and values out of range give `i32::MIN`.
#[inline(always)]
pub(crate) fn truncate(v: f32) -> i32 {
    if (-2147483648.0..2147483648.0).contains(&v) { v as i32 } else { i32::MIN }
}

/// C's `roundf` followed by a conversion to int: half away from zero.
#[inline(always)]
pub(crate) fn round_away(v: f32) -> i32 {
    truncate(v.round())
}

/// `GGML_FP32_TO_FP16`: round to nearest even, overflow to infinity.
///
/// NaN becomes the one that invalid operations give on x86-64, whose sign is set; elsewhere it need not be.
#[inline(always)]
pub(crate) fn to_f16_bits(v: f32) -> u16 {
    if v.is_nan() {
        return 0xfe00;
    }
    half::f16::from_f32_const(v).to_bits()
}

/// `GGML_FP16_TO_FP32`: exact.
#[inline(always)]
pub(crate) fn from_f16_bits(bits: u16) -> f32 {
    half::f16::from_bits(bits).to_f32_const()
}

/// `GGML_FP32_TO_FP16` as little-endian bytes: infinity if too large, a NaN becomes sign | 0x7E00.
pub(crate) fn f16_bytes(v: f32) -> [u8; 2] {
    if v.is_nan() {
        return ((v.to_bits() >> 16) as u16 & 0x8000 | 0x7e00).to_le_bytes();
    }
    half::f16::from_f32(v).to_le_bytes()
}

/// The f16 at byte offset `at`, as f32.
pub(crate) fn f16_at(block: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The value of largest magnitude, the first of several, with its sign; and the magnitude.
#[inline(always)]
pub(crate) fn signed_max(x: &[f32]) -> (f32, f32) {
    let (mut max, mut amax) = (0.0f32, 0.0f32);
    for &v in x {
        if v.abs() > amax {
            (max, amax) = (v, v.abs());
        }
    }
    (max, amax)
}

/// Sums of one candidate of [`make_qx_quants`]: Σ w·x·l and Σ w·l².
#[inline(always)]
fn symmetric_sums(nmax: i32, iscale: f32, x: &[f32], w: &[f32]) -> (f32, f32) {
    let (mut sumlx, mut suml2) = (0.0f32, 0.0f32);
    for (&x, &w) in x.iter().zip(w) {
        let l = nearest_int(iscale * x).clamp(-nmax, nmax - 1) as f32;
        sumlx += w * x * l;
        suml2 += w * l * l;
    }
    (sumlx, suml2)
}

/// `make_qx_quants` with `rmse_type` 1: x ≈ scale · (l − nmax), 0 <= l < 2·nmax, by weighted least squares over 19 scales.
///
/// Without importance weights the caller passes w = x².
pub(crate) fn make_qx_quants(nmax: i32, x: &[f32], w: &[f32], l: &mut [i8]) -> f32 {
    let (max, amax) = signed_max(x);
    if amax < MAX_EPS {
        l.fill(0);
        return 0.0;
    }
    let mut best_iscale = -nmax as f32 / max;
    let (sumlx, suml2) = symmetric_sums(nmax, best_iscale, x, w);
    let mut scale = if suml2 != 0.0 { sumlx / suml2 } else { 0.0 };
    let mut best = scale * sumlx;
    for is in (-9..=9).filter(|&is| is != 0) {
        let iscale = -(nmax as f32 + 0.1 * is as f32) / max;
        let (sumlx, suml2) = symmetric_sums(nmax, iscale, x, w);
        if suml2 > 0.0 && sumlx * sumlx > best * suml2 {
            best_iscale = iscale;
            scale = sumlx / suml2;
            best = scale * sumlx;
        }
    }
    for (l, &x) in l.iter_mut().zip(x) {
        *l = (nearest_int(best_iscale * x).clamp(-nmax, nmax - 1) + nmax) as i8;
    }
    scale
}

/// `make_q3_quants` with `do_rmse`: as [`make_qx_quants`] with w = x², but by up to five passes that change one level
/// at a time.
pub(crate) fn make_q3_quants(nmax: i32, x: &[f32], l: &mut [i8]) -> f32 {
    let (max, amax) = signed_max(x);
    if amax < MAX_EPS {
        l.fill(0);
        return 0.0;
    }
    let iscale = -nmax as f32 / max;
    let (mut sumlx, mut suml2) = (0.0f32, 0.0f32);
    for (l, &x) in l.iter_mut().zip(x) {
        let level = nearest_int(iscale * x).clamp(-nmax, nmax - 1);
        *l = level as i8;
        let (w, level) = (x * x, level as f32);
        sumlx += w * x * level;
        suml2 += w * level * level;
    }
    for _ in 0..5 {
        let mut changed = false;
        for (l, &x) in l.iter_mut().zip(x) {
            let (w, old) = (x * x, *l as f32);
            let mut slx = sumlx - w * x * old;
            if slx > 0.0 {
                let mut sl2 = suml2 - w * old * old;
                let level = nearest_int(x * sl2 / slx).clamp(-nmax, nmax - 1);
                if level != *l as i32 {
                    let new = level as f32;
                    slx += w * x * new;
                    sl2 += w * new * new;
                    if sl2 > 0.0 && slx * slx * suml2 > sumlx * sumlx * sl2 {
                        *l = level as i8;
                        (sumlx, suml2) = (slx, sl2);
                        changed = true;
                    }
                }
            }
        }
        if !changed {
            break;
        }
    }
    for l in l.iter_mut() {
        *l += nmax as i8;
    }
    if suml2 > 0.0 { sumlx / suml2 } else { 0.0 }
}

/// What differs between the callers of the affine search.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Affine {
    /// The highest level.
    pub nmax: i32,
    /// First candidate: `rmin + nmax` levels over the range.
    pub rmin: f32,
    /// Step between candidates.
    pub rdelta: f32,
    /// Candidates `0..=nstep`.
    pub nstep: i32,
    /// The error is Σ w·|diff| instead of Σ w·diff².
    pub mad: bool,
    /// `make_qkx3_quants`: levels are clamped before rounding, so that they cannot wrap.
    pub guarded: bool,
}

impl Affine {
    /// The level of `v` = iscale · (x − min).
    #[inline(always)]
    pub(crate) fn level(&self, v: f32) -> i32 {
        if self.guarded {
            let nmax = self.nmax as f32;
            if v > 0.0 { nearest_int(if v < nmax { v } else { nmax }) } else { 0 }
        } else {
            nearest_int(v).clamp(0, self.nmax)
        }
    }

    /// |diff| or diff².
    #[inline(always)]
    fn loss(&self, diff: f32) -> f32 {
        if self.mad { diff.abs() } else { diff * diff }
    }
}

/// `make_qkx2_quants`, `make_qkx3_quants`: x ≈ scale · l − the_min, 0 <= l <= nmax. Returns (scale, the_min >= 0).
///
/// The minimum of the best candidate so far is the origin of the next one.
pub(crate) fn make_qkx_quants(p: &Affine, x: &[f32], w: &[f32], levels: &mut [u8]) -> (f32, f32) {
    let (mut min, mut max) = (x[0], x[0]);
    let mut sum_w = w[0];
    let mut sum_x = sum_w * x[0];
    for (&x, &w) in x.iter().zip(w).skip(1) {
        if x < min {
            min = x;
        }
        if x > max {
            max = x;
        }
        sum_w += w;
        sum_x += w * x;
    }
    if min > 0.0 {
        min = 0.0;
    }
    if max <= min {
        levels.fill(0);
        return (0.0, -min);
    }
    let nmax = p.nmax as f32;
    let iscale = nmax / (max - min);
    let mut scale = 1.0 / iscale;
    let mut best_error = 0.0f32;
    for ((level, &x), &w) in levels.iter_mut().zip(x).zip(w) {
        let l = nearest_int(iscale * (x - min)).clamp(0, p.nmax);
        *level = l as u8;
        best_error += w * p.loss(scale * l as f32 + min - x);
    }
    let mut candidate = [0u8; 32];
    let candidate = &mut candidate[..x.len()];
    for is in 0..=p.nstep {
        let iscale = (p.rmin + p.rdelta * is as f32 + nmax) / (max - min);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0f32, 0.0f32, 0.0f32);
        for ((level, &x), &w) in candidate.iter_mut().zip(x).zip(w) {
            let l = p.level(iscale * (x - min));
            *level = l as u8;
            let l = l as f32;
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * x;
        }
        let det = sum_w * sum_l2 - sum_l * sum_l;
        if det > 0.0 {
            let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / det;
            let mut this_min = (sum_l2 * sum_x - sum_l * sum_xl) / det;
            if this_min > 0.0 {
                this_min = 0.0;
                this_scale = sum_xl / sum_l2;
            }
            let mut error = 0.0f32;
            for ((&l, &x), &w) in candidate.iter().zip(x).zip(w) {
                error += w * p.loss(this_scale * l as f32 + this_min - x);
            }
            if error < best_error {
                levels.copy_from_slice(candidate);
                best_error = error;
                scale = this_scale;
                min = this_min;
            }
        }
    }
    (scale, -min)
}

/// `make_qp_quants`: x ≈ scale · l for x >= 0, l <= nmax, by least squares over nine scales and five passes.
///
/// Levels are bytes: a negative one (negative x can come from negative scales) wraps, as in the source.
pub(crate) fn make_qp_quants(nmax: i32, x: &[f32], l: &mut [u8], w: &[f32]) -> f32 {
    let mut max = 0.0f32;
    for &x in x {
        max = if max > x { max } else { x };
    }
    if max < MAX_EPS {
        l.fill(0);
        return 0.0;
    }
    let mut iscale = nmax as f32 / max;
    let scale = 1.0 / iscale;
    let mut best_mse = 0.0f32;
    for (&x, &w) in x.iter().zip(w) {
        let diff = x - scale * (nearest_int(iscale * x) as u8) as f32;
        best_mse += w * diff * diff;
    }
    for is in (-4..=4).filter(|&is| is != 0) {
        let iscale_is = (0.1 * is as f32 + nmax as f32) / max;
        let scale_is = 1.0 / iscale_is;
        let mut mse = 0.0f32;
        for (&x, &w) in x.iter().zip(w) {
            let level = nearest_int(iscale_is * x).min(nmax);
            let diff = x - scale_is * level as f32;
            mse += w * diff * diff;
        }
        if mse < best_mse {
            best_mse = mse;
            iscale = iscale_is;
        }
    }
    let (mut sumlx, mut suml2) = (0.0f32, 0.0f32);
    for ((l, &x), &w) in l.iter_mut().zip(x).zip(w) {
        let level = nearest_int(iscale * x).min(nmax);
        *l = level as u8;
        let level = level as f32;
        sumlx += w * x * level;
        suml2 += w * level * level;
    }
    for _ in 0..5 {
        let mut changed = false;
        for ((l, &x), &w) in l.iter_mut().zip(x).zip(w) {
            let old = *l as f32;
            let mut slx = sumlx - w * x * old;
            let mut sl2 = suml2 - w * old * old;
            if slx > 0.0 && sl2 > 0.0 {
                let level = nearest_int(x * sl2 / slx).min(nmax);
                if level != *l as i32 {
                    let new = level as f32;
                    slx += w * x * new;
                    sl2 += w * new * new;
                    if slx * slx * suml2 > sumlx * sumlx * sl2 {
                        *l = level as u8;
                        (sumlx, suml2) = (slx, sl2);
                        changed = true;
                    }
                }
            }
        }
        if !changed {
            break;
        }
    }
    if suml2 > 0.0 { sumlx / suml2 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_int_rounds_to_even_and_wraps() {
        for (v, want) in [(0.5, 0), (1.5, 2), (-0.5, 0), (-2.5, -2), (4194303.0, 4194303), (4194304.0, -4194304)] {
            assert_eq!(nearest_int(v), want, "{v}");
        }
        assert_eq!(nearest_int(f32::INFINITY), -4194304);
        assert_eq!(nearest_int(f32::NAN), 0);
    }

    #[test]
    fn conversions_out_of_range_give_the_minimum() {
        assert_eq!(truncate(f32::NAN), i32::MIN);
        assert_eq!(truncate(3e9), i32::MIN);
        assert_eq!(truncate(-7.9), -7);
        assert_eq!(round_away(-2.5), -3);
        assert_eq!(round_away(0.49999997), 0);
        assert_eq!(to_f16_bits(f32::NAN), 0xfe00);
        assert_eq!(to_f16_bits(-1e6), 0xfc00);
        assert_eq!(to_f16_bits(1e-7), 2);
    }
}
