//! The term of a scheduler: starts what is due while this node holds the lease.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use super::super::definition::Definition;
use super::super::executor::Executor;
use super::super::recurrence::Overlap;
use super::super::status::SchedulerState;
use super::super::ticks::tick;
use super::shared::Shared;
use crate::backoff::Backoff;
use crate::command::ATTEMPT_LIFETIME;
use crate::lease::{CurrentTerm, HeldLease};
use crate::panic::panic_text;
use crate::rate_limit::LogLimit;
use crate::store::{
    EventStore, Lease, ScheduledCommand, ScheduledEnd, ScheduledOutcome, ScheduledQuery, ScheduledState,
    StoreError, StoredSchedule,
};
use crate::supervised::Inbox;

/// Longest interval between two reads of what is due: another node may have scheduled something.
const POLL: Duration = Duration::from_millis(500);

/// Interval between two searches for commands that are started and not in memory.
///
/// A call of an earlier lease holder, or one without an answer, may have started them later.
const SEARCH: Duration = Duration::from_secs(15);

/// Longest time for ticks before due commands are started.
const TICKING: Duration = Duration::from_millis(200);

/// Time in which ends gather for one transaction.
const GATHERING: Duration = Duration::from_millis(20);

/// Maximum number of commands that a call starts or reads, and of schedules.
const PAGE: usize = 1_000;
const SCHEDULES: usize = 1_000;

/// Maximum number of started commands in memory, and of the bytes of their bodies.
const HELD: usize = 4_096;
const HELD_BYTES: usize = 64 << 20;

/// The term of a scheduler.
pub(super) struct SchedulerTerm<'a> {
    shared: &'a Shared,
    /// Fences the ends.
    lease: Lease,
    executor: Arc<Executor>,
    term: CurrentTerm,
    running: JoinSet<(Uuid, Option<ScheduledOutcome>)>,
    /// Sizes of the started commands in memory, by id, until their ends are stored.
    held: HashMap<Uuid, usize>,
    held_bytes: usize,
    /// Ends that are still to be stored.
    ends: Vec<ScheduledEnd>,
    /// Until this time, ends wait for more of them.
    ends_at: Instant,
    /// Where the search for started commands continues; `None` after its end.
    search: Option<Search>,
    /// Time of the next search.
    search_at: Instant,
    /// Times of the next reads of due commands and of due schedules.
    commands_at: Instant,
    schedules_at: Instant,
    stop: watch::Sender<bool>,
    broken: LogLimit,
}

/// The search for commands that an earlier lease holder, or a failed call, has started.
#[derive(Default)]
struct Search {
    after: Option<ScheduledCommand>,
}

impl<'a> SchedulerTerm<'a> {
    pub(super) fn new(shared: &'a Shared, held: &HeldLease) -> Self {
        let (now, term) = (Instant::now(), CurrentTerm::default());
        term.set(held.term());
        Self {
            shared,
            lease: held.lease().clone(),
            executor: Arc::new(Executor::new(shared.services.commands.clone(), term.clone())),
            term,
            running: JoinSet::new(),
            held: HashMap::new(),
            held_bytes: 0,
            ends: Vec::new(),
            ends_at: now,
            search: None,
            search_at: now,
            commands_at: now,
            schedules_at: now,
            stop: watch::Sender::new(false),
            broken: LogLimit::each_minute(),
        }
    }

    /// Starts what is due, until the lease is lost or the node stops.
    ///
    /// After a loss, the next lease holder sends the commands in flight again.
    pub(super) async fn run(mut self, lease: &mut HeldLease, inbox: &mut Inbox<()>) {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
        loop {
            let step = tokio::select! {
                step = self.step() => step,
                // The next lease holder finds the commands that a dropped call has started.
                () = inbox.stopping() => return self.finish().await,
            };
            let failed = step.is_err();
            let wait_until = match step {
                Ok(()) => {
                    backoff.succeeded();
                    self.shared.set(SchedulerState::Running);
                    let next = self.commands_at.min(self.schedules_at).min(self.search_at);
                    if self.ends.is_empty() { next } else { next.min(self.ends_at) }
                }
                Err(error) => {
                    let wait = backoff.next();
                    tracing::warn!(%error, ?wait, "retrying the scheduler");
                    self.shared.failed(error.to_string());
                    Instant::now() + wait
                }
            };
            let commands = self.shared.services.commands.upgrade();
            let scheduled = async {
                match &commands {
                    Some(commands) => commands.scheduled.notified().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = lease.lost() => break,
                () = inbox.stopping() => return self.finish().await,
                Some(ended) = self.running.join_next(), if !failed => self.ended(ended),
                () = scheduled, if !failed => (self.commands_at, self.schedules_at) = (Instant::now(), Instant::now()),
                () = sleep_until(wait_until) => {}
            }
            while let Some(ended) = self.running.try_join_next() {
                self.ended(ended);
            }
        }
        self.shared.status.send_modify(|status| status.started = 0);
    }

    async fn step(&mut self) -> Result<(), StoreError> {
        // Compares clocks of this process only, so it is right also after a pause.
        if self.term.held_since().is_none() {
            let later = Instant::now() + POLL;
            (self.commands_at, self.schedules_at, self.search_at) = (later, later, later);
            self.discard_uncertain_ends();
        }
        self.end_and_start().await?;
        if self.term.held_since().is_none() {
            return Ok(());
        }
        self.search().await?;
        self.tick().await?;
        self.shared.status.send_if_modified(|status| {
            let changed = status.started != self.held.len();
            status.started = self.held.len();
            changed
        });
        Ok(())
    }

    /// Records the end of an execution.
    fn ended(&mut self, ended: Result<(Uuid, Option<ScheduledOutcome>), JoinError>) {
        let (id, outcome) = match ended {
            Ok((id, Some(outcome))) => (id, outcome),
            // The search finds it by its state, in this term or in the next one.
            Ok((id, None)) => return self.forget(id),
            // Executions catch panics, and only the end of the term aborts them.
            Err(error) => return tracing::error!(%error, "losing the end of a scheduled command"),
        };
        self.shared.status.send_modify(|status| match &outcome {
            ScheduledOutcome::Executed => status.executed += 1,
            ScheduledOutcome::Parked(_) => status.parked += 1,
            ScheduledOutcome::Postponed(_) => status.postponed += 1,
        });
        self.ends.push(ScheduledEnd { id, outcome });
    }

    /// Keeps the ends that no later lease holder can contradict: commands that took effect.
    fn discard_uncertain_ends(&mut self) {
        for end in std::mem::take(&mut self.ends) {
            match end.outcome {
                ScheduledOutcome::Executed => self.ends.push(end),
                _ => self.forget(end.id),
            }
        }
    }

    /// Stores ends while due commands are started: neither waits for the commit of the other.
    async fn end_and_start(&mut self) -> Result<(), StoreError> {
        let store = self.shared.services.store.clone();
        let starts = self.may_start();
        let ends = if self.ends_are_due() { self.next_ends() } else { Vec::new() };
        let (count, lease) = (ends.len(), Some(self.lease.clone()));
        let ending = async {
            match count {
                0 => Ok(()),
                _ => store.end_commands(ends, lease).await,
            }
        };
        let starting = async {
            match starts {
                true => store.start_due_commands(PAGE).await.map(Some),
                false => Ok(None),
            }
        };
        let (ended, started) = tokio::join!(ending, starting);
        if ended.is_ok() && count > 0 {
            self.forget_ends(count);
            self.ends_at = Instant::now() + GATHERING;
        }
        if let Some(page) = started? {
            let now = Instant::now();
            self.commands_at = now + page.next_in.unwrap_or(POLL).min(POLL);
            for command in page.commands {
                self.execute(command, now);
            }
        }
        ended
    }

    async fn store_ends(&mut self) -> Result<(), StoreError> {
        while !self.ends.is_empty() {
            let ends = self.next_ends();
            let count = ends.len();
            self.shared.services.store.end_commands(ends, Some(self.lease.clone())).await?;
            self.forget_ends(count);
        }
        Ok(())
    }

    fn ends_are_due(&self) -> bool {
        self.ends.len() >= PAGE || Instant::now() >= self.ends_at
    }

    fn next_ends(&self) -> Vec<ScheduledEnd> {
        self.ends.iter().take(PAGE).cloned().collect()
    }

    /// Forgets the commands of the first ends, which are stored.
    fn forget_ends(&mut self, count: usize) {
        for end in self.ends.drain(..count).collect::<Vec<_>>() {
            self.forget(end.id);
        }
    }

    fn forget(&mut self, id: Uuid) {
        self.held_bytes -= self.held.remove(&id).unwrap_or(0);
    }

    fn is_full(&self) -> bool {
        self.held.len() + PAGE > HELD || self.held_bytes > HELD_BYTES
    }

    /// Continues the commands that an earlier lease holder, or a failed call, has started.
    async fn search(&mut self) -> Result<(), StoreError> {
        if Instant::now() >= self.search_at {
            self.search_at = Instant::now() + SEARCH;
            self.search.get_or_insert_default();
        }
        let query = ScheduledQuery { state: Some(ScheduledState::Started), schedule: None };
        while let Some(search) = &self.search
            && !self.is_full()
        {
            let store = self.shared.services.store.clone();
            let page = store.scheduled_commands(&query, search.after.as_ref(), PAGE).await?;
            self.search = page.last().map(|last| Search { after: Some(last.clone()) });
            // An earlier lease holder may have sent them just before.
            let alone_at = Instant::now() + ATTEMPT_LIFETIME;
            for command in page {
                self.execute(command, alone_at);
            }
        }
        Ok(())
    }

    /// Creates the commands of due ticks.
    async fn tick(&mut self) -> Result<(), StoreError> {
        if Instant::now() < self.schedules_at {
            return Ok(());
        }
        let store = self.shared.services.store.clone();
        let due = store.due_schedules(SCHEDULES).await?;
        let (began, mut ticked) = (Instant::now(), false);
        for schedule in &due.schedules {
            let tick = match tick_schedule(&*store, schedule, due.now).await {
                Err(error) if error.is_transient() => return Err(error),
                Err(error) => Err(error.to_string()),
                Ok(tick) => tick,
            };
            match tick {
                Ok(ticks) => {
                    ticked = true;
                    self.shared.status.send_modify(|status| status.ticks += ticks);
                }
                Err(reason) => {
                    if self.broken.add(1).is_some() {
                        tracing::error!(schedule = schedule.name, reason, "skipping the ticks of a schedule");
                    }
                    let error = format!("schedule {:?} has no ticks: {reason}", schedule.name);
                    self.shared.status.send_modify(|status| status.last_error = Some(error));
                }
            }
            // The commands of the ticks so far start meanwhile.
            if began.elapsed() > TICKING {
                break;
            }
        }
        let now = Instant::now();
        self.schedules_at = match (ticked, due.schedules.is_empty()) {
            (true, _) => now,
            (false, true) => now + due.next_in.unwrap_or(POLL).min(POLL),
            // None of them can tick.
            (false, false) => now + POLL,
        };
        if ticked {
            self.commands_at = now;
        }
        Ok(())
    }

    /// Returns whether due commands are to be started now.
    fn may_start(&mut self) -> bool {
        if self.term.held_since().is_none() || Instant::now() < self.commands_at {
            return false;
        }
        // A target that is fast enough serves what waits in a moment.
        if self.is_full() || self.executor.waiting() >= PAGE {
            self.commands_at = Instant::now() + POLL / 10;
            return false;
        }
        true
    }

    fn execute(&mut self, command: ScheduledCommand, alone_at: Instant) {
        let (id, size) = (command.id, command.body.len());
        if self.held.contains_key(&id) {
            return;
        }
        self.held.insert(id, size);
        self.held_bytes += size;
        let (executor, stop) = (self.executor.clone(), self.stop.subscribe());
        self.running.spawn(async move {
            let execution = AssertUnwindSafe(executor.execute(&command, alone_at, stop)).catch_unwind();
            let end = execution.await.unwrap_or_else(|panic| {
                tracing::error!(command = %id, panic = panic_text(&*panic), "the execution of a command panicked");
                None
            });
            (id, end)
        });
    }

    /// Waits for the commands in flight, and stores their ends. The actor limits the time.
    async fn finish(mut self) {
        self.stop.send_replace(true);
        while let Some(ended) = self.running.join_next().await {
            self.ended(ended);
            while let Some(ended) = self.running.try_join_next() {
                self.ended(ended);
            }
            if self.term.held_since().is_some() {
                // A failure is repeated with the next end.
                let _ = self.store_ends().await;
            }
        }
        if self.term.held_since().is_none() {
            self.discard_uncertain_ends();
        }
        if let Err(error) = self.store_ends().await {
            // The next lease holder sends the commands again.
            tracing::warn!(%error, "storing the ends of scheduled commands failed");
        }
        self.shared.status.send_modify(|status| status.started = 0);
    }
}

/// Records the due ticks of a schedule, and stores their commands. Returns their number, or the
/// reason why the schedule has no ticks.
async fn tick_schedule(
    store: &dyn EventStore,
    schedule: &StoredSchedule,
    now: chrono::DateTime<chrono::Utc>,
) -> Result<Result<u64, String>, StoreError> {
    let mut definition = match Definition::decode(schedule) {
        Ok(definition) => definition,
        Err(error) => return Ok(Err(error.to_string())),
    };
    let busy = definition.overlap == Overlap::Skip && is_busy(store, &schedule.name).await?;
    let written = tick(&mut definition, &schedule.name, now, busy)
        .and_then(|commands| Ok((definition.to_store(&schedule.name, schedule.revision)?, commands)));
    let (written, commands) = match written {
        Ok(written) => written,
        Err(error) => return Ok(Err(error.to_string())),
    };
    let count = commands.len() as u64;
    // Otherwise it was changed meanwhile, and the next step reads it again.
    let stored = store.write_schedule(written, commands).await?;
    Ok(Ok(if stored { count } else { 0 }))
}

/// Returns whether a command of an earlier tick has no answer yet.
async fn is_busy(store: &dyn EventStore, schedule: &str) -> Result<bool, StoreError> {
    for state in [ScheduledState::Started, ScheduledState::Waiting] {
        let query = ScheduledQuery { state: Some(state), schedule: Some(schedule.to_owned()) };
        if !store.scheduled_commands(&query, None, 1).await?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}
