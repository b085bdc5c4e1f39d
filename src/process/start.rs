//! Starts and stops the components of a process on a node.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use ractor::SpawnErr;
use serde::Serialize;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{Instant, sleep};

use super::counters::Counters;
use super::drivers::{Drivers, MOST_ACTIVE};
use super::firing::fire;
use super::follower::{InstanceDelivery, ProcessFollower, follower_name};
use super::instance::Instance;
use super::resumption::resume_after;
use super::timer_writer::TimerWriter;
use super::unresolved::UnresolvedAttempts;
use super::{Process, ProcessOptions};
use crate::aggregate::{self, AggregateOptions};
use crate::command::{Dispatcher, LocalAggregates};
use crate::event::{EncodeError, Position};
use crate::future::BoxFuture;
use crate::lease::CurrentTerm;
use crate::projection::{
    self, AtLeastOnce, FailurePolicy, IntoProjection, NodeServices, ProjectionHandle, ProjectionOptions,
    record_start,
};
use crate::store::{EventStore, GroupCommitter, StoreError};
use crate::supervised::Task;

/// Time that an instance stays in memory without work.
const IDLE: Duration = Duration::from_secs(10);

/// The components that a process uses.
pub(crate) struct ProcessServices {
    pub(crate) node: NodeServices,
    pub(crate) writer: GroupCommitter,
    pub(crate) commands: Weak<Dispatcher>,
    pub(crate) supervisor: ractor::ActorCell,
}

/// Status of a process on this node. Serializes as a map of its fields.
///
/// The numbers count since the start of the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ProcessStatus {
    /// Name of the process.
    pub name: String,
    /// Number of instances with work in progress.
    pub active: usize,
    /// Number of inputs that caused a reaction.
    pub reacted: u64,
    /// Number of inputs that instances with unreacted inputs recorded for later.
    pub held: u64,
    /// Number of times that an instance was parked.
    pub parked: u64,
    /// Number of events that were ignored: they start an instance that exists, continue one that
    /// does not exist, or reach one that compensates or has ended.
    pub ignored: u64,
}

/// A process on this node, without its types.
pub(crate) trait RunningProcess: Send + Sync {
    /// Returns the projection that follows the log for the process.
    fn follower(&self) -> &ProjectionHandle;

    fn status(&self) -> ProcessStatus;

    /// Ends the reactions. Commands in flight have until `deadline`, and the next owner sends the
    /// others. Returns what did not end in time.
    ///
    /// I12: the next owner continues the remaining work.
    fn stop(&self, deadline: Instant) -> BoxFuture<'_, Vec<String>>;
}

struct ProcessHost<P: Process> {
    follower: ProjectionHandle,
    drivers: Arc<Drivers<P>>,
    /// Task that fires timers.
    firing: Mutex<Option<Task>>,
    stop: watch::Sender<bool>,
}

/// Records the start position of a new process.
pub(crate) async fn record_process_start(
    store: &Arc<dyn EventStore>,
    process: &str,
    options: &ProcessOptions,
    log_end: Position,
) -> Result<(), StoreError> {
    let (name, start) = (follower_name(process), Some(options.start));
    record_start(&AtLeastOnce::new(), store, &name, start, log_end).await.map(drop)
}

/// Returns the shared state of the actors of a process' instances.
///
/// # Errors
/// If their events cannot be stored.
fn instances_of<P: Process>(
    store: Arc<dyn EventStore>,
    writer: GroupCommitter,
) -> Result<aggregate::Shared<Instance<P>>, EncodeError> {
    // No command id repeats, so the smallest window suffices.
    let options = AggregateOptions::new().command_window(1).idle_timeout(IDLE);
    aggregate::Shared::new(store, writer, options)
}

/// Starts a process.
///
/// # Errors
/// If the events of its instances cannot be stored, or an actor does not start.
pub(crate) async fn spawn<P: Process>(
    follower: ProcessFollower<P>,
    options: ProcessOptions,
    services: ProcessServices,
) -> Result<Result<Arc<dyn RunningProcess>, SpawnErr>, EncodeError> {
    let ProcessServices { node, writer, commands, supervisor } = services;
    let store = node.store.clone();
    let shared = instances_of::<P>(store.clone(), writer)?;
    Ok(start_all(follower, options, node, store, shared, commands, supervisor).await)
}

async fn start_all<P: Process>(
    follower: ProcessFollower<P>,
    options: ProcessOptions,
    node: NodeServices,
    store: Arc<dyn EventStore>,
    shared: aggregate::Shared<Instance<P>>,
    commands: Weak<Dispatcher>,
    supervisor: ractor::ActorCell,
) -> Result<Arc<dyn RunningProcess>, SpawnErr> {
    let (stop, stopped) = watch::channel(false);
    let (soon, term) = (Arc::new(Notify::new()), CurrentTerm::default());
    let drivers = Arc::new(Drivers {
        store: store.clone(),
        instances: LocalAggregates::start(shared, supervisor)?,
        commands,
        timers: TimerWriter::start(store.clone(), P::NAME, soon.clone()),
        limits: options.limits,
        term: term.clone(),
        unresolved: UnresolvedAttempts::default(),
        resume_after: resume_after(options.lease),
        permits: Semaphore::new(options.in_flight),
        slots: Arc::new(Semaphore::new(MOST_ACTIVE)),
        active: Mutex::default(),
        stop: stopped,
        counters: Counters::default(),
    });
    let following = ProjectionOptions::new()
        .on_failure(FailurePolicy::Park)
        .max_attempts(3)
        // A batch waits for the store and not for work of the user, so its time does not limit it.
        .batch_time(Duration::from_secs(10))
        .lease(options.lease)
        .publish_term(term)
        .start(options.start);
    let made = follower.into_projection();
    let (_, filter) = made.describe(&following);
    let instances = InstanceDelivery::new(drivers.clone());
    let follower = projection::spawn(made, filter, instances, following, None, node).await?;
    let firing = Task::spawn(fire(drivers.clone(), follower.watch(), soon));
    Ok(Arc::new(ProcessHost { follower, drivers, firing: Mutex::new(Some(firing)), stop }))
}

impl<P: Process> RunningProcess for ProcessHost<P> {
    fn follower(&self) -> &ProjectionHandle {
        &self.follower
    }

    fn status(&self) -> ProcessStatus {
        let Counters { reacted, held, parked, ignored } = &self.drivers.counters;
        let [reacted, held, parked, ignored] =
            [reacted, held, parked, ignored].map(|counter| counter.load(Ordering::Relaxed));
        let active = self.drivers.active_count();
        ProcessStatus { name: P::NAME.to_owned(), active, reacted, held, parked, ignored }
    }

    fn stop(&self, deadline: Instant) -> BoxFuture<'_, Vec<String>> {
        Box::pin(async move {
            let left = || deadline.saturating_duration_since(Instant::now());
            let firing = self.firing.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            drop(firing);
            let mut unfinished: Vec<_> =
                self.follower.stop(left()).await.err().map(|error| error.to_string()).into_iter().collect();
            while self.drivers.active_count() > 0 && Instant::now() < deadline {
                sleep(Duration::from_millis(5)).await;
            }
            self.stop.send_replace(true);
            let active = self.drivers.active_count();
            if active > 0 {
                unfinished.push(format!("{active} instances of process {} with open commands", P::NAME));
            }
            let grace = deadline.max(Instant::now() + Duration::from_millis(100));
            let unanswered = self.drivers.instances.shut_down(grace).await;
            if unanswered > 0 {
                unfinished.push(format!("{unanswered} inputs of process {} without an answer", P::NAME));
            }
            unfinished
        })
    }
}
