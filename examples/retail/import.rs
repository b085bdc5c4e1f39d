//! Converts rows to commands, with many in flight, so that the store commits them in groups.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use storied::{ExecuteError, Position, Receipt, Runtime};
use uuid::Uuid;

use crate::domain::{Header, Invoice, InvoiceCommand, InvoiceError, Line};
use crate::report::Progress;
use crate::rows::{Row, RowError, Rows};

/// Maximum number of rows in flight, in full invoices. The importer holds no more of the file.
const ROWS_UNDER_WAY: usize = 1_000;
/// Maximum number of rows of one invoice among them.
const LINES_UNDER_WAY: usize = 100;
/// Maximum number of attempts of a command after transient errors.
const ATTEMPTS: u32 = 10;
/// Namespace of the command ids, which are UUIDs of version 5.
const COMMANDS: Uuid = Uuid::from_u128(0x2d43_77e5_0f3c_4c0f_9c66_51c1_39a0_5d1e);

/// The counts of the import so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tally {
    /// Rows read.
    pub(crate) lines: u64,
    /// Answered commands: one for each row, and one more for each invoice.
    pub(crate) commands: u64,
    /// Commands that an invoice rejected.
    pub(crate) rejected: u64,
    /// Commands that took effect in an earlier run.
    pub(crate) duplicates: u64,
    /// Events that this run added to the log.
    pub(crate) new_events: u64,
    /// The last event of a command, in this run or an earlier one.
    pub(crate) position: Position,
}

/// The cause of an early end of the import. Answered commands stay done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImportError {
    #[error(transparent)]
    Row(#[from] RowError),
    #[error("invoice {invoice}: {error}")]
    Command { invoice: String, error: Box<ExecuteError<InvoiceError>> },
}

/// Consecutive rows of one invoice.
struct Batch {
    invoice: String,
    /// Number of earlier lines of the invoice.
    before: u32,
    rows: Vec<Row>,
}

/// The answers of an invoice to these rows.
struct Answers {
    invoice: String,
    rows: usize,
    answers: Vec<Answer>,
}

type Answer = Result<Receipt, ExecuteError<InvoiceError>>;

/// Sends every row to its invoice and counts the answers.
///
/// Invoices run concurrently, each in file order.
pub(crate) async fn import(
    runtime: &Runtime,
    rows: Rows,
    progress: &mut Progress,
) -> (Tally, Result<(), ImportError>) {
    let (mut tally, mut result) = (Tally::default(), Ok(()));
    // One number for each invoice; nothing else grows with the file.
    let mut lines: HashMap<String, u32> = HashMap::new();
    let mut under_way = FuturesUnordered::new();
    let mut rows_under_way = 0;
    // The file is local and buffered, so reading it needs no thread of its own.
    let mut rows = rows.peekable();
    while let (Ok(()), Some(row)) = (&result, rows.next()) {
        let mut batch = match row {
            Ok(first) => vec![first],
            Err(error) => {
                result = Err(error.into());
                break;
            }
        };
        let invoice = batch[0].invoice.clone();
        let same = |row: &Result<Row, _>| row.as_ref().is_ok_and(|row| row.invoice == invoice);
        while let Some(Ok(row)) = rows.next_if(same) {
            batch.push(row);
        }
        let seen = lines.entry(invoice.clone()).or_default();
        let batch = Batch { invoice, before: *seen, rows: batch };
        *seen += batch.rows.len() as u32;
        // Later rows of an invoice wait for its earlier rows, which may be in flight.
        let room = if batch.before > 0 { 0 } else { ROWS_UNDER_WAY };
        while rows_under_way > 0 && rows_under_way + batch.rows.len() > room {
            let Some::<Answers>(answers) = under_way.next().await else { break };
            rows_under_way -= answers.rows;
            result = result.and(tally.count(answers));
            progress.show(&tally);
        }
        tally.lines += batch.rows.len() as u64;
        rows_under_way += batch.rows.len();
        under_way.push(record(runtime, batch));
    }
    // Waits for all commands in flight, also after an error.
    while let Some(answers) = under_way.next().await {
        result = result.and(tally.count(answers));
        progress.show(&tally);
    }
    (tally, result)
}

/// Opens an invoice and adds its lines.
///
/// It dispatches the commands in order, without waiting for the answers. storied decides on them in
/// this order, and stores decisions together.
async fn record(runtime: &Runtime, batch: Batch) -> Answers {
    let Batch { invoice, before, rows } = batch;
    let (count, mut answers) = (rows.len(), Vec::with_capacity(rows.len() + 1));
    if let (0, Some(first)) = (before, rows.first()) {
        let command = InvoiceCommand::Open { header: header(first) };
        answers.push(send(runtime, &invoice, command_id(first, 0, "open"), command).await);
    }
    let commands: Vec<_> = (before + 1..)
        .zip(rows)
        .map(|(number, row)| {
            let (id, header) = (command_id(&row, number, "add line"), header(&row));
            let Row { stock_code, description, quantity, unit_price, .. } = row;
            let line = Line { number, stock_code, description, quantity, unit_price };
            (id, InvoiceCommand::AddLine { header, line })
        })
        .collect();
    for commands in commands.chunks(LINES_UNDER_WAY) {
        let mut under_way = Vec::with_capacity(commands.len());
        for (id, command) in commands {
            let command = runtime.execute::<Invoice>(&invoice, command.clone()).command_id(*id);
            under_way.push(command.dispatch().await);
        }
        for (dispatched, (id, command)) in under_way.into_iter().zip(commands) {
            let answer = match dispatched {
                Ok(dispatched) => dispatched.await,
                Err(error) => Err(error),
            };
            answers.push(match answer {
                Err(error) if error.is_transient() => send(runtime, &invoice, *id, command.clone()).await,
                answer => answer,
            });
        }
    }
    Answers { invoice, rows: count, answers }
}

/// Sends a command until it is answered. The id stays the same, so the command takes effect once.
async fn send(runtime: &Runtime, invoice: &str, id: Uuid, command: InvoiceCommand) -> Answer {
    let mut attempt = 1;
    loop {
        match runtime.execute::<Invoice>(invoice, command.clone()).command_id(id).await {
            Err(error) if error.is_transient() && attempt < ATTEMPTS => {
                tracing::warn!(%invoice, %error, attempt, "retrying a command");
                tokio::time::sleep(Duration::from_millis(50) * attempt).await;
                attempt += 1;
            }
            answer => return answer,
        }
    }
}

fn header(row: &Row) -> Header {
    Header { customer: row.customer.clone(), country: row.country.clone(), date: row.date }
}

/// Returns the command id of a row: equal in every run, different for a changed row.
///
/// The invoice rejects a changed row. An equal id would return the receipt of the old content
/// instead.
fn command_id(row: &Row, line: u32, kind: &str) -> Uuid {
    let Row { invoice, stock_code, description, quantity, date, unit_price, customer, country } = row;
    let what = format!("{invoice:?} {line} {kind}");
    let row =
        format!("{stock_code:?} {description:?} {quantity} {date} {unit_price} {customer:?} {country:?}");
    Uuid::new_v5(&COMMANDS, format!("{what}: {row}").as_bytes())
}

impl Tally {
    /// Counts all answers, also after a failure.
    fn count(&mut self, Answers { invoice, answers, .. }: Answers) -> Result<(), ImportError> {
        let mut result = Ok(());
        for answer in answers {
            match answer {
                Ok(receipt) => {
                    self.position = self.position.max(receipt.position);
                    self.new_events += if receipt.duplicate { 0 } else { receipt.events };
                    self.duplicates += u64::from(receipt.duplicate || receipt.events == 0);
                }
                Err(ExecuteError::Rejected(reason)) => {
                    tracing::warn!("invoice {invoice} rejected a command: {reason}");
                    self.rejected += 1;
                }
                Err(error) => {
                    result = Err(ImportError::Command { invoice: invoice.clone(), error: Box::new(error) });
                    continue;
                }
            }
            self.commands += 1;
        }
        result
    }
}
