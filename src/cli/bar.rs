//! Progress: a bar on a terminal, elsewhere a line for every tenth, but not more often than people read.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::convert::Progress;
use crate::plan::memory::human;

/// Time between two lines.
const LINE_EVERY: Duration = Duration::from_secs(2);

/// Shows bytes read, throughput and time left.
pub struct Bar {
    bar: Option<ProgressBar>,
    total: u64,
    done: AtomicU64,
    start: Instant,
    /// Percent and time of the next line.
    next_line: Mutex<(u64, Duration)>,
}

impl Bar {
    /// Over `total` bytes of input.
    pub fn new(total: u64) -> Bar {
        let bar = (std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|t| t != "dumb")).then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template(
                "{percent:>3}% [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}, {eta} left  {wide_msg}",
            );
            bar.set_style(style.expect("a valid template").progress_chars("=> "));
            bar
        });
        Bar { bar, total, done: AtomicU64::new(0), start: Instant::now(), next_line: Mutex::new((10, LINE_EVERY)) }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Bar {
    fn advance(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            return bar.inc(bytes);
        }
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let percent = done * 100 / self.total.max(1);
        let Ok(mut next) = self.next_line.try_lock() else { return };
        let elapsed = self.start.elapsed();
        if percent >= next.0 && percent < 100 && elapsed >= next.1 {
            *next = (percent / 10 * 10 + 10, elapsed + LINE_EVERY);
            let seconds = elapsed.as_secs_f64();
            let rate = done as f64 / seconds.max(1e-9);
            let left = (self.total - done.min(self.total)) as f64 / rate.max(1.0);
            super::print::stderr(&format!(
                "{percent}%  {} of {}, {}/s, {left:.0} s left",
                human(done),
                human(self.total),
                human(rate as u64)
            ));
        }
    }

    fn tensor(&self, name: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(name.to_string());
        }
    }
}
