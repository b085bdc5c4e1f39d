//! Partitions that share the pages of the log: their reads, their cost, and their independence.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use storied::projection::{PerTarget, ProjectionState};
use storied::{EventStore, Filter, Position, ProjectionOptions};
use tokio::time::Instant;

use crate::projection::fixtures::*;
use crate::projection::partitions::assert_exact;

const PARTITIONS: u16 = 256;
/// Number of partitions in tests that make a transaction of nearly every event.
const FEWER: u16 = 64;
const STREAMS: u64 = 500;

async fn fill(store: &Arc<dyn EventStore>, events_each: u64) -> Position {
    join_all((0..STREAMS).map(|stream| append(store, stream, 0..events_each))).await;
    store.high_water_mark().await.unwrap()
}

/// 256 partitions read about as many pages as one projection, and renew their leases in few calls.
///
/// 20,000 events on SQLite.
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
                Some(count) => {
                    node.projection(PerTarget::new(|_| table("parts")), model, options().partitions(count))
                        .await
                }
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
        assert_exact(&database, &store, "parts", PARTITIONS).await;
        assert_eq!(database.seen("whole").await, log(&store, &Filter::all()).await);
        assert!(parts_reads <= whole_reads + 20, "{kind}: {parts_reads} pages, unpartitioned {whole_reads}");
        // The start of 256 tasks takes 5 to 11 s here: each commits its lease, its claim and its
        // checkpoint (left open in F50).
        let start = Duration::from_secs(10);
        assert!(!long || parts <= whole * 4 + start, "{kind}: {parts:?}, unpartitioned {whole:?}");
    }
}

/// With pages of 128 events, so that the pages of the other partitions are gone.
fn small_pages() -> ProjectionOptions {
    options().batch_size(4).max_attempts(1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_partition_blocks_no_other_and_catches_up() {
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
        let handle = node
            .projection(PerTarget::new(make), database.open().await, small_pages().partitions(FEWER))
            .await;
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
        assert_exact(&database, &store, "parts", FEWER).await;
        node.stop(PATIENCE).await.unwrap();
    }
}

/// Partitions that begin at positions of their own, while the log grows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_resume_from_their_own_positions() {
    for (_, store, _dir) in stores().await {
        let database = Database::new().await;
        fill(&store, 2).await;
        for round in 0..3_u64 {
            let writers = Writers::start(&store, 4, 20, 5);
            let node = local_node(&store).await;
            let make = |_| table("parts");
            let handle = node
                .projection(PerTarget::new(make), database.open().await, small_pages().partitions(FEWER))
                .await;
            let enough = 200 * (round + 1);
            eventually("some of it is applied", || {
                handle.status().partitions.iter().filter(|one| one.status.position.get() > enough).count()
                    > 20
            })
            .await;
            // Releases the leases; the positions of the partitions differ.
            node.stop(PATIENCE).await.unwrap();
            writers.done().await;
        }
        let node = local_node(&store).await;
        let handle = node
            .projection(
                PerTarget::new(|_| table("parts")),
                database.open().await,
                small_pages().partitions(FEWER),
            )
            .await;
        catch_up(&handle, store.high_water_mark().await.unwrap()).await;
        assert_exact(&database, &store, "parts", FEWER).await;
        node.stop(PATIENCE).await.unwrap();
    }
}
