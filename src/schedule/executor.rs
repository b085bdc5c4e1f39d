//! The execution of a started command, until it has an answer.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep, timeout};

use super::command::{StoredCommand, Unreadable};
use crate::backoff::{Backoff, jitter};
use crate::command::{ATTEMPT_LIFETIME, Dispatcher, ErasedAnswer, ErasedCommand, Kind};
use crate::lease::CurrentTerm;
use crate::rate_limit::LogLimit;
use crate::store::{ScheduledCommand, ScheduledOutcome};

/// Maximum number of commands in flight, and of those to one category or handler.
const IN_FLIGHT: usize = 2_048;
const IN_FLIGHT_TO_TARGET: usize = 512;

/// Number of attempts at a command that fails without having an effect.
const ATTEMPTS: u32 = 3;

/// Number of attempts after which a command waits again, and for about how long.
const RETRIES: u32 = 5;
const POSTPONED: Duration = Duration::from_secs(5);

/// Longest wait for a permit. A target that takes longer is slow for a while.
const PATIENCE: Duration = Duration::from_secs(5);
const SLOW: Duration = Duration::from_secs(10);

/// Maximum size in bytes of the reason for parking a command.
const REASON: usize = 1_000;

/// First and longest wait between two attempts.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// The dispatcher, the lease and the permits that all executions of a term share.
pub(super) struct Executor {
    commands: Weak<Dispatcher>,
    term: CurrentTerm,
    permits: Arc<Semaphore>,
    targets: Mutex<HashMap<String, Arc<TargetPermits>>>,
    /// Number of executions that wait for a permit.
    waiting: AtomicUsize,
    postponed: Mutex<LogLimit>,
}

/// The permits of a category or handler.
struct TargetPermits {
    permits: Arc<Semaphore>,
    /// Until this time, a command without a free permit waits in the store.
    slow_until: Mutex<Option<Instant>>,
}

/// Counts an execution that waits for a permit.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl TargetPermits {
    fn slow_until(&self) -> MutexGuard<'_, Option<Instant>> {
        self.slow_until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_slow(&self) -> bool {
        self.slow_until().is_some_and(|until| Instant::now() < until)
    }
}

impl Executor {
    pub(super) fn new(commands: Weak<Dispatcher>, term: CurrentTerm) -> Self {
        Self {
            commands,
            term,
            permits: Arc::new(Semaphore::new(IN_FLIGHT)),
            targets: Mutex::default(),
            waiting: AtomicUsize::new(0),
            postponed: Mutex::new(LogLimit::each_minute()),
        }
    }

    /// Returns the number of executions that wait for a permit.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    fn target(&self, name: &str) -> Arc<TargetPermits> {
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = targets.get(name) {
            return target.clone();
        }
        let permits = Arc::new(Semaphore::new(IN_FLIGHT_TO_TARGET));
        let target = Arc::new(TargetPermits { permits, slow_until: Mutex::default() });
        targets.insert(name.to_owned(), target.clone());
        target
    }

    /// Executes a command.
    ///
    /// `alone_at`: when no earlier attempt can take effect any more. `stop`: set if the node stops.
    /// `None`: the next search, or the next lease holder, sends the command again.
    pub(super) async fn execute(
        &self,
        started: &ScheduledCommand,
        alone_at: Instant,
        mut stop: watch::Receiver<bool>,
    ) -> Option<ScheduledOutcome> {
        let mut attempts = Attempts::new(alone_at);
        let decoded = StoredCommand::decode(&started.body).and_then(|it| it.command(started.id));
        let target = decoded.as_ref().ok().map(|command| self.target(&command.name));
        loop {
            let step = match (&decoded, &target) {
                _ if attempts.are_enough => attempts.end_or_wait(),
                (Ok(command), Some(target)) => {
                    let permits = tokio::select! {
                        biased;
                        // An error means that the node has ended.
                        _ = stop.wait_for(|stop| *stop) => return None,
                        permits = self.permits(target, attempts.alone_at) => permits,
                    };
                    match permits {
                        Some(permits) => self.attempt(command, &mut attempts, permits).await,
                        None => attempts.postpone("too many commands in flight to this target".to_owned()),
                    }
                }
                (Err(Unreadable::Newer(reason)), _) => attempts.postpone(reason.clone()),
                (Err(Unreadable::Invalid(reason)), _) => attempts.park(reason.clone()),
                // A command has a target.
                (Ok(_), None) => Step::Leave,
            };
            match step {
                Step::Leave => return None,
                Step::End(outcome) => {
                    self.mention(started, &outcome, &attempts);
                    return Some(outcome);
                }
                Step::Wait(wait) => tokio::select! {
                    _ = stop.wait_for(|stop| *stop) => return None,
                    () = sleep(wait) => {}
                },
            }
        }
    }

    /// Waits for a permit of the target and one of all. `None` if the target is slow.
    ///
    /// A command that may still take effect waits on: it must not be cancelled as one that waits in
    /// the store.
    async fn permits(&self, target: &TargetPermits, alone_at: Instant) -> Option<[OwnedSemaphorePermit; 2]> {
        let is_alone = || alone_at <= Instant::now();
        if let Ok(own) = target.permits.clone().try_acquire_owned() {
            return Some([own, self.shared_permit().await?]);
        }
        if target.is_slow() && is_alone() {
            return None;
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.waiting);
        loop {
            // A command that waits for its target holds no permit that others need.
            match timeout(PATIENCE, target.permits.clone().acquire_owned()).await {
                Ok(own) => return Some([own.ok()?, self.shared_permit().await?]),
                Err(_) => {
                    *target.slow_until() = Some(Instant::now() + SLOW);
                    if is_alone() {
                        return None;
                    }
                }
            }
        }
    }

    async fn shared_permit(&self) -> Option<OwnedSemaphorePermit> {
        // The semaphore is never closed.
        self.permits.clone().acquire_owned().await.ok()
    }

    /// Sends the command once.
    async fn attempt(
        &self,
        command: &ErasedCommand,
        attempts: &mut Attempts,
        _permits: [OwnedSemaphorePermit; 2],
    ) -> Step {
        let Some(commands) = self.commands.upgrade() else { return Step::Leave };
        // A stale lease holder sends nothing, so that the next one knows when its attempts have
        // ended.
        let term = self.term.held_since();
        if term.is_none() {
            return Step::Leave;
        }
        let sent_at = Instant::now();
        let answer = commands.execute_erased(command.clone()).await;
        // The next lease holder may have sent the command meanwhile.
        if self.term.held_since() != term && !matches!(answer, ErasedAnswer::Done { .. }) {
            return Step::Leave;
        }
        attempts.judge(command.kind, answer, sent_at)
    }

    /// Writes a line about a command that did not take effect.
    fn mention(&self, command: &ScheduledCommand, outcome: &ScheduledOutcome, attempts: &Attempts) {
        let ScheduledCommand { id, target, .. } = command;
        match outcome {
            ScheduledOutcome::Executed => {}
            ScheduledOutcome::Parked(reason) => {
                tracing::error!(command = %id, to = target, reason, "parked a scheduled command");
            }
            ScheduledOutcome::Postponed(wait) => {
                let mut limit = self.postponed.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(count) = limit.add(1) {
                    let reason = &attempts.reason;
                    tracing::warn!(command = %id, to = target, reason, ?wait, count, "postponed a scheduled command");
                }
            }
        }
    }
}

/// What follows an attempt.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// The execution has ended.
    End(ScheduledOutcome),
    /// The next attempt comes after this time.
    Wait(Duration),
    /// Another execution sends the command again.
    Leave,
}

/// The attempts at a command.
struct Attempts {
    /// Time from which an attempt is the only one, so that a rejection is final.
    alone_at: Instant,
    /// Number of attempts that failed permanently.
    failures: u32,
    /// Number of attempts that failed otherwise.
    retries: u32,
    /// Whether the command waits in the store as soon as no attempt can take effect any more.
    are_enough: bool,
    /// Last failure.
    reason: String,
    backoff: Backoff,
}

impl Attempts {
    fn new(alone_at: Instant) -> Self {
        let backoff = Backoff::new(FIRST_BACKOFF, MAX_BACKOFF);
        Self { alone_at, failures: 0, retries: 0, are_enough: false, reason: String::new(), backoff }
    }

    /// Waits until no attempt can take effect any more. `None` if that is so.
    fn until_alone(&self, sent_at: Instant) -> Option<Step> {
        (sent_at < self.alone_at).then(|| Step::Wait(self.alone_at.saturating_duration_since(Instant::now())))
    }

    /// Postpones a command that has no effect for now.
    fn postpone(&mut self, reason: String) -> Step {
        (self.reason, self.are_enough) = (cut(reason), true);
        self.end_or_wait()
    }

    fn end_or_wait(&self) -> Step {
        // Spread out, so that the commands of a slow target find permits as they become free.
        self.until_alone(Instant::now())
            .unwrap_or_else(|| Step::End(ScheduledOutcome::Postponed(jitter(POSTPONED, 0.8))))
    }

    fn park(&self, reason: String) -> Step {
        let reason = cut(reason);
        self.until_alone(Instant::now()).unwrap_or(Step::End(ScheduledOutcome::Parked(reason)))
    }

    /// Decides what follows an answer.
    fn judge(&mut self, kind: Kind, answer: ErasedAnswer, sent_at: Instant) -> Step {
        match answer {
            ErasedAnswer::Done { .. } => Step::End(ScheduledOutcome::Executed),
            // A handler records its rejections. An aggregate does not: an earlier attempt may still
            // take effect (I12).
            ErasedAnswer::Rejected { message, .. } => match self.until_alone(sent_at) {
                Some(wait) if kind == Kind::Aggregate => wait,
                _ => Step::End(ScheduledOutcome::Parked(cut(message))),
            },
            ErasedAnswer::Transient { reason, uncertain } => {
                if uncertain {
                    self.alone_at = self.alone_at.max(Instant::now() + ATTEMPT_LIFETIME);
                }
                self.retry(reason)
            }
            // Another node may handle it later.
            ErasedAnswer::Unhandled { reason } => self.retry(reason),
            ErasedAnswer::Failed { reason } => match self.until_alone(sent_at) {
                Some(wait) => wait,
                None => {
                    self.failures += 1;
                    if self.failures >= ATTEMPTS {
                        self.park(reason)
                    } else {
                        Step::Wait(self.backoff.next())
                    }
                }
            },
        }
    }

    fn retry(&mut self, reason: String) -> Step {
        self.retries += 1;
        if self.retries < RETRIES { Step::Wait(self.backoff.next()) } else { self.postpone(reason) }
    }
}

fn cut(mut reason: String) -> String {
    reason.truncate(reason.floor_char_boundary(REASON));
    reason
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn rejected() -> ErasedAnswer {
        ErasedAnswer::Rejected { message: "sold out".into(), details: Vec::new() }
    }

    fn unknown() -> ErasedAnswer {
        ErasedAnswer::Transient { reason: "no answer".into(), uncertain: true }
    }

    fn failed() -> ErasedAnswer {
        ErasedAnswer::Failed { reason: "panicked".into() }
    }

    fn parked(reason: &str) -> Step {
        Step::End(ScheduledOutcome::Parked(reason.into()))
    }

    fn is_postponed(step: &Step) -> bool {
        matches!(step, Step::End(ScheduledOutcome::Postponed(wait)) if *wait >= POSTPONED / 5 && *wait <= POSTPONED * 2)
    }

    #[tokio::test(start_paused = true)]
    async fn a_rejection_counts_when_no_other_attempt_is_alive() {
        let now = Instant::now();
        assert_eq!(Attempts::new(now).judge(Kind::Aggregate, rejected(), now), parked("sold out"));
        let mut taken_over = Attempts::new(now + ATTEMPT_LIFETIME);
        assert_eq!(taken_over.judge(Kind::Aggregate, rejected(), now), Step::Wait(ATTEMPT_LIFETIME));
        assert_eq!(taken_over.judge(Kind::Handler, rejected(), now), parked("sold out"));
        let mut unanswered = Attempts::new(now);
        assert!(matches!(unanswered.judge(Kind::Aggregate, unknown(), now), Step::Wait(_)));
        assert_eq!(unanswered.judge(Kind::Aggregate, rejected(), now), Step::Wait(ATTEMPT_LIFETIME));
        advance(ATTEMPT_LIFETIME).await;
        assert_eq!(unanswered.judge(Kind::Aggregate, rejected(), Instant::now()), parked("sold out"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_counts_when_no_other_attempt_is_alive() {
        let mut attempts = Attempts::new(Instant::now() + ATTEMPT_LIFETIME);
        assert_eq!(attempts.judge(Kind::Aggregate, failed(), Instant::now()), Step::Wait(ATTEMPT_LIFETIME));
        advance(ATTEMPT_LIFETIME).await;
        for _ in 1..ATTEMPTS {
            assert!(matches!(attempts.judge(Kind::Aggregate, failed(), Instant::now()), Step::Wait(_)));
        }
        assert_eq!(attempts.judge(Kind::Aggregate, failed(), Instant::now()), parked("panicked"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_command_without_an_effect_is_postponed() {
        let unavailable = || ErasedAnswer::Transient { reason: "restarting".into(), uncertain: false };
        let unhandled = || ErasedAnswer::Unhandled { reason: "no node".into() };
        for answer in [unavailable, unhandled as fn() -> _] {
            let mut attempts = Attempts::new(Instant::now());
            for _ in 1..RETRIES {
                assert!(matches!(attempts.judge(Kind::Aggregate, answer(), Instant::now()), Step::Wait(_)));
            }
            assert!(is_postponed(&attempts.judge(Kind::Aggregate, answer(), Instant::now())));
        }
        // An attempt without a known outcome may still take effect.
        let mut attempts = Attempts::new(Instant::now());
        for _ in 1..RETRIES {
            assert!(matches!(attempts.judge(Kind::Handler, unknown(), Instant::now()), Step::Wait(_)));
        }
        assert_eq!(attempts.judge(Kind::Handler, unknown(), Instant::now()), Step::Wait(ATTEMPT_LIFETIME));
        advance(ATTEMPT_LIFETIME).await;
        assert!(attempts.are_enough && is_postponed(&attempts.end_or_wait()));
    }
}
