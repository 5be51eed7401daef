//! `make_qp_quants` as IQ2_XXS uses it: the scale for codes 0..=4 of 32 values, some of them negative.
//!
//! ggml keeps the codes in bytes, so the code −1 of a negative value counts as 255 in the first error sum and in the
//! passes over the coordinates. Only the scale is needed here; IQ2_XXS replaces the codes.

use super::util::{c_max, nearest_int};
#[cfg(target_arch = "x86_64")]
use crate::formats::simd::iq_scan::Avx2;

/// Largest code.
pub const NMAX: i32 = 4;
/// Trial scales, in tenths of a code.
pub const TRIALS: [i32; 8] = [-4, -3, -2, -1, 1, 2, 3, 4];
/// Most passes over the coordinates.
pub const PASSES: usize = 5;

/// The scale.
pub fn qp_scale(x: &[f32; 32], w: &[f32; 32]) -> f32 {
    let max = x.iter().fold(0.0, |m, &v| c_max(m, v));
    if max < 1e-15 {
        return 0.0;
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(isa) = Avx2::get() {
        return isa.refine(x, w, isa.best_iscale(x, w, max));
    }
    refine(x, w, best_iscale(x, w, max))
}

/// The reciprocal scale with the least squared error.
pub fn best_iscale(x: &[f32; 32], w: &[f32; 32], max: f32) -> f32 {
    let iscales = TRIALS.map(|is| (0.1f32 * is as f32 + NMAX as f32) / max);
    let mse = iscales.map(|iscale| {
        let scale = 1.0 / iscale;
        x.iter().zip(w).fold(0.0, |mse, (x, w)| {
            let diff = x - scale * nearest_int(iscale * x).min(NMAX) as f32;
            mse + w * diff * diff
        })
    });
    choose(x, w, max, &iscales, &mse)
}

/// The first trial with the least error, or `NMAX/max` if none is better.
pub fn choose(x: &[f32; 32], w: &[f32; 32], max: f32, iscales: &[f32; 8], mse: &[f32; 8]) -> f32 {
    let mut chosen = NMAX as f32 / max;
    let scale = 1.0 / chosen;
    let mut best = x.iter().zip(w).fold(0.0, |mse, (x, w)| {
        let diff = x - scale * f32::from(nearest_int(chosen * x) as u8);
        mse + w * diff * diff
    });
    for (&iscale, &mse) in iscales.iter().zip(mse) {
        if mse < best {
            (best, chosen) = (mse, iscale);
        }
    }
    chosen
}

/// Codes (as ggml's bytes) of a reciprocal scale, Σ (w·x)·l and Σ (w·l)·l.
pub fn first_codes(x: &[f32; 32], w: &[f32; 32], iscale: f32) -> ([i32; 32], f32, f32) {
    let (mut sumlx, mut suml2) = (0.0, 0.0);
    let codes = std::array::from_fn(|i| {
        let l = nearest_int(iscale * x[i]).min(NMAX);
        sumlx += w[i] * x[i] * l as f32;
        suml2 += w[i] * l as f32 * l as f32;
        i32::from(l as u8)
    });
    (codes, sumlx, suml2)
}

/// Changes codes one by one while that improves the fit, and gives the scale.
pub fn refine(x: &[f32; 32], w: &[f32; 32], iscale: f32) -> f32 {
    let (mut codes, mut sumlx, mut suml2) = first_codes(x, w, iscale);
    for _ in 0..PASSES {
        let mut changed = false;
        for (i, code) in codes.iter_mut().enumerate() {
            let old = *code as f32;
            let mut slx = sumlx - w[i] * x[i] * old;
            let mut sl2 = suml2 - w[i] * old * old;
            if slx > 0.0 && sl2 > 0.0 {
                let new = nearest_int(x[i] * sl2 / slx).min(NMAX);
                if new != *code {
                    slx += w[i] * x[i] * new as f32;
                    sl2 += w[i] * new as f32 * new as f32;
                    if slx * slx * suml2 > sumlx * sumlx * sl2 {
                        *code = i32::from(new as u8);
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
    ratio(sumlx, suml2)
}

/// The scale that fits best.
pub fn ratio(sumlx: f32, suml2: f32) -> f32 {
    if suml2 > 0.0 { sumlx / suml2 } else { 0.0 }
}
