//! Operator requests from programs without the projection's code.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use sqlx::SqliteConnection;
use storied::projection::SqliteReadModel;
use storied::projection::{
    Answer, ApplyError, BuildTarget, FailurePolicy, Operator, PerTarget, ProjectionState, Request,
    TargetUnavailable,
};
use storied::testing::Node;
use storied::{AnyEvent, EventStore, MemoryStore, Projection, ProjectionHandle, RecordedEvent};

use crate::projection::fixtures::*;

/// Faults, and the number of calls of the user's code.
#[derive(Clone, Default)]
struct Faults {
    /// An event cannot be applied.
    poison: Arc<AtomicBool>,
    /// A reset fails because its database is unavailable.
    away: Arc<AtomicBool>,
    /// Number of resets that are refused.
    refusals: Arc<AtomicUsize>,
    /// The creation of a version beside the live one waits.
    shut: Arc<AtomicBool>,
    waiting: Arc<AtomicBool>,
    resets: Arc<AtomicUsize>,
    discards: Arc<AtomicUsize>,
    /// A version beside the live one does not advance.
    slow: Arc<AtomicBool>,
    /// Another session holds the tables during a drop.
    locked: Arc<AtomicBool>,
    /// Another session holds the tables during a reset.
    held: Arc<AtomicBool>,
}

struct RequestTicket(Faults, u64);

impl Projection for RequestTicket {
    const NAME: &'static str = "asked";
    type Event = AnyEvent;
    type Transaction = SqliteConnection;

    async fn apply(
        &mut self,
        _: AnyEvent,
        _: &RecordedEvent,
        _: &mut SqliteConnection,
    ) -> Result<(), ApplyError> {
        if self.1 > 0 && self.0.slow.load(Ordering::SeqCst) {
            return Err(TargetUnavailable::new("not yet").into());
        }
        if self.0.poison.load(Ordering::SeqCst) { Err("poison".into()) } else { Ok(()) }
    }

    async fn reset(&mut self, _: &mut SqliteConnection) -> Result<(), ApplyError> {
        self.0.resets.fetch_add(1, Ordering::SeqCst);
        while self.0.held.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if self.0.away.load(Ordering::SeqCst) {
            return Err(TargetUnavailable::new("away").into());
        }
        let refusals = &self.0.refusals;
        let left = refusals.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if left.is_ok() { Err("there is no way back".into()) } else { Ok(()) }
    }

    async fn drop_version(&mut self, _: &mut SqliteConnection) -> Result<(), ApplyError> {
        while self.0.locked.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.0.discards.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

fn make(faults: &Faults) -> impl Fn(BuildTarget) -> RequestTicket + Send + Sync + 'static {
    let faults = faults.clone();
    move |target| {
        while target.version > 0 && faults.shut.load(Ordering::SeqCst) {
            faults.waiting.store(true, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(1));
        }
        RequestTicket(faults.clone(), target.version)
    }
}

async fn start(
    store: &Arc<dyn EventStore>,
    database: &Database,
    faults: &Faults,
    partitions: u16,
) -> (Node, ProjectionHandle) {
    let node = local_node(store).await;
    let (model, options) = (database.open().await, options().max_attempts(1).on_failure(FailurePolicy::Park));
    let handle = match partitions {
        0 => node.projection(PerTarget::new(make(faults)), model, options).await,
        count => node.projection(PerTarget::new(make(faults)), model, options.partitions(count)).await,
    };
    (node, handle)
}

/// A log of that many events, and a projection that has applied them on a node.
async fn begun(
    events: u64,
    faults: &Faults,
    partitions: u16,
) -> (Arc<dyn EventStore>, Database, Operator, Node, ProjectionHandle) {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let database = Database::new().await;
    let head = append(&store, 0, 0..events).await;
    let (node, handle) = start(&store, &database, faults, partitions).await;
    catch_up(&handle, head).await;
    let operator = Operator::new(store.clone(), database.open().await).await.unwrap();
    (store, database, operator, node, handle)
}

/// Waits until no request of this projection is waiting.
async fn seen_to(operator: &Operator) {
    let give_up = tokio::time::Instant::now() + PATIENCE;
    loop {
        let requests = operator.projection("asked").await.unwrap().unwrap().requests;
        if !requests.iter().any(|(_, answer)| *answer == Answer::Waiting) {
            return;
        }
        assert!(tokio::time::Instant::now() < give_up, "never completed: {requests:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// An operator that is cut off after its request has announced nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_that_takes_over_reads_the_requests() {
    let (faults, database) = (Faults::default(), Database::new().await);
    let inner: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let (link, far) = (Link::new(&inner), Link::new(&inner));
    let store: Arc<dyn EventStore> = Arc::new(link.clone());
    let head = append(&store, 0, 0..3).await;
    let node = local_node(&store).await;
    let handle = node.projection(PerTarget::new(make(&faults)), database.open().await, short_lived()).await;
    catch_up(&handle, head).await;
    let operator = Operator::new(Arc::new(far.clone()), database.open().await).await.unwrap();
    far.uncontrolled.store(true, Ordering::SeqCst);
    operator.ask("asked", Request::Reset).await.unwrap_err();
    link.mute.store(true, Ordering::SeqCst);
    reach(&handle, ProjectionState::Standby).await;
    link.mute.store(false, Ordering::SeqCst);
    eventually("the projection is reset", || faults.resets.load(Ordering::SeqCst) == 1).await;
    seen_to(&operator).await;
    node.stop(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delayed_request_blocks_nothing() {
    let faults = Faults::default();
    let (store, _database, operator, node, handle) = begun(10, &faults, 0).await;
    faults.away.store(true, Ordering::SeqCst);
    let asked = operator.ask("asked", Request::Reset).await.unwrap();
    eventually("it reports why", || {
        handle
            .status()
            .last_error
            .is_some_and(|error| error.contains("completing an operator request failed"))
    })
    .await;
    let tried = faults.resets.load(Ordering::SeqCst);
    let head = append(&store, 0, 0..10).await;
    catch_up(&handle, head).await;
    assert_eq!(operator.answer(&asked).await.unwrap(), Answer::Waiting);
    // The node's own order lease announces no operator request, so it does not retry at once.
    let heeded = tokio::time::Instant::now() + Duration::from_millis(2_500);
    while tokio::time::Instant::now() < heeded {
        let head = append(&store, 0, [0]).await;
        catch_up(&handle, head).await;
    }
    assert_eq!(faults.resets.load(Ordering::SeqCst), tried);
    // An operator's order lease does.
    faults.away.store(false, Ordering::SeqCst);
    let again = tokio::time::Instant::now();
    operator.ask("asked", Request::Reset).await.unwrap();
    seen_to(&operator).await;
    assert!(again.elapsed() < Duration::from_secs(20), "{:?}", again.elapsed());
    assert_eq!(faults.resets.load(Ordering::SeqCst), tried + 1);
    catch_up(&handle, store.high_water_mark().await.unwrap()).await;
    node.stop(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_request_is_executed_again() {
    let faults = Faults::default();
    let (_store, _database, operator, node, handle) = begun(3, &faults, 0).await;
    for request in [Request::CancelRebuild, Request::Rebuild] {
        // A first refused rebuild says nothing about the second one.
        faults.refusals.store(usize::from(request == Request::Rebuild), Ordering::SeqCst);
        faults.waiting.store(false, Ordering::SeqCst);
        faults.shut.store(true, Ordering::SeqCst);
        operator.ask("asked", request).await.unwrap();
        eventually("the request is in progress", || faults.waiting.load(Ordering::SeqCst)).await;
        let again = operator.ask("asked", request).await.unwrap();
        faults.shut.store(false, Ordering::SeqCst);
        seen_to(&operator).await;
        assert_eq!(operator.answer(&again).await.unwrap(), Answer::Taken, "{request}");
        if request == Request::CancelRebuild {
            eventually("both are done", || faults.discards.load(Ordering::SeqCst) == 2).await;
        }
    }
    eventually("it is rebuilt", || handle.status().version == 1).await;
    node.stop(PATIENCE).await.unwrap();
}

/// The rebuild is over, and the error reports the incomplete drop.
///
/// No call waits longer than 10 s for a lock on its tables.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_drop_after_a_cancelled_rebuild_is_reported() {
    let faults = Faults::default();
    let (store, _database, operator, node, handle) = begun(10, &faults, 0).await;
    faults.slow.store(true, Ordering::SeqCst);
    faults.locked.store(true, Ordering::SeqCst);
    handle.rebuild().await.unwrap();
    let asked = operator.ask("asked", Request::CancelRebuild).await.unwrap();
    let begun = tokio::time::Instant::now();
    seen_to(&operator).await;
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    let Answer::Refused(reason) = operator.answer(&asked).await.unwrap() else { panic!("not refused") };
    for part in
        ["the rebuild is cancelled", "dropping its data failed", "could not be dropped", "cancel it again"]
    {
        assert!(reason.contains(part), "{reason}");
    }
    let record = operator.projection("asked").await.unwrap().unwrap();
    assert_eq!((record.rebuild, record.version), (None, 0));
    assert_eq!(record.requests, [(Request::CancelRebuild, Answer::Refused(reason))]);
    // The live version continues, and after the lock is released the tables are dropped.
    catch_up(&handle, append(&store, 0, [0]).await).await;
    faults.locked.store(false, Ordering::SeqCst);
    let asked = operator.ask("asked", Request::CancelRebuild).await.unwrap();
    seen_to(&operator).await;
    assert_eq!(operator.answer(&asked).await.unwrap(), Answer::Taken);
    assert_eq!(faults.discards.load(Ordering::SeqCst), 1);
    node.stop(PATIENCE).await.unwrap();
}

/// Losing the lease aborts the apply, but not a concurrent control call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_call_during_a_retry_survives_the_loss_of_the_lease() {
    let faults = Faults::default();
    let inner: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let link = Link::new(&inner);
    let mute = link.mute.clone();
    let store: Arc<dyn EventStore> = Arc::new(link);
    let database = Database::new().await;
    let (lease, long) = (Duration::from_secs(1), PATIENCE * 2);
    faults.poison.store(true, Ordering::SeqCst);
    append(&store, 0, 0..10).await;
    let node = local_node(&store).await;
    let options = options().max_attempts(10).initial_backoff(long).max_backoff(long).lease(lease);
    let handle = node.projection(PerTarget::new(make(&faults)), database.open().await, options).await;
    eventually("an event has failed", || handle.status().state == ProjectionState::Retrying).await;
    // While the node waits for the next attempt.
    faults.held.store(true, Ordering::SeqCst);
    let reset = tokio::spawn({
        let handle = handle.clone();
        async move { handle.reset().await }
    });
    eventually("it is reset", || faults.resets.load(Ordering::SeqCst) == 1).await;
    mute.store(true, Ordering::SeqCst);
    let give_up = tokio::time::Instant::now() + PATIENCE;
    loop {
        let leases = store.leases().await.unwrap();
        let lease = leases.iter().find(|info| info.lease.name == "projection/asked").unwrap();
        if !lease.live {
            break;
        }
        assert!(tokio::time::Instant::now() < give_up, "the lease never ends");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Long enough for the node to notice.
    tokio::time::sleep(lease).await;
    assert!(!reset.is_finished(), "the reset still waits for the tables");
    faults.poison.store(false, Ordering::SeqCst);
    faults.held.store(false, Ordering::SeqCst);
    reset.await.unwrap().unwrap();
    mute.store(false, Ordering::SeqCst);
    catch_up(&handle, append(&store, 0, [0]).await).await;
    assert_eq!(faults.resets.load(Ordering::SeqCst), 1);
    node.stop(PATIENCE).await.unwrap();
}

/// A database with one connection: no transaction waits for a second one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_connection_is_enough_for_a_rebuild_and_its_end() {
    for partitions in [0, 2] {
        let faults = Faults::default();
        let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
        let database = Database::new().await;
        let head = append(&store, 0, 0..10).await;
        let node = local_node(&store).await;
        let connect = sqlx::sqlite::SqliteConnectOptions::new().filename(database.path());
        let pool = sqlx::sqlite::SqlitePoolOptions::new().max_connections(1);
        let model = SqliteReadModel::new(pool.connect_with(connect).await.unwrap());
        let handle = match partitions {
            0 => node.projection(PerTarget::new(make(&faults)), model, options()).await,
            count => node.projection(PerTarget::new(make(&faults)), model, options().partitions(count)).await,
        };
        catch_up(&handle, head).await;
        faults.slow.store(true, Ordering::SeqCst);
        let soon = Duration::from_secs(20);
        tokio::time::timeout(soon, handle.rebuild()).await.expect("the rebuild begins").unwrap();
        tokio::time::timeout(soon, handle.cancel_rebuild()).await.expect("it ends").unwrap();
        faults.slow.store(false, Ordering::SeqCst);
        handle.rebuild().await.unwrap();
        eventually("it is rebuilt", || handle.status().version == 1).await;
        catch_up(&handle, append(&store, 0, [0]).await).await;
        node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiting_reset_repairs_a_read_model_that_does_not_fit() {
    let faults = Faults::default();
    let (store, database, operator, node, _) = begun(10, &faults, 2).await;
    node.stop(PATIENCE).await.unwrap();
    operator.ask("asked", Request::Reset).await.unwrap();
    // A dead owner still holds a lease, so that the first attempt fails.
    let lease = store.acquire_lease("partition/0/asked", uuid::Uuid::new_v4(), PATIENCE * 10).await.unwrap();
    let (node, handle) = start(&store, &database, &faults, 3).await;
    reach(&handle, ProjectionState::Failed).await;
    store.release_lease(&lease.unwrap()).await.unwrap();
    reach(&handle, ProjectionState::Following).await;
    catch_up(&handle, store.high_water_mark().await.unwrap()).await;
    node.stop(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebuild_cancelled_before_it_began_never_begins() {
    let faults = Faults::default();
    let (store, database, operator, node, _) = begun(3, &faults, 0).await;
    node.stop(PATIENCE).await.unwrap();
    operator.ask("asked", Request::Rebuild).await.unwrap();
    operator.ask("asked", Request::CancelRebuild).await.unwrap();
    let asked = operator.projection("asked").await.unwrap().unwrap().requests;
    assert_eq!(asked, [(Request::CancelRebuild, Answer::Waiting)]);
    let (node, handle) = start(&store, &database, &faults, 0).await;
    seen_to(&operator).await;
    assert_eq!(handle.status().version, 0);
    node.stop(PATIENCE).await.unwrap();
    // In the other order, both take effect.
    operator.ask("asked", Request::CancelRebuild).await.unwrap();
    operator.ask("asked", Request::Rebuild).await.unwrap();
    let (node, handle) = start(&store, &database, &faults, 0).await;
    eventually("it is rebuilt", || handle.status().version == 1).await;
    node.stop(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_after_a_thousand_refused_ones_is_executed() {
    let faults = Faults::default();
    let (store, database, operator, node, handle) = begun(1_200, &faults, 0).await;
    faults.poison.store(true, Ordering::SeqCst);
    let head = append(&store, 0, [0]).await;
    catch_up(&handle, head).await;
    assert_eq!(handle.parked(10).await.unwrap().len(), 1);
    faults.poison.store(false, Ordering::SeqCst);
    sqlx::query(
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1100)
         INSERT INTO storied_requests SELECT 'asked', 'retry', i, zeroblob(16), 0, 'no' FROM n",
    )
    .execute(database.open().await.pool())
    .await
    .unwrap();
    let asked = operator.ask("asked", Request::Retry(head)).await.unwrap();
    let give_up = tokio::time::Instant::now() + PATIENCE;
    while operator.answer(&asked).await.unwrap() == Answer::Waiting {
        assert!(tokio::time::Instant::now() < give_up, "never done");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(operator.answer(&asked).await.unwrap(), Answer::Taken);
    assert_eq!(operator.parked("asked", 10).await.unwrap(), []);
    node.stop(PATIENCE).await.unwrap();
}
