//! Nodes that share a read model: one owner, quick takeover, and fenced stale owners.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use storied::projection::{AtLeastOnce, ProjectionState};
use storied::store::{Checkpoint, CheckpointKey, PublisherCheckpoint};
use storied::{EventStore, Filter, Position, PublisherState};

use crate::projection::fixtures::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_death_of_an_owner_costs_no_more_than_its_lease() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        let (one, two) = (local_node(&store).await, local_node(&store).await);
        let first = one.projection(table("table"), database.open().await, short_lived()).await;
        reach(&first, ProjectionState::Following).await;
        let second = two.projection(table("table"), database.open().await, options()).await;
        reach(&second, ProjectionState::Standby).await;
        let writers = Writers::start(&store, 2, 30, 10);
        one.kill();
        reach(&second, ProjectionState::Following).await;
        writers.done().await;
        catch_up(&second, store.high_water_mark().await.unwrap()).await;
        assert_eq!(database.seen("table").await, log(&store, &Filter::all()).await, "{kind}");
        two.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_owner_is_fenced() {
    for (kind, store, _dir) in stores().await {
        append(&store, 0, 1..=3).await;
        let link = Link::new(&store);
        let cut: Arc<dyn EventStore> = Arc::new(link.clone());
        let (one, two) = (local_node(&cut).await, local_node(&store).await);
        let (gate, heirs_gate) = (Gate::closed(), Gate::closed());
        let zombie = recorder("delivered").hook(gate.hook());
        let heir = recorder("delivered").hook(heirs_gate.hook());
        let heir_seen = heir.seen.clone();
        let first = one.projection(zombie, AtLeastOnce::new(), short_lived()).await;
        gate.reached().await;
        // From here on, the first node is in the middle of a batch and cannot renew its lease.
        link.mute.store(true, Ordering::SeqCst);
        let second = two.projection(heir, AtLeastOnce::new(), options()).await;
        // The heir has claimed the checkpoint, and not moved it yet: only the epoch distinguishes
        // the two owners.
        heirs_gate.reached().await;
        assert_eq!(second.status().epoch, 2, "{kind}");
        let claimed = store.checkpoint(&CheckpointKey::new("delivered")).await.unwrap();
        assert_eq!((claimed.position, claimed.epoch), (Position::START, 2), "{kind}");
        gate.open();
        reach(&first, ProjectionState::Standby).await;
        assert_eq!(
            store.checkpoint(&CheckpointKey::new("delivered")).await.unwrap(),
            claimed,
            "{kind}: the zombie wrote nothing"
        );
        assert!(first.status().last_error.is_some());
        heirs_gate.open();

        let head = append(&store, 0, 4..=6).await;
        catch_up(&second, head).await;
        assert_eq!(heir_seen.positions(), log(&store, &Filter::all()).await, "{kind}");
        one.stop(PATIENCE).await.unwrap();
        two.stop(PATIENCE).await.unwrap();
    }
}

/// Nodes come, go, die and lose their leases, with the read model and the checkpoint in one
/// database.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exactly_once_while_owners_come_and_go() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        let dice = Dice::new(3);
        let writers = Writers::start(&store, 2, 100, 20);
        let options = options().batch_size(3).lease(Duration::from_millis(60));
        let mut nodes = Vec::new();
        for round in 0..16 {
            let link = Link::new(&store);
            let cut: Arc<dyn EventStore> = Arc::new(link.clone());
            let node = local_node(&cut).await;
            node.projection(table("table"), database.open().await, options.clone()).await;
            nodes.push((node, link));
            dice.pause(Duration::from_millis(60)).await;
            if nodes.len() == 3 {
                let (node, link) = nodes.remove(dice.roll(3) as usize);
                match round % 3 {
                    0 => node.kill(),
                    1 => node.stop(PATIENCE).await.unwrap(),
                    _ => {
                        link.mute.store(true, Ordering::SeqCst);
                        dice.pause(Duration::from_millis(100)).await;
                        node.kill();
                    }
                }
            }
        }
        writers.done().await;
        let node = local_node(&store).await;
        let handle = node.projection(table("table"), database.open().await, options).await;
        catch_up(&handle, store.high_water_mark().await.unwrap()).await;
        assert_eq!(database.seen("table").await, log(&store, &Filter::all()).await, "{kind}");
        for (node, _) in nodes {
            node.kill();
        }
        node.stop(PATIENCE).await.unwrap();
    }
}

/// Leases start from 1 again while checkpoints do not.
///
/// The event store's leases were lost, or restored from a backup.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_epoch_below_the_checkpoints_is_raised_above_it() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        let head = append(&store, 0, 1..=5).await;
        let first = local_node(&store).await;
        let handle = first.projection(table("table"), database.open().await, options()).await;
        catch_up(&handle, head).await;
        first.stop(PATIENCE).await.unwrap();
        let raised = sqlx::query("UPDATE storied_checkpoints SET epoch = 99");
        raised.execute(database.open().await.pool()).await.unwrap();
        let key = CheckpointKey::new("delivered");
        let none = Checkpoint::default();
        save(&store, key.clone(), none, Checkpoint { epoch: 99, ..none }).await.unwrap();
        let none = PublisherCheckpoint::default();
        let raised = PublisherCheckpoint { epoch: 99, ..none };
        assert!(store.save_publisher_checkpoint(none, raised).await.unwrap());
        for epoch in [100, 101] {
            let log_stream = LogStream::default();
            let node = node(&store, log_stream.clone()).await;
            let handles = [
                node.projection(table("table"), database.open().await, options()).await,
                node.projection(recorder("delivered"), AtLeastOnce::new(), options()).await,
            ];
            let head = append(&store, 0, 1..=5).await;
            for handle in &handles {
                catch_up(handle, head).await;
                assert_eq!(handle.status().epoch, epoch, "{kind}");
            }
            eventually("it publishes", || {
                node.publisher().state == PublisherState::Publishing
                    && log_stream.kept().last().is_some_and(|last| *last == head)
            })
            .await;
            node.stop(PATIENCE).await.unwrap();
            let checkpoint = store.checkpoint(&key).await.unwrap();
            assert_eq!((checkpoint.position, checkpoint.epoch), (head, epoch), "{kind}");
            let checkpoint = store.publisher_checkpoint().await.unwrap();
            assert_eq!((checkpoint.position, checkpoint.epoch), (head, epoch), "{kind}");
        }
        assert_eq!(database.seen("table").await, log(&store, &Filter::all()).await, "{kind}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_projection_may_be_called_as_the_publisher_is() {
    for (kind, store, _dir) in stores().await {
        let log_stream = LogStream::default();
        let node = node(&store, log_stream.clone()).await;
        let recorder = recorder("publisher");
        let seen = recorder.seen.clone();
        let handle = node.projection(recorder, AtLeastOnce::new(), options()).await;
        for n in 0..20 {
            let head = append(&store, 0, [n]).await;
            catch_up(&handle, head).await;
        }
        node.stop(PATIENCE).await.unwrap();
        let all = log(&store, &Filter::all()).await;
        assert_eq!((seen.positions(), log_stream.kept()), (all.clone(), all), "{kind}");
    }
}
