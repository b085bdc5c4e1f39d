//! The report of a run, as text and as JSON, and the progress during the run.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use rust_decimal::Decimal;
use serde::Serialize;

use crate::import::Tally;
use crate::projections::Totals;

/// The report. `--json` prints exactly this; decimals are strings.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Of this run: rows read, commands answered, and of these rejected and done before.
    lines: u64,
    commands: u64,
    rejected: u64,
    duplicates: u64,
    /// Events added by this run, and all events of the log.
    new_events: u64,
    events: u64,
    /// From the read models: of all runs on this database.
    invoices: i64,
    cancellations: i64,
    total: Decimal,
    revenue_by_country: BTreeMap<String, Decimal>,
    units_by_stock_code: BTreeMap<String, i64>,
    /// Time until the last answer *and* the catch-up of the read models.
    seconds: f64,
    commands_per_second: f64,
}

impl Report {
    pub(crate) fn new(tally: &Tally, events: u64, totals: Totals, took: Duration) -> Self {
        let seconds = took.as_secs_f64();
        Self {
            lines: tally.lines,
            commands: tally.commands,
            rejected: tally.rejected,
            duplicates: tally.duplicates,
            new_events: tally.new_events,
            events,
            invoices: totals.invoices,
            cancellations: totals.cancellations,
            total: totals.revenue_by_country.values().sum(),
            revenue_by_country: totals.revenue_by_country,
            units_by_stock_code: totals.units_by_stock_code,
            seconds,
            commands_per_second: tally.commands as f64 / seconds.max(f64::EPSILON),
        }
    }

    pub(crate) fn write_json(&self, out: &mut impl Write) -> std::io::Result<()> {
        serde_json::to_writer(&mut *out, self)?;
        writeln!(out)
    }

    pub(crate) fn write_text(&self, out: &mut impl Write) -> std::io::Result<()> {
        let Self { lines, commands, rejected, duplicates, new_events, events, .. } = self;
        writeln!(
            out,
            "{lines} lines, {commands} commands: {rejected} rejected, {duplicates} done before, {new_events} new events"
        )?;
        if *new_events == 0 {
            writeln!(out, "Nothing changed: all commands were done before.")?;
        }
        writeln!(out, "{:.2} s, {:.0} commands a second", self.seconds, self.commands_per_second)?;
        writeln!(
            out,
            "\n{events} events in the log, {} invoices, {} cancellations",
            self.invoices, self.cancellations
        )?;
        writeln!(out, "\nRevenue by country")?;
        for (country, revenue) in by_size(&self.revenue_by_country) {
            writeln!(out, "  {country:<24}{revenue:>14}")?;
        }
        writeln!(out, "  {:<24}{:>14}", "Total", self.total)?;
        writeln!(out, "\nUnits by stock code, the most of {}", self.units_by_stock_code.len())?;
        for (code, units) in by_size(&self.units_by_stock_code).into_iter().take(10) {
            writeln!(out, "  {code:<24}{units:>14}")?;
        }
        Ok(())
    }
}

fn by_size<T: Copy + Ord>(map: &BTreeMap<String, T>) -> Vec<(&str, T)> {
    let mut entries: Vec<_> = map.iter().map(|(name, &value)| (&**name, value)).collect();
    entries.sort_by_key(|&(_, value)| std::cmp::Reverse(value));
    entries
}

/// Progress on standard error: a line that is rewritten on a terminal, or a line at an interval.
#[derive(Debug)]
pub(crate) struct Progress {
    watched: bool,
    every: Duration,
    started: Instant,
    shown: Instant,
}

impl Progress {
    pub(crate) fn new() -> Self {
        let now = Instant::now();
        let watched = std::io::stderr().is_terminal();
        let every = if watched { Duration::from_millis(100) } else { Duration::from_secs(2) };
        Self { watched, every, started: now, shown: now }
    }

    pub(crate) fn show(&mut self, tally: &Tally) {
        if self.shown.elapsed() < self.every {
            return;
        }
        self.shown = Instant::now();
        let rate = tally.commands as f64 / self.started.elapsed().as_secs_f64();
        let (begin, end) = if self.watched { ("\r\x1b[K", "") } else { ("", "\n") };
        // A closed standard error does not stop the run.
        let _ = write!(
            std::io::stderr(),
            "{begin}{} lines, {} commands answered, {rate:.0} a second{end}",
            tally.lines,
            tally.commands
        );
    }

    /// Clears the progress line on a terminal.
    pub(crate) fn done(self) -> Duration {
        if self.watched {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
        self.started.elapsed()
    }
}
