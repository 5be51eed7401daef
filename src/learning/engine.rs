//! What carries out the steps of learning.

use super::LearningError;
use super::maps::Values;
use super::network::Network;
use crate::forward::{Activations, Runner, interrupted};
use crate::tuning::head::{Loss, Target};
use crate::tuning::teacher::Teacher;

/// This processor, or a GPU.
pub trait Engine {
    /// Mean divergence of the transformed, rounded model's predictions from the float model's over `tokens`, whole windows.
    fn divergence(&mut self, tokens: &[u32]) -> Result<f64, LearningError>;

    /// Adds the gradients of the mean loss over the windows `tokens` to those of rotations and scales; the loss.
    fn gradients(&mut self, tokens: &[u32], loss: Loss) -> Result<f64, LearningError>;

    /// Rotations and scales; call [`Engine::fuse`] after moving them.
    fn values(&mut self) -> &mut Values;

    /// Makes the weights from rotations and scales as they are now.
    fn fuse(&mut self) -> Result<(), LearningError>;
}

/// The processor.
pub struct Processor<'a> {
    runner: Runner<'a>,
    teacher: Teacher<'a>,
    network: Network<'a>,
    length: usize,
    /// Tokens of a batch.
    span: usize,
    /// The last tokens that the divergence was asked for, and the float model's stream of them.
    held_out: (Vec<u32>, Vec<f32>),
}

impl<'a> Processor<'a> {
    /// For windows of `length` tokens, `batch` of them at a time; `activations`: of inputs, keys and values.
    pub fn new(
        network: Network<'a>,
        activations: Activations,
        length: usize,
        batch: usize,
    ) -> Result<Processor<'a>, LearningError> {
        Ok(Processor {
            runner: Runner::new(network.model, length, activations)?,
            teacher: Teacher::new(network.model, length, batch)?,
            network,
            length,
            span: batch * length,
            held_out: Default::default(),
        })
    }
}

impl Engine for Processor<'_> {
    fn divergence(&mut self, tokens: &[u32]) -> Result<f64, LearningError> {
        if self.held_out.0 != tokens {
            self.held_out = (tokens.to_vec(), self.teacher.last(tokens)?);
        }
        let width = self.held_out.1.len() / tokens.len();
        let mut sum = 0.0;
        for (tokens, last) in tokens.chunks(self.span).zip(self.held_out.1.chunks(self.span * width)) {
            interrupted()?;
            let network = &mut self.network;
            sum += self.runner.pass(|pass, _| network.divergence(pass, tokens, last))? * tokens.len() as f64;
        }
        Ok(sum / tokens.len() as f64)
    }

    fn gradients(&mut self, tokens: &[u32], loss: Loss) -> Result<f64, LearningError> {
        let last = self.teacher.last(tokens)?;
        let target = Target { loss, last: &last, tokens, length: self.length };
        let network = &mut self.network;
        Ok(self.runner.pass(|pass, _| network.gradients(pass, tokens, &target))?)
    }

    fn values(&mut self) -> &mut Values {
        &mut self.network.values
    }

    fn fuse(&mut self) -> Result<(), LearningError> {
        self.network.fuse();
        Ok(())
    }
}
