//! Pause, resume, reset.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use storied::projection::{
    ApplyError, ControlError, Delivery, External, FailurePolicy, InMemory, ProjectionState,
};
use storied::store::Checkpoint;
use storied::{EncodeError, EventStore, Filter, MemoryStore, Position, Projection, RecordedEvent};

use crate::support::*;

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
        let park = options().on_failure(FailurePolicy::Park).attempts(1);
        let (memory, delivered) = (recorder("memory"), recorder("delivered"));
        let (memory_seen, delivered_seen) = (memory.seen.clone(), delivered.seen.clone());
        let handles = [
            node.projection(memory.hook(poison(3, &broken)), InMemory::new(), park.clone()).await,
            node.projection(delivered.hook(poison(3, &broken)), External::new(), park.clone()).await,
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

        // A paused one stays paused, and is empty.
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

struct NoReset;

impl Projection for NoReset {
    type Transaction = ();

    fn name(&self) -> &str {
        "no reset"
    }

    fn filter(&self) -> Result<Filter, EncodeError> {
        Ok(Filter::all())
    }

    async fn apply(&mut self, _: &RecordedEvent, (): &mut ()) -> Result<(), ApplyError> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_that_is_refused_changes_nothing() {
    for (_, store, _dir) in stores().await {
        let node = local_node(&store).await;
        let handle = node.projection(NoReset, InMemory::new(), options()).await;
        let head = append(&store, 0, 0..5).await;
        catch_up(&handle, head).await;
        let error = handle.reset().await.unwrap_err();
        assert!(
            matches!(&error, ControlError::Refused { reason, .. } if reason.contains("reset")),
            "{error}"
        );
        assert_eq!(handle.status().position, head);
        let head = append(&store, 0, 0..5).await;
        catch_up(&handle, head).await;
        assert_eq!(handle.status().events_applied, 10);

        node.stop(PATIENCE).await.unwrap();
        let error = handle.pause().await.unwrap_err();
        assert!(matches!(error, ControlError::Stopped { .. }), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_applied_before_it_is_known_that_it_may() {
    for (kind, store, _dir) in stores().await {
        store.set_paused("memory", true).await.unwrap();
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

/// "… or reset the projection", say the errors.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_helps_where_the_checkpoint_does_not_fit_the_log() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        let before: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
        let head = append(&before, 0, 1..=20).await;
        let node = local_node(&before).await;
        let broken = Arc::new(AtomicBool::new(true));
        let park = options().on_failure(FailurePolicy::Park).attempts(1);
        for name in ["table", "refusing"] {
            let table = table(name).hook(poison(3, &broken));
            let handle = node.projection(table, database.open().await, park.clone()).await;
            catch_up(&handle, head).await;
        }
        node.stop(PATIENCE).await.unwrap();

        // Another store, with less in it: the checkpoint is neither of this store nor within its log.
        let head = append(&store, 0, 1..=10).await;
        let (one, two) = (local_node(&store).await, local_node(&store).await);
        let handle = one.projection(table("table"), database.open().await, options()).await;
        reach(&handle, ProjectionState::Failed).await;
        let advice = handle.status().last_error.unwrap();
        assert!(advice.contains("reset"), "{kind}: {advice}");
        let standby = two.projection(table("table"), database.open().await, options()).await;
        // It takes over what the first one cannot do, and cannot do it either.
        reach(&standby, ProjectionState::Failed).await;
        assert_eq!(database.seen("table").await.len(), 19, "{kind}: nothing was changed");
        assert_eq!(handle.parked(10).await.unwrap().len(), 1, "{kind}");

        // From any node: both try again, the other one when it hears of it. Who waits there before is told of the failure.
        standby.reset().await.unwrap();
        catch_up(&standby, head).await;
        leave(&handle, ProjectionState::Failed).await;
        catch_up(&handle, head).await;
        let all = log(&store, &Filter::all()).await;
        assert_eq!(database.seen("table").await, all, "{kind}");
        assert!(handle.parked(10).await.unwrap().is_empty(), "{kind}");

        // One that refuses is as before.
        let model = database.open().await;
        let handle = one.projection(Refusing("refusing"), model, options()).await;
        reach(&handle, ProjectionState::Failed).await;
        let error = handle.reset().await.unwrap_err();
        assert!(matches!(error, ControlError::Refused { .. }), "{error}");
        handle.resume().await.unwrap();
        reach(&handle, ProjectionState::Failed).await;
        assert!(handle.status().last_error.unwrap().contains("in event store"), "{kind}");

        // A checkpoint beyond the end of the log: the log was restored from a backup.
        let ahead = Checkpoint { position: Position::new(99), epoch: 7, mark: 0 };
        store.save_checkpoint("projection/delivered", Checkpoint::default(), ahead, None).await.unwrap();
        let delivered = recorder("delivered");
        let seen = delivered.seen.clone();
        let handle = one.projection(delivered, External::new(), options()).await;
        reach(&handle, ProjectionState::Failed).await;
        assert!(handle.status().last_error.unwrap().contains("position 99"));
        handle.reset().await.unwrap();
        catch_up(&handle, head).await;
        assert_eq!(seen.positions(), all, "{kind}");
        let checkpoint = store.checkpoint("projection/delivered").await.unwrap();
        assert_eq!((checkpoint.position, checkpoint.epoch), (head, 8), "{kind}");
        one.stop(PATIENCE).await.unwrap();
        two.stop(PATIENCE).await.unwrap();

        // The same with a read model of its own.
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
    type Transaction = sqlx::SqliteConnection;

    fn name(&self) -> &str {
        self.0
    }

    fn filter(&self) -> Result<Filter, EncodeError> {
        Ok(Filter::all())
    }

    async fn apply(&mut self, _: &RecordedEvent, _: &mut sqlx::SqliteConnection) -> Result<(), ApplyError> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_projection_can_be_asked_what_it_parked_from_the_first_moment_on() {
    for (kind, store, _dir) in stores().await {
        let node = local_node(&store).await;
        let database = Database::new().await;
        let model = database.open().await;
        // Nobody waits in between, and the first is to be prepared while somebody else has the database.
        let lock = model.pool().begin_with("BEGIN IMMEDIATE").await.unwrap();
        let handles = [
            node.projection(table("table"), model.clone(), options()).await,
            node.projection(recorder("delivered"), External::new(), options()).await,
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

/// Tells others of events, and knows what they were told before a reset.
struct Mails {
    sent: Arc<Mutex<Vec<Position>>>,
    seen: Arc<Mutex<Vec<Position>>>,
}

impl Projection for Mails {
    type Transaction = Delivery;

    fn name(&self) -> &str {
        "mails"
    }

    fn filter(&self) -> Result<Filter, EncodeError> {
        Ok(Filter::all())
    }

    async fn apply(&mut self, event: &RecordedEvent, delivery: &mut Delivery) -> Result<(), ApplyError> {
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
async fn a_replay_says_so_and_nothing_is_sent_again() {
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
                None => node.projection(mails(), External::new(), options()).await,
                // It was whole before, so that it has to be reset; and nothing that was sent is sent again.
                Some(count) => node.partitioned(count, move |_| mails(), External::new(), options()).await,
            };
            if partitions.is_some() {
                reach(&handle, ProjectionState::Failed).await;
                handle.reset().await.unwrap();
            }
            let before = log(&store, &Filter::all()).await.len();
            for n in 0..10 {
                append(&store, n, [n, n]).await;
            }
            catch_up(&handle, store.frontier().await.unwrap()).await;
            handle.reset().await.unwrap();
            handle.reset().await.unwrap();
            for n in 0..10 {
                append(&store, n, [n]).await;
            }
            catch_up(&handle, store.frontier().await.unwrap()).await;
            let all = log(&store, &Filter::all()).await;
            let mut sent = sent.lock().unwrap().clone();
            sent.sort_unstable();
            assert_eq!(sent, all[before..], "{kind} {partitions:?}: each once");
            assert!(seen.lock().unwrap().len() >= all.len(), "{kind}: and all of them were seen again");
            node.stop(PATIENCE).await.unwrap();
        }
    }
}
