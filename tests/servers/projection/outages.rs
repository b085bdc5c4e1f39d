//! Transient errors: storied's own errors, hung calls, the end of a node.
//!
//! They are retried without counting against an event.

use std::error::Error;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use storied::bus::BusError;
use storied::command::{HandleError, Handler, HandlerContext};
use storied::projection::{
    ApplyError, AtLeastOnce, ControlError, Delivery, FailurePolicy, InMemory, ProjectionState, Schedule,
    Start, TargetUnavailable, WaitError,
};
use storied::store::CheckpointKey;
use storied::{
    AnyEvent, EventStore, ExecuteError, Filter, MemoryStore, NotExecutedKind, Position, Projection,
    ProjectionOptions, RecordedEvent, Runtime, StoreError, StreamId,
};
use tokio::time::Instant;
use uuid::Uuid;

use crate::projection::fixtures::*;

#[derive(Debug, Serialize, Deserialize, thiserror::Error)]
#[error("no")]
struct No;

/// A typical application error.
#[derive(Debug, thiserror::Error)]
enum Mine {
    #[error(transparent)]
    Execute(#[from] ExecuteError<No>),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("mine")]
    Other(#[source] Box<dyn Error + Send + Sync>),
}

fn transient() -> Vec<ApplyError> {
    let reason = || "test".to_owned();
    let unavailable = || StoreError::Unavailable { reason: reason(), source: None };
    let execute: [fn() -> ExecuteError<No>; 8] = [
        || ExecuteError::OutcomeUnknown { command_id: Uuid::nil(), reason: "test".into() },
        || NotExecutedKind::Overloaded { what: "test".into(), limit: 1 }.into(),
        || NotExecutedKind::Unavailable { reason: "test".into() }.into(),
        || {
            NotExecutedKind::RetriesExhausted { stream: StreamId::new("thing", 1).unwrap(), attempts: 1 }
                .into()
        },
        || NotExecutedKind::NoHandler { name: "test", retryable: true }.into(),
        || NotExecutedKind::ShuttingDown.into(),
        || NotExecutedKind::Store(StoreError::Unavailable { reason: "test".into(), source: None }).into(),
        || NotExecutedKind::Store(StoreError::storage("full", io::Error::other("full"))).into(),
    ];
    let mut errors: Vec<ApplyError> = Vec::new();
    for error in execute {
        errors.extend([error().into(), Mine::from(error()).into(), Mine::Other(error().into()).into()]);
    }
    errors.extend([
        unavailable().into(),
        Mine::from(unavailable()).into(),
        StoreError::OutcomeUnknown { reason: reason(), source: None }.into(),
        BusError::Unavailable { reason: reason(), source: None }.into(),
        io::Error::from(io::ErrorKind::ConnectionRefused).into(),
        Mine::Other(io::Error::from(io::ErrorKind::TimedOut).into()).into(),
        io::Error::from(io::ErrorKind::UnexpectedEof).into(),
        io::Error::other("failed to lookup address information: Temporary failure in name resolution").into(),
        async_nats::client::RequestError::new(async_nats::client::RequestErrorKind::NoResponders).into(),
        async_nats::client::PublishError::new(async_nats::client::PublishErrorKind::Send).into(),
        Mine::Other(async_nats::ConnectError::new(async_nats::ConnectErrorKind::Io).into()).into(),
        sqlx::Error::PoolTimedOut.into(),
        ControlError::Overloaded { name: reason() }.into(),
        ControlError::Conflict { name: reason(), reason: reason() }.into(),
        ControlError::Unavailable { name: reason(), reason: reason() }.into(),
        ControlError::Store(unavailable()).into(),
        WaitError::Stopped { name: reason() }.into(),
    ]);
    errors
}

fn faults() -> Vec<ApplyError> {
    vec![
        "mine".into(),
        ExecuteError::Rejected(No).into(),
        Mine::from(ExecuteError::<No>::from(NotExecutedKind::InvalidId { reason: "test".into() })).into(),
        ExecuteError::<No>::from(NotExecutedKind::NoHandler { name: "test", retryable: false }).into(),
        StoreError::Invalid { reason: "test".into() }.into(),
        io::Error::from(io::ErrorKind::NotFound).into(),
        sqlx::Error::RowNotFound.into(),
        async_nats::client::PublishError::new(async_nats::client::PublishErrorKind::InvalidSubject).into(),
    ]
}

fn quick() -> ProjectionOptions {
    ProjectionOptions::new()
        .max_attempts(1)
        .on_failure(FailurePolicy::Park)
        .initial_backoff(Duration::from_millis(1))
        .max_backoff(Duration::from_millis(1))
}

/// A hook that fails three times with each of the errors in turn, and the number of its calls.
fn failing(make: fn() -> Vec<ApplyError>) -> (Hook, Arc<AtomicUsize>) {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    let hook = hook(move |_| {
        let mut errors = make();
        let call = count.fetch_add(1, Ordering::SeqCst) / 3;
        if call < errors.len() { Err(errors.swap_remove(call)) } else { Ok(()) }
    });
    (hook, calls)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transient_errors_are_retried_without_a_limit_and_park_nothing() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let head = append(&store, 0, 1..=1).await;
    let node = local_node(&store).await;
    let ((outside, outside_calls), (memory, memory_calls)) = (failing(transient), failing(transient));
    let handles = [
        node.projection(recorder("outside").hook(outside), AtLeastOnce::new(), quick()).await,
        node.projection(recorder("memory").hook(memory), InMemory::new(), quick()).await,
    ];
    for (handle, calls) in handles.iter().zip([outside_calls, memory_calls]) {
        catch_up(handle, head).await;
        assert_eq!(handle.status().events_parked, 0);
        assert_eq!(calls.load(Ordering::SeqCst), 3 * transient().len() + 1);
    }
    node.stop(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_count_against_the_event() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let count = 3 * faults().len() as u64;
    let head = append(&store, 0, 1..=count).await;
    let node = local_node(&store).await;
    let handle =
        node.projection(recorder("outside").hook(failing(faults).0), AtLeastOnce::new(), quick()).await;
    catch_up(&handle, head).await;
    assert_eq!(handle.status().events_parked, count);
    node.stop(PATIENCE).await.unwrap();
}

/// An `apply` that hangs is aborted at its limit: the status reports it, and the event is retried.
#[tokio::test]
async fn a_hung_call_is_aborted_and_retried() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let head = append(&store, 0, 1..=3).await;
    let node = local_node(&store).await;
    // By position: on a busy machine the call before it may run into the limit as well, and comes again.
    let hanging = || -> Hook {
        let hung = AtomicBool::new(false);
        Arc::new(move |event| {
            let hangs = event.position == Position::new(2) && !hung.swap(true, Ordering::SeqCst);
            Box::pin(async move { if hangs { std::future::pending().await } else { Ok(()) } })
        })
    };
    let database = Database::new().await;
    let options = || quick().transaction_timeout(Duration::from_millis(300));
    let handles = [
        node.projection(recorder("outside").hook(hanging()), AtLeastOnce::new(), options()).await,
        node.projection(recorder("memory").hook(hanging()), InMemory::new(), options()).await,
        node.projection(table("table").hook(hanging()), database.open().await, options()).await,
    ];
    for handle in &handles {
        let mut status = handle.watch();
        let at_fault = |error: &String| error.contains("position 2");
        let failed = status.wait_for(|status| status.last_error.as_ref().is_some_and(at_fault));
        let error =
            tokio::time::timeout(PATIENCE, failed).await.unwrap().unwrap().last_error.clone().unwrap();
        assert!(error.contains("transaction_timeout"), "{error}");
        assert!(!error.contains("event store"), "{error}");
        catch_up(handle, head).await;
        assert_eq!(handle.status().events_parked, 0);
    }
    assert_eq!(database.seen("table").await, log(&store, &Filter::all()).await);
    node.stop(PATIENCE).await.unwrap();
}

/// Slow events: a full batch of them would exceed the limit.
#[tokio::test(start_paused = true)]
async fn a_batch_of_slow_events_is_committed_before_the_limit() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let head = append(&store, 0, 1..=100).await;
    let node = local_node(&store).await;
    let slow: Hook = Arc::new(|_| {
        Box::pin(async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok(())
        })
    });
    let projection = recorder("outside").hook(slow);
    let seen = projection.seen.clone();
    // Fifty of them in a row take longer than the limit.
    let options = quick().batch_time(Duration::MAX);
    let handle = node.projection(projection, AtLeastOnce::new(), options).await;
    handle.caught_up_to_within(head, Duration::from_secs(300)).await.unwrap();
    assert_eq!(seen.positions(), (1..=100).map(Position::new).collect::<Vec<_>>(), "none came twice");
    node.stop(PATIENCE).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_hung_call_does_not_delay_the_shutdown() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, 1..=3).await;
    let node = local_node(&store).await;
    let gate = Gate::closed();
    let handle = node.projection(recorder("outside").hook(gate.hook()), AtLeastOnce::new(), quick()).await;
    gate.reached().await;
    let began = Instant::now();
    node.stop(PATIENCE).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(handle.status().events_parked, 0);
    assert!(store.parked(&CheckpointKey::new("outside"), Position::START, 10).await.unwrap().is_empty());
}

/// A node stops in a long batch: the current event is the last one, and the applied events are
/// kept.
#[tokio::test(start_paused = true)]
async fn a_stop_begins_no_further_event_of_a_batch() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, 1..=20).await;
    let node = local_node(&store).await;
    let slow: Hook = Arc::new(|_| {
        Box::pin(async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok(())
        })
    });
    let projection = recorder("outside").hook(slow);
    let seen = projection.seen.clone();
    let options = quick().batch_time(Duration::MAX);
    node.projection(projection, AtLeastOnce::new(), options).await;
    eventually("two are applied", || seen.positions().len() >= 2).await;
    let began = Instant::now();
    node.stop(PATIENCE).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    let checkpoint = store.checkpoint(&CheckpointKey::new("outside")).await.unwrap();
    assert_eq!(checkpoint.position.get(), seen.positions().len() as u64);
}

struct Slow;

#[derive(Serialize, Deserialize)]
struct Work(u64);

impl Handler for Slow {
    const NAME: &'static str = "slow";
    type Command = Work;
    type Reply = ();
    type Error = No;

    async fn handle(&self, _: &Work, _: &HandlerContext) -> Result<(), HandleError<No>> {
        tokio::time::sleep(Duration::from_secs(3)).await;
        Ok(())
    }
}

/// Sends a command for every event.
struct Reaction(Arc<OnceLock<Runtime>>);

impl Projection for Reaction {
    const NAME: &'static str = "reaction";
    type Event = AnyEvent;
    type Transaction = Delivery;

    async fn apply(
        &mut self,
        _: AnyEvent,
        event: &RecordedEvent,
        _: &mut Delivery,
    ) -> Result<(), ApplyError> {
        let Some(runtime) = self.0.get() else { return Err(TargetUnavailable::new("not yet").into()) };
        runtime.execute_handler::<Slow>(Work(event.position.get())).await?;
        Ok(())
    }
}

/// The shutdown does not count against an event.
///
/// In the middle of a backlog, while a command is in flight.
#[tokio::test(start_paused = true)]
async fn an_orderly_shutdown_parks_nothing() {
    let memory = MemoryStore::new();
    let store: Arc<dyn EventStore> = Arc::new(memory.clone());
    append(&store, 0, 1..=20).await;
    let known = Arc::new(OnceLock::new());
    let options = ProjectionOptions::new()
        .start(Start::Beginning)
        .on_failure(FailurePolicy::Park)
        .initial_backoff(Duration::from_millis(1))
        .max_backoff(Duration::from_millis(1));
    let builder = Runtime::builder().store(memory).handler(Slow);
    let builder = builder.projection_with(Reaction(known.clone()), AtLeastOnce::new(), options);
    let runtime = builder.start().await.unwrap();
    assert!(known.set(runtime.clone()).is_ok());
    let projection = runtime.projection("reaction").unwrap().clone();
    projection.caught_up_to_within(Position::new(2), PATIENCE).await.unwrap();
    runtime.shutdown().await.unwrap();
    assert_eq!(projection.status().events_parked, 0);
    assert!(store.parked(&CheckpointKey::new("reaction"), Position::START, 100).await.unwrap().is_empty());
    assert!(store.checkpoint(&CheckpointKey::new("reaction")).await.unwrap().position < Position::new(20));
}

/// Leases of a dead holder, written by a clock that was a day ahead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_of_a_clock_that_was_ahead_is_taken_over() {
    let dir = tempfile::TempDir::new().unwrap();
    let path = dir.path().join("events.db");
    let store: Arc<dyn EventStore> = Arc::new(storied::SqliteStore::open(&path).await.unwrap());
    let head = append(&store, 0, 1..=3).await;
    let ttl = Duration::from_millis(300);
    let names = ["projection/outside", "order/outside"];
    for name in names {
        store.acquire_lease(name, Uuid::new_v4(), ttl).await.unwrap().unwrap();
    }
    let file = sqlx::SqlitePool::connect(&format!("sqlite:{}", path.display())).await.unwrap();
    let ahead = "UPDATE storied_leases SET expires_at = expires_at + 86400000000";
    assert_eq!(sqlx::query(ahead).execute(&file).await.unwrap().rows_affected(), 2);
    let node = local_node(&store).await;
    let handle = node.projection(recorder("outside"), AtLeastOnce::new(), options()).await;
    catch_up(&handle, head).await;
    // An order lease as well: the old one may not hold up others, and a new one can be acquired.
    handle.reset().await.unwrap();
    let leases = store.leases().await.unwrap();
    assert!(leases.iter().all(|info| info.lease.epoch >= 2), "{leases:?}");
    node.stop(PATIENCE).await.unwrap();
}

/// A holder that renews keeps its lease, even with a wrong clock.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_is_renewed_is_not_taken_over() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let (first, second) = (local_node(&store).await, local_node(&store).await);
    let options = || options().lease(Duration::from_millis(600));
    let owner = first.projection(recorder("outside"), AtLeastOnce::new(), options()).await;
    catch_up(&owner, append(&store, 0, 1..=3).await).await;
    let other = second.projection(recorder("outside"), AtLeastOnce::new(), options()).await;
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(2) {
        let leases = store.leases().await.unwrap();
        assert!(leases.iter().all(|info| info.lease.epoch == 1), "{leases:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(other.status().state, storied::projection::ProjectionState::Standby);
    first.stop(PATIENCE).await.unwrap();
    second.stop(PATIENCE).await.unwrap();
}

#[tokio::test]
async fn a_wait_for_a_paused_projection_reports_the_pause() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let node = local_node(&store).await;
    let handle = node.projection(recorder("memory"), InMemory::new(), options()).await;
    handle.pause().await.unwrap();
    let head = append(&store, 0, 1..=3).await;
    let error = handle.caught_up_to_within(head, Duration::from_millis(50)).await.unwrap_err();
    assert!(matches!(error, WaitError::Paused { wanted, .. } if wanted == head), "{error}");
    assert!(error.to_string().contains("paused"), "{error}");
    handle.resume().await.unwrap();
    catch_up(&handle, head).await;
    node.stop(PATIENCE).await.unwrap();
}

/// The error of a wait names the trigger that the projection waits for.
#[tokio::test]
async fn a_wait_for_an_untriggered_projection_reports_it() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let head = append(&store, 0, 1..=3).await;
    let node = local_node(&store).await;
    let manual = options().schedule(Schedule::Manual);
    let handle = node.projection(recorder("memory"), InMemory::new(), manual).await;
    reach(&handle, ProjectionState::Waiting).await;
    let error = handle.caught_up_to_within(head, Duration::from_millis(50)).await.unwrap_err();
    assert!(matches!(error, WaitError::NotTriggered { wanted, .. } if wanted == head), "{error}");
    assert!(error.to_string().contains("waits for a trigger") && error.is_transient(), "{error}");
    handle.trigger().await.unwrap();
    catch_up(&handle, head).await;
    node.stop(PATIENCE).await.unwrap();
}

/// If the read model failed, it is the subject of the error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_read_model_is_the_subject_of_its_error() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let node = local_node(&store).await;
    let database = Database::new().await;
    let options = quick().transaction_timeout(Duration::from_millis(300));
    let model = database.open().await;
    let pool = model.pool().clone();
    let handle = node.projection(table("table"), model, options).await;
    reach(&handle, ProjectionState::Following).await;
    let lock = pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
    let head = append(&store, 0, 1..=1).await;
    let mut status = handle.watch();
    let failed = status.wait_for(|status| status.last_error.is_some());
    let error = tokio::time::timeout(PATIENCE, failed).await.unwrap().unwrap().last_error.clone().unwrap();
    assert!(error.starts_with("the read model is unavailable: "), "{error}");
    lock.rollback().await.unwrap();
    catch_up(&handle, head).await;
    node.stop(PATIENCE).await.unwrap();
}
