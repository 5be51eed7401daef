//! What carries out the steps of tuning.

use super::TuningError;
use super::blocks::Adam;
use super::student::Student;
use super::teacher::Teacher;
use crate::forward::{Activations, Model, Runner};

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
        })
    }
}

impl<'a> Engine<'a> for Processor<'a> {
    fn loss(&mut self, tokens: &[u32]) -> Result<f64, TuningError> {
        let (runner, student) = (&mut self.runner, &mut self.student);
        Ok(self.teacher.mean(tokens, |tokens, last| runner.pass(|pass, _| student.loss(pass, tokens, last)))?)
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
