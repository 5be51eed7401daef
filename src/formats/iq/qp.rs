//! `make_qp_quants` as IQ2_XXS uses it: the scale for codes 0..=4 of 32 values, some of them negative.

use super::util::{c_max, nearest_int};

const NMAX: i32 = 4;

/// The scale only; ggml also leaves codes, which IQ2_XXS replaces.
///
/// ggml keeps the codes in bytes, so the code −1 of a negative value counts as 255 in the first error sum and in the
/// passes over the coordinates.
pub fn qp_scale(x: &[f32; 32], w: &[f32; 32]) -> f32 {
    let max = x.iter().fold(0.0, |m, &v| c_max(m, v));
    if max < 1e-15 {
        return 0.0;
    }
    let mut iscale = NMAX as f32 / max;
    let scale = 1.0 / iscale;
    let mut best = 0.0;
    for (&x, &w) in x.iter().zip(w) {
        let diff = x - scale * f32::from(nearest_int(iscale * x) as u8);
        best += w * diff * diff;
    }
    for is in (-4..=4).filter(|&is| is != 0) {
        let iscale_is = (0.1f32 * is as f32 + NMAX as f32) / max;
        let scale_is = 1.0 / iscale_is;
        let mut mse = 0.0;
        for (&x, &w) in x.iter().zip(w) {
            let diff = x - scale_is * nearest_int(iscale_is * x).min(NMAX) as f32;
            mse += w * diff * diff;
        }
        if mse < best {
            best = mse;
            iscale = iscale_is;
        }
    }
    let (mut sumlx, mut suml2) = (0.0, 0.0);
    let mut codes = [0u8; 32];
    for (i, code) in codes.iter_mut().enumerate() {
        let l = nearest_int(iscale * x[i]).min(NMAX);
        *code = l as u8;
        sumlx += w[i] * x[i] * l as f32;
        suml2 += w[i] * l as f32 * l as f32;
    }
    for _ in 0..5 {
        let mut changed = false;
        for (i, code) in codes.iter_mut().enumerate() {
            let old = f32::from(*code);
            let mut slx = sumlx - w[i] * x[i] * old;
            let mut sl2 = suml2 - w[i] * old * old;
            if slx > 0.0 && sl2 > 0.0 {
                let new = nearest_int(x[i] * sl2 / slx).min(NMAX);
                if new != i32::from(*code) {
                    slx += w[i] * x[i] * new as f32;
                    sl2 += w[i] * new as f32 * new as f32;
                    if slx * slx * suml2 > sumlx * sumlx * sl2 {
                        *code = new as u8;
                        sumlx = slx;
                        suml2 = sl2;
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
