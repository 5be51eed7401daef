//! Rotary position embedding: angles of every position, scaling by linear, YaRN, llama3 and longrope rules.
//!
//! Source: `ggml_compute_forward_rope_flt`, `rope_yarn` (ggml b11434), `llama_context` (attention factor of YaRN) and, for
//! the methods, RoFormer (Su et al. 2021) and YaRN (Peng et al. 2023). Angles are computed in f64.

use super::kernels;
use super::spec::{RopeStyle, Spec};

/// What scales the angles of one kind of layer.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeScale {
    /// `rope.freq_base`.
    pub base: f64,
    /// 1 / `rope.scaling.factor`.
    pub freq_scale: f64,
    /// YaRN's mix of interpolation and extrapolation; 0 switches YaRN off.
    pub ext_factor: f64,
    /// Multiplies cosine and sine.
    pub attn_factor: f64,
    pub beta_fast: f64,
    pub beta_slow: f64,
    /// `rope.scaling.original_context_length`.
    pub original_context: f64,
}

/// Cosine and sine of every position, `[positions, pairs]`.
#[derive(Clone, Debug)]
pub struct RopeTable {
    style: RopeStyle,
    pairs: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// For `positions` positions. `divisors`: one per pair (`rope_freqs`, `rope_factors_*`).
    pub fn new(spec: &Spec, scale: &RopeScale, divisors: Option<&[f32]>, positions: usize) -> RopeTable {
        let pairs = spec.rope_dims / 2;
        let corr = |beta: f64| {
            // ggml_rope_yarn_corr_dim
            spec.rope_dims as f64 * (scale.original_context / (beta * 2.0 * std::f64::consts::PI)).ln()
                / (2.0 * scale.base.ln())
        };
        let low = corr(scale.beta_fast).floor().max(0.0);
        let high = corr(scale.beta_slow).ceil().min(spec.rope_dims as f64 - 1.0);
        let mut mscale = scale.attn_factor;
        if scale.ext_factor != 0.0 {
            mscale *= 1.0 + 0.1 * (1.0 / scale.freq_scale).ln();
        }
        let mut table =
            RopeTable { style: spec.rope_style, pairs, cos: Vec::with_capacity(positions * pairs), sin: Vec::new() };
        table.sin.reserve(positions * pairs);
        for position in 0..positions {
            for i in 0..pairs {
                let divisor = divisors.map_or(1.0, |d| f64::from(d[i]));
                let extrapolated = position as f64 * scale.base.powf(-2.0 * i as f64 / spec.rope_dims as f64) / divisor;
                let interpolated = extrapolated * scale.freq_scale;
                let angle = if scale.ext_factor == 0.0 {
                    interpolated
                } else {
                    let ramp = 1.0 - ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                    let mix = ramp * scale.ext_factor;
                    interpolated * (1.0 - mix) + extrapolated * mix
                };
                table.cos.push((angle.cos() * mscale) as f32);
                table.sin.push((angle.sin() * mscale) as f32);
            }
        }
        table
    }

    /// Cosines and sines, `[positions, pairs]`.
    pub fn values(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// The table of the transposed rotation: what takes gradients back.
    pub fn reversed(&self) -> RopeTable {
        RopeTable { sin: self.sin.iter().map(|s| -s).collect(), ..self.clone() }
    }

    /// Rotates the first `rope_dims` values of every head of one token.
    pub fn apply(&self, heads: &mut [f32], head_dim: usize, position: usize) {
        let range = position * self.pairs..(position + 1) * self.pairs;
        let (cos, sin) = (&self.cos[range.clone()], &self.sin[range]);
        for head in heads.chunks_exact_mut(head_dim) {
            let head = &mut head[..2 * self.pairs];
            match self.style {
                RopeStyle::Interleaved => kernels::rotate_interleaved(head, cos, sin),
                RopeStyle::Halves => kernels::rotate_halves(head, cos, sin),
            }
        }
    }
}
