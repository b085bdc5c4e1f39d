//! Executes transfers until all are settled.
//!
//! An unknown outcome is resolved by a retry with the same id.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use storied::{ExecuteError, NotExecutedKind, Runtime};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::Failure;
use crate::args::Args;
use crate::domain::{Account, AccountCommand, Transfer, TransferError, Transfers};

/// Maximum time of an open outcome after the last transfer has begun.
const PATIENCE: Duration = Duration::from_secs(120);

/// Wait before a retry.
const AGAIN: Duration = Duration::from_millis(50);

/// The result of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Committed,
    Refused,
}

/// A transfer, and its result.
#[derive(Debug)]
pub(crate) struct Settled {
    pub(crate) id: Uuid,
    pub(crate) transfer: Transfer,
    pub(crate) end: End,
    /// Whether its outcome was unknown for some time.
    pub(crate) unknown: bool,
}

/// Opens the accounts.
pub(crate) async fn open(runtime: &Runtime, accounts: u64) -> Result<(), Failure> {
    let give_up = Instant::now() + PATIENCE;
    for account in 0..accounts {
        // The same id in every run.
        let id = Uuid::new_v5(&Uuid::NAMESPACE_OID, format!("open {account}").as_bytes());
        loop {
            let opened = runtime.execute::<Account>(account, AccountCommand::Open).command_id(id).await;
            match opened {
                Ok(_) => break,
                Err(error) if Instant::now() > give_up => return Err(Failure::Open(error.to_string())),
                Err(_) => sleep(AGAIN).await,
            }
        }
    }
    Ok(())
}

/// A file with a line for every transfer.
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    pub(crate) fn create(path: &Path) -> Result<Self, Failure> {
        let file = File::create(path).map_err(|error| Failure::Journal { path: path.to_owned(), error })?;
        Ok(Self { path: path.to_owned(), file })
    }

    fn write(self, settled: &[Settled]) -> Result<(), Failure> {
        let Self { path, file } = self;
        let mut lines = BufWriter::new(file);
        let mut write = || -> std::io::Result<()> {
            for Settled { id, transfer: Transfer { from, to, amount }, end, .. } in settled {
                let end = if *end == End::Committed { "committed" } else { "refused" };
                writeln!(lines, "{id} {end} {from} {to} {amount}")?;
            }
            lines.flush()
        };
        write().map_err(|error| Failure::Journal { path, error })
    }
}

struct Shared {
    runtime: Runtime,
    accounts: u64,
    left: AtomicU64,
    stop_at: Option<Instant>,
    settled: Mutex<Vec<Settled>>,
}

/// Executes transfers; returns their results and the total time.
pub(crate) async fn transfers(
    runtime: &Runtime,
    args: &Args,
    journal: Option<Journal>,
) -> Result<(Vec<Settled>, Duration), Failure> {
    let started = Instant::now();
    let shared = Arc::new(Shared {
        runtime: runtime.clone(),
        accounts: args.accounts,
        left: AtomicU64::new(if args.transfers == 0 { u64::MAX } else { args.transfers }),
        stop_at: (!args.seconds.is_zero()).then(|| started + args.seconds),
        settled: Mutex::default(),
    });
    let callers: Vec<_> = (0..args.callers).map(|_| tokio::spawn(call(shared.clone()))).collect();
    for caller in callers {
        caller.await.map_err(std::io::Error::other)??;
    }
    let settled = std::mem::take(&mut *shared.settled.lock().map_err(|_| Failure::Bug("a caller panicked"))?);
    if let Some(journal) = journal {
        journal.write(&settled)?;
    }
    Ok((settled, started.elapsed()))
}

async fn call(shared: Arc<Shared>) -> Result<(), Failure> {
    let took_one = |left: u64| left.checked_sub(1);
    while shared.stop_at.is_none_or(|stop| Instant::now() < stop)
        && shared.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, took_one).is_ok()
    {
        let dice = Uuid::new_v4().as_u128();
        let accounts = u128::from(shared.accounts);
        let from = (dice & 0xffff_ffff) % accounts;
        let to = (from + 1 + ((dice >> 32) & 0xffff_ffff) % (accounts - 1)) % accounts;
        let amount = 1 + (dice >> 96) % 200;
        let [from, to, amount] = [from, to, amount].map(|number| u64::try_from(number).unwrap_or(0));
        let settled = settle(&shared, Transfer { from, to, amount }).await?;
        shared.settled.lock().map_err(|_| Failure::Bug("another caller panicked"))?.push(settled);
    }
    Ok(())
}

/// Executes one transfer, with retries until it is settled.
async fn settle(shared: &Shared, transfer: Transfer) -> Result<Settled, Failure> {
    let id = Uuid::now_v7();
    let mut give_up = Instant::now() + PATIENCE;
    if let Some(stop) = shared.stop_at {
        give_up = give_up.max(stop + PATIENCE);
    }
    let mut unknown = false;
    loop {
        let end = match shared.runtime.execute_handler::<Transfers>(transfer.clone()).command_id(id).await {
            Ok(_) => Some(End::Committed),
            Err(ExecuteError::Rejected(TransferError::NoAccount { .. })) => {
                return Err(Failure::Bug("no such account"));
            }
            Err(ExecuteError::Rejected(_)) => Some(End::Refused),
            Err(ExecuteError::NotExecuted { kind: NotExecutedKind::CommandIdReused { .. }, .. }) => {
                return Err(Failure::Bug("an id was used twice"));
            }
            Err(error) if Instant::now() > give_up => {
                return Err(Failure::Unsettled { id, reason: error.to_string() });
            }
            Err(ExecuteError::OutcomeUnknown { reason, .. }) => {
                tracing::info!(%id, reason, "unknown");
                unknown = true;
                None
            }
            // Nothing happened; a retry will succeed.
            Err(error) => {
                tracing::info!(%id, %error, "retrying a transfer");
                None
            }
        };
        match end {
            Some(end) => return Ok(Settled { id, transfer, end, unknown }),
            None => sleep(AGAIN).await,
        }
    }
}
