//! The backward pass of decoders, written by hand: what a change of any weight would cost, to second order.
//!
//! For a small change δ of the outputs of one linear at one token the Kullback-Leibler divergence of the new predictions
//! from the old is ½ δᵀ F δ, where F = E\[g gᵀ\] is the Fisher information and g the gradient of -log p(label) with respect to
//! these outputs, the labels drawn from the model itself (Amari 1998; Kunstner et al. 2019). With H = E\[x xᵀ\] of the inputs
//! and F cut down to its diagonal, a change ΔW of the weight costs ½ Σ_o E\[g_o²\] (ΔW H ΔWᵀ)_oo per position; a change e of
//! an embedding row costs ½ eᵀ E\[g gᵀ\] e where its word stands. [`fisher`] measures both means.
//!
//! The loss is summed over the positions of a window, so that g holds what a token does to all later positions. One sample
//! per position is enough: labels are independent, and products of two positions' gradients have no mean.
//!
//! The forward pass runs layer by layer over all windows and keeps the stream before each layer ([`Hidden`]); then layers
//! go from last to first, each computed again and led back batch by batch. Weights of one layer are in memory at a time. All sums have one order: the number of threads changes no bit.

mod attention;
mod experts;
mod head;
pub mod kernels;
pub mod layer;

use std::path::Path;

pub use head::Labels;

use self::head::HeadBack;
use self::layer::{Kept, LayerBack, Scratch, Squares};
use super::layer::Pass;
use super::rope::RopeTable;
use super::{Activations, ForwardError, Hidden, Model, Runner, interrupted};
use crate::linalg;

/// Means of squared gradients of a model.
#[derive(Clone, Debug)]
pub struct Fisher {
    /// By weight, in the order of the layers, the head last: E\[g²\] of each output. Rows of a fused weight are in its order; a stack
    /// of experts has those of each expert, where tokens that are not routed to it count as 0.
    pub outputs: Vec<(String, Vec<f64>)>,
    /// E\[g gᵀ\] of the rows of `token_embd.weight` (as stored, before any scale of the architecture), `[embed, embed]`, the
    /// lower triangle packed: row `i` has its `i + 1` values at `i (i + 1) / 2`.
    pub embedding: Vec<f64>,
    /// E\[x xᵀ\] of the head's input, packed likewise.
    pub head_input: Vec<f64>,
    /// Positions that count: what sums are divided by.
    pub tokens: u64,
}

impl Fisher {
    /// E\[g²\] of the outputs of the weight called `name`.
    pub fn of(&self, name: &str) -> Option<&[f64]> {
        self.outputs.iter().find(|(n, _)| n == name).map(|(_, v)| &v[..])
    }
}

/// How a text is cut.
#[derive(Clone, Copy, Debug)]
pub struct Windows {
    /// Tokens of a window. What is left over at the end of the text is not looked at.
    pub length: usize,
    /// Windows that are run beside each other.
    pub batch: usize,
    /// The first position of a window whose loss counts: 0 for all.
    pub first: usize,
}

/// Calls of `progress` that [`fisher`] makes.
pub fn steps(model: &Model<'_>) -> usize {
    2 * model.spec.layers + 1
}

/// The Fisher information of `model` over windows of `length` of `tokens`, `batch` windows at a time. The loss of positions
/// `first..` of each window counts. Equal seeds give equal labels.
///
/// `progress` is called with 1, 2, ... [`steps`]. Streams are kept in memory: 4 bytes times (layers + 2) x embed x tokens;
/// [`fisher_of`] can keep them in files.
pub fn fisher(
    model: &Model<'_>,
    tokens: &[u32],
    length: usize,
    batch: usize,
    first: usize,
    seed: u64,
    progress: &mut dyn FnMut(usize),
) -> Result<Fisher, ForwardError> {
    fisher_of(model, tokens, Windows { length, batch, first }, Labels::Sampled(seed), None, progress)
}

/// Windows of text that [`sample`] looks at, and how many of them at a time at most.
pub const SAMPLE: usize = 32;
pub const SAMPLE_BATCH: usize = 8;

/// [`fisher_of`] the first `windows` windows of `length` of `tokens`, at most `batch` at a time: what a cost needs to know. Labels are
/// drawn; the first position of a window does not count.
pub fn sample(
    model: &Model<'_>,
    tokens: &[u32],
    length: usize,
    (windows, batch): (usize, usize),
    scratch: &Path,
    progress: &mut dyn FnMut(usize),
) -> Result<Fisher, ForwardError> {
    let text = &tokens[..tokens.len().min(windows * length)];
    let windows = Windows { length, batch: batch.min(SAMPLE_BATCH), first: 1 };
    fisher_of(model, text, windows, Labels::Sampled(1), Some(scratch), progress)
}

/// [`fisher`] with labels of the caller's choice; `scratch`: a folder for the streams, which then take no memory.
pub fn fisher_of(
    model: &Model<'_>,
    tokens: &[u32],
    windows: Windows,
    labels: Labels<'_>,
    scratch: Option<&Path>,
    progress: &mut dyn FnMut(usize),
) -> Result<Fisher, ForwardError> {
    let Windows { length, batch, first } = windows;
    check(model, tokens, windows, labels)?;
    let tokens = &tokens[..tokens.len() / length * length];
    let (embed, layers) = (model.spec.embed, model.spec.layers);
    let values = tokens.len() * embed;
    let stream = |number: usize| match scratch {
        // calibration numbers its own files from 0
        Some(dir) => Hidden::scratch(dir, 1000 + number, values as u64 * 4),
        None => Ok(Hidden::Memory(vec![0.0; values])),
    };

    let mut runner = Runner::new(model, length, Activations::F32)?;
    let mut streams = vec![stream(0)?];
    runner.embed(tokens, &mut streams[0])?;
    for l in 0..layers {
        let mut next = stream(l + 1)?;
        runner.layer(l, &streams[l], &mut next, tokens.len(), batch, &mut ())?;
        streams.push(next);
        progress(l + 1);
    }
    drop(runner);

    let mut gradient = stream(layers + 1)?;
    let step = batch.max(1) * length;
    let mut back = Back { model, tokens: tokens.len(), step, x: Vec::new(), d: Vec::new() };
    let (mut outputs, mut head_input) = (Vec::new(), Vec::new());
    if let Some(last) = streams.pop() {
        let (squares, input) = back.head(&last, &mut gradient, (length, first), labels)?;
        head_input = input;
        outputs.push(vec![(model.head_name().to_string(), squares)]);
    }
    progress(layers + 1);

    let ropes = model.rope_tables(length)?;
    let mut buffers = (Kept::default(), Scratch::default());
    for l in (0..layers).rev() {
        let Some(input) = streams.pop() else { break };
        outputs.push(back.layer(l, &input, &mut gradient, (&ropes.0, &ropes.1, length), &mut buffers)?);
        progress(2 * layers + 1 - l);
    }
    drop(buffers);

    let count = tokens.len() / length * (length - first);
    let mut embedding = back.embedding(&gradient)?;
    let mut outputs: Vec<_> = outputs.into_iter().rev().flatten().collect();
    let means = outputs.iter_mut().flat_map(|(_, v)| v).chain(&mut embedding).chain(&mut head_input);
    means.for_each(|v| *v /= count as f64);
    Ok(Fisher { outputs, embedding, head_input, tokens: count as u64 })
}

/// Refuses what cannot be run before anything is read.
fn check(model: &Model<'_>, tokens: &[u32], windows: Windows, labels: Labels<'_>) -> Result<(), ForwardError> {
    let Windows { length, first, .. } = windows;
    if length == 0 || first >= length {
        return Err(ForwardError::Windows(format!(
            "no position of a window of {length} tokens counts from {first} on"
        )));
    }
    if tokens.len() < length {
        return Err(ForwardError::Windows(format!("{} tokens are no window of {length}", tokens.len())));
    }
    if let Labels::Given(labels) = labels {
        if labels.len() != tokens.len() {
            return Err(ForwardError::Windows(format!("{} labels for {} tokens", labels.len(), tokens.len())));
        }
        if let Some(&token) = labels.iter().find(|&&t| t as usize >= model.vocab) {
            return Err(ForwardError::Token { token, vocab: model.vocab });
        }
    }
    Ok(())
}

/// What the steps of the backward pass share.
struct Back<'a> {
    model: &'a Model<'a>,
    tokens: usize,
    /// Tokens of a batch.
    step: usize,
    /// Stream and gradient of a batch.
    x: Vec<f32>,
    d: Vec<f32>,
}

impl Back<'_> {
    /// Starts and lengths of the batches, in tokens.
    fn batches(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (tokens, step) = (self.tokens, self.step);
        (0..tokens).step_by(step).map(move |at| (at, step.min(tokens - at)))
    }

    /// Gradients at the last stream; the sums of squares at the head's outputs, and of its input's products.
    fn head(
        &mut self,
        last: &Hidden,
        gradient: &mut Hidden,
        (length, first): (usize, usize),
        labels: Labels<'_>,
    ) -> Result<(Vec<f64>, Vec<f64>), ForwardError> {
        let n = self.model.spec.embed;
        let mut head = HeadBack::new(self.model)?;
        let mut d_rows = Vec::new();
        for (at, here) in self.batches() {
            interrupted()?;
            self.x.resize(here * n, 0.0);
            last.read(at * n, &mut self.x)?;
            self.d.clear();
            self.d.resize(here * n, 0.0);
            // only rows that count
            let counted: Vec<usize> = (0..here).filter(|t| t % length >= first).collect();
            let x: Vec<f32> = counted.iter().flat_map(|t| &self.x[t * n..][..n]).copied().collect();
            let positions: Vec<usize> = counted.iter().map(|t| at + t).collect();
            d_rows.resize(x.len(), 0.0);
            head.run(&x, &positions, labels, &mut d_rows)?;
            for (t, row) in counted.iter().zip(d_rows.chunks_exact(n)) {
                self.d[t * n..][..n].copy_from_slice(row);
            }
            self.finite(self.model.spec.layers, at)?;
            gradient.write(at * n, &self.d)?;
        }
        Ok((head.squares, head.second))
    }

    /// Leads `gradient` from the output of layer `l` to its input; the sums of squares at its linears' outputs.
    fn layer(
        &mut self,
        l: usize,
        input: &Hidden,
        gradient: &mut Hidden,
        (rope, window_rope, length): (&RopeTable, &RopeTable, usize),
        (kept, buffers): &mut (Kept, Scratch),
    ) -> Result<Vec<(String, Vec<f64>)>, ForwardError> {
        let n = self.model.spec.embed;
        let mut layer = LayerBack::new(self.model.layer(l, Activations::F32)?, &self.model.spec)?;
        let mut squares = Squares::new(&layer, self.model)?;
        let pass = Pass { model: self.model, rope, window_rope, activations: Activations::F32, length };
        for (at, here) in self.batches() {
            interrupted()?;
            self.x.resize(here * n, 0.0);
            self.d.resize(here * n, 0.0);
            input.read(at * n, &mut self.x)?;
            gradient.read(at * n, &mut self.d)?;
            layer.forward(&pass, &self.x, kept, buffers);
            layer.back(&pass, &self.x, &mut self.d, kept, buffers, &mut squares)?;
            self.finite(l, at)?;
            gradient.write(at * n, &self.d)?;
        }
        Ok(squares.joined())
    }

    /// Σ g gᵀ of the embedding's rows.
    fn embedding(&mut self, gradient: &Hidden) -> Result<Vec<f64>, ForwardError> {
        let s = &self.model.spec;
        let n = s.embed;
        let mut sums = vec![0.0; n * (n + 1) / 2];
        for (at, here) in self.batches() {
            interrupted()?;
            self.d.resize(here * n, 0.0);
            gradient.read(at * n, &mut self.d)?;
            linalg::syrk_packed(&mut sums, &self.d, here, n, linalg::all_threads());
        }
        let scale = f64::from(s.embedding_scale);
        sums.iter_mut().for_each(|v| *v *= scale * scale);
        Ok(sums)
    }

    fn finite(&self, layer: usize, at: usize) -> Result<(), ForwardError> {
        let n = self.model.spec.embed;
        match self.d.iter().position(|v| !v.is_finite()) {
            Some(i) => {
                let (token, column) = (at + i / n, i % n);
                Err(ForwardError::Gradient { layer, token, column, value: self.d[i] }.of(self.model.path()))
            }
            None => Ok(()),
        }
    }
}
