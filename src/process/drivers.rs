//! The drivers of a process on a node: what they share, and which instances have one.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{Instant, timeout};

use super::Process;
use super::command::InstanceCommand;
use super::counters::Counters;
use super::event::Effect;
use super::instance::Instance;
use super::options::Limits;
use super::reaction::{Consumed, Reaction};
use super::timer_writer::TimerWriter;
use super::unresolved::UnresolvedAttempts;
use super::work::{Work, WorkError};
use crate::aggregate::{ExecuteError, NotExecutedKind, Receipt};
use crate::command::{Dispatcher, ErasedAnswer, ErasedCommand, Expected, LocalAggregates};
use crate::event::Metadata;
use crate::lease::CurrentTerm;
use crate::outage::is_outage;
use crate::store::{EventStore, ExpectedVersion};

/// Time that a driver retries a command with transient errors. Afterwards it leaves the command to
/// the resumption.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);

/// Maximum number of instances with a driver. At the limit, the follower and the timers wait.
pub(super) const MOST_ACTIVE: usize = 4_096;

/// Time limit of a command to an instance.
const INSTANCE_TIMEOUT: Duration = Duration::from_secs(10);

/// The drivers of a process on this node.
pub(super) struct Drivers<P: Process> {
    pub(super) store: Arc<dyn EventStore>,
    pub(super) instances: LocalAggregates<Instance<P>>,
    pub(super) commands: Weak<Dispatcher>,
    pub(super) timers: TimerWriter,
    pub(super) limits: Limits,
    /// Wait of the timers that resume instances.
    pub(super) resume_after: Duration,
    /// Term of the lease, while this node is the lease holder.
    pub(super) term: CurrentTerm,
    pub(super) unresolved: UnresolvedAttempts,
    /// Permits for commands in flight.
    pub(super) permits: Semaphore,
    /// Permits for instances with a driver.
    pub(super) slots: Arc<Semaphore>,
    /// Instances with a driver, by id.
    pub(super) active: Mutex<HashMap<String, Active>>,
    /// Set when the drivers must end.
    pub(super) stop: watch::Receiver<bool>,
    pub(super) counters: Counters,
}

/// An instance with a driver.
pub(super) struct Active {
    pub(super) queue: VecDeque<Work>,
    pub(super) wake: Arc<Notify>,
}

impl<P: Process> Drivers<P> {
    pub(super) fn active(&self) -> MutexGuard<'_, HashMap<String, Active>> {
        // Every change of the map is complete even after a panic.
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_active(&self, instance: &str) -> bool {
        self.active().contains_key(instance)
    }

    pub(super) fn active_count(&self) -> usize {
        self.active().len()
    }

    pub(super) fn next_work(&self, instance: &str) -> Option<Work> {
        self.active().get_mut(instance)?.queue.pop_front()
    }

    /// Removes an instance without work. Returns whether it has none.
    pub(super) fn retire(&self, instance: &str) -> bool {
        let mut active = self.active();
        let idle = active.get(instance).is_none_or(|active| active.queue.is_empty());
        if idle {
            active.remove(instance);
        }
        idle
    }

    pub(super) async fn execute(
        &self,
        instance: &str,
        command: InstanceCommand,
        metadata: Metadata,
        expected: ExpectedVersion,
    ) -> Result<Receipt<Reaction>, WorkError> {
        let deadline = Instant::now() + INSTANCE_TIMEOUT;
        match self.instances.execute(instance, command, metadata, expected, deadline).await {
            Ok(receipt) => {
                self.counters.count(receipt.reply.consumed);
                if let Some(reason) = &receipt.reply.parked {
                    tracing::error!(process = P::NAME, instance, reason, "parked an instance");
                }
                match receipt.reply.consumed {
                    Consumed::Full => {
                        Err(WorkError::Permanent("the parked instance holds too many inputs".into()))
                    }
                    _ => Ok(receipt),
                }
            }
            // Another node or an operator was faster than a late delivery.
            Err(error @ ExecuteError::NotExecuted { kind: NotExecutedKind::ExpectedVersion { .. }, .. }) => {
                Err(WorkError::Transient(error.to_string()))
            }
            Err(error) if is_outage(&error) => Err(WorkError::Transient(error.to_string())),
            Err(error) => Err(WorkError::Permanent(error.to_string())),
        }
    }

    /// Sends a command, and returns its answer.
    pub(super) async fn send(&self, effect: &Effect) -> ErasedAnswer {
        let Ok(Ok(_permit)) = timeout(PATIENCE, self.permits.acquire()).await else {
            return not_sent("too many commands in flight");
        };
        let Some(commands) = self.commands.upgrade() else {
            return not_sent("the node is shutting down");
        };
        // I12: a stale owner sends nothing, so that the next one knows when its attempts have ended.
        if self.term.held_since().is_none() {
            return not_sent("another node may own the process");
        }
        let command = effect.command.clone();
        let command = ErasedCommand {
            id: effect.id,
            kind: command.kind,
            name: command.name,
            key: command.target,
            payload: command.payload,
            metadata: effect.trail.command_metadata(effect.cause),
            expected: Expected::Any,
        };
        let attempt = self.unresolved.begin(effect.id);
        let answer = commands.execute_erased(command).await;
        if !matches!(answer, ErasedAnswer::Transient { uncertain: true, .. }) {
            attempt.end();
        }
        answer
    }
}

fn not_sent(reason: &str) -> ErasedAnswer {
    ErasedAnswer::Transient { reason: reason.into(), uncertain: false }
}
