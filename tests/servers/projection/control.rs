//! Pause, resume, reset.

use std::collections::BTreeSet;
use std::future::Future;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use storied::projection::{
    ApplyError, AtLeastOnce, ControlError, Delivery, FailurePolicy, InMemory, PerTarget, ProjectionState,
};
use storied::store::{BoxFuture, Checkpoint, CheckpointKey, ControlChange};
use storied::testing::Node;
use storied::{
    AnyEvent, EventStore, Filter, MemoryStore, Position, Projection, ProjectionHandle, RecordedEvent,
};

use crate::projection::fixtures::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_reaches_every_node() {
    for (kind, store, _dir) in stores().await {
        let (one, two) = (local_node(&store).await, local_node(&store).await);
        let first = one.projection(recorder("memory"), InMemory::new(), options()).await;
        let second = two.projection(recorder("memory"), InMemory::new(), options()).await;
        reach(&second, ProjectionState::Following).await;
        first.pause().await.unwrap();
        reach(&second, ProjectionState::Paused).await;
        let head = append(&store, 0, 0..5).await;
        second.resume().await.unwrap();
        for handle in [&first, &second] {
            catch_up(handle, head).await;
        }
        assert_eq!(first.status().events_applied, 5, "{kind}");
        one.stop(PATIENCE).await.unwrap();
        two.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_applies_the_log_from_its_start() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        let broken = Arc::new(AtomicBool::new(true));
        let node = local_node(&store).await;
        let park = options().on_failure(FailurePolicy::Park).max_attempts(1);
        let (memory, delivered) = (recorder("memory"), recorder("delivered"));
        let (memory_seen, delivered_seen) = (memory.seen.clone(), delivered.seen.clone());
        let handles = [
            node.projection(memory.hook(poison(3, &broken)), InMemory::new(), park.clone()).await,
            node.projection(delivered.hook(poison(3, &broken)), AtLeastOnce::new(), park.clone()).await,
            node.projection(table("table").hook(poison(3, &broken)), database.open().await, park).await,
        ];
        let head = append(&store, 0, 1..=10).await;
        for handle in &handles {
            catch_up(handle, head).await;
            assert_eq!(handle.parked(10).await.unwrap().len(), 1, "{kind}");
        }
        broken.store(false, Ordering::SeqCst);
        for handle in &handles {
            handle.reset().await.unwrap();
        }
        let head = append(&store, 0, 1..=10).await;
        for handle in &handles {
            catch_up(handle, head).await;
            assert!(handle.parked(10).await.unwrap().is_empty(), "{kind}");
        }
        let all = log(&store, &Filter::all()).await;
        assert_eq!(database.seen("table").await, all, "{kind}");
        assert_eq!(memory_seen.positions(), all, "{kind}");
        assert_eq!(delivered_seen.positions(), all, "{kind}");
        node.stop(PATIENCE).await.unwrap();

        // A paused projection stays paused, and is empty.
        let node = local_node(&store).await;
        let handle = node.projection(table("table"), database.open().await, options()).await;
        catch_up(&handle, head).await;
        handle.pause().await.unwrap();
        handle.reset().await.unwrap();
        assert_eq!(handle.status().position, Position::START);
        assert!(database.seen("table").await.is_empty());
        reach(&handle, ProjectionState::Paused).await;
        handle.resume().await.unwrap();
        catch_up(&handle, head).await;
        assert_eq!(database.seen("table").await, all, "{kind}");
        node.stop(PATIENCE).await.unwrap();
    }
}

/// Records events, and cannot be reset.
struct NoReset<T> {
    name: &'static str,
    seen: Arc<Mutex<Vec<Position>>>,
    transaction: PhantomData<fn(T)>,
}

impl<T> NoReset<T> {
    fn new(name: &'static str, seen: &Arc<Mutex<Vec<Position>>>) -> Self {
        Self { name, seen: seen.clone(), transaction: PhantomData }
    }
}

impl<T: Send + 'static> Projection for NoReset<T> {
    const NAME: &'static str = "noreset";
    type Event = AnyEvent;
    type Transaction = T;

    fn name(&self) -> &str {
        self.name
    }

    async fn apply(&mut self, _: AnyEvent, event: &RecordedEvent, _: &mut T) -> Result<(), ApplyError> {
        self.seen.lock().unwrap().push(event.position);
        Ok(())
    }
}

async fn is_refused(handle: &ProjectionHandle) {
    let error = handle.reset().await.unwrap_err();
    assert!(matches!(&error, ControlError::Refused { reason, .. } if reason.contains("reset")), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_that_is_refused_changes_nothing() {
    for (kind, store, _dir) in stores().await {
        let seen: [Arc<Mutex<Vec<Position>>>; 2] = Default::default();
        let [whole, parts] = &seen;
        let cut = || {
            let parts = parts.clone();
            move |_| NoReset::new("parts", &parts)
        };
        let more = async || {
            for n in 0..10 {
                append(&store, n, [n]).await;
            }
            store.high_water_mark().await.unwrap()
        };
        let node = local_node(&store).await;
        let handles = [
            node.projection(NoReset::new("whole", whole), AtLeastOnce::new(), options()).await,
            node.projection(PerTarget::new(cut()), AtLeastOnce::new(), options().partitions(4)).await,
        ];
        let before = more().await;
        for handle in &handles {
            catch_up(handle, before).await;
            is_refused(handle).await;
        }
        let head = more().await;
        for handle in &handles {
            catch_up(handle, head).await;
        }
        // Events that arrive while a checkpoint moves back to its former position may come twice.
        let old = |seen: &Arc<Mutex<Vec<Position>>>| {
            seen.lock().unwrap().iter().filter(|position| **position <= before).count()
        };
        assert_eq!(seen.each_ref().map(old), [10; 2], "{kind}");
        node.stop(PATIENCE).await.unwrap();
        let error = handles[0].pause().await.unwrap_err();
        assert!(matches!(error, ControlError::Stopped { .. }), "{error}");

        // A reset that would change the number of partitions changes nothing either.
        let node = local_node(&store).await;
        let two = node.projection(PerTarget::new(cut()), AtLeastOnce::new(), options().partitions(2)).await;
        reach(&two, ProjectionState::Failed).await;
        is_refused(&two).await;
        node.stop(PATIENCE).await.unwrap();
        let node = local_node(&store).await;
        let four = node.projection(PerTarget::new(cut()), AtLeastOnce::new(), options().partitions(4)).await;
        catch_up(&four, more().await).await;
        assert_eq!(old(parts), 10, "{kind}: in as many partitions as before");
        let all = log(&store, &Filter::all()).await;
        assert_eq!(parts.lock().unwrap().iter().copied().collect::<BTreeSet<_>>(), all.into_iter().collect());
        node.stop(PATIENCE).await.unwrap();
    }
}

type Ending = Arc<dyn Fn() -> BoxFuture<'static, Result<(), ApplyError>> + Send + Sync>;

/// An external index that can be emptied.
///
/// The test defines the outcome of emptying, and when it happens.
#[derive(Clone)]
struct Index {
    has: Arc<Mutex<BTreeSet<Position>>>,
    /// Runs before the index is emptied.
    before: Ending,
    /// Runs after the index is emptied.
    behind: Ending,
}

impl Index {
    fn new() -> Self {
        let nothing: Ending = Arc::new(|| Box::pin(async { Ok(()) }));
        Self { has: Arc::default(), before: nothing.clone(), behind: nothing }
    }

    fn has(&self) -> Vec<Position> {
        self.has.lock().unwrap().iter().copied().collect()
    }

    async fn on(&self, node: &Node, partitions: Option<u16>) -> ProjectionHandle {
        let index = self.clone();
        match partitions {
            None => node.projection(index, AtLeastOnce::new(), short_lived()).await,
            Some(count) => {
                node.projection(
                    PerTarget::new(move |_| index.clone()),
                    AtLeastOnce::new(),
                    short_lived().partitions(count),
                )
                .await
            }
        }
    }

    /// Eventually the index has everything, regardless of the outcome of a reset.
    async fn is_whole(&self, what: &str, store: &Arc<dyn EventStore>, handle: &ProjectionHandle) {
        catch_up(handle, append(store, 0, [0]).await).await;
        let all = log(store, &Filter::all()).await;
        eventually(what, || self.has() == all).await;
    }
}

impl Projection for Index {
    const NAME: &'static str = "index";
    type Event = AnyEvent;
    type Transaction = Delivery;

    async fn apply(
        &mut self,
        _: AnyEvent,
        event: &RecordedEvent,
        _: &mut Delivery,
    ) -> Result<(), ApplyError> {
        self.has.lock().unwrap().insert(event.position);
        Ok(())
    }

    async fn reset(&mut self, _: &mut Delivery) -> Result<(), ApplyError> {
        (self.before)().await?;
        self.has.lock().unwrap().clear();
        (self.behind)().await
    }
}

/// Each store with an external index, unpartitioned and partitioned.
///
/// All cases run concurrently, because an order lease holds up the others for some seconds.
async fn with_indexes<F: Future<Output = ()>>(test: impl Fn(String, Arc<dyn EventStore>, Option<u16>) -> F) {
    let (one, other) = (stores().await, stores().await);
    let cases = one.iter().map(|store| (store, None)).chain(other.iter().map(|store| (store, Some(4))));
    let tests = cases.map(async |((kind, store, _dir), partitions)| {
        for n in 0..40 {
            append(store, n, [n]).await;
        }
        test(format!("{kind}, {partitions:?}"), store.clone(), partitions).await;
    });
    futures_util::future::join_all(tests).await;
}

/// The user's code fails half-way, and the remaining data is unknown.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_external_reset_that_fails_half_way_loses_nothing() {
    with_indexes(async |what, store, partitions| {
        let node = local_node(&store).await;
        let failing: Ending = Arc::new(|| Box::pin(async { Err("the second half is locked".into()) }));
        let index = Index { behind: failing, ..Index::new() };
        let handle = index.on(&node, partitions).await;
        catch_up(&handle, store.high_water_mark().await.unwrap()).await;
        let error = handle.reset().await.unwrap_err();
        assert!(matches!(error, ControlError::Refused { .. }), "{what}: {error}");
        index.is_whole(&what, &store, &handle).await;
        node.stop(PATIENCE).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_external_reset_cut_off_from_its_store_loses_nothing() {
    with_indexes(async |what, store, partitions| {
        let link = Link::new(&store);
        let linked: Arc<dyn EventStore> = Arc::new(link.clone());
        let node = local_node(&linked).await;
        let cut: Ending = {
            let down = link.down.clone();
            Arc::new(move || {
                down.store(true, Ordering::SeqCst);
                Box::pin(async { Ok(()) })
            })
        };
        let index = Index { behind: cut, ..Index::new() };
        let handle = index.on(&node, partitions).await;
        catch_up(&handle, store.high_water_mark().await.unwrap()).await;
        let error = handle.reset().await.unwrap_err();
        assert!(matches!(error, ControlError::Store(_)), "{what}: {error}");
        link.down.store(false, Ordering::SeqCst);
        index.is_whole(&what, &store, &handle).await;
        node.stop(PATIENCE).await.unwrap();
    })
    .await;
}

/// A node dies in a reset.
///
/// The owner is another node that receives no notification: it writes nothing into the index before
/// it is emptied.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_external_reset_loses_nothing() {
    with_indexes(async |what, store, partitions| {
        let link = Link::new(&store);
        let linked: Arc<dyn EventStore> = Arc::new(link.clone());
        let (one, two) = (local_node(&linked).await, local_node(&store).await);
        let index = Index::new();
        let owner = index.on(&one, partitions).await;
        catch_up(&owner, store.high_water_mark().await.unwrap()).await;
        let (begun, emptied) = (Gate::closed(), Gate::closed());
        let wait = |gate: &Gate| -> Ending {
            let gate = gate.clone();
            Arc::new(move || gate.pass())
        };
        let dying = Index { before: wait(&begun), behind: wait(&emptied), ..index.clone() };
        let other = dying.on(&two, partitions).await;
        catch_up(&other, store.high_water_mark().await.unwrap()).await;
        link.blind.store(true, Ordering::SeqCst);
        let reset = tokio::spawn(async move { other.reset().await });
        begun.reached().await;
        // The owner finds its checkpoints moved.
        for n in 0..40 {
            append(&store, n, [n]).await;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        begun.open();
        emptied.reached().await;
        two.kill();
        reset.await.unwrap().unwrap_err();
        link.blind.store(false, Ordering::SeqCst);
        index.is_whole(&what, &store, &owner).await;
        one.stop(PATIENCE).await.unwrap();
    })
    .await;
}

/// Longer than an order lease lasts without renewal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn owners_wait_during_a_long_external_reset() {
    with_indexes(async |what, store, partitions| {
        let (one, two) = (local_node(&store).await, local_node(&store).await);
        let index = Index::new();
        let owner = index.on(&one, partitions).await;
        catch_up(&owner, store.high_water_mark().await.unwrap()).await;
        let (slow, emptied) = (Gate::closed(), Gate::closed());
        let (begun, behind) = (slow.clone(), emptied.clone());
        let dying = Index {
            before: Arc::new(move || begun.pass()),
            behind: Arc::new(move || behind.pass()),
            ..index.clone()
        };
        let other = dying.on(&two, partitions).await;
        catch_up(&other, store.high_water_mark().await.unwrap()).await;
        let reset = tokio::spawn(async move { other.reset().await });
        slow.reached().await;
        tokio::time::sleep(Duration::from_secs(12)).await;
        slow.open();
        emptied.reached().await;
        two.kill();
        reset.await.unwrap().unwrap_err();
        index.is_whole(&what, &store, &owner).await;
        one.stop(PATIENCE).await.unwrap();
    })
    .await;
}

/// A node that is not held up cannot leave stale events in the index.
///
/// A node of an earlier version is such a node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_external_reset_undoes_concurrent_progress() {
    with_indexes(async |what, store, partitions| {
        let node = local_node(&store).await;
        // The first start in partitions has moved the checkpoint, too.
        let reset = if partitions.is_none() { 1 } else { 2 };
        let rival: Ending = {
            let store = store.clone();
            Arc::new(move || {
                let store = store.clone();
                Box::pin(async move {
                    let key = CheckpointKey::new("index");
                    let found = store.checkpoint(&key).await?;
                    // Once only: before, the position was elsewhere.
                    if found.position == Position::START && found.generation == reset {
                        let went_on = Checkpoint { position: Position::new(30), ..found };
                        save(&store, key, found, went_on).await?;
                    }
                    Ok(())
                })
            })
        };
        let index = Index { before: rival, ..Index::new() };
        let handle = index.on(&node, partitions).await;
        catch_up(&handle, store.high_water_mark().await.unwrap()).await;
        handle.reset().await.unwrap();
        index.is_whole(&what, &store, &handle).await;
        node.stop(PATIENCE).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_applied_before_the_pause_state_is_known() {
    for (kind, store, _dir) in stores().await {
        store.control("memory", ControlChange::Pause).await.unwrap();
        append(&store, 0, 0..5).await;
        let link = Link::new(&store);
        link.down.store(true, Ordering::SeqCst);
        let cut: Arc<dyn EventStore> = Arc::new(link.clone());
        let node = local_node(&cut).await;
        let recorder = recorder("memory");
        let seen = recorder.seen.clone();
        let handle = node.projection(recorder, InMemory::new(), options()).await;
        reach(&handle, ProjectionState::Retrying).await;
        link.down.store(false, Ordering::SeqCst);
        reach(&handle, ProjectionState::Paused).await;
        assert!(seen.positions().is_empty(), "{kind}");
        node.stop(PATIENCE).await.unwrap();
    }
}

/// The error messages advise: "… or reset the projection".
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_repairs_a_checkpoint_that_does_not_fit_the_log() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        let before: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
        let head = append(&before, 0, 1..=20).await;
        let node = local_node(&before).await;
        let broken = Arc::new(AtomicBool::new(true));
        let park = options().on_failure(FailurePolicy::Park).max_attempts(1);
        for name in ["table", "refusing"] {
            let table = table(name).hook(poison(3, &broken));
            let handle = node.projection(table, database.open().await, park.clone()).await;
            catch_up(&handle, head).await;
        }
        node.stop(PATIENCE).await.unwrap();

        // Another store with fewer events: the checkpoint is neither of this store nor within its
        // log.
        let head = append(&store, 0, 1..=10).await;
        let (one, two) = (local_node(&store).await, local_node(&store).await);
        let handle = one.projection(table("table"), database.open().await, options()).await;
        reach(&handle, ProjectionState::Failed).await;
        let advice = handle.status().last_error.unwrap();
        assert!(advice.contains("reset"), "{kind}: {advice}");
        let standby = two.projection(table("table"), database.open().await, options()).await;
        // The standby takes over after the failure of the first node, and fails as well.
        reach(&standby, ProjectionState::Failed).await;
        assert_eq!(database.seen("table").await.len(), 19, "{kind}: nothing was changed");
        assert_eq!(handle.parked(10).await.unwrap().len(), 1, "{kind}");

        // From any node: both nodes retry, the other one when it is notified. A wait that began
        // earlier fails.
        standby.reset().await.unwrap();
        catch_up(&standby, head).await;
        leave(&handle, ProjectionState::Failed).await;
        catch_up(&handle, head).await;
        let all = log(&store, &Filter::all()).await;
        assert_eq!(database.seen("table").await, all, "{kind}");
        assert!(handle.parked(10).await.unwrap().is_empty(), "{kind}");

        // After a refused reset, the projection is unchanged.
        let model = database.open().await;
        let handle = one.projection(Refusing("refusing"), model, options()).await;
        reach(&handle, ProjectionState::Failed).await;
        let error = handle.reset().await.unwrap_err();
        assert!(matches!(error, ControlError::Refused { .. }), "{error}");
        handle.resume().await.unwrap();
        reach(&handle, ProjectionState::Failed).await;
        assert!(handle.status().last_error.unwrap().contains("in event store"), "{kind}");

        // A checkpoint beyond the end of the log: the log was restored from a backup.
        let ahead = Checkpoint { position: Position::new(99), epoch: 7, ..Checkpoint::default() };
        let key = CheckpointKey::new("delivered");
        save(&store, key.clone(), Checkpoint::default(), ahead).await.unwrap();
        let delivered = recorder("delivered");
        let seen = delivered.seen.clone();
        let handle = one.projection(delivered, AtLeastOnce::new(), options()).await;
        reach(&handle, ProjectionState::Failed).await;
        assert!(handle.status().last_error.unwrap().contains("position 99"));
        handle.reset().await.unwrap();
        catch_up(&handle, head).await;
        assert_eq!(seen.positions(), all, "{kind}");
        let checkpoint = store.checkpoint(&key).await.unwrap();
        assert_eq!((checkpoint.position, checkpoint.epoch), (head, 8), "{kind}");
        one.stop(PATIENCE).await.unwrap();
        two.stop(PATIENCE).await.unwrap();

        // The same with a separate read model.
        sqlx::query("UPDATE storied_checkpoints SET position = 99")
            .execute(database.open().await.pool())
            .await
            .unwrap();
        let node = local_node(&store).await;
        let handle = node.projection(table("table"), database.open().await, options()).await;
        reach(&handle, ProjectionState::Failed).await;
        handle.reset().await.unwrap();
        catch_up(&handle, head).await;
        assert_eq!(database.seen("table").await, all, "{kind}");
        node.stop(PATIENCE).await.unwrap();
    }
}

/// Writes nothing, and cannot be reset.
struct Refusing(&'static str);

impl Projection for Refusing {
    const NAME: &'static str = "refusing";
    type Event = AnyEvent;
    type Transaction = sqlx::SqliteConnection;

    fn name(&self) -> &str {
        self.0
    }

    async fn apply(
        &mut self,
        _: AnyEvent,
        _: &RecordedEvent,
        _: &mut sqlx::SqliteConnection,
    ) -> Result<(), ApplyError> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parked_events_can_be_listed_from_the_start() {
    for (kind, store, _dir) in stores().await {
        let node = local_node(&store).await;
        let database = Database::new().await;
        let model = database.open().await;
        // No call waits in between, and the first call must be prepared while another connection
        // has locked the database.
        let lock = model.pool().begin_with("BEGIN IMMEDIATE").await.unwrap();
        let handles = [
            node.projection(table("table"), model.clone(), options()).await,
            node.projection(recorder("delivered"), AtLeastOnce::new(), options()).await,
            node.projection(recorder("memory"), InMemory::new(), options()).await,
        ];
        let asked = handles.each_ref().map(|handle| async move {
            let none = handle.parked(10).await.unwrap();
            let error = handle.discard_parked(Position::new(1)).await.unwrap_err();
            (none.len(), matches!(error, ControlError::NotParked { .. }))
        });
        let unlocked = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            lock.rollback().await.unwrap();
        };
        let (answers, ()) = tokio::join!(futures_util::future::join_all(asked), unlocked);
        assert_eq!(answers, [(0, true); 3], "{kind}");
        node.stop(PATIENCE).await.unwrap();
    }
}

/// Sends a mail for each event, except for events that were sent before a reset.
struct Mails {
    sent: Arc<Mutex<Vec<Position>>>,
    seen: Arc<Mutex<Vec<Position>>>,
}

impl Projection for Mails {
    const NAME: &'static str = "mails";
    type Event = AnyEvent;
    type Transaction = Delivery;

    async fn apply(
        &mut self,
        _: AnyEvent,
        event: &RecordedEvent,
        delivery: &mut Delivery,
    ) -> Result<(), ApplyError> {
        self.seen.lock().unwrap().push(event.position);
        if !delivery.is_replay(event) {
            self.sent.lock().unwrap().push(event.position);
        }
        Ok(())
    }

    async fn reset(&mut self, _: &mut Delivery) -> Result<(), ApplyError> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_is_marked_and_sends_nothing_again() {
    for (kind, store, _dir) in stores().await {
        for partitions in [None, Some(4)] {
            let (sent, seen) =
                (Arc::<Mutex<Vec<Position>>>::default(), Arc::<Mutex<Vec<Position>>>::default());
            let mails = {
                let (sent, seen) = (sent.clone(), seen.clone());
                move || Mails { sent: sent.clone(), seen: seen.clone() }
            };
            let node = local_node(&store).await;
            let handle = match partitions {
                None => node.projection(mails(), AtLeastOnce::new(), options()).await,
                // It was unpartitioned before, so it must be reset; no mail is sent again.
                Some(count) => {
                    node.projection(
                        PerTarget::new(move |_| mails()),
                        AtLeastOnce::new(),
                        options().partitions(count),
                    )
                    .await
                }
            };
            if partitions.is_some() {
                reach(&handle, ProjectionState::Failed).await;
                handle.reset().await.unwrap();
            }
            let before = log(&store, &Filter::all()).await.len();
            for n in 0..10 {
                append(&store, n, [n, n]).await;
            }
            catch_up(&handle, store.high_water_mark().await.unwrap()).await;
            handle.reset().await.unwrap();
            handle.reset().await.unwrap();
            for n in 0..10 {
                append(&store, n, [n]).await;
            }
            catch_up(&handle, store.high_water_mark().await.unwrap()).await;
            let all = log(&store, &Filter::all()).await;
            let mut sent = sent.lock().unwrap().clone();
            sent.sort_unstable();
            assert_eq!(sent, all[before..], "{kind} {partitions:?}: each once");
            assert!(seen.lock().unwrap().len() >= all.len(), "{kind}: and all of them were seen again");
            node.stop(PATIENCE).await.unwrap();
        }
    }
}

/// The end of the order lease announces the reset then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_that_cannot_be_announced_reaches_the_owner() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, 1..=5).await;
    let (database, link) = (Database::new().await, Link::new(&store));
    let cut: Arc<dyn EventStore> = Arc::new(link.clone());
    let (one, two) = (local_node(&store).await, local_node(&cut).await);
    let owner = one.projection(table("table"), database.open().await, options()).await;
    owner.wait_until_caught_up(PATIENCE).await.unwrap();
    let standby = two.projection(table("table"), database.open().await, options()).await;
    reach(&standby, ProjectionState::Standby).await;
    assert_eq!(database.seen("table").await.len(), 5);
    link.uncontrolled.store(true, Ordering::SeqCst);
    standby.reset().await.unwrap();
    crate::support::eventually_async("the owner applies the log again", async || {
        database.seen("table").await.len() == 5
    })
    .await;
    one.stop(PATIENCE).await.unwrap();
    two.stop(PATIENCE).await.unwrap();
}

/// The other nodes notice the reset only later: until then, their last known position is old.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_on_another_node_sees_a_reset_at_once() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        let nodes = [local_node(&store).await, local_node(&store).await, local_node(&store).await];
        let head = append(&store, 0, 1..=200).await;
        let mut handles = Vec::new();
        for node in &nodes {
            handles.push(node.projection(table("table"), database.open().await, options()).await);
        }
        for handle in &handles {
            catch_up(handle, head).await;
            eventually("the position is known", || handle.status().position == head).await;
        }
        let all = log(&store, &Filter::all()).await;
        for round in 0..6 {
            let (resets, waits) = (&handles[round % 3], &handles[(round + 1 + round / 3) % 3]);
            resets.reset().await.unwrap();
            if round % 2 == 0 {
                waits.wait_until_caught_up(PATIENCE).await.unwrap();
            } else {
                waits.caught_up_to(head).await.unwrap();
            }
            assert_eq!(database.seen("table").await, all, "{kind}, round {round}");
            for handle in &handles {
                eventually("the position is known", || handle.status().position == head).await;
            }
        }
        for node in nodes {
            node.stop(PATIENCE).await.unwrap();
        }
    }
}
