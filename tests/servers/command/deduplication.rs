//! A command takes effect once for the life of the log, after any number of later commands.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use storied::aggregate::AggregateOptions;
use storied::command::HandlerOptions;
use storied::{EventStore, ExecuteError, MemoryStore, NotExecutedKind, Receipt, Runtime, SnapshotRevision};
use uuid::{NoContext, Timestamp, Uuid};

use crate::command::domain::{Add, Counter, Look, Shared, Work, Worker};
use crate::support::FaultyStore;

/// Returns ids of every kind, including ids with an old time.
fn ids() -> [Uuid; 7] {
    [
        Uuid::now_v7(),
        Uuid::new_v4(),
        Uuid::new_v5(&Uuid::nil(), b"a request"),
        Uuid::new_v7(Timestamp::from_unix(NoContext, 0, 0)),
        Uuid::new_v7(Timestamp::from_unix(NoContext, 1_500_000_000, 0)),
        Uuid::nil(),
        Uuid::max(),
    ]
}

async fn node(store: impl EventStore, options: AggregateOptions<Counter>) -> Runtime {
    Runtime::builder().store(store).aggregate_with(options).start().await.unwrap()
}

fn window(commands: usize) -> AggregateOptions<Counter> {
    AggregateOptions::new().command_window(commands)
}

async fn add(runtime: &Runtime, id: Uuid, n: u64) -> Receipt<u64> {
    runtime.execute::<Counter>("a", Add(n)).command_id(id).await.unwrap()
}

async fn total(runtime: &Runtime) -> u64 {
    runtime.execute::<Counter>("a", Look).await.unwrap().reply
}

/// Repeats the commands of `first`. Each of them added 100.
async fn repeat(runtime: &Runtime, first: &[(Uuid, Receipt<u64>)], what: &str) {
    for (id, receipt) in first {
        let again = add(runtime, *id, 100).await;
        let mut expected = receipt.clone();
        expected.duplicate = true;
        assert_eq!(again, expected, "{what}, {id}");
    }
}

#[tokio::test]
async fn a_command_beyond_the_window_gets_its_first_receipt() {
    for commands in [0, 1, 3, 10, 1_000] {
        let store = MemoryStore::new();
        let runtime = node(store.clone(), window(commands)).await;
        let mut first = Vec::new();
        for id in ids() {
            first.push((id, add(&runtime, id, 100).await));
            for _ in 0..4 {
                add(&runtime, Uuid::now_v7(), 1).await;
            }
        }
        repeat(&runtime, &first, &format!("window {commands}")).await;
        assert_eq!(total(&runtime).await, 728);
        // Also on another node with another window.
        for other in [0, 2, 1_000] {
            let other = node(store.clone(), window(other)).await;
            repeat(&other, &first, &format!("window {commands}, another node")).await;
            assert_eq!(total(&other).await, 728);
        }
        // Another content is refused for an id of any age.
        let error = runtime.execute::<Counter>("a", Add(7)).command_id(first[0].0).await.unwrap_err();
        assert!(
            matches!(error, ExecuteError::NotExecuted { kind: NotExecutedKind::CommandIdReused { .. }, .. }),
            "{error}"
        );
    }
}

/// A snapshot records the greatest id that left its window, also for a node with a larger window.
#[tokio::test]
async fn a_snapshot_records_that_commands_left_the_window() {
    let store = MemoryStore::new();
    let (old, stream) = (Uuid::now_v7(), storied::StreamId::new("counter", "a").unwrap());
    let first = {
        let runtime = node(store.clone(), window(2).snapshot_every(5, SnapshotRevision(1))).await;
        let first = add(&runtime, old, 100).await;
        for _ in 0..9 {
            add(&runtime, Uuid::now_v7(), 1).await;
        }
        crate::command::cluster::eventually("a snapshot", || {
            let snapshot = futures_util::FutureExt::now_or_never(store.snapshot(&stream)).unwrap();
            snapshot.unwrap().is_some_and(|snapshot| snapshot.version.get() == 10)
        })
        .await;
        runtime.shutdown().await.unwrap();
        [(old, first)]
    };
    for commands in [0, 1, 2, 1_000] {
        let runtime = node(store.clone(), window(commands).snapshot_every(1_000, SnapshotRevision(1))).await;
        repeat(&runtime, &first, &format!("window {commands}")).await;
        assert_eq!(total(&runtime).await, 109);
    }
}

#[tokio::test]
async fn a_new_command_costs_no_look_up() {
    let store = FaultyStore::new(MemoryStore::new());
    let runtime = node(store.clone(), window(3)).await;
    for _ in 0..20 {
        add(&runtime, Uuid::now_v7(), 1).await;
        runtime.execute::<Counter>("a", Add(1)).await.unwrap();
    }
    assert_eq!(store.looked_up(), 0);
    // While the window holds all commands of an aggregate, it recognises any id as new.
    for id in ids() {
        runtime.execute::<Counter>("b", Look).command_id(id).await.unwrap();
    }
    assert_eq!(store.looked_up(), 0);
    // Otherwise an id without a time and an id with an old time cost one look-up each.
    for (count, id) in (1..).zip([Uuid::new_v4(), Uuid::new_v7(Timestamp::from_unix(NoContext, 0, 0))]) {
        add(&runtime, id, 1).await;
        assert_eq!(store.looked_up(), count);
    }
    // An old id that leaves the window later causes no look-up for other ids.
    for _ in 0..10 {
        add(&runtime, Uuid::now_v7(), 1).await;
    }
    assert_eq!(store.looked_up(), 2);
}

/// If two nodes look up the same command concurrently, one of them executes it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_that_look_up_a_command_execute_it_once() {
    let store = MemoryStore::new();
    let nodes = [node(store.clone(), window(1)).await, node(store.clone(), window(0)).await];
    for _ in 0..3 {
        add(&nodes[0], Uuid::now_v7(), 0).await;
    }
    for round in 1..=50 {
        let id = Uuid::new_v4();
        let both = nodes.iter().map(|node| add(node, id, 1));
        let both = futures_util::future::join_all(both).await;
        assert_eq!(both.iter().filter(|receipt| receipt.duplicate).count(), 1, "{both:?}");
        assert_eq!(both[0].position, both[1].position);
        assert_eq!(total(&nodes[round as usize % 2]).await, round);
    }
}

/// The handler's node fails between the effect of its command and the record.
///
/// Many other commands arrive before the repetition.
#[tokio::test]
async fn a_handlers_command_takes_effect_once_after_many_others() {
    for id in ids() {
        let (store, shared) = (MemoryStore::new(), Arc::new(Shared::default()));
        let start = async |store: MemoryStore| {
            let builder = Runtime::builder().store(store).aggregate_with(window(10));
            builder.handler_with(Worker(shared.clone()), HandlerOptions::new()).start().await.unwrap()
        };
        let (runtime, other) = (start(store.clone()).await, start(store.clone()).await);
        let work = Work::Count { id: "a".into(), add: 100, limit: u64::MAX, wait: false };
        shared.failures.store(1, Ordering::SeqCst);
        let error = runtime.execute_handler::<Worker>(work.clone()).command_id(id).await.unwrap_err();
        assert!(matches!(error, ExecuteError::OutcomeUnknown { .. }), "{error}");
        for _ in 0..11 {
            runtime.execute::<Counter>("a", Add(1)).await.unwrap();
        }
        let handled = other.execute_handler::<Worker>(work).command_id(id).await.unwrap();
        assert_eq!((handled.reply, shared.begun()), (100, 2), "{id}");
        assert_eq!(total(&other).await, 111, "{id}");
    }
}

/// The ids of a handler's commands have the time of the handler's own id.
#[tokio::test]
async fn a_new_command_of_a_handler_costs_no_look_up() {
    let (store, shared) = (FaultyStore::new(MemoryStore::new()), Arc::new(Shared::default()));
    let builder = Runtime::builder().store(store.clone()).aggregate_with(window(2)).handler(Worker(shared));
    let runtime = builder.start().await.unwrap();
    for _ in 0..10 {
        let work = Work::Count { id: "a".into(), add: 1, limit: u64::MAX, wait: false };
        runtime.execute_handler::<Worker>(work).await.unwrap();
        // Within a millisecond, derived ids have no order.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!((total(&runtime).await, store.looked_up()), (10, 0));
}
