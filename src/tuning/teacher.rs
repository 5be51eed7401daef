//! The float model's side: its last stream, from which the head makes predictions.

use crate::forward::{Activations, ForwardError, Hidden, Model, Runner, interrupted};

/// The float model.
pub struct Teacher<'a> {
    runner: Runner<'a>,
    batch: usize,
    length: usize,
    /// The last tokens that a mean was asked for, and the stream of them.
    held_out: (Vec<u32>, Vec<f32>),
}

impl<'a> Teacher<'a> {
    /// For windows of `length` tokens, `batch` of them at a time.
    pub fn new(model: &'a Model<'a>, length: usize, batch: usize) -> Result<Teacher<'a>, ForwardError> {
        let runner = Runner::new(model, length, Activations::F32)?;
        Ok(Teacher { runner, batch, length, held_out: Default::default() })
    }

    /// Mean over `tokens`, whole windows, of what `of` gives as the mean over a batch and its stream.
    pub fn mean(
        &mut self,
        tokens: &[u32],
        mut of: impl FnMut(&[u32], &[f32]) -> Result<f64, ForwardError>,
    ) -> Result<f64, ForwardError> {
        if self.held_out.0 != tokens {
            self.held_out = (tokens.to_vec(), self.last(tokens)?);
        }
        let (span, width) = (self.batch * self.length, self.held_out.1.len() / tokens.len());
        let mut sum = 0.0;
        for (tokens, last) in tokens.chunks(span).zip(self.held_out.1.chunks(span * width)) {
            interrupted()?;
            sum += of(tokens, last)? * tokens.len() as f64;
        }
        Ok(sum / tokens.len() as f64)
    }

    /// The stream behind the last layer, `[tokens, embed]`, of whole windows.
    pub fn last(&mut self, tokens: &[u32]) -> Result<Vec<f32>, ForwardError> {
        let spec = &self.runner.model.spec;
        let (layers, n) = (spec.layers, spec.embed);
        let mut hidden = Hidden::Memory(vec![0.0; tokens.len() * n]);
        self.runner.embed(tokens, &mut hidden)?;
        for l in 0..layers {
            self.runner.layer_in_place(l, &mut hidden, tokens.len(), self.batch, &mut ())?;
        }
        match hidden {
            Hidden::Memory(values) => Ok(values),
            Hidden::File { .. } => unreachable!("it was made in memory"),
        }
    }
}
