//! The transforms of a model: a rotation of the stream and, layer by layer, rotations and scales. All in f64.

use std::fmt::Write;

use sha2::{Digest, Sha256};

use super::TransformError;
use super::anatomy::{Anatomy, Pair};
use crate::calibration::imatrix::hex;
use crate::linalg;

/// Largest `|RᵀR - I|` that is taken for orthogonal.
pub const ORTHOGONAL: f64 = 1e-6;

/// Of one layer; `None`: the identity. Shapes are those of [`Anatomy::shape`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerTransforms {
    pub r_ov: Option<Vec<f64>>,
    pub s_attn: Option<Vec<f64>>,
    pub s_ffn: Option<Vec<f64>>,
    pub s_ov: Option<Vec<f64>>,
    pub s_qk: Option<Vec<f64>>,
    pub s_ud: Option<Vec<f64>>,
}

/// Of a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Transforms {
    /// What they are called: a preset with its settings, or the name of a file.
    pub name: String,
    pub r_res: Option<Vec<f64>>,
    pub layers: Vec<LayerTransforms>,
}

impl Transforms {
    /// The identity on `layers` layers.
    pub fn identity(name: &str, layers: usize) -> Transforms {
        Transforms { name: name.into(), r_res: None, layers: vec![LayerTransforms::default(); layers] }
    }

    /// The values of a pair; the layer does not matter to [`Pair::Stream`].
    pub fn get(&self, pair: Pair, layer: usize) -> Option<&[f64]> {
        if pair == Pair::Stream {
            return self.r_res.as_deref();
        }
        let l = self.layers.get(layer)?;
        match pair {
            Pair::Stream => None,
            Pair::Values => l.r_ov.as_deref(),
            Pair::Attention => l.s_attn.as_deref(),
            Pair::FeedForward => l.s_ffn.as_deref(),
            Pair::ValueScales => l.s_ov.as_deref(),
            Pair::QueryKey => l.s_qk.as_deref(),
            Pair::UpDown => l.s_ud.as_deref(),
        }
    }

    /// Where a pair's values go.
    pub fn slot(&mut self, pair: Pair, layer: usize) -> &mut Option<Vec<f64>> {
        let l = match pair {
            Pair::Stream => return &mut self.r_res,
            _ => &mut self.layers[layer],
        };
        match pair {
            Pair::Stream | Pair::Values => &mut l.r_ov,
            Pair::Attention => &mut l.s_attn,
            Pair::FeedForward => &mut l.s_ffn,
            Pair::ValueScales => &mut l.s_ov,
            Pair::QueryKey => &mut l.s_qk,
            Pair::UpDown => &mut l.s_ud,
        }
    }

    /// Every tensor that is there: name in a file, pair, layer, values.
    pub fn tensors(&self) -> Vec<(String, Pair, usize, &[f64])> {
        let mut all = Vec::new();
        if let Some(r) = &self.r_res {
            all.push((Pair::Stream.name().to_string(), Pair::Stream, 0, &r[..]));
        }
        for l in 0..self.layers.len() {
            for pair in &Pair::ALL[1..] {
                if let Some(v) = self.get(*pair, l) {
                    all.push((format!("blk.{l}.{}", pair.name()), *pair, l, v));
                }
            }
        }
        all
    }

    /// True if a rotation is among them: a diagonal importance matrix of the original model is then of no use.
    pub fn rotates(&self) -> bool {
        self.r_res.is_some() || self.layers.iter().any(|l| l.r_ov.is_some())
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> u64 {
        self.tensors().iter().map(|t| t.3.len() as u64 * 8).sum()
    }

    /// sha256 in hexadecimal over names and values (f64, little-endian), in the order of [`Transforms::tensors`].
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(b"ostq.transforms.1\n");
        for (name, _, _, values) in self.tensors() {
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name.as_bytes());
            hash.update((values.len() as u64).to_le_bytes());
            values.iter().for_each(|v| hash.update(v.to_le_bytes()));
        }
        hex(&hash.finalize())
    }

    /// Refuses what does not fit the model, is not orthogonal or not positive, with numbers.
    pub fn check(&self, model: &Anatomy) -> Result<(), TransformError> {
        if self.layers.len() != model.spec.layers {
            let (found, expected) = (vec![self.layers.len()], vec![model.spec.layers]);
            return Err(TransformError::Shape { name: "layers".into(), found, expected });
        }
        for (name, pair, layer, values) in self.tensors() {
            if let Some(why) = model.refusal(pair) {
                return Err(TransformError::Void { name, arch: model.spec.arch.clone(), why: why.into() });
            }
            let shape = model.shape(pair, layer);
            if shape.iter().product::<usize>() != values.len() {
                return Err(TransformError::Shape { name, found: vec![values.len()], expected: shape });
            }
            if let Some(i) = values.iter().position(|v| !v.is_finite()) {
                return Err(TransformError::NotFinite { name, index: i, value: values[i] });
            }
            if let Pair::Stream | Pair::Values = pair {
                let n = shape[shape.len() - 1];
                for (i, r) in values.chunks_exact(n * n).enumerate() {
                    let error = off_orthogonal(r, n);
                    if error.is_nan() || error > ORTHOGONAL {
                        let mut name = name;
                        if pair == Pair::Values {
                            write!(name, "[{i}]").expect("a string");
                        }
                        return Err(TransformError::NotOrthogonal { name, error });
                    }
                }
            } else if let Some(i) = values.iter().position(|v| *v <= 0.0) {
                return Err(TransformError::NotPositive { name, index: i, value: values[i] });
            }
        }
        Ok(())
    }
}

/// Largest element of `|R Rᵀ - I|`; for a square matrix it is small when that of `RᵀR - I` is.
pub fn off_orthogonal(r: &[f64], n: usize) -> f64 {
    let mut product = vec![0.0; n * n];
    let t: Vec<f64> = (0..n * n).map(|at| r[at % n * n + at / n]).collect();
    linalg::gemm_f64(&mut product, &t, &t, (n, n, n), linalg::all_threads());
    let off = |(at, v): (usize, &f64)| (v - f64::from(u8::from(at / n == at % n))).abs();
    product.iter().enumerate().map(off).fold(0.0, |a: f64, b| if b.is_nan() || b > a { b } else { a })
}
