//! The driver of an instance: delivers inputs, sends commands, and delivers their answers.
//!
//! An instance with work has one driver task on its node. It ends when nothing is left to do, so an
//! instance that waits for an event or a timer takes no memory. Drivers of two nodes do no harm: the
//! ids of commands are the same, and the stream of the instance decides which answer counts.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::{Notify, OwnedSemaphorePermit, oneshot};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::Process;
use super::attempt::{Attempt, TargetKey, target_of};
use super::command::{CommandKind, InstanceCommand, Settlement};
use super::drivers::{Drivers, PATIENCE};
use super::event::{Effect, Trail, Trigger};
use super::history::find_input;
use super::reaction::{Consumed, Reaction};
use super::resumption::resumption;
use super::routes::RouteKind;
use super::work::{Work, WorkError, WorkKind};
use crate::command::{ATTEMPT_LIFETIME, ErasedAnswer};
use crate::event::{Metadata, RecordedEvent, StreamId, Version};
use crate::future::BoxFuture;
use crate::outage::is_outage;
use crate::store::ExpectedVersion;

/// Number of attempts at a command that fails without having an effect.
const ATTEMPTS: u32 = 3;

/// Maximum number of commands in flight for one instance, so that it does not hold up the others.
const SENDING: usize = 16;

/// A guard that forgets a driver that ends early, with its queue.
struct ForgetOnDrop<'a, P: Process> {
    drivers: &'a Drivers<P>,
    instance: &'a str,
    retired: bool,
}

impl<P: Process> Drop for ForgetOnDrop<'_, P> {
    fn drop(&mut self) {
        if !self.retired {
            self.drivers.active().remove(self.instance);
        }
    }
}

/// The driver task of an instance.
pub(super) async fn drive<P: Process>(
    drivers: Arc<Drivers<P>>,
    instance: String,
    wake: Arc<Notify>,
    _slot: Option<OwnedSemaphorePermit>,
) {
    let mut stop = drivers.stop.clone();
    let mut guard = ForgetOnDrop { drivers: &drivers, instance: &instance, retired: false };
    let mut driver = Driver::new(&drivers, &instance);
    let driving = async {
        loop {
            if let Some(work) = drivers.next_work(&instance) {
                driver.work(work).await;
            } else if let Some(Some((attempt, answer))) = driver.sending.next().now_or_never() {
                driver.answered(attempt, answer).await;
            } else if driver.more {
                driver.advance().await;
            } else if driver.is_idle() {
                driver.finish();
                if drivers.retire(&instance) {
                    guard.retired = true;
                    return;
                }
            } else {
                tokio::select! {
                    Some((attempt, answer)) = driver.sending.next() => driver.answered(attempt, answer).await,
                    () = wake.notified() => {}
                }
            }
        }
    };
    tokio::select! {
        () = driving => {}
        // An error means that the node has ended.
        _ = stop.wait_for(|stop| *stop) => {}
    }
}

/// The state of a driver task.
struct Driver<'a, P: Process> {
    drivers: &'a Arc<Drivers<P>>,
    instance: &'a str,
    sending: FuturesUnordered<BoxFuture<'a, (Attempt, ErasedAnswer)>>,
    /// Commands that wait: their target is busy with an earlier one, or too many are in flight.
    waiting: VecDeque<Attempt>,
    /// Targets of the commands that are being sent.
    busy: HashSet<TargetKey>,
    /// Ids of the commands that are being sent or wait.
    known: HashSet<Uuid>,
    /// Whether the instance has open commands that this driver may not know.
    resend: bool,
    /// Whether the instance must advance.
    more: bool,
    /// Whether a timer has fired whose row is deleted when the driver has finished.
    fires: bool,
    /// Latest version of the instance.
    version: Version,
    /// Work that ends with the driver.
    unfinished: Vec<oneshot::Sender<()>>,
}

impl<'a, P: Process> Driver<'a, P> {
    fn new(drivers: &'a Arc<Drivers<P>>, instance: &'a str) -> Self {
        Self {
            drivers,
            instance,
            sending: FuturesUnordered::new(),
            waiting: VecDeque::new(),
            busy: HashSet::new(),
            known: HashSet::new(),
            resend: true,
            more: false,
            fires: false,
            version: Version::NONE,
            unfinished: Vec::new(),
        }
    }

    fn is_idle(&self) -> bool {
        self.sending.is_empty() && self.waiting.is_empty()
    }

    /// Reports all work as finished.
    fn finish(&mut self) {
        self.fires = false;
        for finished in self.unfinished.drain(..) {
            // A failed send means that the batch has stopped waiting.
            let _ = finished.send(());
        }
    }

    /// Leaves everything to the resumption.
    fn give_up(&mut self, reason: &str) {
        let (process, instance) = (P::NAME, self.instance);
        tracing::debug!(process, instance, reason, "leaving an instance to its resumption");
        self.forget_commands();
        (self.more, self.fires) = (false, false);
        self.unfinished.clear();
    }

    /// Stops sending. The instance still has the commands.
    fn forget_commands(&mut self) {
        self.sending.clear();
        self.waiting.clear();
        self.busy.clear();
        self.known.clear();
        self.resend = true;
    }

    async fn execute(
        &mut self,
        kind: CommandKind,
        metadata: Metadata,
        expected: ExpectedVersion,
    ) -> Result<Reaction, WorkError> {
        let command = InstanceCommand { kind, resend: self.resend, limits: self.drivers.limits };
        let receipt = self.drivers.execute(self.instance, command, metadata, expected).await?;
        let known = self.version;
        self.version = receipt.version;
        // Events of another owner or of an operator: they may have left something to do.
        let foreign = known.plus(receipt.events) != receipt.version;
        self.resend = foreign && known > Version::NONE;
        self.more |= self.resend;
        Ok(receipt.reply)
    }

    async fn work(&mut self, work: Work) {
        let Work { kind, recorded, finished } = work;
        let any = ExpectedVersion::Any;
        let (results, reactions) = match kind {
            WorkKind::Deliver { events, late } => self.deliver(events, late).await,
            WorkKind::Fire { timer, version } => {
                self.fires = true;
                let reaction = self.execute(CommandKind::Fire { timer, version }, Metadata::default(), any);
                one(reaction.await)
            }
            WorkKind::Resume => {
                self.resend = true;
                one(self.execute(CommandKind::Advance, Metadata::default(), any).await)
            }
        };
        let results = results.into_iter().map(|result| result.map(|()| self.version)).collect();
        // A failed send means that the batch has stopped waiting.
        let _ = recorded.send(results);
        self.unfinished.push(finished);
        for reaction in reactions {
            // In their order: a later command must not overtake an earlier one.
            if !self.carry_out(reaction).await {
                return;
            }
        }
    }

    /// Delivers events in their order.
    async fn deliver(
        &mut self,
        events: Vec<(RecordedEvent, RouteKind)>,
        late: bool,
    ) -> (Vec<Result<(), WorkError>>, Vec<Reaction>) {
        let (mut results, mut reactions) = (Vec::with_capacity(events.len()), Vec::new());
        for (event, route) in events {
            // I12: the event after a failed one would hide that the failed one is not consumed.
            if let Some(Err(WorkError::Transient(reason))) = results.last() {
                results.push(Err(WorkError::Transient(reason.clone())));
                continue;
            }
            results.push(match self.deliver_one(&event, route, late).await {
                Ok(reaction) => {
                    reactions.push(reaction);
                    Ok(())
                }
                Err(error) => Err(error),
            });
        }
        (results, reactions)
    }

    /// Delivers an event.
    async fn deliver_one(
        &mut self,
        event: &RecordedEvent,
        route: RouteKind,
        late: bool,
    ) -> Result<Reaction, WorkError> {
        let mut expected = ExpectedVersion::Any;
        if late {
            // I12: a position does not show whether a late event was consumed.
            let stream = StreamId::new(P::NAME, self.instance);
            let stream = stream.map_err(|error| WorkError::Permanent(error.to_string()))?;
            let found = find_input(&*self.drivers.store, &stream, event.id).await;
            let (version, found) = found.map_err(|error| match is_outage(&error) {
                true => WorkError::Transient(error.to_string()),
                false => WorkError::Permanent(error.to_string()),
            })?;
            if found {
                // Its driver may have ended before it carried out the reaction.
                self.resend = true;
                return self.execute(CommandKind::Advance, Metadata::default(), ExpectedVersion::Any).await;
            }
            expected = ExpectedVersion::Exact(version);
        }
        let metadata = event.decode_metadata().map_err(|error| WorkError::Permanent(error.to_string()))?;
        let trail = Trail::of(metadata, event.command_id);
        let metadata = trail.own_metadata(event.id);
        let trigger = Box::new(Trigger::of(event));
        let deliver = CommandKind::Deliver { id: event.id, trigger, route, trail, late };
        self.execute(deliver, metadata, expected).await
    }

    async fn advance(&mut self) {
        self.more = false;
        let advanced = self.execute(CommandKind::Advance, Metadata::default(), ExpectedVersion::Any).await;
        match advanced {
            Ok(reaction) => _ = self.carry_out(reaction).await,
            Err(error) => self.failed(&error),
        }
    }

    /// Stores timers and sends commands. Returns `false` if it gave up.
    async fn carry_out(&mut self, reaction: Reaction) -> bool {
        let Reaction { consumed, parked: _, effects, resent, cancels, mut put, mut remove, more } = reaction;
        if cancels {
            self.forget_commands();
            self.resend = false;
        }
        if consumed == Consumed::Parked {
            for waiting in self.waiting.drain(..) {
                self.known.remove(&waiting.effect.id);
                self.resend = true;
            }
        }
        if !put.is_empty() || !remove.is_empty() {
            put.iter_mut().for_each(|timer| self.instance.clone_into(&mut timer.instance));
            remove.iter_mut().for_each(|timer| self.instance.clone_into(&mut timer.instance));
            if self.fires {
                // The reaction may replace the row that would resume it.
                put.push(resumption(self.instance.to_owned(), self.version, self.drivers.resume_after));
            }
            if let Err(error) = self.drivers.timers.write(put, remove).await {
                self.give_up(&error.to_string());
                return false;
            }
        }
        let (now, term) = (Instant::now(), self.drivers.term.held_since());
        // An earlier owner may have sent the commands of earlier reactions just before its end.
        let since = term.unwrap_or(now) + ATTEMPT_LIFETIME;
        for (index, effect) in effects.into_iter().enumerate() {
            if self.known.insert(effect.id) {
                let of_owner = if index < resent { since } else { now };
                let alone_at =
                    self.drivers.unresolved.end(effect.id).map_or(of_owner, |end| end.max(of_owner));
                self.waiting.push_back(Attempt::new(effect, term, alone_at));
            }
        }
        self.more |= more;
        self.send_waiting();
        true
    }

    fn failed(&mut self, error: &WorkError) {
        match error {
            WorkError::Transient(reason) => self.give_up(reason),
            WorkError::Permanent(reason) => {
                let (process, instance) = (P::NAME, self.instance);
                tracing::error!(process, instance, reason, "could not continue an instance; retrying later");
                self.give_up(reason);
            }
        }
    }

    /// Sends the waiting commands whose targets are free.
    fn send_waiting(&mut self) {
        for _ in 0..self.waiting.len() {
            if self.sending.len() >= SENDING {
                return;
            }
            let Some(mut attempt) = self.waiting.pop_front() else { return };
            if self.busy.insert(target_of(&attempt.effect)) {
                attempt.since = Instant::now();
                self.attempt(attempt, Duration::ZERO);
            } else {
                self.waiting.push_back(attempt);
            }
        }
    }

    fn attempt(&mut self, mut attempt: Attempt, wait: Duration) {
        let drivers = self.drivers;
        self.sending.push(Box::pin(async move {
            if !wait.is_zero() {
                sleep(wait).await;
            }
            attempt.started = Instant::now();
            let answer = drivers.send(&attempt.effect).await;
            (attempt, answer)
        }));
    }

    async fn answered(&mut self, mut attempt: Attempt, answer: ErasedAnswer) {
        let settlement = match answer {
            ErasedAnswer::Done { reply } => Settlement::Done { reply },
            // Another owner may have sent the command since.
            ErasedAnswer::Rejected { .. } if attempt.may_be_stale(self.drivers.term.held_since()) => {
                return self.give_up("the lease was lost while a command was in flight");
            }
            ErasedAnswer::Rejected { .. } if attempt.may_have_rival() => {
                attempt.since = attempt.alone_at;
                let wait = attempt.alone_at.saturating_duration_since(Instant::now());
                return self.attempt(attempt, wait);
            }
            ErasedAnswer::Rejected { message, details } => Settlement::Rejected { message, details },
            ErasedAnswer::Transient { reason, uncertain } => {
                if uncertain {
                    attempt.alone_at = Instant::now() + ATTEMPT_LIFETIME;
                }
                if attempt.since.elapsed() >= PATIENCE {
                    return self.give_up(&reason);
                }
                let wait = attempt.backoff.next();
                return self.attempt(attempt, wait);
            }
            ErasedAnswer::Failed { reason } | ErasedAnswer::Unhandled { reason } => {
                attempt.failures += 1;
                if attempt.failures < ATTEMPTS {
                    let wait = attempt.backoff.next();
                    return self.attempt(attempt, wait);
                }
                return self.park(attempt.effect, &reason).await;
            }
        };
        let effect = attempt.effect;
        let settle = CommandKind::Settle { effect: effect.id, answer: settlement };
        let metadata = effect.trail.own_metadata(effect.id);
        match self.execute(settle, metadata, ExpectedVersion::Any).await {
            Ok(reaction) => {
                self.busy.remove(&target_of(&effect));
                self.known.remove(&effect.id);
                self.drivers.unresolved.remove(effect.id);
                self.carry_out(reaction).await;
            }
            Err(WorkError::Permanent(reason)) => {
                self.park(effect, &format!("recording the answer failed: {reason}")).await;
            }
            Err(error) => self.failed(&error),
        }
    }

    /// Parks the instance because a command failed permanently.
    async fn park(&mut self, effect: Effect, reason: &str) {
        let key = effect.key.as_str();
        self.busy.remove(&target_of(&effect));
        self.known.remove(&effect.id);
        let reason = format!("the command {key:?} to {:?} failed: {reason}", effect.command.name);
        let park = CommandKind::Park { effect: effect.id, reason };
        match self.execute(park, effect.trail.own_metadata(effect.id), ExpectedVersion::Any).await {
            Ok(reaction) => {
                self.resend = true;
                self.carry_out(reaction).await;
            }
            Err(error) => self.failed(&error),
        }
    }
}

/// Returns the result and the reaction of one command.
fn one(reaction: Result<Reaction, WorkError>) -> (Vec<Result<(), WorkError>>, Vec<Reaction>) {
    match reaction {
        Ok(reaction) => (vec![Ok(())], vec![reaction]),
        Err(error) => (vec![Err(error)], Vec::new()),
    }
}
