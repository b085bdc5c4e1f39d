//! Rebuilding beside the live read model.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sqlx::SqliteConnection;
use storied::projection::{
    ApplyError, AtLeastOnce, BuildTarget, ControlError, FailurePolicy, InMemory, PerTarget, ProjectionState,
    RebuildStatus, TargetUnavailable,
};
use storied::testing::Node;
use storied::{
    AnyEvent, EventStore, Filter, Position, Projection, ProjectionHandle, ProjectionOptions, RecordedEvent,
};

use crate::projection::fixtures::*;

/// Writes to a table of its version; and to `live` after its cut-over.
struct Versioned {
    version: u64,
    /// The hook runs from this version on.
    from: u64,
    hook: Hook,
}

impl Projection for Versioned {
    const NAME: &'static str = "versioned";
    type Event = AnyEvent;
    type Transaction = SqliteConnection;

    async fn apply(
        &mut self,
        _: AnyEvent,
        event: &RecordedEvent,
        tx: &mut SqliteConnection,
    ) -> Result<(), ApplyError> {
        sqlx::query("INSERT INTO seen (name, position) VALUES (?, ?)")
            .bind(format!("v{}", self.version))
            .bind(event.position.get() as i64)
            .execute(tx)
            .await?;
        if self.version >= self.from { (self.hook)(event).await } else { Ok(()) }
    }

    async fn reset(&mut self, tx: &mut SqliteConnection) -> Result<(), ApplyError> {
        sqlx::query("DELETE FROM seen WHERE name = ?").bind(format!("v{}", self.version)).execute(tx).await?;
        Ok(())
    }

    async fn drop_version(&mut self, tx: &mut SqliteConnection) -> Result<(), ApplyError> {
        self.reset(tx).await
    }

    async fn cut_over(&mut self, tx: &mut SqliteConnection) -> Result<(), ApplyError> {
        sqlx::query("INSERT INTO seen (name, position) VALUES ('live', ?)")
            .bind(self.version as i64)
            .execute(tx)
            .await?;
        Ok(())
    }
}

/// Runs the hook before an event of a rebuild is recorded.
fn make(hook: &Hook) -> impl Fn(BuildTarget) -> Versioned + Send + Sync + 'static {
    let hook = hook.clone();
    move |target| Versioned { version: target.version, from: 1, hook: hook.clone() }
}

/// Stops at this position while shut, without holding the database.
fn behind(position: u64, shut: &Arc<AtomicBool>) -> Hook {
    let shut = shut.clone();
    hook(move |event| {
        let wait = event.position.get() > position && shut.load(Ordering::SeqCst);
        if wait { Err(TargetUnavailable::new("not yet").into()) } else { Ok(()) }
    })
}

async fn start(
    store: &Arc<dyn EventStore>,
    database: &Database,
    hook: &Hook,
    partitions: Option<u16>,
    options: ProjectionOptions,
) -> (Node, ProjectionHandle) {
    let node = local_node(store).await;
    let model = database.open().await;
    let handle = match partitions {
        None => node.projection(PerTarget::new(make(hook)), model, options).await,
        Some(count) => node.projection(PerTarget::new(make(hook)), model, options.partitions(count)).await,
    };
    (node, handle)
}

async fn switched(handle: &ProjectionHandle, version: u64) {
    eventually(&format!("version {version}"), || {
        handle.status().version == version && handle.rebuilding().is_none()
    })
    .await;
}

fn sorted(mut positions: Vec<Position>) -> Vec<Position> {
    positions.sort_unstable();
    positions
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebuild_cuts_over_under_traffic() {
    for (kind, store, _dir) in stores().await {
        for partitions in [None, Some(4)] {
            let database = Database::new().await;
            // So that the progress is read in the middle.
            let shut = Arc::new(AtomicBool::new(true));
            let slow = behind(150, &shut);
            let options = options().batch_size(20);
            let (one, first) = start(&store, &database, &slow, partitions, options.clone()).await;
            for n in 0..40 {
                append(&store, n, [n, n, n, n, n]).await;
            }
            first.wait_until_caught_up(PATIENCE).await.unwrap();
            let (two, second) = start(&store, &database, &slow, partitions, options).await;
            assert_eq!(first.rebuilding(), None);
            // From any node; a second call changes nothing.
            second.rebuild().await.unwrap();
            second.rebuild().await.unwrap();
            let progress = |handle: &ProjectionHandle| handle.rebuilding();
            eventually("a node reports the progress", || {
                let told = |status: RebuildStatus| {
                    status.version == 1 && status.done > 0 && status.done < status.of && status.left.is_some()
                };
                [&first, &second].into_iter().any(|handle| progress(handle).is_some_and(told))
            })
            .await;
            // The live version continues meanwhile.
            let writers = Writers::start(&store, 2, 30, 10);
            let position = append(&store, 7, [7]).await;
            catch_up(&first, position).await;
            assert_eq!(first.status().version, 0, "{kind}");
            shut.store(false, Ordering::SeqCst);
            for handle in [&first, &second] {
                switched(handle, 1).await;
            }
            writers.done().await;
            let head = store.high_water_mark().await.unwrap();
            for handle in [&first, &second] {
                catch_up(handle, head).await;
            }
            assert_eq!(database.seen("live").await, [Position::new(1)], "{kind}: once");
            let all = log(&store, &Filter::all()).await;
            assert_eq!(sorted(database.seen("v1").await), all, "{kind}");
            let old = database.seen("v0").await;
            assert_eq!(old.iter().collect::<BTreeSet<_>>().len(), old.len(), "{kind}");

            // A restart finds the live version, a reset empties it, and another rebuild makes a
            // next one.
            one.stop(PATIENCE).await.unwrap();
            two.stop(PATIENCE).await.unwrap();
            let (node, handle) =
                start(&store, &database, &slow, partitions, crate::projection::fixtures::options()).await;
            catch_up(&handle, append(&store, 0, [1]).await).await;
            assert_eq!(handle.status().version, 1, "{kind}");
            handle.reset().await.unwrap();
            catch_up(&handle, head).await;
            assert_eq!(database.seen("v0").await, old, "{kind}: it does not change any more");
            handle.rebuild().await.unwrap();
            switched(&handle, 2).await;
            let all = log(&store, &Filter::all()).await;
            for version in ["v1", "v2"] {
                assert_eq!(sorted(database.seen(version).await), all, "{kind}: {version}");
            }
            node.stop(PATIENCE).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_rebuild_resumes() {
    for (kind, store, _dir) in stores().await {
        for partitions in [None, Some(4)] {
            let database = Database::new().await;
            let gate = Gate::closed();
            let (gated, go) = (gate.hook(), hook(|_| Ok(())));
            let wait: Hook =
                Arc::new(move |event| if event.position.get() > 100 { gated(event) } else { go(event) });
            let options = short_lived().batch_size(10);
            let (one, first) = start(&store, &database, &wait, partitions, options.clone()).await;
            for n in 0..40 {
                append(&store, n, [n, n, n, n, n]).await;
            }
            first.wait_until_caught_up(PATIENCE).await.unwrap();
            first.rebuild().await.unwrap();
            gate.reached().await;
            let done = first.rebuilding().unwrap();
            assert!(done.done < done.of && done.version == 1, "{kind}: {done:?}");
            one.kill();
            gate.open();
            let (two, second) = start(&store, &database, &wait, partitions, options).await;
            switched(&second, 1).await;
            assert_eq!(sorted(database.seen("v1").await), log(&store, &Filter::all()).await, "{kind}");
            assert_eq!(database.seen("live").await.len(), 1, "{kind}");
            two.stop(PATIENCE).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_rebuild_does_not_affect_the_live_version() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        let broken = Arc::new(AtomicBool::new(true));
        let (node, handle) =
            start(&store, &database, &poison(3, &broken), None, options().max_attempts(1)).await;
        let head = append(&store, 0, 0..10).await;
        catch_up(&handle, head).await;
        handle.rebuild().await.unwrap();
        eventually("the rebuild reports why it has stopped", || {
            let error = handle.rebuilding().and_then(|status| status.last_error);
            error.is_some_and(|error| error.contains("poison"))
        })
        .await;
        let head = append(&store, 0, 0..10).await;
        catch_up(&handle, head).await;
        assert_eq!(
            (handle.status().version, handle.status().state),
            (0, ProjectionState::Following),
            "{kind}"
        );
        broken.store(false, Ordering::SeqCst);
        handle.resume().await.unwrap();
        switched(&handle, 1).await;
        node.stop(PATIENCE).await.unwrap();

        // A projection with a single version does not write to another version's tables.
        let node = local_node(&store).await;
        let hook = hook(|_| Ok(()));
        let fixed = Versioned { version: 0, from: 1, hook };
        let handle = node.projection(fixed, database.open().await, options()).await;
        reach(&handle, ProjectionState::Failed).await;
        assert!(handle.status().last_error.unwrap().contains("PerTarget"), "{kind}");
        let whole = node.projection(table("whole"), database.open().await, options()).await;
        let delivered = node.projection(recorder("delivered"), AtLeastOnce::new(), options()).await;
        for handle in [whole, delivered] {
            let error = handle.rebuild().await.unwrap_err();
            assert!(matches!(error, ControlError::NotRebuildable { .. }), "{kind}: {error}");
        }
        node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_projection_that_cannot_be_rebuilt_refuses_a_rebuild() {
    for (kind, store, _dir) in stores().await {
        let node = local_node(&store).await;
        let (memory, delivered) = (Seen::default(), Seen::default());
        let handles = [
            node.projection(PerTarget::new(recording("memory", &memory)), InMemory::new(), options()).await,
            node.projection(
                PerTarget::new(recording("delivered", &delivered)),
                AtLeastOnce::new(),
                options(),
            )
            .await,
        ];
        for stream in 0..10 {
            let head = append(&store, stream, 1..=20).await;
            for handle in &handles {
                catch_up(handle, head).await;
            }
        }
        for handle in handles {
            let error = handle.rebuild().await.unwrap_err();
            assert!(matches!(error, ControlError::NotRebuildable { .. }), "{kind}: {error}");
            assert!(handle.rebuilding().is_none(), "{kind}");
        }
        node.stop(PATIENCE).await.unwrap();
        let all = log(&store, &Filter::all()).await;
        assert_eq!(memory.positions(), all, "{kind}");
        assert_eq!(delivered.positions(), all, "{kind}");
    }
}

fn recording<T: Send + 'static>(
    name: &'static str,
    seen: &Seen,
) -> impl Fn(BuildTarget) -> Recorder<T> + Send + Sync + 'static {
    let seen = seen.clone();
    move |_| {
        let mut recorder = recorder(name);
        recorder.seen = seen.clone();
        recorder
    }
}

/// Near the end, but not advancing: neither the live version nor an operator waits for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_rebuild_does_not_block_the_live_version() {
    for (kind, store, _dir) in stores().await {
        for partitions in [None, Some(2)] {
            let database = Database::new().await;
            let shut = Arc::new(AtomicBool::new(true));
            let (node, handle) = start(&store, &database, &behind(5, &shut), partitions, options()).await;
            let head = append(&store, 0, 0..10).await;
            catch_up(&handle, head).await;
            handle.rebuild().await.unwrap();
            eventually("the rebuild reports why it does not advance", || {
                let error = handle.rebuilding().and_then(|status| status.last_error);
                error.is_some_and(|error| error.contains("not yet"))
            })
            .await;
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(1_500) {
                let at = Instant::now();
                let head = append(&store, 0, [0]).await;
                catch_up(&handle, head).await;
                assert!(at.elapsed() < Duration::from_secs(3), "{kind}: after {:?}", at.elapsed());
            }
            shut.store(false, Ordering::SeqCst);
            switched(&handle, 1).await;
            assert_eq!(sorted(database.seen("v1").await), log(&store, &Filter::all()).await, "{kind}");
            node.stop(PATIENCE).await.unwrap();
        }
    }
}

/// The rows of the rebuild belong to the old number of partitions.
///
/// Otherwise events would be doubled or lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebuild_keeps_the_number_of_partitions() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        append(&store, 0, 0..100).await;
        let shut = Arc::new(AtomicBool::new(true));
        let slow = behind(50, &shut);
        let (two, handle) = start(&store, &database, &slow, Some(2), options()).await;
        handle.rebuild().await.unwrap();
        two.stop(PATIENCE).await.unwrap();

        let (four, handle) = start(&store, &database, &slow, Some(4), options()).await;
        let error = handle.reset().await.unwrap_err().to_string();
        assert!(error.contains("a rebuild of version 1 in progress"), "{kind}: {error}");
        four.stop(PATIENCE).await.unwrap();

        shut.store(false, Ordering::SeqCst);
        let (two, handle) = start(&store, &database, &slow, Some(2), options()).await;
        switched(&handle, 1).await;
        two.stop(PATIENCE).await.unwrap();
        let (four, handle) = start(&store, &database, &slow, Some(4), options()).await;
        handle.reset().await.unwrap();
        handle.caught_up_to(store.high_water_mark().await.unwrap()).await.unwrap();
        four.stop(PATIENCE).await.unwrap();
    }
}

/// In the middle, from a node that does not build, after the death of the nodes that did.
///
/// The cancellation survives restarts, and a new rebuild is possible.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_rebuild_ends_on_every_node_and_survives_restarts() {
    for (kind, store, _dir) in stores().await {
        for partitions in [None, Some(4)] {
            let database = Database::new().await;
            let shut = Arc::new(AtomicBool::new(true));
            let slow = behind(100, &shut);
            let options = short_lived().batch_size(10);
            let begin = || start(&store, &database, &slow, partitions, options.clone());
            for n in 0..40 {
                append(&store, n, [n, n, n, n, n]).await;
            }
            for dies in [false, true] {
                let (one, first) = begin().await;
                first.wait_until_caught_up(PATIENCE).await.unwrap();
                first.rebuild().await.unwrap();
                eventually("it is in the middle of it", || {
                    first.rebuilding().is_some_and(|status| status.done > 0)
                })
                .await;
                let node = if dies {
                    one.kill();
                    None
                } else {
                    Some(one)
                };
                let (two, second) = begin().await;
                eventually("the other node knows of it", || second.rebuilding().is_some()).await;
                second.cancel_rebuild().await.unwrap();
                eventually("no node rebuilds", || {
                    (dies || first.rebuilding().is_none()) && second.rebuilding().is_none()
                })
                .await;
                assert!(database.seen("v1").await.is_empty(), "{kind}");
                if let Some(one) = node {
                    one.stop(PATIENCE).await.unwrap();
                }
                two.stop(PATIENCE).await.unwrap();
            }
            // A node that starts later does not rebuild either.
            shut.store(false, Ordering::SeqCst);
            let (node, handle) = begin().await;
            catch_up(&handle, append(&store, 0, [1]).await).await;
            assert_eq!((handle.rebuilding(), handle.status().version), (None, 0), "{kind}");
            assert!(database.seen("v1").await.is_empty(), "{kind}");
            // Until a new rebuild: from the start.
            handle.rebuild().await.unwrap();
            switched(&handle, 1).await;
            assert_eq!(sorted(database.seen("v1").await), log(&store, &Filter::all()).await, "{kind}");
            node.stop(PATIENCE).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebuild_in_other_partitions_can_be_cancelled() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        append(&store, 0, 0..100).await;
        let shut = Arc::new(AtomicBool::new(true));
        let slow = behind(50, &shut);
        let (two, handle) = start(&store, &database, &slow, Some(2), options()).await;
        handle.rebuild().await.unwrap();
        eventually("it is in the middle of it", || handle.rebuilding().is_some_and(|status| status.done > 0))
            .await;
        two.stop(PATIENCE).await.unwrap();
        let (four, handle) = start(&store, &database, &slow, Some(4), options()).await;
        let error = handle.reset().await.unwrap_err().to_string();
        assert!(error.contains("cancel the rebuild"), "{kind}: {error}");
        handle.cancel_rebuild().await.unwrap();
        handle.reset().await.unwrap();
        shut.store(false, Ordering::SeqCst);
        handle.rebuild().await.unwrap();
        switched(&handle, 1).await;
        catch_up(&handle, store.high_water_mark().await.unwrap()).await;
        assert_eq!(sorted(database.seen("v1").await), log(&store, &Filter::all()).await, "{kind}");
        four.stop(PATIENCE).await.unwrap();
    }
}

/// Parked events of a version that is not live any more are ignored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parked_events_are_those_of_the_live_version_after_a_cut_over() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        let broken = Arc::new(AtomicBool::new(true));
        let hook = {
            let broken = broken.clone();
            hook(move |event| {
                let fails = [3, 4].contains(&event.position.get()) && broken.load(Ordering::SeqCst);
                if fails { Err("poison".into()) } else { Ok(()) }
            })
        };
        let make = || {
            let hook = hook.clone();
            move |target: BuildTarget| Versioned { version: target.version, from: 0, hook: hook.clone() }
        };
        let link = Link::new(&store);
        let linked: Arc<dyn EventStore> = Arc::new(link.clone());
        let (one, two) = (local_node(&store).await, local_node(&linked).await);
        let park = || options().max_attempts(1).on_failure(FailurePolicy::Park);
        let first = one.projection(PerTarget::new(make()), database.open().await, park()).await;
        let head = append(&store, 0, 0..10).await;
        catch_up(&first, head).await;
        let second = two.projection(PerTarget::new(make()), database.open().await, park()).await;
        reach(&second, ProjectionState::Standby).await;
        link.blind.store(true, Ordering::SeqCst);
        first.rebuild().await.unwrap();
        switched(&first, 1).await;
        broken.store(false, Ordering::SeqCst);
        assert_eq!(second.status().version, 0, "{kind}: it does not know yet");

        second.discard_parked(Position::new(4)).await.unwrap();
        assert_eq!(first.parked(10).await.unwrap().len(), 1, "{kind}");
        assert_eq!(second.parked(10).await.unwrap().len(), 1, "{kind}");
        assert_eq!(second.status().version, 0, "{kind}: it still does not know");
        second.retry_parked(Position::new(3)).await.unwrap();
        assert!(first.parked(10).await.unwrap().is_empty(), "{kind}");
        let [old, new] = [database.seen("v0").await, database.seen("v1").await];
        assert!(!old.contains(&Position::new(3)), "{kind}: {old:?}");
        assert!(new.contains(&Position::new(3)), "{kind}: {new:?}");
        link.blind.store(false, Ordering::SeqCst);
        one.stop(PATIENCE).await.unwrap();
        two.stop(PATIENCE).await.unwrap();
    }
}

/// A lock held by another session at the cut-over, and the number of attempts.
#[derive(Clone, Default)]
struct Lock {
    held: Arc<AtomicBool>,
    tries: Arc<AtomicU64>,
}

struct Locked(Versioned, Lock);

impl Projection for Locked {
    const NAME: &'static str = Versioned::NAME;
    type Event = AnyEvent;
    type Transaction = SqliteConnection;

    async fn apply(
        &mut self,
        _: AnyEvent,
        event: &RecordedEvent,
        tx: &mut SqliteConnection,
    ) -> Result<(), ApplyError> {
        self.0.apply(AnyEvent, event, tx).await
    }

    async fn reset(&mut self, tx: &mut SqliteConnection) -> Result<(), ApplyError> {
        self.0.reset(tx).await
    }

    async fn cut_over(&mut self, tx: &mut SqliteConnection) -> Result<(), ApplyError> {
        self.1.tries.fetch_add(1, Ordering::SeqCst);
        while self.1.held.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.0.cut_over(tx).await
    }
}

/// Follows appends until the second attempt of the cut-over.
async fn goes_on_meanwhile(store: &Arc<dyn EventStore>, handle: &ProjectionHandle, tries: &AtomicU64) {
    let give_up = Instant::now() + PATIENCE;
    while tries.load(Ordering::SeqCst) < 2 {
        let position = append(store, 0, [0]).await;
        let stall = Instant::now();
        catch_up(handle, position).await;
        // 2 s are for the cut-over; the rest is for a machine that is busy with other tests.
        assert!(stall.elapsed() < Duration::from_secs(8), "it was stopped for {:?}", stall.elapsed());
        assert!(Instant::now() < give_up, "it is not retried: {:?}", handle.rebuilding());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(handle.status().version, 0);
    let error = handle.rebuilding().unwrap().last_error.unwrap();
    assert!(error.contains("could not be cut over"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_over_waiting_for_a_lock_lets_the_live_version_continue() {
    for (kind, store, _dir) in stores().await {
        let (database, lock) = (Database::new().await, Lock::default());
        lock.held.store(true, Ordering::SeqCst);
        let node = local_node(&store).await;
        let (free, ours) = (make(&hook(|_| Ok(()))), lock.clone());
        let made = move |target| Locked(free(target), ours.clone());
        let handle = node.projection(PerTarget::new(made), database.open().await, options()).await;
        catch_up(&handle, append(&store, 0, 0..50).await).await;
        handle.rebuild().await.unwrap();
        goes_on_meanwhile(&store, &handle, &lock.tries).await;
        lock.held.store(false, Ordering::SeqCst);
        switched(&handle, 1).await;
        catch_up(&handle, store.high_water_mark().await.unwrap()).await;
        assert_eq!(sorted(database.seen("v1").await), log(&store, &Filter::all()).await, "{kind}");
        assert_eq!(database.seen("live").await, [Position::new(1)], "{kind}: once");
        node.stop(PATIENCE).await.unwrap();
    }
}

/// On a server, which continues to wait for a lock after its client has given up.
#[cfg(all(feature = "postgres", feature = "nats"))]
mod on_a_server {
    use sqlx::{AssertSqlSafe, PgConnection, PgPool};
    use storied::{MemoryStore, PostgresReadModel};

    use super::*;
    use crate::support::PostgresServer;

    /// Readers see a view.
    struct Viewed(u64, Lock);

    async fn execute(tx: &mut PgConnection, sql: String) -> Result<(), ApplyError> {
        sqlx::query(AssertSqlSafe(sql)).execute(tx).await?;
        Ok(())
    }

    impl Projection for Viewed {
        const NAME: &'static str = "viewed";
        type Event = AnyEvent;
        type Transaction = PgConnection;

        async fn apply(
            &mut self,
            _: AnyEvent,
            event: &RecordedEvent,
            tx: &mut PgConnection,
        ) -> Result<(), ApplyError> {
            execute(tx, format!("INSERT INTO seen_{} VALUES ({})", self.0, event.position)).await
        }

        async fn reset(&mut self, tx: &mut PgConnection) -> Result<(), ApplyError> {
            execute(tx, format!("CREATE TABLE seen_{} (position bigint)", self.0)).await
        }

        async fn cut_over(&mut self, tx: &mut PgConnection) -> Result<(), ApplyError> {
            self.1.tries.fetch_add(1, Ordering::SeqCst);
            execute(tx, "ALTER TABLE seen_0 RENAME TO old".into()).await?;
            execute(tx, format!("CREATE OR REPLACE VIEW seen AS SELECT * FROM seen_{}", self.0)).await
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_cut_over_waiting_for_a_reader_lets_the_live_version_continue() {
        let url = PostgresServer::shared().await.create_database().await;
        let pool = PgPool::connect(&url).await.unwrap();
        for sql in ["CREATE TABLE seen_0 (position bigint)", "CREATE VIEW seen AS SELECT * FROM seen_0"] {
            sqlx::query(sql).execute(&pool).await.unwrap();
        }
        let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
        let (node, lock) = (local_node(&store).await, Lock::default());
        let ours = lock.clone();
        let made = move |target: BuildTarget| Viewed(target.version, ours.clone());
        let handle =
            node.projection(PerTarget::new(made), PostgresReadModel::new(pool.clone()), options()).await;
        catch_up(&handle, append(&store, 0, 0..50).await).await;
        // A report, or pg_dump.
        let mut report = pool.begin().await.unwrap();
        sqlx::query("SELECT count(*) FROM seen").execute(&mut *report).await.unwrap();
        handle.rebuild().await.unwrap();
        goes_on_meanwhile(&store, &handle, &lock.tries).await;
        report.rollback().await.unwrap();
        switched(&handle, 1).await;
        catch_up(&handle, store.high_water_mark().await.unwrap()).await;
        let seen: Vec<i64> =
            sqlx::query_scalar("SELECT position FROM seen ORDER BY 1").fetch_all(&pool).await.unwrap();
        let seen: Vec<_> = seen.into_iter().map(|position| Position::new(position as u64)).collect();
        assert_eq!(seen, log(&store, &Filter::all()).await);
        node.stop(PATIENCE).await.unwrap();
    }
}
