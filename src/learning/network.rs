//! The transformed model in memory, its weights rounded, and one step of what its transforms learn.
//!
//! The stream is rotated behind the embedding and back before the final norm, so that embedding and head stay the float
//! model's: rotated as they would be they compute the same. The weights of the norms before readers are folded where the stream
//! is rotated. Every step makes each weight of a layer from the original and the transforms ([`Map`]), rounds it ([`Fake`]),
//! runs forward and back, and leads the gradients on to rotations and scales.

use super::LearningError;
use super::fake::Fake;
use super::maps::Map;
use super::values::{SCALES, Values, scales, scales_mut};
use crate::forward::backward::layer::{Kept, LayerBack, Norm, Scratch, Sink, Slot};
use crate::forward::layer::{Linear, Pass};
use crate::forward::{Activations, ForwardError, Model, kernels};
use crate::linalg::{add_cross, product, product_back};
use crate::transform::{Anatomy, Pair, Transforms};
use crate::tuning::blocks::Adam;
use crate::tuning::head::{LossHead, Target, add_norm_gradient};
use crate::tuning::student::embedded;

/// A linear as the float model has it, the norm before it folded in where the stream is rotated.
pub(super) struct Original {
    pub weight: Vec<f32>,
    pub bias: Option<Vec<f32>>,
    pub columns: usize,
    pub map: Map,
    pub fake: Option<Fake>,
}

/// A layer: the originals, and the weights of the norms before attention and feed-forward, 1 where they are folded.
pub(super) struct Base {
    pub linears: [Original; 7],
    norms: [Option<Vec<f32>>; 2],
}

/// The model.
pub struct Network<'a> {
    pub model: &'a Model<'a>,
    base: Vec<Base>,
    layers: Vec<LayerBack>,
    pub values: Values,
    embedding: Vec<f32>,
    /// None: the embedding is the head.
    output: Option<Vec<f32>>,
    head: LossHead<'a>,
    kept: Vec<Kept>,
    scratch: Scratch,
    again: bool,
}

/// The norms that hold inverse scales, and which these are.
pub(super) const HELD: [(Norm, Pair); 2] = [(Norm::Attention, Pair::Attention), (Norm::FeedForward, Pair::FeedForward)];

/// Of a layer in work.
pub(super) struct Back<'a> {
    pub base: &'a Base,
    pub values: &'a mut Values,
    pub layer: usize,
    pub eps: f32,
}

impl Sink for Back<'_> {
    fn linear(&mut self, slot: Slot, linear: &mut Linear, x: &[f32], dy: &[f32]) {
        let o = &self.base.linears[slot as usize];
        let mut g = vec![0f32; linear.weight.len()];
        add_cross(&mut g, dy, x, x.len() / o.columns, o.columns);
        let steps = o.map.steps(&o.weight, o.columns, self.values, self.layer);
        if let Some(fake) = o.fake {
            fake.back(steps.made(), &linear.weight, &mut g, o.columns);
        }
        o.map.back_through(&steps, o.columns, g, self.values, self.layer);
        if let Some(bias) = &o.bias {
            let mut g = vec![0f32; bias.len()];
            dy.chunks_exact(bias.len()).for_each(|row| kernels::add(&mut g, row));
            o.map.of_bias().back(bias, 1, &g, self.values, self.layer);
        }
    }

    fn norm(&mut self, norm: Norm, weight: &mut [f32], x: &[f32], dy: &[f32]) {
        let Some((_, pair)) = HELD.iter().find(|(n, _)| *n == norm) else { return };
        let Some(s) = scales_mut(&mut self.values.layers[self.layer], *pair) else { return };
        let mut d = vec![0f32; weight.len()];
        add_norm_gradient(x, self.eps, dy, &mut d);
        // γ / S, by log S
        s.gradient.iter_mut().zip(d.iter().zip(&*weight)).for_each(|(g, (d, w))| *g -= f64::from(d * w));
    }
}

/// Bytes that a step of `tokens` tokens takes at most; `again`: each layer's forward pass is computed twice.
pub fn memory(model: &Model<'_>, tokens: usize, again: bool) -> u64 {
    let kept = crate::tuning::student::kept(model, tokens);
    let layers = model.layer_bytes() * (2 * model.spec.layers as u64 + 6);
    let kept = if again { kept / model.spec.layers.max(1) as u64 } else { kept };
    layers + crate::tuning::student::least(model, tokens) + kept
}

/// Bytes that learning takes here where the steps are done on a device.
pub fn beside_device(model: &Model<'_>) -> u64 {
    // layers on their way, embedding and head of both models
    (256 << 20) + 6 * model.layer_bytes() + (4 * model.vocab * model.spec.embed * 4) as u64
}

impl<'a> Network<'a> {
    /// Starts from `start`; what it has is learned, the other pairs stay away. `fake`: how the linear of a name with so many
    /// columns is rounded.
    pub fn new(
        model: &'a Model<'a>,
        anatomy: &Anatomy,
        start: &Transforms,
        fake: &(dyn Fn(&str, usize) -> Option<Fake> + Sync),
        again: bool,
    ) -> Result<Network<'a>, LearningError> {
        let spec = &model.spec;
        let values = Values::new(start, anatomy);
        let (mut base, mut layers) = (Vec::new(), Vec::new());
        for l in 0..spec.layers {
            let (own, layer) = set_up(model, anatomy, &values, fake, l)?;
            base.push(own);
            layers.push(layer);
        }
        let (embedding, output) = tables(model)?;
        let (head, kept, scratch) = (LossHead::new(model)?, Vec::new(), Scratch::default());
        Ok(Network { model, base, layers, values, embedding, output, head, kept, scratch, again })
    }

    /// Makes the weights of all layers from the transforms as they are now.
    pub fn fuse(&mut self) {
        for (l, (base, layer)) in self.base.iter().zip(&mut self.layers).enumerate() {
            fuse(base, layer, &self.values, l);
        }
    }

    /// The linears of layer `l` as they are now, made and rounded.
    pub fn linear(&self, l: usize, slot: Slot) -> &Linear {
        self.layers[l].linear(slot)
    }

    /// Mean divergence over whole windows; `last` is the float model's last stream of the same tokens.
    pub fn divergence(&mut self, pass: &Pass<'_>, tokens: &[u32], last: &[f32]) -> Result<f64, ForwardError> {
        let mut x = turned(&self.values, embedded(&self.embedding, tokens, &self.model.spec));
        let (mut kept, mut out) = (Kept::default(), Vec::new());
        for layer in &self.layers {
            layer.forward(pass, &x, &mut kept, &mut self.scratch);
            layer.output(pass, &kept, &mut self.scratch, &mut out);
            std::mem::swap(&mut x, &mut out);
        }
        let x = turned_back(&self.values, x);
        let weight = self.output.as_ref().unwrap_or(&self.embedding);
        Ok(self.head.loss(&x, last, weight)? / tokens.len() as f64)
    }

    /// Adds the gradients of the mean loss over whole windows to those of rotations and scales; the loss.
    pub fn gradients(&mut self, pass: &Pass<'_>, tokens: &[u32], target: &Target<'_>) -> Result<f64, ForwardError> {
        let spec = &self.model.spec;
        let first = embedded(&self.embedding, tokens, &self.model.spec);
        let mut streams = vec![turned(&self.values, first.clone())];
        self.kept.resize_with(if self.again { 1 } else { self.layers.len() }, Kept::default);
        for (l, layer) in self.layers.iter().enumerate() {
            let kept = &mut self.kept[if self.again { 0 } else { l }];
            let mut out = Vec::new();
            layer.forward(pass, &streams[l], kept, &mut self.scratch);
            layer.output(pass, kept, &mut self.scratch, &mut out);
            streams.push(out);
        }
        let last = streams.pop().expect("one per layer and the first");
        let x = turned_back(&self.values, last.clone());
        let mut d = vec![0f32; x.len()];
        // the final norm stays
        let still = Adam::new(1, 0.0, 0.0);
        let weight = self.output.as_ref().unwrap_or(&self.embedding);
        let loss = self.head.back(&x, target, weight, &mut d, None, &still)?;
        if let Some(r) = &mut self.values.r_res {
            // x = last Rᵀ
            add_cross(&mut r.gradient, &d, &last, tokens.len(), r.n);
        }
        d = turned(&self.values, d);
        for l in (0..self.layers.len()).rev() {
            let x = streams.pop().expect("one per layer");
            let (layer, kept) = (&mut self.layers[l], &mut self.kept[if self.again { 0 } else { l }]);
            if self.again {
                layer.forward(pass, &x, kept, &mut self.scratch);
            }
            let mut sink = Back { base: &self.base[l], values: &mut self.values, layer: l, eps: spec.rms_eps };
            layer.back(pass, &x, &mut d, kept, &mut self.scratch, &mut sink)?;
        }
        if let Some(r) = &mut self.values.r_res {
            // the first stream = first R
            add_cross(&mut r.gradient, &first, &d, tokens.len(), r.n);
        }
        Ok(loss)
    }
}

/// The embedding, and the head where it is a tensor of its own.
pub(super) fn tables(model: &Model<'_>) -> Result<(Vec<f32>, Option<Vec<f32>>), ForwardError> {
    let mut embedding = vec![0.0; model.vocab * model.spec.embed];
    model.embedding_rows(0, model.vocab, &mut embedding)?;
    let output = match model.head_name() {
        "token_embd.weight" => None,
        _ => Some(model.head(Activations::F32)?.weight),
    };
    Ok((embedding, output))
}

/// Layer `l` of the model, its weights made once, and what they are made from.
pub(super) fn set_up(
    model: &Model<'_>,
    anatomy: &Anatomy,
    values: &Values,
    fake: &(dyn Fn(&str, usize) -> Option<Fake> + Sync),
    l: usize,
) -> Result<(Base, LayerBack), LearningError> {
    let (base, mut layer) = originals(model, anatomy, values, fake, l)?;
    fuse(&base, &mut layer, values, l);
    Ok((base, layer))
}

/// What the weights of layer `l` are made from, and the layer without weights and biases of linears.
pub(super) fn originals(
    model: &Model<'_>,
    anatomy: &Anatomy,
    values: &Values,
    fake: &(dyn Fn(&str, usize) -> Option<Fake> + Sync),
    l: usize,
) -> Result<(Base, LayerBack), LearningError> {
    let mut layer = LayerBack::dense(model.layer(l, Activations::F32)?, &model.spec)?;
    let folds = values.r_res.is_some();
    let fold = |norm: &mut Option<Vec<f32>>| match norm {
        Some(w) if folds => Some(std::mem::replace(w, vec![1.0; w.len()])),
        _ => None,
    };
    let gammas = [fold(&mut layer.attn_norm), fold(&mut layer.ffn_norm)];
    let linears = Slot::ALL.map(|slot| {
        let linear = layer.linear_mut(slot);
        let gamma = match slot {
            Slot::Q | Slot::K | Slot::V => &gammas[0],
            Slot::Gate | Slot::Up => &gammas[1],
            Slot::O | Slot::Down => &None,
        };
        let columns = linear.inputs;
        let mut weight = std::mem::take(&mut linear.weight);
        if let Some(gamma) = gamma {
            weight.chunks_exact_mut(columns).for_each(|row| row.iter_mut().zip(gamma).for_each(|(w, g)| *w *= g));
        }
        let (map, bias) = (Map::of(slot, l, anatomy), linear.bias.take());
        Original { weight, bias, columns, map, fake: fake(&linear.name, columns) }
    });
    Ok((Base { linears, norms: [layer.attn_norm.clone(), layer.ffn_norm.clone()] }, layer))
}

/// Makes the weights of layer `l` from the transforms as they are now.
pub(super) fn fuse(base: &Base, layer: &mut LayerBack, values: &Values, l: usize) {
    for slot in Slot::ALL {
        let (o, linear) = (&base.linears[slot as usize], layer.linear_mut(slot));
        linear.weight = o.map.apply(&o.weight, o.columns, values, l);
        if let Some(fake) = o.fake {
            fake.apply(&mut linear.weight, o.columns);
        }
        linear.bias = o.bias.as_ref().map(|b| o.map.of_bias().apply(b, 1, values, l));
    }
    let norms = [&mut layer.attn_norm, &mut layer.ffn_norm];
    for (norm, made) in norms.into_iter().zip(held(base, values, l)) {
        if let (Some(norm), Some(made)) = (norm, made) {
            norm.copy_from_slice(&made);
        }
    }
}

/// The weights of the norms of [`HELD`] as they are now.
pub(super) fn held(base: &Base, values: &Values, l: usize) -> [Option<Vec<f32>>; 2] {
    [0, 1].map(|i| {
        let mut norm = base.norms[i].clone()?;
        if let Some(s) = scales(&values.layers[l], HELD[i].1) {
            norm.iter_mut().zip(&s.single).for_each(|(w, s)| *w /= s);
        }
        Some(norm)
    })
}

/// `x R`, or `x` where the stream is not rotated.
pub(super) fn turned(values: &Values, x: Vec<f32>) -> Vec<f32> {
    let Some(r) = &values.r_res else { return x };
    let mut out = vec![0.0; x.len()];
    product_back(&x, &r.single, r.n, &mut out);
    out
}

/// `x Rᵀ`.
fn turned_back(values: &Values, x: Vec<f32>) -> Vec<f32> {
    let Some(r) = &values.r_res else { return x };
    let mut out = vec![0.0; x.len()];
    product(&x, &r.single, r.n, &mut out);
    out
}

/// The pairs that learn where `start` has none yet: what the model admits of `pairs`, as the identity.
pub fn with_scales(mut start: Transforms, anatomy: &Anatomy) -> Transforms {
    for pair in SCALES.into_iter().filter(|p| anatomy.admits(*p)) {
        for l in 0..anatomy.spec.layers {
            let size = anatomy.shape(pair, l).iter().product();
            start.slot(pair, l).get_or_insert_with(|| vec![1.0; size]);
        }
    }
    start
}
