//! Activations as llama.cpp's CPU kernels see them: rounded to the type that the weight's dot product wants.
//!
//! Source: `type_traits_cpu[..].vec_dot_type` in `ggml-cpu.c` and `quantize_row_q8_0`, `quantize_row_q8_K` (ggml b11434).

use half::f16;
use rayon::prelude::*;

use super::kernels;
use super::simulation::Simulation;
use crate::gguf::GgmlType;

/// In which arithmetic products are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// f32 throughout: what the weights cost, and nothing else.
    #[default]
    F32,
    /// Rounded as llama.cpp's CPU kernels round: 8 bits for quantized weights, the weight's own type for 16-bit ones, and f16
    /// for keys and values (the cache; `ggml_compute_forward_flash_attn_ext_tiled` keeps queries in f32).
    Ggml,
    /// In f32 with weights, inputs and keys and values rounded to a precision of other runtimes.
    Simulated(Simulation),
}

impl Activations {
    /// The precision that is simulated.
    pub fn simulated(self) -> Option<Simulation> {
        match self {
            Activations::Simulated(s) => Some(s),
            Activations::F32 | Activations::Ggml => None,
        }
    }
}

/// What a weight's dot product makes of its other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    None,
    F16,
    Bf16,
    /// 32 values with one f16 scale (Q8_0; Q8_1 holds the same values and a sum).
    Q8_0,
    /// 256 values with one f32 scale.
    Q8K,
    /// As a simulated precision wants it; of the down matrix or of another.
    Simulated(Simulation, bool),
}

impl Rounding {
    /// Of a weight of type `ty`.
    pub fn of(ty: GgmlType, activations: Activations) -> Rounding {
        use GgmlType::*;
        if activations != Activations::Ggml {
            return Rounding::None;
        }
        match ty {
            F16 => Rounding::F16,
            BF16 => Rounding::Bf16,
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | IQ4_NL | MXFP4 | NVFP4 | Q1_0 | Q2_0 => Rounding::Q8_0,
            Q2_K | Q3_K | Q4_K | Q5_K | Q6_K | IQ4_XS | IQ3_S | IQ3_XXS | IQ2_S | IQ2_XS | IQ2_XXS | IQ1_S | IQ1_M
            | TQ1_0 | TQ2_0 => Rounding::Q8K,
            F32 | F64 | Q8_1 | Q8_K | I8 | I16 | I32 | I64 => Rounding::None,
        }
    }

    /// Rounds rows of `columns` values in place.
    pub fn apply(self, x: &mut [f32], columns: usize) {
        let chunk = columns.max(1) * 64;
        match self {
            Rounding::None => {}
            Rounding::F16 => x.par_chunks_mut(chunk).for_each(to_f16),
            Rounding::Bf16 => x.par_chunks_mut(chunk).for_each(kernels::to_bf16),
            Rounding::Q8_0 => {
                x.par_chunks_mut(chunk).for_each(|x| x.chunks_mut(32).for_each(q8_0));
            }
            Rounding::Q8K => {
                x.par_chunks_mut(chunk).for_each(|x| x.chunks_mut(256).for_each(q8_k));
            }
            Rounding::Simulated(s, down) => s.inputs(x, columns, down),
        }
    }
}

/// To f16 and back.
pub fn to_f16(x: &mut [f32]) {
    for v in x {
        *v = f16::from_f32(*v).to_f32();
    }
}

/// `quantize_row_q8_0` and back: scale amax / 127, kept as f16.
fn q8_0(block: &mut [f32]) {
    let amax = kernels::abs_max(block);
    let d = amax / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    kernels::round_scaled(block, inverse, f16::from_f32(d).to_f32());
}

/// `quantize_row_q8_K` and back: the value of largest size becomes -127.
fn q8_k(block: &mut [f32]) {
    let amax = kernels::abs_max(block);
    if amax == 0.0 {
        return;
    }
    let max = block.iter().copied().find(|v| v.abs() == amax).unwrap_or(amax);
    let scale = -127.0 / max;
    kernels::round_scaled(block, scale, 1.0 / scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 % 1013) as f32 / 506.5 - 1.0) * 3.0).collect()
    }

    #[test]
    fn eight_bits_are_the_rows_that_ggml_would_store() {
        use crate::formats;
        let x = wave(512);
        let mut rounded = x.clone();
        Rounding::Q8_0.apply(&mut rounded, 512);
        // the weights' Q8_0 is the same format (its rounding of halves aside, which does not occur here)
        let format = formats::format(GgmlType::Q8_0).unwrap();
        let mut bytes = vec![0; 512 / 32 * GgmlType::Q8_0.block_bytes()];
        format.encode(&x, 512, None, &mut bytes).unwrap();
        let mut want = vec![0.0; 512];
        format.decode(&bytes, &mut want);
        assert_eq!(rounded, want);
    }

    #[test]
    fn q8_k_keeps_the_extreme_value_and_is_within_half_a_step() {
        let x = wave(512);
        let mut rounded = x.clone();
        Rounding::Q8K.apply(&mut rounded, 512);
        for (a, b) in x.chunks(256).zip(rounded.chunks(256)) {
            let amax = a.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            for (v, r) in a.iter().zip(b) {
                assert!((v - r).abs() <= amax / 254.0 * 1.0001, "{v} became {r}");
            }
            let at = a.iter().position(|v| v.abs() == amax).unwrap();
            assert!((a[at] - b[at]).abs() <= amax * 1e-6);
        }
        let mut zeros = vec![0.0; 256];
        Rounding::Q8K.apply(&mut zeros, 256);
        assert!(zeros.iter().all(|v| *v == 0.0));
    }

    #[test]
    fn sixteen_bits() {
        let mut x = vec![1.0 + 2.0f32.powi(-12), 3.0];
        Rounding::Bf16.apply(&mut x, 2);
        assert_eq!(x, [1.0, 3.0]);
        for v in wave(100) {
            let mut one = [v];
            kernels::to_bf16(&mut one);
            assert_eq!(one[0], half::bf16::from_f32(v).to_f32());
        }
    }
}
