//! The report of a run, checked against the log.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use storied::{EventStore, Filter, Position, ReadLog};
use uuid::Uuid;

use crate::Failure;
use crate::domain::{AccountEvent, OPENING, Transfer};
use crate::drive::{End, Settled};

/// The report of a run.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Report {
    accounts: u64,
    transfers: u64,
    committed: u64,
    refused: u64,
    /// Transfers with a temporarily unknown outcome, and those of them that were resolved.
    unknown: u64,
    resolved: u64,
    total_before: u64,
    total_after: i128,
    /// Number of negative balances.
    overdrafts: u64,
    /// Number of repeated steps.
    duplicates: u64,
    per_second: f64,
    /// Transfers whose log differs from the answer to their caller.
    wrong: Vec<String>,
}

/// The steps of a transfer in the log: the accounts that were debited, credited, and so on.
#[derive(Debug, Default)]
struct Steps {
    withdrawn: Vec<(String, u64)>,
    refused: u64,
    deposited: Vec<(String, u64)>,
    declined: u64,
    refunded: Vec<(String, u64)>,
}

impl Report {
    /// Compares the answers to the callers with the log.
    pub(crate) async fn of(
        store: &dyn EventStore,
        settled: &[Settled],
        took: Duration,
    ) -> Result<Self, Failure> {
        let ended = |end| settled.iter().filter(|one| one.end == end).count() as u64;
        let (committed, refused) = (ended(End::Committed), ended(End::Refused));
        // Every transfer is settled, or there is no report.
        let unknown = settled.iter().filter(|one| one.unknown).count() as u64;
        let per_second = committed as f64 / took.as_secs_f64().max(0.001);
        let transfers = settled.len() as u64;
        let mut report =
            Self { transfers, committed, refused, unknown, resolved: unknown, per_second, ..Self::default() };
        let mut balances: HashMap<String, i128> = HashMap::new();
        let mut steps: HashMap<Uuid, Steps> = HashMap::new();
        let mut after = Position::START;
        loop {
            let read = ReadLog::after(after).filter(Filter::of::<AccountEvent>());
            let page = store.read_log(read).await?;
            for event in &page.events {
                let account = event.stream.id();
                let balance = balances.entry(account.to_owned()).or_default();
                match event.decode::<AccountEvent>()? {
                    AccountEvent::Opened { balance: opening } => {
                        *balance += i128::from(opening);
                        report.accounts += 1;
                        report.total_before += OPENING;
                    }
                    AccountEvent::Withdrawn { transfer, amount } => {
                        *balance -= i128::from(amount);
                        report.overdrafts += u64::from(*balance < 0);
                        steps.entry(transfer).or_default().withdrawn.push((account.to_owned(), amount));
                    }
                    AccountEvent::Refused { transfer, .. } => steps.entry(transfer).or_default().refused += 1,
                    AccountEvent::Deposited { transfer, amount } => {
                        *balance += i128::from(amount);
                        steps.entry(transfer).or_default().deposited.push((account.to_owned(), amount));
                    }
                    AccountEvent::Declined { transfer, .. } => {
                        steps.entry(transfer).or_default().declined += 1
                    }
                    AccountEvent::Refunded { transfer, amount } => {
                        *balance += i128::from(amount);
                        steps.entry(transfer).or_default().refunded.push((account.to_owned(), amount));
                    }
                }
            }
            if !page.has_more() {
                break;
            }
            after = page.scanned_to;
        }
        report.total_after = balances.values().sum();
        for Steps { withdrawn, refused, deposited, declined, refunded } in steps.values() {
            let counts =
                [withdrawn.len() as u64 + refused, deposited.len() as u64 + declined, refunded.len() as u64];
            report.duplicates += counts.iter().map(|count| count.saturating_sub(1)).sum::<u64>();
        }
        for one in settled {
            let found = steps.remove(&one.id).unwrap_or_default();
            if !found.fits(&one.transfer, one.end) {
                report.wrong.push(format!("{} was {:?}, and the log has {found:?}", one.id, one.end));
            }
        }
        Ok(report)
    }

    /// Checks the report.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        let mut wrong = self.wrong.clone();
        if i128::from(self.total_before) != self.total_after {
            wrong.push(format!(
                "{} before and {} after: a run that was killed has left transfers half-way in this database; use another one",
                self.total_before, self.total_after
            ));
        }
        if self.overdrafts > 0 {
            wrong.push(format!("{} overdrafts", self.overdrafts));
        }
        if self.duplicates > 0 {
            wrong.push(format!("{} repeated steps", self.duplicates));
        }
        if wrong.is_empty() { Ok(()) } else { Err(Failure::Wrong { wrong }) }
    }

    pub(crate) fn json(&self) -> String {
        serde_json::json!({
            "accounts": self.accounts,
            "transfers": self.transfers,
            "committed": self.committed,
            "refused": self.refused,
            "unknown": self.unknown,
            "resolved": self.resolved,
            "total_before": self.total_before,
            "total_after": i64::try_from(self.total_after).unwrap_or(i64::MIN),
            "overdrafts": self.overdrafts,
            "duplicates": self.duplicates,
            "per_second": (self.per_second * 10.0).round() / 10.0,
        })
        .to_string()
    }
}

impl Steps {
    /// Returns whether these steps match the result of the transfer.
    fn fits(&self, Transfer { from, to, amount }: &Transfer, end: End) -> bool {
        let (from, to) = ([(from.to_string(), *amount)], [(to.to_string(), *amount)]);
        let nothing_came = self.deposited.is_empty() && self.declined == 0 && self.refunded.is_empty();
        match end {
            End::Committed => {
                self.withdrawn == from
                    && self.refused == 0
                    && self.deposited == to
                    && self.declined == 0
                    && self.refunded.is_empty()
            }
            End::Refused if self.refused == 1 => self.withdrawn.is_empty() && nothing_came,
            End::Refused => {
                self.withdrawn == from
                    && self.deposited.is_empty()
                    && self.declined == 1
                    && self.refunded == from
            }
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} transfers between {} accounts", self.transfers, self.accounts)?;
        writeln!(
            f,
            "{} committed, {} refused, {:.0} a second",
            self.committed, self.refused, self.per_second
        )?;
        writeln!(f, "{} had an unknown outcome, {} of these were resolved", self.unknown, self.resolved)?;
        writeln!(f, "{} before, {} after", self.total_before, self.total_after)?;
        write!(f, "{} overdrafts, {} repeated steps", self.overdrafts, self.duplicates)
    }
}
