//! Fires the timers of a process that are due.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};

use super::Process;
use super::batch::BatchEnd;
use super::drivers::Drivers;
use super::resumption::resumption;
use super::timer_writer::POLL;
use super::work::{WorkError, WorkKind};
use crate::backoff::Backoff;
use crate::event::Position;
use crate::projection::{ProjectionState, ProjectionStatus};
use crate::store::{DueTime, EventStore, NewTimer, StoreError, StoredTimer, TimerRef};

/// Maximum number of timers in a page of due ones.
const PAGE: usize = 500;

/// Wait while timers must not overtake events.
const BACKLOG_WAIT: Duration = Duration::from_millis(50);

/// Fires the timers of a process while this node owns it, until the sender of `owner` is dropped.
pub(super) async fn fire<P: Process>(
    drivers: Arc<Drivers<P>>,
    mut owner: watch::Receiver<ProjectionStatus>,
    soon: Arc<Notify>,
) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    let mut backlog = Backlog::default();
    loop {
        let Ok(status) = owner.wait_for(owns).await.map(|status| status.clone()) else { return };
        let wait = match fire_page(&drivers, &status, &mut backlog).await {
            Ok(wait) => {
                backoff.succeeded();
                wait
            }
            Err(reason) => {
                let wait = backoff.next();
                tracing::warn!(process = P::NAME, reason, ?wait, "retrying the timers that are due");
                wait
            }
        };
        // Either way, the next page follows.
        let _ = timeout(wait.min(POLL), soon.notified()).await;
    }
}

/// Returns whether this node owns the process and may react.
fn owns(status: &ProjectionStatus) -> bool {
    let active = matches!(
        status.state,
        ProjectionState::CatchingUp
            | ProjectionState::Following
            | ProjectionState::Retrying
            | ProjectionState::Waiting
    );
    active && status.epoch > 0
}

/// The events that a timer must not overtake: those that were recorded before it was due.
///
/// After an outage, a payment in the log would otherwise come after its time-out.
#[derive(Default)]
struct Backlog {
    /// Start of the lease's term, and the end of the log at that time.
    of_term: Option<(Instant, Position)>,
}

impl Backlog {
    /// Returns which timers may fire.
    async fn limit(
        &mut self,
        store: &dyn EventStore,
        status: &ProjectionStatus,
        term: Instant,
    ) -> Result<FireLimit, StoreError> {
        let end = match self.of_term {
            Some((of, end)) if of == term => end,
            _ => {
                let end = store.high_water_mark().await?;
                self.of_term = Some((term, end));
                end
            }
        };
        if status.position < end {
            return Ok(FireLimit::None);
        }
        Ok(status.behind_since.map_or(FireLimit::All, FireLimit::Before))
    }
}

/// The timers that may fire; resumptions always may.
enum FireLimit {
    None,
    /// Those that were due before this time.
    Before(DateTime<Utc>),
    All,
}

impl FireLimit {
    fn allows(&self, timer: &StoredTimer) -> bool {
        match self {
            Self::None => false,
            Self::Before(time) => timer.due_at < *time,
            Self::All => true,
        }
    }
}

/// Fires a page of timers. Returns the wait until the next one.
async fn fire_page<P: Process>(
    drivers: &Arc<Drivers<P>>,
    status: &ProjectionStatus,
    backlog: &mut Backlog,
) -> Result<Duration, String> {
    let store = &*drivers.store;
    // The status may be older than a pause of this process.
    let Some(term) = drivers.term.held_since() else { return Ok(POLL) };
    let limit = backlog.limit(store, status, term).await.map_err(|error| error.to_string())?;
    let due = store.due_timers(P::NAME, PAGE).await.map_err(|error| error.to_string())?;
    let mut put = Vec::new();
    let mut fired = Vec::new();
    let mut overtakes = false;
    for timer in due.timers {
        if timer.name.is_empty() && drivers.is_active(&timer.instance) {
            put.push(resumption(timer.instance, timer.version, drivers.resume_after));
        } else if !timer.name.is_empty() && !limit.allows(&timer) {
            overtakes = true;
        } else {
            fired.push(timer);
        }
    }
    let end = drivers.run(fired.iter().map(work_of).collect()).await;
    let (remove, transient) = changes(fired, end, drivers.resume_after, &mut put);
    if !put.is_empty() || !remove.is_empty() {
        drivers.timers.write(put, remove).await.map_err(|error| error.to_string())?;
    }
    match transient {
        Some(reason) => Err(reason),
        None if overtakes => Ok(BACKLOG_WAIT),
        None => Ok(due.next_in.unwrap_or(POLL)),
    }
}

fn work_of(timer: &StoredTimer) -> (String, WorkKind) {
    let kind = match timer.name.as_str() {
        "" => WorkKind::Resume,
        name => WorkKind::Fire { timer: name.to_owned(), version: timer.version },
    };
    (timer.instance.clone(), kind)
}

/// Returns the timers to delete, and a transient error if there was one. Adds those to write to `put`.
fn changes(
    fired: Vec<StoredTimer>,
    end: BatchEnd,
    resume_after: Duration,
    put: &mut Vec<NewTimer>,
) -> (Vec<TimerRef>, Option<String>) {
    let BatchEnd { recorded, unfinished } = end;
    let (mut remove, mut transient) = (Vec::new(), None);
    for (timer, recorded) in fired.into_iter().zip(recorded) {
        let StoredTimer { instance, name, version, .. } = timer;
        match recorded.into_iter().next() {
            Some(Err(WorkError::Transient(reason))) => transient = Some(reason),
            Some(Err(WorkError::Permanent(reason))) => {
                tracing::error!(instance, timer = name, reason, "could not fire a timer; retrying later");
                // The removal comes first, so that the same version can get another time.
                remove.push(TimerRef { instance: instance.clone(), name: name.clone(), version });
                put.push(NewTimer { instance, name, version, due: DueTime::After(resume_after) });
            }
            _ if name.is_empty() && unfinished.contains_key(&instance) => {}
            _ => remove.push(TimerRef { instance, name, version }),
        }
    }
    let resumed = unfinished.into_iter();
    put.extend(resumed.map(|(instance, version)| resumption(instance, version, resume_after)));
    (remove, transient)
}
