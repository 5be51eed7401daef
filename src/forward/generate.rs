//! Text that the model itself writes: windows sampled at temperature 1, many at a time.
//!
//! Calibration on such text follows LLM-QAT (Liu et al. 2023, section 3.1) and Williams et al. 2024 ("self-calibration"): it is
//! what the model was trained on as far as the model knows, and no file is needed.
//!
//! All sequences of a batch advance together, one token a step, so that the weights meet a matrix of activations; keys and
//! values of earlier tokens are kept ([`KvCache`]). Weights of all layers stay in memory as f32.

use std::ops::Range;

use rayon::prelude::*;

use super::cache::KvCache;
use super::layer::{FeedForward, Layer, Pass, Scratch, gated};
use super::rope::RopeTable;
use super::run::{Head, Runner};
use super::sample::{draw, uniform};
use super::{Activations, ForwardError, Model, interrupted, kernels};
use crate::plan::memory::human;

/// Keys and values of a batch take at most so many bytes, if that leaves [`LEAST`] sequences.
const CACHE: u64 = 2 << 30;
/// Fewer sequences make thin products; more win nothing.
const LEAST: u64 = 16;
const MOST: u64 = 256;

/// How texts begin and end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joints {
    /// The first token of every window.
    pub first: u32,
    /// Tokens that end a text.
    pub ends: Vec<u32>,
    /// What follows them: the beginning of the next text. `None`: what the model says.
    pub next: Option<u32>,
}

/// A model set up to write windows of one length.
pub struct Generator<'a> {
    model: &'a Model<'a>,
    layers: Vec<Layer>,
    head: Head<'a>,
    ropes: (RopeTable, RopeTable),
    caches: Vec<KvCache>,
    scratch: Scratch,
    length: usize,
    batch: usize,
}

/// Sequences that are written together, `count` in all: never of the memory that there is, because products of other heights
/// may differ in the last bits, and a draw with them.
pub fn batch(model: &Model<'_>, length: usize, count: usize) -> usize {
    let one = KvCache::bytes(&model.spec, length) * model.spec.layers as u64;
    let most = (CACHE / one.max(1)).clamp(LEAST, MOST) as usize;
    // batches of one size
    count.div_ceil(count.div_ceil(most).max(1)).max(1)
}

/// Bytes that writing `batch` windows of `length` tokens at a time needs.
pub fn memory(model: &Model<'_>, length: usize, batch: usize) -> u64 {
    let tensors = model.source().tensors();
    let layers: u64 = tensors.iter().filter(|t| t.name.starts_with("blk.")).map(|t| t.elements() * 4).sum();
    let head = (model.vocab * model.spec.embed * 4) as u64;
    let cache = KvCache::bytes(&model.spec, length) * (model.spec.layers * batch) as u64;
    let logits = (model.vocab * batch * 4) as u64;
    layers + head + cache + logits + Runner::batch_bytes(model, batch)
}

impl<'a> Generator<'a> {
    /// Loads the weights. `limit`: bytes that all of it may take.
    ///
    /// # Errors
    /// The model has experts; it does not fit; a weight is missing or not finite.
    pub fn new(
        model: &'a Model<'a>,
        length: usize,
        batch: usize,
        limit: Option<u64>,
    ) -> Result<Generator<'a>, ForwardError> {
        let spec = &model.spec;
        if spec.experts > 0 {
            let why = format!("it has {} experts a layer, and only dense models can", spec.experts);
            return Err(ForwardError::Generate(why).of(model.path()));
        }
        let (length, batch) = (length.max(1), batch.max(1));
        let needed = memory(model, length, batch);
        if let Some(limit) = limit.filter(|l| needed > *l) {
            return Err(ForwardError::Memory(format!(
                "{}: to write text this model needs {} ({needed} bytes: all weights as f32, keys and values of {batch} windows of \
                 {length} tokens); there are {}",
                model.path().display(),
                human(needed),
                human(limit)
            )));
        }
        Ok(Generator {
            model,
            layers: (0..spec.layers).map(|l| model.layer(l, Activations::F32)).collect::<Result<_, _>>()?,
            head: Head::new(model, Activations::F32, u64::MAX)?,
            ropes: model.rope_tables(length)?,
            caches: (0..spec.layers).map(|_| KvCache::new(spec, batch, length)).collect(),
            scratch: Scratch::default(),
            length,
            batch,
        })
    }

    /// Writes the windows of these numbers, `[windows, length]`; no more than a batch. What a window holds depends on `seed`
    /// and its number, not on threads; on how many others are written with it only as far as products of another height
    /// differ in their last bits. `see` gets a position and the logits there, `[windows, vocab]`.
    ///
    /// # Errors
    /// A token of `joints` is not in the vocabulary; activations overflow; a signal asks to stop.
    pub fn write(
        &mut self,
        windows: Range<usize>,
        joints: &Joints,
        seed: u64,
        see: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<Vec<u32>, ForwardError> {
        let (first, count, length) = (windows.start, windows.len(), self.length);
        assert!(count <= self.batch, "windows of a batch");
        let (embed, vocab) = (self.model.spec.embed, self.model.vocab);
        let mut tokens = vec![0; count * length];
        let mut last = vec![joints.first; count];
        let (mut x, mut logits) = (vec![0.0; count * embed], Vec::new());
        for position in 0..length {
            tokens.iter_mut().skip(position).step_by(length).zip(&last).for_each(|(t, l)| *t = *l);
            if position + 1 == length {
                break;
            }
            interrupted()?;
            self.model.embed(&last, &mut x)?;
            for l in 0..self.layers.len() {
                self.step(l, position, &mut x);
            }
            if let Some(i) = x.iter().position(|v| !v.is_finite()) {
                let (layer, token) = (self.layers.len() - 1, i / embed * length + position);
                let e = ForwardError::NotFinite { layer, token, column: i % embed, value: x[i] };
                return Err(e.of(self.model.path()));
            }
            self.head.logits(&mut x, &mut logits, &mut ())?;
            see(position, &logits);
            last.par_iter_mut().zip(logits.par_chunks_mut(vocab)).enumerate().for_each(|(i, (last, row))| {
                *last = match joints.next.filter(|_| joints.ends.contains(last)) {
                    Some(next) => next,
                    None => {
                        kernels::softmax(row);
                        let place = (first + i) * length + position + 1;
                        draw(row, uniform(seed, place as u64)) as u32
                    }
                };
            });
        }
        Ok(tokens)
    }

    /// Layer `l` for one token of every sequence.
    fn step(&mut self, l: usize, position: usize, x: &mut [f32]) {
        let (spec, layer, s) = (&self.model.spec, &self.layers[l], &mut self.scratch);
        let (rope, window_rope) = (&self.ropes.0, &self.ropes.1);
        let pass = Pass { model: self.model, rope, window_rope, activations: Activations::F32, length: 1 };
        s.normed = {
            let input = layer.attention_input(&pass, x, s);
            layer.project(&pass, &input, s, |_| position);
            input
        };
        let mut attended = std::mem::take(&mut s.attended);
        attended.resize(s.q.len(), 0.0);
        self.caches[l].attend(spec, position, spec.window_of(l), (&s.q, &s.k, &s.v), &mut attended);
        layer.attention_output(&pass, &attended, x, s);
        s.attended = attended;
        let input = layer.feed_forward_input(&pass, x, s);
        if let FeedForward::Dense { gate, up, .. } = &layer.ffn {
            gated(&pass, (gate, up), &input, s);
        }
        s.normed = input;
        let hidden = std::mem::take(&mut s.gate);
        layer.feed_forward_output(&pass, &hidden, x, s);
        s.gate = hidden;
    }
}
