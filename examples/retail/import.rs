//! Turns rows into commands and keeps many of them under way, so that the store commits them in groups.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use futures_util::future::{FutureExt, Shared};
use futures_util::stream::{FuturesUnordered, StreamExt};
use storied::{ExecuteError, Position, Receipt, Runtime};
use uuid::Uuid;

use crate::domain::{Header, Invoice, InvoiceCommand, InvoiceError, Line};
use crate::report::Progress;
use crate::rows::{Row, RowError, Rows};

/// How many commands are under way at a time. All that the importer holds of the file.
const IN_FLIGHT: usize = 512;
/// How often a command is sent when something is in its way that may pass by itself.
const ATTEMPTS: u32 = 10;
/// Command ids are UUIDs of version 5 in this namespace of ours.
const COMMANDS: Uuid = Uuid::from_u128(0x2d43_77e5_0f3c_4c0f_9c66_51c1_39a0_5d1e);

/// What became of the rows so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tally {
    /// Rows read.
    pub(crate) lines: u64,
    /// Commands answered: one for each row, and one more for each invoice.
    pub(crate) commands: u64,
    /// … of which an invoice refused.
    pub(crate) rejected: u64,
    /// … of which had taken effect in an earlier run.
    pub(crate) duplicates: u64,
    /// Events that this run added to the log.
    pub(crate) new_events: u64,
    /// The last event that a command caused, in this run or an earlier one.
    pub(crate) position: Position,
}

/// Why the import ended before the file did. Whatever was answered by then stays done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImportError {
    #[error(transparent)]
    Row(#[from] RowError),
    #[error("invoice {invoice}: {error}")]
    Command { invoice: String, error: Box<ExecuteError<InvoiceError>> },
}

/// An invoice's answer to a command.
type Answer = (String, Result<Receipt, ExecuteError<InvoiceError>>);
type Answering = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// An invoice of which rows were read. There is one for each invoice of the file; nothing else grows with it.
struct Seen {
    lines: u32,
    opened: Shared<Answering>,
}

/// Sends every row to its invoice, in the order of the file, and counts the answers.
pub(crate) async fn import(
    runtime: &Runtime,
    rows: Rows,
    progress: &mut Progress,
) -> (Tally, Result<(), ImportError>) {
    let mut tally = Tally::default();
    let mut seen: HashMap<String, Seen> = HashMap::new();
    let mut under_way = FuturesUnordered::<Answering>::new();
    let mut result = Ok(());
    // The file is local and read through a buffer: waiting for it is not worth a thread of its own.
    for row in rows {
        let row = match row {
            Ok(row) => row,
            Err(error) => {
                result = Err(error.into());
                break;
            }
        };
        tally.lines += 1;
        let header = Header { customer: row.customer.clone(), country: row.country.clone(), date: row.date };
        let seen = seen.entry(row.invoice.clone()).or_insert_with(|| {
            let (id, command) =
                (command_id(&row, 0, "open"), InvoiceCommand::Open { header: header.clone() });
            let opened = send(runtime.clone(), row.invoice.clone(), id, command).boxed().shared();
            under_way.push(opened.clone().boxed());
            Seen { lines: 0, opened }
        });
        seen.lines += 1;
        let id = command_id(&row, seen.lines, "add line");
        let Row { invoice, stock_code, description, quantity, unit_price, .. } = row;
        let line = Line { number: seen.lines, stock_code, description, quantity, unit_price };
        let added = send(runtime.clone(), invoice, id, InvoiceCommand::AddLine { header, line });
        // Lines need not wait for each other, but the invoice must be there.
        let opened = seen.opened.clone();
        under_way.push(async { opened.then(|_| added).await }.boxed());
        while result.is_ok() && under_way.len() >= IN_FLIGHT {
            let Some(answer) = under_way.next().await else { break };
            result = tally.count(answer);
            progress.show(&tally);
        }
        if result.is_err() {
            break;
        }
    }
    // What was sent is waited for in any case.
    while let Some(answer) = under_way.next().await {
        result = result.and(tally.count(answer));
        progress.show(&tally);
    }
    (tally, result)
}

/// Sends a command until it is answered. Its id stays the same, so that it takes effect once, however often it is sent.
async fn send(runtime: Runtime, invoice: String, id: Uuid, command: InvoiceCommand) -> Answer {
    let mut attempt = 1;
    loop {
        match runtime.execute::<Invoice>(&invoice, command.clone()).command_id(id).await {
            Err(error) if error.is_transient() && attempt < ATTEMPTS => {
                tracing::warn!(%invoice, %error, attempt, "trying again");
                tokio::time::sleep(Duration::from_millis(50) * attempt).await;
                attempt += 1;
            }
            answer => return (invoice, answer),
        }
    }
}

/// The same row has the same id in every run. A changed row has another one: it is for the invoice to refuse it, where a
/// repeated id would be answered with the receipt of what the row said before.
fn command_id(row: &Row, line: u32, kind: &str) -> Uuid {
    let Row { invoice, stock_code, description, quantity, date, unit_price, customer, country } = row;
    let what = format!("{invoice:?} {line} {kind}");
    let row =
        format!("{stock_code:?} {description:?} {quantity} {date} {unit_price} {customer:?} {country:?}");
    Uuid::new_v5(&COMMANDS, format!("{what}: {row}").as_bytes())
}

impl Tally {
    fn count(&mut self, (invoice, answer): Answer) -> Result<(), ImportError> {
        match answer {
            Ok(receipt) => {
                self.position = self.position.max(receipt.position);
                if receipt.duplicate || receipt.events == 0 {
                    self.duplicates += 1;
                } else {
                    self.new_events += receipt.events;
                }
            }
            Err(ExecuteError::Rejected(reason)) => {
                tracing::warn!(%invoice, %reason, "rejected");
                self.rejected += 1;
            }
            Err(error) => return Err(ImportError::Command { invoice, error: Box::new(error) }),
        }
        self.commands += 1;
        Ok(())
    }
}
