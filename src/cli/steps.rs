//! Progress in steps (layers): a bar on a terminal, lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::print;
use crate::calibration::collector::{self, Coverage};
use crate::calibration::run::Watch;

/// Time between two lines.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Shows steps done and time left.
pub struct Steps {
    what: &'static str,
    total: usize,
    bar: Option<ProgressBar>,
    quiet: bool,
    start: Instant,
    /// Steps that were done before.
    before: usize,
    last_line: Instant,
    coverage: Vec<Coverage>,
}

impl Steps {
    /// Of `total` steps called `what`.
    pub fn new(what: &'static str, total: usize, quiet: bool) -> Steps {
        let terminal = std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|t| t != "dumb");
        let bar = (terminal && !quiet).then(|| {
            let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr());
            let template = format!("{{percent:>3}}% [{{bar:30}}] {what} {{pos}}/{{len}}, {{eta}} left  {{wide_msg}}");
            bar.set_style(ProgressStyle::with_template(&template).expect("a valid template").progress_chars("=> "));
            bar
        });
        let now = Instant::now();
        Steps { what, total, bar, quiet, start: now, before: 0, last_line: now, coverage: Vec::new() }
    }

    /// `done` steps of all are done.
    pub fn done(&mut self, done: usize) {
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
        } else if !self.quiet && done < self.total && self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            let each = self.start.elapsed().as_secs_f64() / (done - self.before).max(1) as f64;
            let left = each * (self.total - done) as f64;
            print::stderr(&format!("{} {done} of {}, {left:.0} s left", self.what, self.total));
        }
    }

    /// What stands behind the bar.
    pub fn message(&self, text: String) {
        if let Some(bar) = &self.bar {
            bar.set_message(text);
        }
    }

    /// A line of its own, above the bar.
    pub fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| print::stderr(text)),
            None => print::stderr(text),
        }
    }

    /// Removes the bar; says how the experts of a mixture were covered.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if !self.quiet && !self.coverage.is_empty() {
            print::stderr(collector::coverage_table(&self.coverage).trim_end());
        }
        let unseen: usize = self.coverage.iter().map(Coverage::unseen).sum();
        if unseen > 0 {
            print::stderr(&format!(
                "warning: {unseen} expert weights saw no token of this text: llama.cpp takes all their inputs for equally \
                 important; more text, or --expert-prior, gives them something better"
            ));
        }
    }
}

impl Watch for Steps {
    fn layer(&mut self, layers: usize) {
        self.done(layers);
    }

    fn experts(&mut self, coverage: Vec<Coverage>) {
        self.coverage.extend(coverage);
    }

    fn resumed(&mut self, layers: usize) {
        self.before = layers;
        if !self.quiet {
            print::stderr(&format!("going on after {layers} of {} {}s that are done", self.total, self.what));
        }
        self.done(layers);
    }
}
