//! The execution of a started command, until it has an answer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep, timeout};

use super::command::StoredCommand;
use crate::backoff::Backoff;
use crate::command::{ATTEMPT_ENDS, Dispatcher, ErasedAnswer, ErasedCommand, Kind};
use crate::lease::CurrentTerm;
use crate::store::ScheduledCommand;

/// Maximum number of commands in flight.
const IN_FLIGHT: usize = 1_024;

/// Number of attempts at a command that fails without having an effect.
const ATTEMPTS: u32 = 3;

/// Number of attempts after which a command without an effect waits again, and for how long.
const RETRIES: u32 = 5;
const POSTPONED: Duration = Duration::from_secs(5);

/// Longest wait for a permit. A slow target postpones the others of its commands.
const PATIENCE: Duration = Duration::from_secs(5);

/// Maximum number of commands in flight to one category or handler, so that a slow one does not hold
/// up the others.
const IN_FLIGHT_TO_TARGET: usize = 256;

/// Maximum size in bytes of the reason for parking a command.
const REASON: usize = 1_000;

/// First and longest wait between two attempts.
const BACKOFF: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(5)];

/// What executions share.
pub(super) struct Executor {
    commands: Weak<Dispatcher>,
    term: CurrentTerm,
    permits: Semaphore,
    /// Permits by category or handler, as many as this node has sent commands to.
    of_targets: Mutex<HashMap<String, Arc<Semaphore>>>,
}

/// The end of an execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ExecutionEnd {
    /// The command took effect.
    Executed,
    /// It was rejected, or failed permanently.
    Parked(String),
    /// It has had no effect, and waits again.
    Postponed(Duration),
    /// The next owner of the lease sends it again.
    Left,
}

impl Executor {
    pub(super) fn new(commands: Weak<Dispatcher>, term: CurrentTerm) -> Self {
        Self { commands, term, permits: Semaphore::new(IN_FLIGHT), of_targets: Mutex::default() }
    }

    fn permits_of(&self, target: &str) -> Arc<Semaphore> {
        let mut of_targets = self.of_targets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(permits) = of_targets.get(target) {
            return permits.clone();
        }
        let permits = Arc::new(Semaphore::new(IN_FLIGHT_TO_TARGET));
        of_targets.insert(target.to_owned(), permits.clone());
        permits
    }

    /// Executes a command.
    ///
    /// `alone_at`: when no earlier attempt of another owner can take effect any more. `stop`: set if
    /// the node stops.
    pub(super) async fn execute(
        &self,
        started: &ScheduledCommand,
        alone_at: Instant,
        mut stop: watch::Receiver<bool>,
    ) -> ExecutionEnd {
        let decoded = StoredCommand::decode(&started.body).and_then(|it| it.command(started.id));
        let command = match decoded {
            Ok(command) => command,
            Err(reason) => return ExecutionEnd::Parked(format!("the command does not decode: {reason}")),
        };
        let permits = self.permits_of(&command.name);
        let mut attempts = Attempts::new(alone_at);
        loop {
            // A command that waits for its target holds no permit that others need.
            let both = async { (permits.acquire().await, self.permits.acquire().await) };
            let permitted = tokio::select! {
                permitted = timeout(PATIENCE, both) => permitted,
                // An error means that the node has ended.
                _ = stop.wait_for(|stop| *stop) => return ExecutionEnd::Left,
            };
            // The semaphores are never closed.
            let Ok(_permits) = permitted else { return attempts.postpone() };
            match self.attempt(&command, &mut attempts).await {
                Ok(end) => return end,
                Err(wait) => tokio::select! {
                    () = sleep(wait) => {}
                    _ = stop.wait_for(|stop| *stop) => return ExecutionEnd::Left,
                },
            }
        }
    }

    /// Sends the command once. Returns the wait until the next attempt if this one did not end it.
    async fn attempt(
        &self,
        command: &ErasedCommand,
        attempts: &mut Attempts,
    ) -> Result<ExecutionEnd, Duration> {
        let Some(commands) = self.commands.upgrade() else { return Ok(ExecutionEnd::Left) };
        // A stale owner sends nothing, so that the next one knows when its attempts have ended.
        let term = self.term.held_since();
        if term.is_none() {
            return Ok(ExecutionEnd::Left);
        }
        let sent_at = Instant::now();
        let answer = commands.execute_erased(command.clone()).await;
        // The next owner may have sent the command meanwhile.
        if self.term.held_since() != term && !matches!(answer, ErasedAnswer::Done { .. }) {
            return Ok(ExecutionEnd::Left);
        }
        attempts.judge(command, answer, sent_at)
    }
}

/// The attempts at a command.
struct Attempts {
    /// Time from which an attempt is the only one, so that a rejection is final.
    alone_at: Instant,
    /// Number of attempts that failed permanently.
    failures: u32,
    /// Number of attempts that failed otherwise.
    retries: u32,
    backoff: Backoff,
}

impl Attempts {
    fn new(alone_at: Instant) -> Self {
        let [first, longest] = BACKOFF;
        Self { alone_at, failures: 0, retries: 0, backoff: Backoff::new(first, longest) }
    }

    /// Returns the end of a command without a slot, or without a target for now.
    ///
    /// A command that may still take effect is not `waiting`, which could be cancelled.
    fn postpone(&self) -> ExecutionEnd {
        if Instant::now() < self.alone_at { ExecutionEnd::Left } else { ExecutionEnd::Postponed(POSTPONED) }
    }

    /// Returns what an answer means: the end, or the wait until the next attempt.
    fn judge(
        &mut self,
        command: &ErasedCommand,
        answer: ErasedAnswer,
        sent_at: Instant,
    ) -> Result<ExecutionEnd, Duration> {
        match answer {
            ErasedAnswer::Done { .. } => Ok(ExecutionEnd::Executed),
            // An aggregate records no rejection: an earlier attempt may still take effect (I12). A
            // handler records it.
            ErasedAnswer::Rejected { .. } if command.kind == Kind::Aggregate && sent_at < self.alone_at => {
                Err(self.alone_at.saturating_duration_since(Instant::now()))
            }
            ErasedAnswer::Rejected { message, .. } => Ok(ExecutionEnd::Parked(cut(message))),
            ErasedAnswer::Transient { reason, uncertain: true } => {
                self.alone_at = self.alone_at.max(Instant::now() + ATTEMPT_ENDS);
                tracing::debug!(command = %command.id, reason, "retrying a scheduled command");
                Err(self.backoff.next())
            }
            // Another node may handle it later.
            ErasedAnswer::Unhandled { reason } | ErasedAnswer::Transient { reason, .. } => {
                let wait = self.backoff.next();
                self.retries = self.retries.saturating_add(1);
                if self.retries < RETRIES || Instant::now() < self.alone_at {
                    return Err(wait);
                }
                tracing::debug!(command = %command.id, to = command.name, reason, "postponing a command");
                Ok(self.postpone())
            }
            // An earlier attempt may still take effect: its end decides.
            ErasedAnswer::Failed { .. } if sent_at < self.alone_at => {
                Err(self.alone_at.saturating_duration_since(Instant::now()))
            }
            ErasedAnswer::Failed { reason } => {
                self.failures += 1;
                if self.failures >= ATTEMPTS {
                    return Ok(ExecutionEnd::Parked(cut(reason)));
                }
                Err(self.backoff.next())
            }
        }
    }
}

fn cut(mut reason: String) -> String {
    reason.truncate(reason.floor_char_boundary(REASON));
    reason
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep_until;
    use uuid::Uuid;

    use super::*;
    use crate::command::Expected;
    use crate::event::Metadata;

    fn command(kind: Kind) -> ErasedCommand {
        let (id, name, metadata) = (Uuid::nil(), "order".to_owned(), Metadata::default());
        ErasedCommand { id, kind, name, key: None, payload: Vec::new(), metadata, expected: Expected::Any }
    }

    fn rejected() -> ErasedAnswer {
        ErasedAnswer::Rejected { message: "sold out".into(), details: Vec::new() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_rejection_counts_when_no_other_attempt_is_alive() {
        let now = Instant::now();
        let parked = Ok(ExecutionEnd::Parked("sold out".into()));
        let mut fresh = Attempts::new(now);
        assert_eq!(fresh.judge(&command(Kind::Aggregate), rejected(), now), parked);
        let mut taken_over = Attempts::new(now + ATTEMPT_ENDS);
        assert_eq!(taken_over.judge(&command(Kind::Aggregate), rejected(), now), Err(ATTEMPT_ENDS));
        assert_eq!(taken_over.judge(&command(Kind::Handler), rejected(), now), parked);
        let uncertain = ErasedAnswer::Transient { reason: "no answer".into(), uncertain: true };
        assert!(fresh.judge(&command(Kind::Aggregate), uncertain, now).is_err());
        assert_eq!(fresh.judge(&command(Kind::Aggregate), rejected(), now), Err(ATTEMPT_ENDS));
        sleep_until(now + ATTEMPT_ENDS).await;
        assert_eq!(fresh.judge(&command(Kind::Aggregate), rejected(), Instant::now()), parked);
    }

    #[tokio::test(start_paused = true)]
    async fn a_command_that_fails_again_and_again_is_parked() {
        let mut attempts = Attempts::new(Instant::now());
        let failed = || ErasedAnswer::Failed { reason: "panicked".into() };
        let one = command(Kind::Aggregate);
        assert!(attempts.judge(&one, failed(), Instant::now()).is_err());
        assert!(attempts.judge(&one, failed(), Instant::now()).is_err());
        let end = attempts.judge(&one, failed(), Instant::now());
        assert_eq!(end, Ok(ExecutionEnd::Parked("panicked".into())));
    }
}
