//! What carries out the steps of learning.

use super::LearningError;
use super::network::Network;
use super::values::Values;
use crate::forward::{Activations, Runner};
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
        })
    }
}

impl Engine for Processor<'_> {
    fn divergence(&mut self, tokens: &[u32]) -> Result<f64, LearningError> {
        let (runner, network) = (&mut self.runner, &mut self.network);
        Ok(self.teacher.mean(tokens, |tokens, last| runner.pass(|pass, _| network.divergence(pass, tokens, last)))?)
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
