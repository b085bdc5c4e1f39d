//! Partitions that share the pages of the log: what they read, what they cost, and that none waits for another.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use storied::projection::ProjectionState;
use storied::{EventStore, Filter, Partition, Position, ProjectionOptions, ReadLog, StreamId};
use tokio::time::Instant;

use crate::support::*;

const PARTITIONS: u16 = 256;
/// In tests that make a transaction of nearly every event.
const FEWER: u16 = 64;
const STREAMS: u64 = 500;

async fn fill(store: &Arc<dyn EventStore>, events_each: u64) -> Position {
    join_all((0..STREAMS).map(|stream| append(store, stream, 0..events_each))).await;
    store.frontier().await.unwrap()
}

/// Each partition must have applied its events of the log once and in order.
async fn assert_exact(database: &Database, store: &Arc<dyn EventStore>, partitions: u16) {
    let mut streams: BTreeMap<Position, StreamId> = BTreeMap::new();
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
    assert!(by_partition(database.seen("parts").await) == log, "the read model differs from the log");
}

/// 256 partitions read about as many pages as one projection, and renew their leases in few calls (20,000 events on SQLite).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_partitions_of_a_node_read_the_log_once() {
    for (kind, store, _dir) in stores().await {
        let long = kind == "sqlite";
        let head = fill(&store, if long { 40 } else { 8 }).await;
        let database = Database::new().await;
        let mut costs = Vec::new();
        for partitions in [None, Some(PARTITIONS)] {
            let link = Link::new(&store);
            let (reads, renewals) = (link.reads.clone(), link.renewals.clone());
            let counted: Arc<dyn EventStore> = Arc::new(link);
            let node = local_node(&counted).await;
            let model = database.open().await;
            let began = Instant::now();
            let handle = match partitions {
                None => node.projection(table("whole"), model, options()).await,
                Some(count) => node.partitioned(count, |_| table("parts"), model, options()).await,
            };
            catch_up(&handle, head).await;
            let elapsed = began.elapsed();
            costs.push((elapsed, reads.load(Ordering::SeqCst)));
            // One call for all leases in each third of their TTL of 6 s.
            let renewals = renewals.load(Ordering::SeqCst);
            assert!(renewals <= elapsed.as_secs() + 1, "{kind}: {renewals} renewals in {elapsed:?}");
            node.stop(PATIENCE).await.unwrap();
        }
        let [(whole, whole_reads), (parts, parts_reads)] = costs[..] else { unreachable!() };
        println!(
            "{kind}: whole {whole:?}, {whole_reads} pages; in partitions {parts:?}, {parts_reads} pages"
        );
        assert_exact(&database, &store, PARTITIONS).await;
        assert_eq!(database.seen("whole").await, log(&store, &Filter::all()).await);
        assert!(parts_reads <= whole_reads + 20, "{kind}: {parts_reads} pages, unpartitioned {whole_reads}");
        // The start of 256 tasks takes 5 to 11 s here: each commits its lease, its claim and its checkpoint (left open in F50).
        let start = Duration::from_secs(10);
        assert!(!long || parts <= whole * 2 + start, "{kind}: {parts:?}, unpartitioned {whole:?}");
    }
}

/// With pages of 128 events, so that the pages of the others are gone.
fn small_pages() -> ProjectionOptions {
    options().batch_size(4).attempts(1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_partition_holds_up_no_other_and_catches_up() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        let head = fill(&store, 2).await;
        let failing = Position::new(300);
        let broken = Arc::new(AtomicBool::new(true));
        let make = {
            let broken = broken.clone();
            move |_| table("parts").hook(poison(300, &broken))
        };
        let node = local_node(&store).await;
        let handle = node.partitioned(FEWER, make, database.open().await, small_pages()).await;
        let others_at = |head: Position| {
            let partitions = handle.status().partitions;
            let (failed, others): (Vec<_>, Vec<_>) =
                partitions.iter().partition(|one| one.status.state == ProjectionState::Failed);
            failed.len() == 1
                && failed[0].status.position < failing
                && others.iter().all(|one| one.status.position >= head)
        };
        eventually(&format!("{kind}: the others are at the head"), || others_at(head)).await;
        let head = fill(&store, 1).await;
        eventually(&format!("{kind}: the others follow"), || others_at(head)).await;
        broken.store(false, Ordering::SeqCst);
        handle.resume().await.unwrap();
        catch_up(&handle, head).await;
        assert_exact(&database, &store, FEWER).await;
        node.stop(PATIENCE).await.unwrap();
    }
}

/// Partitions that begin at positions of their own, while the log grows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_go_on_from_where_each_of_them_was() {
    for (_, store, _dir) in stores().await {
        let database = Database::new().await;
        fill(&store, 2).await;
        for round in 0..3_u64 {
            let writers = Writers::start(&store, 4, 20, 5);
            let node = local_node(&store).await;
            let make = |_| table("parts");
            let handle = node.partitioned(FEWER, make, database.open().await, small_pages()).await;
            let enough = 200 * (round + 1);
            eventually("some of it is applied", || {
                handle.status().partitions.iter().filter(|one| one.status.position.get() > enough).count()
                    > 20
            })
            .await;
            // Gives the leases back; the partitions are wherever they are.
            node.stop(PATIENCE).await.unwrap();
            writers.done().await;
        }
        let node = local_node(&store).await;
        let handle = node.partitioned(FEWER, |_| table("parts"), database.open().await, small_pages()).await;
        catch_up(&handle, store.frontier().await.unwrap()).await;
        assert_exact(&database, &store, FEWER).await;
        node.stop(PATIENCE).await.unwrap();
    }
}
