//! Progress of a run that goes layer by layer, and what the windows that are held out say.

use std::time::Instant;

use super::print;
use super::steps::Steps;
use crate::calibration::run::Watch;
use crate::{learning, tuning};

pub struct Layers {
    steps: Steps,
    quiet: bool,
    /// Logarithms of the errors' ratios.
    ratios: Vec<f64>,
    start: Instant,
}

impl Layers {
    pub fn new(layers: usize, quiet: bool) -> Layers {
        Layers { steps: Steps::new("layer", layers, quiet), quiet, ratios: Vec::new(), start: Instant::now() }
    }

    fn done(&mut self, l: usize, (before, after): (f64, f64), more: &str) {
        if !self.quiet {
            let text = format!("layer {l}: error {before:.5} -> {after:.5} of its branch on windows held out{more}");
            self.steps.line(&text);
        }
        if before > 0.0 && after > 0.0 {
            self.ratios.push((after / before).ln());
        }
        self.steps.done(l + 1);
    }

    /// What the run brought; `verb`: what it did.
    pub fn finish(&self, verb: &str) {
        self.steps.finish();
        if !self.quiet {
            let mean = (self.ratios.iter().sum::<f64>() / self.ratios.len().max(1) as f64).exp();
            let seconds = self.start.elapsed().as_secs_f64();
            print::stderr(&format!(
                "{verb} in {seconds:.1} s: errors of layers {mean:.3} of what they were (geometric mean)"
            ));
        }
    }
}

impl learning::local::Watch for Layers {
    fn layer(&mut self, l: usize, before: f64, after: f64) {
        self.done(l, (before, after), "");
    }

    fn resumed(&mut self, layers: usize) {
        Watch::resumed(&mut self.steps, layers);
    }
}

impl tuning::local::Watch for Layers {
    fn layer(&mut self, l: usize, done: tuning::local::Done) {
        self.done(l, (done.before, done.after), &format!(", step {}", done.step));
    }

    fn resumed(&mut self, layers: usize) {
        Watch::resumed(&mut self.steps, layers);
    }
}
