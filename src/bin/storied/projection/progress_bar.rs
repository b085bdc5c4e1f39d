//! The progress display.

use std::io::Write;
use std::time::Duration;

use tokio::time::Instant;

use crate::terminal;

/// Interval of progress lines if standard error is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Progress on standard error: one changing line on a terminal, a line at an interval otherwise.
pub(crate) struct Bar {
    since: Instant,
    last_shown: Option<Instant>,
    watched: bool,
}

impl Bar {
    pub(crate) fn new() -> Self {
        Self { since: Instant::now(), last_shown: None, watched: terminal::watched() }
    }

    pub(crate) fn seconds(&self) -> f64 {
        self.since.elapsed().as_secs_f64()
    }

    pub(crate) fn show(&mut self, name: &str, done: u64, of: u64, start: u64) {
        const WIDTH: u64 = 30;
        if !self.watched && self.last_shown.is_some_and(|last_shown| last_shown.elapsed() < LINE_EVERY) {
            return;
        }
        self.last_shown = Some(Instant::now());
        let rate = done.saturating_sub(start) as f64 / self.seconds().max(0.001);
        let left = Duration::try_from_secs_f64(of.saturating_sub(done) as f64 / rate);
        let left = left.map_or("unknown".to_owned(), |left| format!("{} s", left.as_secs()));
        let full = usize::try_from(WIDTH.saturating_mul(done) / of.max(1)).unwrap_or(0);
        let bar = format!("{:#<full$}{:.<empty$}", "", "", empty = 30 - full.min(30));
        let text = terminal::clean(name).into_owned();
        let text = format!("{text} [{bar}] {done} of {of} positions, {rate:.0}/s, {left} left");
        // A failure to write to standard error cannot be reported.
        let _ = if self.watched {
            write!(std::io::stderr(), "\r\x1b[K{text}")
        } else {
            writeln!(std::io::stderr(), "{text}")
        };
    }

    pub(crate) fn end(&self) {
        if self.watched && self.last_shown.is_some() {
            terminal::print_error("\n");
        }
    }
}
