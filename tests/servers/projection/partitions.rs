//! Projections with partitions that nodes share.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use storied::projection::{AtLeastOnce, BuildTarget, FailurePolicy, InMemory, PerTarget, ProjectionState};
use storied::runtime::StartError;
use storied::testing::Node;
use storied::{
    EventStore, Filter, MemoryStore, Partition, Position, ProjectionHandle, ProjectionOptions, ReadLog,
    Runtime,
};
use tokio::time::Instant;
use uuid::Uuid;

use crate::projection::fixtures::*;

const PARTITIONS: u16 = 8;

async fn join(
    store: &Arc<dyn EventStore>,
    database: &Database,
    options: ProjectionOptions,
) -> (Node, ProjectionHandle) {
    let node = local_node(store).await;
    let handle = node
        .projection(PerTarget::new(|_| table("table")), database.open().await, options.partitions(PARTITIONS))
        .await;
    (node, handle)
}

/// Number of partitions of each owner, in descending order; unowned partitions are not counted.
fn balance(handle: &ProjectionHandle) -> Vec<usize> {
    let mut owned: BTreeMap<Uuid, usize> = BTreeMap::new();
    for owner in handle.status().partitions.iter().filter_map(|partition| partition.owner) {
        *owned.entry(owner).or_default() += 1;
    }
    let mut sizes: Vec<_> = owned.into_values().collect();
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    sizes
}

async fn balanced(handle: &ProjectionHandle, expected: &[usize]) {
    eventually(&format!("{expected:?}"), || balance(handle) == expected).await;
}

/// The positions in the table must equal those of the log, by partition and in order.
pub async fn assert_exact(database: &Database, store: &Arc<dyn EventStore>, name: &str, partitions: u16) {
    let mut streams = BTreeMap::new();
    let mut after = Position::START;
    loop {
        let page = store.read_log(ReadLog::after(after)).await.unwrap();
        streams.extend(page.events.iter().map(|event| (event.position, event.stream.clone())));
        after = page.scanned_to;
        if !page.has_more() {
            break;
        }
    }
    let by_partition = |positions: Vec<Position>| {
        let mut found: BTreeMap<u16, Vec<Position>> = BTreeMap::new();
        for position in positions {
            found.entry(Partition::of(&streams[&position], partitions).index()).or_default().push(position);
        }
        found
    };
    let log = by_partition(streams.keys().copied().collect());
    assert_eq!(by_partition(database.seen(name).await), log);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_share_the_partitions_evenly_as_they_come_and_go() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        // So long that only the release of leases can explain the result.
        let options = options().lease(Duration::from_secs(600));
        let (one, first) = join(&store, &database, options.clone()).await;
        balanced(&first, &[8]).await;
        let (two, second) = join(&store, &database, options.clone()).await;
        balanced(&first, &[4, 4]).await;
        let (three, third) = join(&store, &database, options.clone()).await;
        for handle in [&first, &second, &third] {
            balanced(handle, &[3, 3, 2]).await;
        }
        for n in 0..40 {
            let position = append(&store, n, [n]).await;
            if n % 10 == 0 {
                for handle in [&first, &second, &third] {
                    catch_up(handle, position).await;
                }
            }
        }
        let left = Instant::now();
        two.stop(PATIENCE).await.unwrap();
        balanced(&first, &[4, 4]).await;
        // It takes some 100 ms; the rest is for a machine that is busy with other tests.
        assert!(left.elapsed() < Duration::from_secs(5), "{kind}: {:?}", left.elapsed());
        let position = append(&store, 0, 0..10).await;
        catch_up(&third, position).await;
        one.stop(PATIENCE).await.unwrap();
        balanced(&third, &[8]).await;
        reach(&third, ProjectionState::Following).await;
        assert_exact(&database, &store, "table", PARTITIONS).await;
        three.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_of_a_dead_node_are_taken_over_within_the_lease() {
    for (_, store, _dir) in stores().await {
        let database = Database::new().await;
        let (one, first) = join(&store, &database, short_lived()).await;
        let (two, _) = join(&store, &database, short_lived()).await;
        let (three, third) = join(&store, &database, short_lived()).await;
        balanced(&first, &[3, 3, 2]).await;
        let writers = Writers::start(&store, 4, 50, 10);
        two.kill();
        balanced(&first, &[4, 4]).await;
        one.kill();
        balanced(&third, &[8]).await;
        writers.done().await;
        catch_up(&third, store.high_water_mark().await.unwrap()).await;
        assert_exact(&database, &store, "table", PARTITIONS).await;
        three.stop(PATIENCE).await.unwrap();
    }
}

/// Nodes come, go, die and lose their leases all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_event_once_and_in_order_while_nodes_come_and_go() {
    for (_, store, _dir) in stores().await {
        let database = Database::new().await;
        let dice = Dice::new(5);
        let writers = Writers::start(&store, 3, 80, 20);
        let options = options().batch_size(3).lease(Duration::from_millis(80));
        let mut nodes = Vec::new();
        for round in 0..12 {
            let link = Link::new(&store);
            let cut: Arc<dyn EventStore> = Arc::new(link.clone());
            nodes.push((join(&cut, &database, options.clone()).await.0, link));
            dice.pause(Duration::from_millis(100)).await;
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
        let (node, handle) = join(&store, &database, options).await;
        catch_up(&handle, store.high_water_mark().await.unwrap()).await;
        assert_exact(&database, &store, "table", PARTITIONS).await;
        for (node, _) in nodes {
            node.kill();
        }
        node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_number_of_partitions_is_fixed_until_a_reset() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        let mut head = Position::START;
        for n in 0..20 {
            head = append(&store, n, [n]).await;
        }
        let (node, handle) = join(&store, &database, options()).await;
        catch_up(&handle, head).await;
        let model = async || database.open().await;
        let other = local_node(&store).await;
        let four = other
            .projection(PerTarget::new(|_| table("table")), model().await, options().partitions(4))
            .await;
        reach(&four, ProjectionState::Failed).await;
        let advice = four.status().last_error.unwrap();
        assert!(advice.contains("8 partitions") && advice.contains("4 partitions"), "{kind}: {advice}");
        let whole = local_node(&store).await;
        let one = whole.projection(table("table"), model().await, options()).await;
        reach(&one, ProjectionState::Failed).await;
        assert!(one.status().last_error.unwrap().contains("without partitions"), "{kind}");
        let error = one.caught_up_to(head).await.unwrap_err().to_string();
        assert!(error.contains("8 partitions"), "{kind}: {error}");
        balanced(&handle, &[8]).await;
        assert_exact(&database, &store, "table", PARTITIONS).await;
        whole.stop(PATIENCE).await.unwrap();

        // The other nodes do not know yet that their layout is outdated.
        four.reset().await.unwrap();
        catch_up(&four, head).await;
        reach(&handle, ProjectionState::Failed).await;
        assert_eq!(database.seen("table").await.len(), 20, "{kind}");
        node.stop(PATIENCE).await.unwrap();
        other.stop(PATIENCE).await.unwrap();

        // An unpartitioned projection can be partitioned only by a reset.
        let node = local_node(&store).await;
        let whole = node.projection(table("other"), model().await, options()).await;
        catch_up(&whole, head).await;
        node.stop(PATIENCE).await.unwrap();
        let node = local_node(&store).await;
        let cut =
            node.projection(PerTarget::new(|_| table("other")), model().await, options().partitions(2)).await;
        reach(&cut, ProjectionState::Failed).await;
        cut.reset().await.unwrap();
        catch_up(&cut, head).await;
        assert_eq!(database.seen("other").await.len(), 20, "{kind}");
        node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn control_calls_work_from_any_node() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        let broken = Arc::new(AtomicBool::new(true));
        let park = options().on_failure(FailurePolicy::Park).max_attempts(1);
        let poisoned = || {
            let broken = broken.clone();
            move |_| table("table").hook(poison(3, &broken))
        };
        let (one, two) = (local_node(&store).await, local_node(&store).await);
        let first = one
            .projection(
                PerTarget::new(poisoned()),
                database.open().await,
                park.clone().partitions(PARTITIONS),
            )
            .await;
        let second = two
            .projection(PerTarget::new(poisoned()), database.open().await, park.partitions(PARTITIONS))
            .await;
        balanced(&first, &[4, 4]).await;
        let mut head = Position::START;
        for n in 1..=20 {
            head = append(&store, n, [n]).await;
        }
        for handle in [&first, &second] {
            catch_up(handle, head).await;
            let parked = handle.parked(10).await.unwrap();
            assert_eq!(parked.iter().map(|event| event.position.get()).collect::<Vec<_>>(), [3], "{kind}");
        }
        let parked = first.status().events_parked + second.status().events_parked;
        let applied = first.status().events_applied + second.status().events_applied;
        assert_eq!((parked, applied), (1, 19), "{kind}");

        // One of the two nodes does not own it.
        broken.store(false, Ordering::SeqCst);
        let position = Position::new(3);
        first.retry_parked(position).await.unwrap();
        assert!(second.retry_parked(position).await.is_err());
        assert!(second.discard_parked(position).await.is_err());
        assert_eq!(database.seen("table").await.len(), 20, "{kind}");

        second.pause().await.unwrap();
        assert_eq!(second.status().state, ProjectionState::Paused);
        reach(&first, ProjectionState::Paused).await;
        head = append(&store, 0, [1]).await.max(head);
        first.reset().await.unwrap();
        assert_eq!(first.status().position, Position::START);
        assert!(database.seen("table").await.is_empty(), "{kind}");
        first.resume().await.unwrap();
        for handle in [&second, &first] {
            catch_up(handle, head).await;
        }
        assert_eq!(database.seen("table").await.len(), 21, "{kind}");
        assert_exact(&database, &store, "table", PARTITIONS).await;
        one.stop(PATIENCE).await.unwrap();
        two.stop(PATIENCE).await.unwrap();
    }
}

/// While owners are in the middle of batches.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_under_load_leaves_no_old_rows() {
    for (_, store, _dir) in stores().await {
        let database = Database::new().await;
        let (one, first) = join(&store, &database, options().batch_size(2)).await;
        let (two, second) = join(&store, &database, options().batch_size(2)).await;
        balanced(&first, &[4, 4]).await;
        let writers = Writers::start(&store, 4, 60, 5);
        for handle in [&first, &second, &second, &first] {
            tokio::time::sleep(Duration::from_millis(50)).await;
            handle.reset().await.unwrap();
        }
        writers.done().await;
        let head = store.high_water_mark().await.unwrap();
        for handle in [&first, &second] {
            catch_up(handle, head).await;
        }
        assert_exact(&database, &store, "table", PARTITIONS).await;
        one.stop(PATIENCE).await.unwrap();
        two.stop(PATIENCE).await.unwrap();
    }
}

/// A failure in one partition does not stop the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_partition_does_not_stop_the_others() {
    for (kind, store, _dir) in stores().await {
        let broken = Arc::new(AtomicBool::new(true));
        let node = local_node(&store).await;
        let seen: Arc<[Seen]> = (0..PARTITIONS).map(|_| Seen::default()).collect();
        let make = {
            let (seen, broken) = (seen.clone(), broken.clone());
            move |target: BuildTarget| {
                let mut recorder = recorder("delivered").hook(poison(1, &broken));
                recorder.seen = seen[usize::from(target.partition.index())].clone();
                recorder
            }
        };
        let handle = node
            .projection(
                PerTarget::new(make),
                AtLeastOnce::new(),
                options().max_attempts(1).partitions(PARTITIONS),
            )
            .await;
        let mut head = Position::START;
        for n in 0..40 {
            head = append(&store, n, [n]).await;
        }
        let failed = handle.caught_up_to(head).await.unwrap_err();
        assert!(failed.to_string().contains("poison"), "{kind}: {failed}");
        reach(&handle, ProjectionState::Failed).await;
        eventually("the others continue", || {
            let healthy = handle.status().partitions;
            let healthy = healthy.iter().filter(|one| one.status.state != ProjectionState::Failed);
            healthy.filter(|one| one.status.position == head).count() == usize::from(PARTITIONS) - 1
        })
        .await;
        broken.store(false, Ordering::SeqCst);
        handle.resume().await.unwrap();
        catch_up(&handle, head).await;
        let all: BTreeSet<_> = seen.iter().flat_map(Seen::positions).collect();
        assert_eq!(all, log(&store, &Filter::all()).await.into_iter().collect(), "{kind}");
        node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test]
async fn invalid_partition_counts_are_refused_at_the_start() {
    let database = Database::new().await;
    for count in [0, 257] {
        let model = database.open().await;
        let builder = Runtime::builder().store(MemoryStore::new());
        let error = builder
            .projection_with(
                PerTarget::new(|_| table("table")),
                model,
                ProjectionOptions::new().partitions(count),
            )
            .start()
            .await
            .unwrap_err();
        assert!(matches!(error, StartError::Partitions { partitions, .. } if partitions == count), "{error}");
    }
    let builder = Runtime::builder().store(MemoryStore::new());
    let error = builder
        .projection_with(
            PerTarget::new(|_| recorder("memory")),
            InMemory::new(),
            ProjectionOptions::new().partitions(8),
        )
        .start()
        .await
        .unwrap_err();
    assert!(matches!(error, StartError::Partitions { .. }), "{error}");
}
