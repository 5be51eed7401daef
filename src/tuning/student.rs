//! The rounded model in memory: weights as f32 for the passes, and the parameters that they come from.

use std::collections::BTreeMap;

use super::TuningError;
use super::blocks::{Adam, Blocks};
use super::head::{LossHead, Target};
use super::layer::{Rounded, Step, Tuned, blocks_of, f32s};
use crate::forward::backward::layer::{Kept, LayerBack, Scratch};
use crate::forward::layer::Pass;
use crate::forward::{Activations, ForwardError, Model, Spec, kernels};
use crate::gguf::GgmlType;

/// Bytes of what the layers' forward passes leave to the backward pass, for a batch of `tokens`.
pub fn kept(model: &Model<'_>, tokens: usize) -> u64 {
    let s = &model.spec;
    let (q, kv, ff) = (s.heads * s.head_dim, s.kv_heads * s.head_dim, model.feed_forward());
    ((3 * q + 2 * kv + 2 * s.embed + 2 * ff) * 4 * tokens * s.layers) as u64
}

/// Bytes of a step beside weights, parameters and [`kept`].
pub fn least(model: &Model<'_>, tokens: usize) -> u64 {
    let s = &model.spec;
    let (q, ff) = (s.heads * s.head_dim, model.feed_forward());
    let streams = tokens * s.embed * (s.layers + 6);
    let scratch = tokens * (6 * s.embed + 4 * q + 3 * ff);
    // both models' logits, the heads and the gradient of one
    let head = 3 * 512 * model.vocab + 3 * model.vocab * s.embed;
    (96 << 20) + (4 * (streams + scratch + head)) as u64
}

/// The embedding, and the head where it is a tensor of its own.
pub struct Table {
    name: &'static str,
    pub weight: Vec<f32>,
    pub blocks: Option<Blocks>,
    /// Of the weight, summed over a step.
    gradient: Vec<f32>,
}

impl Table {
    fn new(name: &'static str, mut weight: Vec<f32>, columns: usize, rounded: Option<&Rounded>, latent: u32) -> Table {
        let blocks = rounded.and_then(|r| blocks_of(r, &mut weight, columns, latent));
        let gradient = if blocks.is_some() { vec![0.0; weight.len()] } else { Vec::new() };
        Table { name, weight, blocks, gradient }
    }

    fn step(&mut self, adam: &Adam) {
        if let Some(blocks) = &mut self.blocks {
            blocks.step(&self.gradient, &mut self.weight, adam);
            self.gradient.fill(0.0);
        }
    }
}

/// The rows of `table` \[vocab, embed\] for `tokens`, as the first layer gets them.
pub fn embedded(table: &[f32], tokens: &[u32], spec: &Spec) -> Vec<f32> {
    let n = spec.embed;
    let mut x = Vec::with_capacity(tokens.len() * n);
    tokens.iter().for_each(|&t| x.extend_from_slice(&table[t as usize * n..][..n]));
    if spec.embedding_scale != 1.0 {
        kernels::scale(&mut x, spec.embedding_scale);
    }
    x
}

/// The rounded model.
pub struct Student<'a> {
    pub model: &'a Model<'a>,
    pub layers: Vec<LayerBack>,
    pub tuned: Vec<Tuned>,
    pub embedding: Table,
    /// None: the embedding is the head.
    pub output: Option<Table>,
    pub head: LossHead<'a>,
    /// What each layer's forward pass left, or room for one that is computed again.
    kept: Vec<Kept>,
    scratch: Scratch,
    gradient: Vec<f32>,
    again: bool,
}

impl<'a> Student<'a> {
    /// `rounded`: the blocks by tensor; what is not among them stays as the float model has it. Codes of types with up to
    /// `latent` levels are tuned. `again`: compute each layer's forward pass twice, to keep less.
    pub fn new(
        model: &'a Model<'a>,
        rounded: &BTreeMap<String, Rounded>,
        latent: u32,
        again: bool,
    ) -> Result<Student<'a>, TuningError> {
        let spec = &model.spec;
        let n = spec.embed;
        let (mut layers, mut tuned) = (Vec::new(), Vec::new());
        for l in 0..spec.layers {
            let (layer, of_layer) = Tuned::of(model, l, &|name| Ok(rounded.get(name).cloned()), latent)?;
            layers.push(layer);
            tuned.push(of_layer);
        }
        let mut rows = vec![0.0; model.vocab * n];
        model.embedding_rows(0, model.vocab, &mut rows)?;
        let embedding = Table::new("token_embd.weight", rows, n, rounded.get("token_embd.weight"), latent);
        let output = match model.head_name() {
            "token_embd.weight" => None,
            name => Some(Table::new(name, model.head(Activations::F32)?.weight, n, rounded.get(name), latent)),
        };
        let (head, kept) = (LossHead::new(model)?, Vec::new());
        let (scratch, gradient) = (Scratch::default(), Vec::new());
        Ok(Student { model, layers, tuned, embedding, output, head, kept, scratch, gradient, again })
    }

    /// Mean divergence over whole windows; `last` is the teacher's stream of the same tokens.
    pub fn loss(&mut self, pass: &Pass<'_>, tokens: &[u32], last: &[f32]) -> Result<f64, ForwardError> {
        let mut x = embedded(&self.embedding.weight, tokens, &self.model.spec);
        let (mut kept, mut out) = (Kept::default(), Vec::new());
        for layer in &self.layers {
            layer.forward(pass, &x, &mut kept, &mut self.scratch);
            layer.output(pass, &kept, &mut self.scratch, &mut out);
            std::mem::swap(&mut x, &mut out);
        }
        let weight = self.output.as_ref().map_or(&self.embedding.weight, |o| &o.weight);
        Ok(self.head.loss(&x, last, weight)? / tokens.len() as f64)
    }

    /// One step; the mean divergence before it.
    pub fn step(&mut self, pass: &Pass<'_>, tokens: &[u32], last: &[f32], adam: &Adam) -> Result<f64, ForwardError> {
        let spec = &self.model.spec;
        let n = spec.embed;
        let mut streams = vec![embedded(&self.embedding.weight, tokens, &self.model.spec)];
        self.kept.resize_with(if self.again { 1 } else { self.layers.len() }, Kept::default);
        for (l, layer) in self.layers.iter().enumerate() {
            let kept = &mut self.kept[if self.again { 0 } else { l }];
            let mut out = Vec::new();
            layer.forward(pass, &streams[l], kept, &mut self.scratch);
            layer.output(pass, kept, &mut self.scratch, &mut out);
            streams.push(out);
        }
        let x = streams.pop().expect("one per layer and the first");
        let mut d = vec![0f32; x.len()];
        let (weight, gradient) = match &mut self.output {
            Some(o) => (&o.weight, &mut o.gradient),
            None => (&self.embedding.weight, &mut self.embedding.gradient),
        };
        let gradient = Some(&mut gradient[..]).filter(|g| !g.is_empty());
        let loss = self.head.back(&x, &Target::divergence(last), weight, &mut d, gradient, adam)?;
        if let Some(output) = &mut self.output {
            output.step(adam);
        }
        for l in (0..self.layers.len()).rev() {
            let x = streams.pop().expect("one per layer");
            let (layer, kept) = (&mut self.layers[l], &mut self.kept[if self.again { 0 } else { l }]);
            if self.again {
                layer.forward(pass, &x, kept, &mut self.scratch);
            }
            let tuned = &mut self.tuned[l];
            let mut sink = Step::new(tuned, &mut self.gradient, *adam, spec.rms_eps);
            layer.back(pass, &x, &mut d, kept, &mut self.scratch, &mut sink)?;
        }
        if !self.embedding.gradient.is_empty() {
            for (&t, d) in tokens.iter().zip(d.chunks_exact(n)) {
                kernels::add_scaled(&mut self.embedding.gradient[t as usize * n..][..n], d, spec.embedding_scale);
            }
            self.embedding.step(adam);
        }
        Ok(loss)
    }

    /// Bytes of every tensor that is tuned, as it is written: blocks, and norms as f32.
    pub fn bytes(&self) -> Vec<(String, GgmlType, Vec<u8>)> {
        let mut all: Vec<(String, GgmlType, Vec<u8>)> = Vec::new();
        let mut add = |name: &str, ty: GgmlType, bytes: Vec<u8>| all.push((name.to_string(), ty, bytes));
        for table in [Some(&self.embedding), self.output.as_ref()].into_iter().flatten() {
            if let Some(b) = &table.blocks {
                add(table.name, b.ty(), b.bytes());
            }
        }
        add("output_norm.weight", GgmlType::F32, f32s(&self.head.norm));
        for (l, (layer, tuned)) in self.layers.iter().zip(&self.tuned).enumerate() {
            tuned.bytes(layer, l).into_iter().for_each(|(name, ty, bytes)| add(&name, ty, bytes));
        }
        all
    }

    /// Everything that a step depends on, to keep and to go on from; call [`Student::refresh`] after writing to it.
    pub fn state(&mut self) -> Vec<&mut Vec<f32>> {
        let mut all: Vec<&mut Vec<f32>> = Vec::new();
        for table in [Some(&mut self.embedding), self.output.as_mut()].into_iter().flatten() {
            all.extend(table.blocks.as_mut().map(Blocks::state).unwrap_or_default());
        }
        all.extend(self.head.norm.state());
        for tuned in &mut self.tuned {
            all.extend(tuned.state());
        }
        all
    }

    /// Makes the weights those of the parameters.
    pub fn refresh(&mut self) {
        for table in [Some(&mut self.embedding), self.output.as_mut()].into_iter().flatten() {
            if let Some(b) = &mut table.blocks {
                b.values(&mut table.weight);
            }
        }
        for (layer, tuned) in self.layers.iter_mut().zip(&mut self.tuned) {
            tuned.refresh(layer);
        }
    }
}
