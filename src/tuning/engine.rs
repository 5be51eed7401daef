//! What carries out the steps of tuning.

use super::TuningError;
use super::blocks::Adam;
use super::student::Student;
use super::teacher::Teacher;
use crate::forward::{Activations, Model, Runner, interrupted};

/// This processor, or a GPU.
pub trait Engine<'a> {
    /// Mean divergence of the rounded model's predictions from the float model's over `tokens`, whole windows.
    fn loss(&mut self, tokens: &[u32]) -> Result<f64, TuningError>;

    /// One step of Adam on the windows `tokens`; their mean divergence before it.
    fn step(&mut self, tokens: &[u32], adam: &Adam) -> Result<f64, TuningError>;

    /// The rounded model with its parameters as they are now.
    fn pull(&mut self) -> Result<&mut Student<'a>, TuningError>;

    /// Takes up parameters that were written to the model that [`Engine::pull`] gave.
    fn push(&mut self) -> Result<(), TuningError>;
}

/// The processor.
pub struct Processor<'a> {
    runner: Runner<'a>,
    teacher: Teacher<'a>,
    student: Student<'a>,
    /// Tokens of a batch.
    span: usize,
    /// The last tokens that the loss was asked for, and the float model's stream of them.
    held_out: (Vec<u32>, Vec<f32>),
}

impl<'a> Processor<'a> {
    /// For windows of `length` tokens, `batch` of them at a time.
    pub fn new(
        model: &'a Model<'a>,
        student: Student<'a>,
        length: usize,
        batch: usize,
    ) -> Result<Processor<'a>, TuningError> {
        Ok(Processor {
            runner: Runner::new(model, length, Activations::F32)?,
            teacher: Teacher::new(model, length, batch)?,
            student,
            span: batch * length,
            held_out: Default::default(),
        })
    }
}

impl<'a> Engine<'a> for Processor<'a> {
    fn loss(&mut self, tokens: &[u32]) -> Result<f64, TuningError> {
        if self.held_out.0 != tokens {
            self.held_out = (tokens.to_vec(), self.teacher.last(tokens)?);
        }
        let width = self.held_out.1.len() / tokens.len();
        let mut sum = 0.0;
        for (tokens, last) in tokens.chunks(self.span).zip(self.held_out.1.chunks(self.span * width)) {
            interrupted()?;
            let student = &mut self.student;
            sum += self.runner.pass(|pass, _| student.loss(pass, tokens, last))? * tokens.len() as f64;
        }
        Ok(sum / tokens.len() as f64)
    }

    fn step(&mut self, tokens: &[u32], adam: &Adam) -> Result<f64, TuningError> {
        let last = self.teacher.last(tokens)?;
        let student = &mut self.student;
        Ok(self.runner.pass(|pass, _| student.step(pass, tokens, &last, adam))?)
    }

    fn pull(&mut self) -> Result<&mut Student<'a>, TuningError> {
        Ok(&mut self.student)
    }

    fn push(&mut self) -> Result<(), TuningError> {
        self.student.refresh();
        Ok(())
    }
}
