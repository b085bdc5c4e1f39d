//! Handlers that tests can delay, count and fail.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use storied::command::{HandleError, Handler, HandlerContext};
use tokio::sync::watch;

pub use crate::support::counter::{Add, AddUpTo, Counter, CounterCommand, CounterError, Look};

/// The shared state of the handlers of all nodes of a test.
pub struct Shared {
    /// Number of started handlers, of running handlers, and the maximum of the latter.
    pub begun: AtomicU64,
    pub running: AtomicUsize,
    pub most: AtomicUsize,
    /// Handled numbers, in order.
    pub seen: Mutex<Vec<u64>>,
    /// Gate: handlers with a wait continue when this is true.
    pub open: watch::Sender<bool>,
    /// Number of the next attempts that fail.
    pub failures: AtomicU64,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            begun: AtomicU64::new(0),
            running: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            seen: Mutex::default(),
            open: watch::Sender::new(false),
            failures: AtomicU64::new(0),
        }
    }
}

impl Shared {
    pub fn begun(&self) -> u64 {
        self.begun.load(Ordering::SeqCst)
    }
}

/// A handler that executes the commands of a test sequentially.
pub struct Worker(pub Arc<Shared>);

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Work {
    /// Records a number, after an optional wait.
    Note {
        n: u64,
        wait: bool,
    },
    /// Records a number as `Note` does, one at a time for each key.
    Keyed {
        key: String,
        n: u64,
        wait: bool,
    },
    /// Adds to a counter through a command, and replies with the total. Then waits optionally.
    Count {
        id: String,
        add: u64,
        limit: u64,
        wait: bool,
    },
    /// Waits, then adds to a counter.
    CountLater {
        id: String,
        add: u64,
    },
    /// Sends commands to this handler itself, nested to the given depth.
    Nest(u64),
    Refuse {
        code: u32,
        text: String,
    },
    Panic,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub enum WorkError {
    #[error("refused with {code}: {text}")]
    Refused { code: u32, text: String },
    #[error("it would be more than {limit}")]
    Limit { limit: u64 },
}

struct Running<'a>(&'a Shared);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Handler for Worker {
    const NAME: &'static str = "test.work";
    type Command = Work;
    type Reply = u64;
    type Error = WorkError;

    async fn handle(&self, work: &Work, context: &HandlerContext) -> Result<u64, HandleError<WorkError>> {
        let shared = &*self.0;
        shared.begun.fetch_add(1, Ordering::SeqCst);
        let running = shared.running.fetch_add(1, Ordering::SeqCst) + 1;
        let _running = Running(shared);
        shared.most.fetch_max(running, Ordering::SeqCst);
        let fail =
            shared.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        let opened = async || _ = shared.open.subscribe().wait_for(|open| *open).await;
        match work {
            Work::Note { n, wait } | Work::Keyed { n, wait, .. } => {
                if *wait {
                    opened().await;
                }
                if fail.is_ok() {
                    return Err(HandleError::Failed("as requested".into()));
                }
                shared.seen.lock().unwrap().push(*n);
                Ok(*n)
            }
            Work::Count { id, add, limit, wait } => {
                let command = AddUpTo { add: *add, limit: *limit };
                let total = match context.execute::<Counter>(id, command).await {
                    Ok(receipt) => receipt.reply,
                    Err(error) if error.rejection().is_some() => {
                        return Err(HandleError::Rejected(WorkError::Limit { limit: *limit }));
                    }
                    Err(error) => return Err(error.into()),
                };
                if *wait {
                    opened().await;
                }
                if fail.is_ok() {
                    return Err(HandleError::Failed("as requested".into()));
                }
                Ok(total)
            }
            Work::CountLater { id, add } => {
                opened().await;
                Ok(context.execute::<Counter>(id, Add(*add)).await?.reply)
            }
            Work::Nest(0) => Ok(0),
            Work::Nest(depth) => {
                Ok(context.execute_handler::<Worker>(Work::Nest(depth - 1)).await?.reply + 1)
            }
            Work::Refuse { code, text } => {
                Err(HandleError::Rejected(WorkError::Refused { code: *code, text: text.clone() }))
            }
            Work::Panic => panic!("as requested"),
        }
    }

    fn key(work: &Work) -> Option<String> {
        match work {
            Work::Keyed { key, .. } => Some(key.clone()),
            _ => None,
        }
    }
}
