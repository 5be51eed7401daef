//! What of one layer is tuned, and a step of it.

use std::collections::BTreeMap;

use super::TuningError;
use super::blocks::{Adam, Blocks, Parameters};
use super::head::add_norm_gradient;
use crate::forward::backward::layer::{LayerBack, Norm, Sink, Slot};
use crate::forward::layer::Linear;
use crate::forward::{Activations, Model};
use crate::gguf::GgmlType;
use crate::linalg::add_cross;

/// The blocks that a tensor was rounded to.
#[derive(Clone)]
pub struct Rounded {
    pub ty: GgmlType,
    pub bytes: Vec<u8>,
}

/// Parameters of a norm: steps are relative to a weight's size, or to the mean size where that is larger.
pub fn norm_parameters(weight: Vec<f32>) -> Parameters {
    let mean = weight.iter().map(|w| w.abs()).sum::<f32>() / weight.len().max(1) as f32;
    Parameters::relative(weight, mean)
}

/// The norms of a layer that are there.
#[derive(Default)]
pub struct Norms(pub [Option<Parameters>; 6]);

/// What of a layer is tuned.
pub struct Tuned {
    pub linears: [Option<Blocks>; 7],
    pub norms: Norms,
}

/// The norms of a layer, in the order of [`Norm`].
const NORMS: [&str; 6] =
    ["attn_norm", "attn_q_norm", "attn_k_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"];

impl Tuned {
    /// Layer `l` of the float model with the weights that `rounded` gives, and what of it is tuned: codes of types with up to
    /// `latent` levels, scales, norms. A norm that `rounded` gives as f32 takes the place of the float model's.
    pub fn of(
        model: &Model<'_>,
        l: usize,
        rounded: &dyn Fn(&str) -> Result<Option<Rounded>, TuningError>,
        latent: u32,
    ) -> Result<(LayerBack, Tuned), TuningError> {
        let mut layer = LayerBack::dense(model.layer(l, Activations::F32)?, &model.spec)?;
        // parts of a fused weight follow each other
        let mut used: BTreeMap<String, usize> = BTreeMap::new();
        let mut linears = Vec::new();
        for slot in Slot::ALL {
            let linear = layer.linear_mut(slot);
            let Some(r) = rounded(&linear.name)? else {
                linears.push(None);
                continue;
            };
            let row = r.ty.block_bytes() * (linear.inputs / r.ty.block_len());
            let at = used.entry(linear.name.clone()).or_default();
            let part = &r.bytes[*at..][..row * linear.outputs()];
            *at += part.len();
            let part = Rounded { ty: r.ty, bytes: part.to_vec() };
            linears.push(blocks_of(&part, &mut linear.weight, linear.inputs, latent));
        }
        for (name, weight) in NORMS.iter().zip(layer.norms_mut()) {
            let Some(weight) = weight else { continue };
            if let Some(r) = rounded(&norm_name(l, name))? {
                weight.iter_mut().zip(r.bytes.as_chunks().0).for_each(|(w, b)| *w = f32::from_le_bytes(*b));
            }
        }
        let norms = layer.norms().map(|w| w.map(|w| norm_parameters(w.to_vec())));
        let linears = linears.try_into().unwrap_or_else(|_| unreachable!("one for each slot"));
        Ok((layer, Tuned { linears, norms: Norms(norms) }))
    }

    /// Bytes of every tensor of layer `l` that is tuned, as it is written: blocks, and norms as f32.
    pub fn bytes(&self, layer: &LayerBack, l: usize) -> Vec<(String, GgmlType, Vec<u8>)> {
        let mut all: Vec<(String, GgmlType, Vec<u8>)> = Vec::new();
        for (slot, blocks) in Slot::ALL.into_iter().zip(&self.linears) {
            let Some(b) = blocks else { continue };
            let name = &layer.linear(slot).name;
            match all.last_mut() {
                Some((last, _, old)) if last == name => old.extend(b.bytes()),
                _ => all.push((name.clone(), b.ty(), b.bytes())),
            }
        }
        let norms = NORMS.iter().zip(&self.norms.0).filter_map(|(name, p)| Some((name, p.as_ref()?)));
        all.extend(norms.map(|(name, p)| (norm_name(l, name), GgmlType::F32, f32s(p))));
        all
    }

    /// Everything that a step depends on; call [`Tuned::refresh`] after writing to it.
    pub fn state(&mut self) -> Vec<&mut Vec<f32>> {
        let mut all: Vec<&mut Vec<f32>> = self.linears.iter_mut().flatten().flat_map(Blocks::state).collect();
        all.extend(self.norms.0.iter_mut().flatten().flat_map(Parameters::state));
        all
    }

    /// Makes the weights of `layer` those of the parameters.
    pub fn refresh(&mut self, layer: &mut LayerBack) {
        for (slot, blocks) in Slot::ALL.into_iter().zip(&mut self.linears) {
            if let Some(b) = blocks {
                b.values(&mut layer.linear_mut(slot).weight);
            }
        }
        for (w, p) in layer.norms_mut().into_iter().zip(&self.norms.0) {
            if let (Some(w), Some(p)) = (w, p) {
                w.copy_from_slice(&p.values);
            }
        }
    }
}

fn norm_name(l: usize, part: &str) -> String {
    format!("blk.{l}.{part}.weight")
}

/// Values as they are written.
pub fn f32s(p: &Parameters) -> Vec<u8> {
    p.values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// A step in work, for one layer.
pub struct Step<'a> {
    tuned: &'a mut Tuned,
    gradient: &'a mut Vec<f32>,
    adam: Adam,
    eps: f32,
}

impl<'a> Step<'a> {
    /// `gradient`: room for that of a weight; `eps`: of the norms.
    pub fn new(tuned: &'a mut Tuned, gradient: &'a mut Vec<f32>, adam: Adam, eps: f32) -> Step<'a> {
        Step { tuned, gradient, adam, eps }
    }
}

impl Sink for Step<'_> {
    fn linear(&mut self, slot: Slot, linear: &mut Linear, x: &[f32], dy: &[f32]) {
        let Some(blocks) = &mut self.tuned.linears[slot as usize] else { return };
        self.gradient.clear();
        self.gradient.resize(linear.weight.len(), 0.0);
        add_cross(self.gradient, dy, x, x.len() / linear.inputs, linear.inputs);
        blocks.step(self.gradient, &mut linear.weight, &self.adam);
    }

    fn norm(&mut self, norm: Norm, weight: &mut [f32], x: &[f32], dy: &[f32]) {
        let Some(p) = &mut self.tuned.norms.0[norm as usize] else { return };
        let mut d = vec![0f32; weight.len()];
        add_norm_gradient(x, self.eps, dy, &mut d);
        d.iter().enumerate().for_each(|(i, g)| p.step(i, *g, &self.adam));
        weight.copy_from_slice(&p.values);
    }
}

/// Makes parameters of what a tensor was rounded to, and `weight` its values. Codes are latent up to `latent` levels.
pub fn blocks_of(r: &Rounded, weight: &mut [f32], columns: usize, latent: u32) -> Option<Blocks> {
    let levels = crate::formats::grid::Grid::of(r.ty).map(|g| crate::rounding::levels::AnyLevels::of(g.levels).count());
    let target = levels.is_some_and(|n| n <= latent as usize).then(|| weight.to_vec());
    let mut blocks = Blocks::new(r.ty, &r.bytes, columns, target.as_deref());
    match &mut blocks {
        Some(b) => b.values(weight),
        None => crate::formats::format(r.ty).expect("it was rounded to it").decode(&r.bytes, weight),
    }
    blocks
}
