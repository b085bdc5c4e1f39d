//! Commands with attempts that may still take effect.
//!
//! An aggregate records no rejection. While an earlier attempt at a command may be alive, on another
//! node or in its queue, a rejection does not exclude that this attempt takes effect later. So a
//! rejection counts only if it was decided after all earlier attempts have ended (I12).

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::command::RECEIVE_TIMEOUT;

/// Time after which an attempt has ended: no node decides on it after its deadline.
///
/// The part above the deadline covers the transit of a message.
pub(super) const ATTEMPT_ENDS: Duration = RECEIVE_TIMEOUT.saturating_add(Duration::from_secs(2));

/// Number of entries from which expired ones are removed.
const CLEAN: usize = 1_000;

/// The times of the last uncertain attempts, by command.
#[derive(Debug, Default)]
pub(super) struct Doubts(Mutex<HashMap<Uuid, Instant>>);

impl Doubts {
    fn entries(&self) -> MutexGuard<'_, HashMap<Uuid, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that an attempt at a command may still take effect.
    pub(super) fn add(&self, command: Uuid) {
        let (mut entries, now) = (self.entries(), Instant::now());
        if entries.len() >= CLEAN {
            entries.retain(|_, at| now.duration_since(*at) < ATTEMPT_ENDS);
        }
        entries.insert(command, now);
    }

    /// Forgets a command with a final answer.
    pub(super) fn remove(&self, command: Uuid) {
        self.entries().remove(&command);
    }

    /// Returns the time from which a new attempt at a command is the only one.
    pub(super) fn end(&self, command: Uuid) -> Option<Instant> {
        self.entries().get(&command).map(|at| *at + ATTEMPT_ENDS)
    }
}
