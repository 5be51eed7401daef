//! The float model's side: its last stream, from which the head makes predictions.

use crate::forward::{Activations, ForwardError, Hidden, Model, Runner};

/// The float model.
pub struct Teacher<'a> {
    runner: Runner<'a>,
    batch: usize,
}

impl<'a> Teacher<'a> {
    /// For windows of `length` tokens, `batch` of them at a time.
    pub fn new(model: &'a Model<'a>, length: usize, batch: usize) -> Result<Teacher<'a>, ForwardError> {
        Ok(Teacher { runner: Runner::new(model, length, Activations::F32)?, batch })
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
