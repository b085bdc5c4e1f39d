//! Commands with attempts that may still take effect.
//!
//! An aggregate records no rejection. An earlier attempt may be alive, on another node or in its
//! queue, and take effect after the rejection. So a rejection counts only if it was decided after all
//! earlier attempts have ended (I12).

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;
use uuid::Uuid;

use crate::command::ATTEMPT_LIFETIME;

/// The times of the last attempts without a known end, by command.
///
/// An entry leaves after [`ATTEMPT_LIFETIME`], so the attempts of that time limit the number.
#[derive(Debug, Default)]
pub(super) struct UnresolvedAttempts(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    by_command: HashMap<Uuid, Instant>,
    /// All additions, oldest first.
    order: VecDeque<(Instant, Uuid)>,
}

impl UnresolvedAttempts {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins an attempt. If it is dropped before its [end](Attempting::end), it may still take
    /// effect.
    pub(super) fn begin(&self, command: Uuid) -> Attempting<'_> {
        Attempting { attempts: self, command, ended: false }
    }

    fn add(&self, command: Uuid) {
        let (mut entries, now) = (self.entries(), Instant::now());
        while let Some((at, oldest)) = entries.order.front().copied()
            && now.duration_since(at) >= ATTEMPT_LIFETIME
        {
            entries.order.pop_front();
            // A later attempt at the same command stays.
            if entries.by_command.get(&oldest) == Some(&at) {
                entries.by_command.remove(&oldest);
            }
        }
        entries.order.push_back((now, command));
        entries.by_command.insert(command, now);
    }

    /// Removes a command with a final answer.
    pub(super) fn remove(&self, command: Uuid) {
        self.entries().by_command.remove(&command);
    }

    /// Returns the time from which a new attempt at a command is the only one.
    pub(super) fn end(&self, command: Uuid) -> Option<Instant> {
        self.entries().by_command.get(&command).map(|at| *at + ATTEMPT_LIFETIME)
    }
}

/// An attempt at a command in flight.
pub(super) struct Attempting<'a> {
    attempts: &'a UnresolvedAttempts,
    command: Uuid,
    ended: bool,
}

impl Attempting<'_> {
    /// Ends the attempt: it has taken effect, or never will.
    pub(super) fn end(mut self) {
        self.ended = true;
    }
}

impl Drop for Attempting<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.attempts.add(self.command);
        }
    }
}
