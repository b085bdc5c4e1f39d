//! Aggregates through a runtime: the guarantees for callers under conflicts and failures.

use std::sync::Arc;
use std::time::Duration;

use crate::support::counter::{
    Add, AddAndPanicInApply, AddIf, AddTwice, Counter, CounterCommand, CounterError, CounterEvent, Look,
};
use crate::support::{FaultyStore, run_alone};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use storied::store::{Append, ExpectedVersion, Snapshot, StoreError};
use storied::testing::given;
use storied::{
    Aggregate, AggregateOptions, Codec, Context, Decided, Decision, Event, EventStore, ExecuteError,
    MemoryStore, Metadata, NewEvent, NotExecutedKind, ReadLog, Runtime, SnapshotRevision, StreamId, Version,
};
use uuid::Uuid;

async fn runtime(store: impl EventStore) -> Runtime {
    Runtime::builder().store(store).aggregate::<Counter>().start().await.unwrap()
}

fn stream(id: &str) -> StreamId {
    StreamId::new("counter", id).unwrap()
}

fn added(n: u64) -> NewEvent {
    NewEvent::encode(&CounterEvent::Added { n }, Codec::Cbor, &Metadata::default()).unwrap()
}

/// Appends events of another writer, without the runtime.
async fn foreign(store: &dyn EventStore, id: &str, expected: ExpectedVersion, events: Vec<NewEvent>) {
    store.append(vec![Append::one(stream(id), expected, events)]).await.remove(0).unwrap();
}

/// Returns the sum and number of a counter's stored events. Checks that its versions have no gaps.
async fn stored(store: &dyn EventStore, id: &str) -> (u64, u64) {
    let events = store.read_stream(&stream(id), Version::NONE, usize::MAX).await.unwrap();
    for (index, event) in events.iter().enumerate() {
        assert_eq!(event.version, Version::new(index as u64 + 1), "versions have no gaps");
    }
    let sum = events
        .iter()
        .map(|event| match event.decode::<CounterEvent>().unwrap() {
            CounterEvent::Added { n } => n,
            CounterEvent::Broken => 0,
        })
        .sum();
    (sum, events.len() as u64)
}

#[test]
fn decisions_are_tested_without_a_runtime() {
    let then = given::<Counter>([CounterEvent::Added { n: 3 }])
        .when(AddTwice(2))
        .then([CounterEvent::Added { n: 2 }, CounterEvent::Added { n: 2 }]);
    assert_eq!((then.state.total, then.reply), (7, 7));
    given::<Counter>([CounterEvent::Added { n: 3 }])
        .when(AddIf { total: 4, add: 1 })
        .then_error(CounterError::OtherTotal { total: 3 });
    given::<Counter>([]).when(Look).then_nothing();
}

#[tokio::test]
async fn a_receipt_matches_the_durable_events() {
    let store = MemoryStore::new();
    let runtime = runtime(store.clone()).await;
    let first = runtime.execute::<Counter>("a", Add(3)).await.unwrap();
    assert_eq!((first.version, first.events, first.reply, first.duplicate), (Version::new(1), 1, 3, false));
    let second = runtime.execute::<Counter>("a", AddTwice(2)).metadata("who", "me").await.unwrap();
    assert_eq!((second.version, second.events, second.reply), (Version::new(3), 2, 7));
    assert!(second.position > first.position);
    let nothing = runtime.execute::<Counter>("a", Look).await.unwrap();
    assert_eq!((nothing.version, nothing.events, nothing.reply), (Version::new(3), 0, 7));
    assert_eq!(nothing.position, second.position);

    let events = store.read_stream(&stream("a"), Version::NONE, 10).await.unwrap();
    assert_eq!(events.last().unwrap().position, second.position);
    assert_eq!(events[2].name.as_str(), "counter.added");
    assert_eq!(events[2].command_id, second.command_id);
    assert_eq!(events[2].decode_metadata().unwrap().user["who"], "me");

    let refused = runtime.execute::<Counter>("a", AddIf { total: 1, add: 1 }).await.unwrap_err();
    assert_eq!(refused.rejection(), Some(&CounterError::OtherTotal { total: 7 }));
    runtime.shutdown().await.unwrap();
}

#[tokio::test]
async fn the_caller_can_expect_a_version() {
    let runtime = runtime(MemoryStore::new()).await;
    runtime.execute::<Counter>("a", Add(1)).expect_version(ExpectedVersion::NoStream).await.unwrap();
    let error =
        runtime.execute::<Counter>("a", Add(1)).expect_version(ExpectedVersion::NoStream).await.unwrap_err();
    assert!(
        matches!(error, ExecuteError::NotExecuted { kind: NotExecutedKind::ExpectedVersion { actual, .. }, .. } if actual == Version::new(1)),
        "{error}"
    );
    runtime
        .execute::<Counter>("a", Add(1))
        .expect_version(ExpectedVersion::Exact(Version::new(1)))
        .await
        .unwrap();
}

#[tokio::test]
async fn invalid_calls_are_rejected_before_any_effect() {
    let runtime = runtime(MemoryStore::new()).await;
    let empty = runtime.execute::<Counter>("", Add(1)).await.unwrap_err();
    assert!(
        matches!(empty, ExecuteError::NotExecuted { kind: NotExecutedKind::InvalidId { .. }, .. }),
        "{empty}"
    );
    let long = runtime.execute::<Counter>("x".repeat(1 << 20), Add(1)).await.unwrap_err();
    assert!(
        matches!(long, ExecuteError::NotExecuted { kind: NotExecutedKind::InvalidId { .. }, .. }),
        "{long}"
    );
    let odd = runtime.execute::<Counter>("O'Brien \u{1F980} \"quoted\"", Add(1)).await.unwrap();
    assert_eq!(odd.stream.id(), "O'Brien \u{1F980} \"quoted\"");
    let nobody = Runtime::builder().store(MemoryStore::new()).start().await.unwrap();
    let error = nobody.execute::<Counter>("a", Add(1)).await.unwrap_err();
    assert!(
        matches!(
            error,
            ExecuteError::NotExecuted {
                kind: NotExecutedKind::NoHandler { name: "counter", retryable: false },
                ..
            }
        ),
        "{error}"
    );
    assert!(!error.is_transient());
}

/// Commands are decided on speculative state while the store hangs and another writer appends.
#[tokio::test(flavor = "multi_thread")]
async fn a_conflict_under_a_speculated_pipeline_decides_all_again() {
    for foreign_events in [1, 2, 5] {
        let store = FaultyStore::new(MemoryStore::new());
        let runtime = runtime(store.clone()).await;
        runtime.execute::<Counter>("a", Add(1)).await.unwrap();
        store.hold();
        let spawn = |nothing: bool| {
            let runtime = runtime.clone();
            tokio::spawn(async move {
                let command = if nothing { Look } else { Add(10) };
                (nothing, runtime.execute::<Counter>("a", command).await)
            })
        };
        let mut commands = vec![spawn(false)];
        store.held(1).await; // what follows hangs on this one
        commands.extend((0..20).map(|n| spawn(n % 3 == 2)));
        tokio::time::sleep(Duration::from_millis(20)).await; // let the rest be decided ahead
        // The number of events makes a later expected version correct by coincidence.
        let events = (0..foreign_events).map(|_| added(1_000)).collect();
        foreign(&store.inner, "a", ExpectedVersion::Exact(Version::new(1)), events).await;
        store.release();
        let mut replies = Vec::new();
        for command in commands {
            let (nothing, receipt) = command.await.unwrap();
            let receipt = receipt.unwrap();
            assert!(receipt.reply > 1_000 * foreign_events, "decided on the stored events: {receipt:?}");
            assert_eq!(receipt.events, u64::from(!nothing));
            if !nothing {
                replies.push(receipt.reply);
            }
        }
        let adds = replies.len() as u64;
        replies.sort_unstable();
        replies.dedup();
        assert_eq!(replies.len() as u64, adds, "each decision saw the one before");
        let (sum, events) = stored(&store.inner, "a").await;
        assert_eq!((sum, events), (1 + 1_000 * foreign_events + 10 * adds, 1 + foreign_events + adds));
        assert_eq!(replies.last(), Some(&sum));
    }
}

/// Two nodes on one store continuously write to the same few aggregates.
#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_on_one_aggregate_lose_and_double_nothing() {
    let store = MemoryStore::new();
    let options = || AggregateOptions::<Counter>::new().max_attempts(1_000);
    let mut tasks = Vec::new();
    for _ in 0..2 {
        let runtime =
            Runtime::builder().store(store.clone()).aggregate_with(options()).start().await.unwrap();
        for task in 0..8 {
            let runtime = runtime.clone();
            tasks.push(tokio::spawn(async move {
                for _ in 0..50 {
                    runtime.execute::<Counter>(task % 2, Add(1)).await.unwrap();
                }
            }));
        }
    }
    for task in tasks {
        task.await.unwrap();
    }
    for id in ["0", "1"] {
        assert_eq!(stored(&store, id).await, (400, 400));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn passivation_racing_with_commands_loses_none() {
    let store = MemoryStore::new();
    let options = AggregateOptions::<Counter>::new().idle_timeout(Duration::from_millis(1)).max_live(4);
    let runtime = Runtime::builder().store(store.clone()).aggregate_with(options).start().await.unwrap();
    let tasks: Vec<_> = (0..3_u64)
        .map(|task| {
            let runtime = runtime.clone();
            tokio::spawn(async move {
                for round in 0..400_u64 {
                    runtime.execute::<Counter>((task + round) % 8, Add(1)).await.unwrap();
                    if round % 7 == task {
                        tokio::time::sleep(Duration::from_millis(round % 5)).await;
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let mut sum = 0;
    for id in 0..8 {
        let (total, events) = stored(&store, &id.to_string()).await;
        assert_eq!(total, events);
        sum += total;
    }
    assert_eq!(sum, 1_200);
    let live = runtime.status().await.aggregates[0].live;
    assert!(live <= 4, "{live} live");
}

#[tokio::test]
async fn idle_aggregates_leave_memory() {
    for idle in [20, 0].map(Duration::from_millis) {
        idle_aggregates_leave_memory_after(idle).await;
    }
}

async fn idle_aggregates_leave_memory_after(idle: Duration) {
    let options = AggregateOptions::<Counter>::new().idle_timeout(idle);
    let runtime = Runtime::builder().store(MemoryStore::new()).aggregate_with(options).start().await.unwrap();
    for id in 0..100 {
        runtime.execute::<Counter>(id, Add(1)).await.unwrap();
    }
    tokio::time::timeout(Duration::from_secs(10), async {
        while runtime.status().await.aggregates[0].live > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("all are gone");
    assert_eq!(runtime.execute::<Counter>(7, Add(1)).await.unwrap().reply, 2);
}

#[test]
fn memory_stays_flat_over_100_000_ids() {
    run_alone(module_path!(), "touch_100_000_ids");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "for memory_stays_flat_over_100_000_ids"]
async fn touch_100_000_ids() {
    let options = AggregateOptions::<Counter>::new().max_live(1_000);
    // The memory of the store itself must not grow.
    let store = FaultyStore::forgetful(MemoryStore::new());
    let runtime = Runtime::builder().store(store).aggregate_with(options).start().await.unwrap();
    let touch = async |ids: std::ops::Range<u32>| {
        let mut tasks = Vec::new();
        for part in 0..16 {
            let (runtime, ids) = (runtime.clone(), ids.clone());
            tasks.push(tokio::spawn(async move {
                for id in ids.skip(part).step_by(16) {
                    runtime.execute::<Counter>(id, Look).await.unwrap();
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
    };
    touch(0..20_000).await;
    let before = resident_kib();
    touch(20_000..100_000).await;
    let after = resident_kib();
    let live = runtime.status().await.aggregates[0].live;
    println!("resident: {before} KiB after 20,000 ids, {after} KiB after 100,000; {live} live");
    assert!(live <= 1_000);
    assert!(after < before + 16 * 1_024, "from {before} KiB to {after} KiB");
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_fails_only_its_command() {
    let store = FaultyStore::new(MemoryStore::new());
    let runtime = runtime(store.clone()).await;
    runtime.execute::<Counter>("a", Add(1)).await.unwrap();
    // Commands are decided before and after it.
    store.hold();
    let spawn = |id: &'static str, command| {
        let runtime = runtime.clone();
        tokio::spawn(async move { runtime.execute::<Counter>(id, command).await })
    };
    let ahead = spawn("a", Add(10));
    store.held(1).await;
    let panics = spawn("a", CounterCommand::Panic);
    let error = panics.await.unwrap().unwrap_err();
    assert!(
        matches!(&error, ExecuteError::NotExecuted { kind: NotExecutedKind::Panicked { message, .. }, .. } if message == "as requested"),
        "{error}"
    );
    let behind = spawn("a", Add(100));
    let other = spawn("b", Add(1));
    store.release();
    assert_eq!(ahead.await.unwrap().unwrap().reply, 11);
    assert_eq!(behind.await.unwrap().unwrap().reply, 111);
    assert_eq!(other.await.unwrap().unwrap().reply, 1);
    assert_eq!(stored(&store.inner, "a").await, (111, 3));
}

/// F49: events that the state cannot fold are rejected before the append.
///
/// The aggregate continues with the next command.
#[tokio::test(flavor = "multi_thread")]
async fn events_that_cannot_be_applied_are_refused_before_the_append() {
    let store = FaultyStore::new(MemoryStore::new());
    let runtime = runtime(store.clone()).await;
    let panics = async || {
        let error = runtime.execute::<Counter>("a", AddAndPanicInApply).await.unwrap_err();
        assert!(
            matches!(&error, ExecuteError::NotExecuted { kind: NotExecutedKind::Panicked { message, .. }, .. } if message == "cannot fold this"),
            "{error}"
        );
    };
    panics().await;
    assert_eq!(runtime.execute::<Counter>("a", Add(1)).await.unwrap().reply, 1);
    // A command before it has an append in flight, and another command follows it.
    store.hold();
    let spawn = |command| {
        let runtime = runtime.clone();
        tokio::spawn(async move { runtime.execute::<Counter>("a", command).await })
    };
    let ahead = spawn(Add(10));
    store.held(1).await;
    panics().await;
    let after = spawn(Add(100));
    store.release();
    assert_eq!(ahead.await.unwrap().unwrap().reply, 11);
    assert_eq!(after.await.unwrap().unwrap().reply, 111);
    assert_eq!(stored(&store.inner, "a").await, (111, 3));
    assert_eq!(runtime.execute::<Counter>("b", Add(1)).await.unwrap().reply, 1);
}

/// F7: the state equals the state of a reader of the log.
///
/// Events that do not decode are not stored.
mod readable {
    use std::collections::BTreeMap;

    use storied::EncodeError;

    use super::*;

    /// An aggregate that records its notes unchanged.
    #[derive(Default)]
    struct Memo {
        notes: Vec<Note>,
    }

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Note {
        id: u8,
        twice: Option<Option<u8>>,
        #[serde(skip)]
        unsaved: u8,
        #[serde(flatten)]
        more: BTreeMap<String, String>,
    }

    #[derive(Debug, Serialize, Deserialize)]
    enum MemoEvent {
        Noted(Note),
    }

    #[derive(Serialize, Deserialize)]
    enum MemoCommand {
        Take { note: Note, reply: f64 },
        Show,
    }

    /// A reply like in JSON: a value that is not a number encodes, but does not decode.
    #[derive(Debug, Clone, Copy, PartialEq)]
    struct Rate(f64);

    impl Serialize for Rate {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            if self.0.is_nan() { serializer.serialize_str("none") } else { serializer.serialize_f64(self.0) }
        }
    }

    impl<'de> Deserialize<'de> for Rate {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            f64::deserialize(deserializer).map(Rate)
        }
    }

    impl Event for MemoEvent {
        const CATEGORY: &'static str = "memo";
    }

    impl Aggregate for Memo {
        type Event = MemoEvent;
        type Command = MemoCommand;
        type Reply = (Vec<Note>, Rate);
        type Error = CounterError;

        fn handle(&self, command: &MemoCommand, _: &Context<'_>) -> Decided<Self> {
            match command {
                MemoCommand::Take { note, reply } => {
                    Ok(Decision::event(MemoEvent::Noted(Note { unsaved: 9, ..note.clone() }))
                        .reply((Vec::new(), Rate(*reply))))
                }
                MemoCommand::Show => Ok(Decision::none().reply((self.notes.clone(), Rate(0.0)))),
            }
        }

        fn apply(&mut self, MemoEvent::Noted(note): &MemoEvent) {
            self.notes.push(note.clone());
        }
    }

    #[tokio::test]
    async fn the_state_in_memory_matches_the_log() {
        for codec in [Codec::Cbor, Codec::Json] {
            let store = MemoryStore::with_codec(codec);
            let start =
                async || Runtime::builder().store(store.clone()).aggregate::<Memo>().start().await.unwrap();
            let runtime = start().await;
            let note = |id, key: &str| Note {
                id,
                twice: Some(None),
                unsaved: 0,
                more: BTreeMap::from([(key.to_owned(), "x".to_owned())]),
            };
            let take = |note, reply| MemoCommand::Take { note, reply };
            let first = runtime.execute::<Memo>("a", take(note(1, "k"), 0.5)).await.unwrap();
            assert_eq!(first.reply.1, Rate(0.5));
            // The field name is part of the data.
            let error = runtime.execute::<Memo>("a", take(note(2, "id"), 0.5)).await.unwrap_err();
            assert!(
                matches!(&error, ExecuteError::NotExecuted { kind: NotExecutedKind::Encode(EncodeError::NotReadable { what, .. }), .. } if what == "memo.Noted"),
                "{error}"
            );
            // A reply that a repetition could not decode.
            let error = runtime.execute::<Memo>("a", take(note(3, "k"), f64::NAN)).await.unwrap_err();
            assert!(
                matches!(
                    &error,
                    ExecuteError::NotExecuted {
                        kind: NotExecutedKind::Encode(EncodeError::NotReadable { .. }),
                        ..
                    }
                ),
                "{error}"
            );
            runtime.execute::<Memo>("a", take(note(4, "k"), 1.0)).await.unwrap();
            let live = runtime.execute::<Memo>("a", MemoCommand::Show).await.unwrap().reply.0;
            runtime.shutdown().await.unwrap();

            let restarted = start().await;
            let folded = restarted.execute::<Memo>("a", MemoCommand::Show).await.unwrap().reply.0;
            assert_eq!(live, folded, "{codec}");
            assert_eq!(folded.iter().map(|note| note.id).collect::<Vec<_>>(), [1, 4], "{codec}");
            restarted.shutdown().await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_commands_are_an_overload() {
    let store = FaultyStore::new(MemoryStore::new());
    let options = AggregateOptions::<Counter>::new()
        .max_in_flight(4)
        .max_in_flight_per_aggregate(2)
        .admission_timeout(Duration::from_millis(50));
    let runtime = Runtime::builder().store(store.clone()).aggregate_with(options).start().await.unwrap();
    store.hold();
    let spawn = |id: &'static str| {
        let runtime = runtime.clone();
        tokio::spawn(async move { runtime.execute::<Counter>(id, Add(1)).await })
    };
    let first = [spawn("hot"), spawn("hot")];
    store.held(1).await;
    in_flight(&runtime, 2).await;
    let error = spawn("hot").await.unwrap().unwrap_err();
    assert!(
        matches!(error, ExecuteError::NotExecuted { kind: NotExecutedKind::Overloaded { limit: 2, .. }, .. }),
        "one aggregate cannot take all permits: {error}"
    );
    let others = [spawn("b"), spawn("c")];
    in_flight(&runtime, 4).await;
    let error = spawn("d").await.unwrap().unwrap_err();
    assert!(
        matches!(error, ExecuteError::NotExecuted { kind: NotExecutedKind::Overloaded { limit: 4, .. }, .. }),
        "{error}"
    );
    assert!(error.is_transient());
    store.release();
    for command in first.into_iter().chain(others) {
        command.await.unwrap().unwrap();
    }
    runtime.execute::<Counter>("d", Add(1)).await.unwrap();
}

async fn in_flight(runtime: &Runtime, commands: usize) {
    while runtime.status().await.aggregates[0].in_flight != commands {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn busy_aggregates_at_the_limit_are_an_overload() {
    let store = FaultyStore::new(MemoryStore::new());
    let options = AggregateOptions::<Counter>::new().max_live(2);
    let runtime = Runtime::builder().store(store.clone()).aggregate_with(options).start().await.unwrap();
    store.hold();
    let busy: Vec<_> = ["a", "b"]
        .map(|id| {
            let runtime = runtime.clone();
            tokio::spawn(async move { runtime.execute::<Counter>(id, Add(1)).await })
        })
        .into();
    in_flight(&runtime, 2).await;
    let error = runtime.execute::<Counter>("c", Add(1)).await.unwrap_err();
    assert!(
        matches!(error, ExecuteError::NotExecuted { kind: NotExecutedKind::Overloaded { limit: 2, .. }, .. }),
        "{error}"
    );
    store.release();
    for command in busy {
        command.await.unwrap().unwrap();
    }
    runtime.execute::<Counter>("c", Add(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_command_gets_the_first_receipt() {
    let store = FaultyStore::new(MemoryStore::new());
    let id = Uuid::now_v7();
    let first_node = runtime(store.clone()).await;
    // Concurrently, before the first command is durable.
    store.hold();
    let both: Vec<_> = (0..3)
        .map(|_| {
            let runtime = first_node.clone();
            tokio::spawn(
                async move { runtime.execute::<Counter>("a", AddTwice(5)).command_id(id).await.unwrap() },
            )
        })
        .collect();
    in_flight(&first_node, 3).await;
    store.release();
    let mut receipts = Vec::new();
    for receipt in both {
        receipts.push(receipt.await.unwrap());
    }
    assert_eq!(receipts.iter().filter(|receipt| !receipt.duplicate).count(), 1);
    let first = receipts.iter().find(|receipt| !receipt.duplicate).unwrap().clone();
    // Later, with a new actor and on another node.
    first_node.execute::<Counter>("a", Add(1)).await.unwrap();
    receipts.push(first_node.execute::<Counter>("a", AddTwice(5)).command_id(id).await.unwrap());
    first_node.shutdown().await.unwrap();
    let second_node = runtime(store.clone()).await;
    receipts.push(second_node.execute::<Counter>("a", AddTwice(5)).command_id(id).await.unwrap());
    for receipt in &receipts {
        assert_eq!(
            (receipt.version, receipt.position, receipt.events, receipt.reply),
            (first.version, first.position, 2, 10)
        );
    }
    assert_eq!(receipts.iter().filter(|receipt| receipt.duplicate).count(), 4);
    assert_eq!(stored(&store.inner, "a").await, (11, 3));
}

#[tokio::test]
async fn a_store_outage_is_reported_and_ends() {
    let store = FaultyStore::new(MemoryStore::new());
    let runtime = runtime(store.clone()).await;
    runtime.execute::<Counter>("a", Add(1)).await.unwrap();
    store.fail_appends(StoreError::Unavailable { reason: "unplugged".into(), source: None });
    let error = runtime.execute::<Counter>("a", Add(10)).await.unwrap_err();
    assert!(
        matches!(
            error,
            ExecuteError::NotExecuted { kind: NotExecutedKind::Store(StoreError::Unavailable { .. }), .. }
        ),
        "{error}"
    );
    store.heal();
    assert_eq!(runtime.execute::<Counter>("a", Add(100)).await.unwrap().reply, 101);
    assert_eq!(stored(&store.inner, "a").await, (101, 2));
}

/// The commit happened, but the store cannot report it. A retry with the same id gets the receipt.
#[tokio::test]
async fn an_unknown_outcome_is_resolved_by_the_command_id() {
    let store = FaultyStore::new(MemoryStore::new());
    let runtime = runtime(store.clone()).await;
    let id = Uuid::now_v7();
    store.append_and_forget();
    let error = runtime.execute::<Counter>("a", Add(7)).command_id(id).await.unwrap_err();
    assert!(matches!(error, ExecuteError::OutcomeUnknown { command_id, .. } if command_id == id), "{error}");
    store.heal();
    let receipt = runtime.execute::<Counter>("a", Add(7)).command_id(id).await.unwrap();
    assert_eq!((receipt.duplicate, receipt.reply), (true, 7));
    assert_eq!(stored(&store.inner, "a").await, (7, 1));
}

#[tokio::test]
async fn no_answer_in_time_is_an_unknown_outcome_and_an_undecided_command_is_dropped() {
    let store = FaultyStore::new(MemoryStore::new());
    let runtime = runtime(store.clone()).await;
    store.hold();
    let timeout = Duration::from_millis(30);
    let id = Uuid::now_v7();
    let error = runtime.execute::<Counter>("a", Add(1)).command_id(id).timeout(timeout).await.unwrap_err();
    assert!(matches!(error, ExecuteError::OutcomeUnknown { .. }), "{error}");
    store.release();
    assert!(runtime.execute::<Counter>("a", Add(1)).command_id(id).await.unwrap().duplicate);
    // The stream of this command is not readable until after the command's deadline.
    store.hold_reads();
    let late = runtime.execute::<Counter>("b", Add(1)).timeout(timeout).await.unwrap_err();
    assert!(matches!(late, ExecuteError::OutcomeUnknown { .. }), "{late}");
    let later = runtime.execute::<Counter>("b", Add(1)).timeout(timeout).await.unwrap_err();
    assert!(matches!(later, ExecuteError::OutcomeUnknown { .. }), "{later}");
    store.heal();
    let receipt = runtime.execute::<Counter>("b", Look).await.unwrap();
    assert!(receipt.reply <= 1, "the second was dropped: {receipt:?}");
}

#[tokio::test]
async fn a_timeout_can_be_unlimited() {
    let runtime = runtime(MemoryStore::new()).await;
    runtime.execute::<Counter>("a", Add(1)).timeout(Duration::MAX).await.unwrap();
    runtime.shutdown_within(Duration::MAX).await.unwrap();
}

#[tokio::test]
async fn contention_without_end_gives_up() {
    let store = FaultyStore::new(MemoryStore::new());
    let options = AggregateOptions::<Counter>::new().max_attempts(3);
    let runtime = Runtime::builder().store(store.clone()).aggregate_with(options).start().await.unwrap();
    store.always_first(stream("a"), || added(1));
    let error = runtime.execute::<Counter>("a", Add(1)).await.unwrap_err();
    assert!(
        matches!(
            error,
            ExecuteError::NotExecuted { kind: NotExecutedKind::RetriesExhausted { attempts: 3, .. }, .. }
        ),
        "{error}"
    );
    store.heal();
    assert_eq!(runtime.execute::<Counter>("a", Add(1)).await.unwrap().reply, 4);
}

#[tokio::test]
async fn an_unreadable_event_is_named() {
    let store = MemoryStore::new();
    let runtime = runtime(store.clone()).await;
    let odd = |name: &str, payload: &'static [u8]| NewEvent {
        name: storied::EventName::new(name).unwrap(),
        payload: Bytes::from_static(payload),
        ..added(1)
    };
    foreign(&store, "a", ExpectedVersion::Any, vec![added(1), odd("counter.multiplied", &[0xf6])]).await;
    let error = runtime.execute::<Counter>("a", Add(1)).await.unwrap_err().to_string();
    for part in ["counter.multiplied", "version 2", "counter/a", "no variant of that name"] {
        assert!(error.contains(part), "{error}");
    }
    foreign(&store, "b", ExpectedVersion::Any, vec![odd("counter.added", &[0x1c, 0xff])]).await;
    let error = runtime.execute::<Counter>("b", Add(1)).await.unwrap_err();
    assert!(matches!(error, ExecuteError::NotExecuted { kind: NotExecutedKind::Decode(_), .. }), "{error}");
    assert_eq!(runtime.execute::<Counter>("c", Add(1)).await.unwrap().reply, 1);
}

#[tokio::test]
async fn a_snapshot_saves_reading_and_an_unusable_one_is_ignored() {
    let store = FaultyStore::new(MemoryStore::new());
    let options =
        |revision| AggregateOptions::<Counter>::new().snapshot_every(100, SnapshotRevision(revision));
    let start = async |revision| {
        Runtime::builder().store(store.clone()).aggregate_with(options(revision)).start().await.unwrap()
    };
    let id = Uuid::now_v7();
    let node = start(1).await;
    for n in 0..250 {
        let command = node.execute::<Counter>("a", Add(1));
        if n == 199 {
            command.command_id(id).await.unwrap()
        } else {
            command.await.unwrap()
        };
    }
    // The snapshot is written in a separate task: wait for it.
    let snapshot = loop {
        match store.snapshot(&stream("a")).await.unwrap() {
            Some(snapshot) if snapshot.version == Version::new(200) => break snapshot,
            _ => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    };
    node.shutdown().await.unwrap();

    let node = start(1).await;
    store.count_reads();
    assert_eq!(node.execute::<Counter>("a", Look).await.unwrap().reply, 250);
    assert_eq!(store.events_read(), 50, "only the events after the snapshot");
    let repeated = node.execute::<Counter>("a", Add(1)).command_id(id).await.unwrap();
    assert_eq!((repeated.duplicate, repeated.version, repeated.reply), (true, Version::new(200), 200));
    node.shutdown().await.unwrap();

    for (what, revision, snapshot) in [
        ("another revision", 2, snapshot.clone()),
        (
            "broken bytes",
            1,
            Snapshot { state: Bytes::from_static(b"\xff broken"), version: Version::new(201), ..snapshot },
        ),
    ] {
        store.save_snapshot(&stream("a"), snapshot).await.unwrap();
        let node = start(revision).await;
        store.count_reads();
        assert_eq!(node.execute::<Counter>("a", Look).await.unwrap().reply, 250, "{what}");
        assert_eq!(store.events_read(), 250, "{what}: the whole stream");
        node.shutdown().await.unwrap();
    }
}

/// A state that decodes to other content: serde omits an empty list, and reads it as `[9]`.
#[derive(Default, Serialize, Deserialize)]
struct Shelf {
    #[serde(default = "nine", skip_serializing_if = "Vec::is_empty")]
    books: Vec<u64>,
}

fn nine() -> Vec<u64> {
    vec![9]
}

impl Aggregate for Shelf {
    type Event = CounterEvent;
    type Command = u64;
    type Reply = Vec<u64>;
    type Error = CounterError;

    fn handle(&self, n: &u64, _: &Context<'_>) -> Decided<Self> {
        Ok(Decision::event(CounterEvent::Added { n: *n }).reply(self.books.clone()))
    }

    fn apply(&mut self, _: &CounterEvent) {
        self.books.clear();
    }
}

#[tokio::test]
async fn a_state_that_decodes_to_other_content_has_no_snapshot() {
    let store = MemoryStore::new();
    for _ in 0..2 {
        let options = AggregateOptions::<Shelf>::new().snapshot_every(5, SnapshotRevision(1));
        let node = Runtime::builder().store(store.clone()).aggregate_with(options).start().await.unwrap();
        for _ in 0..12 {
            assert!(node.execute::<Shelf>("a", 1_u64).await.unwrap().reply.is_empty());
        }
        node.shutdown().await.unwrap();
    }
    assert!(store.snapshot(&stream("a")).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_under_a_busy_pipeline_hold_what_is_durable() {
    let store = MemoryStore::new();
    let start = async || {
        let options = AggregateOptions::<Counter>::new().snapshot_every(7, SnapshotRevision(1));
        Runtime::builder().store(store.clone()).aggregate_with(options).start().await.unwrap()
    };
    for round in 1..=5 {
        let runtime = start().await;
        let tasks: Vec<_> = (0..16)
            .map(|_| {
                let runtime = runtime.clone();
                tokio::spawn(async move {
                    for _ in 0..25 {
                        runtime.execute::<Counter>("hot", Add(1)).await.unwrap();
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(runtime.execute::<Counter>("hot", Look).await.unwrap().reply, round * 400);
        runtime.shutdown().await.unwrap();
    }
    assert!(store.snapshot(&stream("hot")).await.unwrap().is_some());
    assert_eq!(stored(&store, "hot").await, (2_000, 2_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_answers_commands_in_flight_and_refuses_new_ones() {
    for round in 0..20 {
        let store = FaultyStore::new(MemoryStore::new());
        let runtime = runtime(store.clone()).await;
        let acknowledged = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let tasks: Vec<_> = (0..8)
            .map(|task| {
                let (runtime, acknowledged) = (runtime.clone(), acknowledged.clone());
                tokio::spawn(async move {
                    loop {
                        match runtime.execute::<Counter>(task % 3, Add(1)).await {
                            Ok(_) => acknowledged.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
                            Err(ExecuteError::NotExecuted {
                                kind: NotExecutedKind::ShuttingDown, ..
                            }) => return,
                            Err(error) => panic!("{error}"),
                        };
                    }
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(round)).await;
        runtime.shutdown().await.unwrap();
        for task in tasks {
            task.await.unwrap();
        }
        let mut sum = 0;
        for id in ["0", "1", "2"] {
            sum += stored(&store.inner, id).await.0;
        }
        assert_eq!(
            sum,
            acknowledged.load(std::sync::atomic::Ordering::Relaxed),
            "exactly the acknowledged commands"
        );
    }
}

#[tokio::test]
async fn shutdown_reports_unfinished_commands() {
    let store = FaultyStore::new(MemoryStore::new());
    let runtime = runtime(store.clone()).await;
    store.hold();
    let clone = runtime.clone();
    let stuck = tokio::spawn(async move { clone.execute::<Counter>("a", Add(1)).await });
    store.held(1).await;
    let error = runtime.shutdown_within(Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(error.unfinished, ["1 commands without an answer"]);
    let unknown = stuck.await.unwrap().unwrap_err();
    assert!(matches!(unknown, ExecuteError::OutcomeUnknown { .. }), "{unknown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hot_aggregate_shares_transactions() {
    let store = FaultyStore::new(MemoryStore::new());
    store.delay(Duration::from_millis(2));
    let runtime = runtime(store.clone()).await;
    let tasks: Vec<_> = (0..64)
        .map(|_| {
            let runtime = runtime.clone();
            tokio::spawn(async move {
                for _ in 0..10 {
                    runtime.execute::<Counter>("hot", Add(1)).await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(stored(&store.inner, "hot").await, (640, 640));
    let writer = runtime.status().await.writer;
    assert!(writer.transactions <= 160, "{writer:?}: not one commit a command");
}

#[tokio::test]
async fn events_must_be_an_enum_and_categories_unique() {
    #[derive(Default)]
    struct Odd;
    #[derive(Serialize, Deserialize)]
    struct NoEnum {
        n: u64,
    }
    impl Event for NoEnum {
        const CATEGORY: &'static str = "odd";
    }
    impl Aggregate for Odd {
        type Event = NoEnum;
        type Command = ();
        type Reply = ();
        type Error = CounterError;
        fn handle(&self, (): &(), _: &Context<'_>) -> Decided<Self> {
            Ok(Decision::event(NoEnum { n: 1 }))
        }
        fn apply(&mut self, _: &NoEnum) {}
    }
    let error = Runtime::builder().store(MemoryStore::new()).aggregate::<Odd>().start().await.unwrap_err();
    assert!(error.to_string().contains("externally tagged"), "{error}");
    let error = Runtime::builder()
        .store(MemoryStore::new())
        .aggregate::<Counter>()
        .aggregate::<Counter>()
        .start()
        .await
        .unwrap_err();
    assert!(error.to_string().contains("category"), "{error}");
    assert!(Runtime::builder().aggregate::<Counter>().start().await.is_err());
}

/// Every event appended through the runtime is in the log, ordered by position.
#[tokio::test]
async fn the_log_has_every_event_in_order() {
    let store = MemoryStore::new();
    let runtime = runtime(store.clone()).await;
    for n in 0..100 {
        runtime.execute::<Counter>(n % 7, Add(1)).await.unwrap();
    }
    let page = store.read_log(ReadLog::after(storied::Position::START)).await.unwrap();
    assert_eq!(page.events.len(), 100);
    assert!(page.events.windows(2).all(|pair| pair[0].position < pair[1].position));
}

/// Another node has executed the command. It took effect, regardless of the limit of attempts.
#[tokio::test]
async fn the_last_attempt_still_finds_the_first_receipt() {
    let store = MemoryStore::new();
    let here = runtime(store.clone()).await;
    let options = AggregateOptions::<Counter>::new().max_attempts(1);
    let there = Runtime::builder().store(store.clone()).aggregate_with(options).start().await.unwrap();
    there.execute::<Counter>("a", Add(1)).await.unwrap(); // live there, at version 1
    let id = Uuid::now_v7();
    let first = here.execute::<Counter>("a", Add(2)).command_id(id).await.unwrap();
    let again = there.execute::<Counter>("a", Add(2)).command_id(id).await.unwrap();
    assert_eq!((again.duplicate, again.version, again.reply), (true, first.version, 3));
    assert_eq!(stored(&store, "a").await, (3, 2));
}

#[tokio::test]
async fn an_unstorable_command_fails_alone() {
    let store = FaultyStore::new(MemoryStore::new());
    let runtime = runtime(store.clone()).await;
    store.poison(added(666).payload.to_vec());
    store.hold();
    let head = runtime.execute::<Counter>("a", Add(1)).dispatch().await.unwrap();
    store.held(1).await;
    // These are decided while the first append is in flight, and sent as one append.
    let ahead = runtime.execute::<Counter>("a", Add(10)).dispatch().await.unwrap();
    let poison = runtime.execute::<Counter>("a", Add(666)).dispatch().await.unwrap();
    let behind = runtime.execute::<Counter>("a", Add(100)).dispatch().await.unwrap();
    tokio::time::sleep(Duration::from_millis(20)).await; // let them be decided ahead
    store.release();
    assert_eq!(head.await.unwrap().reply, 1);
    assert_eq!(ahead.await.unwrap().reply, 11);
    let error = poison.await.unwrap_err();
    assert!(
        matches!(
            error,
            ExecuteError::NotExecuted { kind: NotExecutedKind::Store(StoreError::Invalid { .. }), .. }
        ),
        "{error}"
    );
    assert_eq!(behind.await.unwrap().reply, 111, "decided again, without the rejected command");
    assert_eq!(stored(&store.inner, "a").await, (111, 3));
}

#[tokio::test]
async fn a_slow_store_does_not_pile_up_snapshots() {
    let mut store = FaultyStore::new(MemoryStore::new());
    store.hold_snapshots = true;
    let waiting = store.snapshots_waiting.clone();
    let options = AggregateOptions::<Counter>::new().snapshot_every(1, SnapshotRevision(1));
    let runtime = Runtime::builder().store(store).aggregate_with(options).start().await.unwrap();
    for _ in 0..500 {
        runtime.execute::<Counter>("a", Add(1)).await.unwrap();
    }
    let waiting = waiting.load(std::sync::atomic::Ordering::SeqCst);
    assert!((1..=4).contains(&waiting), "{waiting} snapshots in flight");
}

#[tokio::test]
async fn shutdown_counts_unanswered_commands() {
    let store = FaultyStore::new(MemoryStore::new());
    let runtime = runtime(store.clone()).await;
    store.hold();
    let mut dispatched = Vec::new();
    for id in 0..50 {
        dispatched.push(runtime.execute::<Counter>(id, Add(1)).dispatch().await.unwrap());
    }
    store.held(1).await;
    let error = runtime.shutdown_within(Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(error.unfinished, ["50 commands without an answer"]);
}

mod unlucky {
    //! Panics of user code outside of its main functions.

    use super::*;

    #[derive(Default)]
    struct Unlucky;

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum UnluckyEvent {
        Drawn(u64),
    }

    impl Serialize for UnluckyEvent {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let UnluckyEvent::Drawn(number) = self;
            assert!(*number != 13, "cannot write 13");
            serializer.serialize_newtype_variant("UnluckyEvent", 0, "drawn", number)
        }
    }

    impl Event for UnluckyEvent {
        const CATEGORY: &'static str = "unlucky";
    }

    impl Aggregate for Unlucky {
        type Event = UnluckyEvent;
        type Command = u64;
        type Reply = ();
        type Error = CounterError;

        fn handle(&self, number: &u64, context: &Context<'_>) -> Decided<Self> {
            assert!(context.new_id() != context.new_id());
            Ok(Decision::event(UnluckyEvent::Drawn(*number)))
        }

        fn apply(&mut self, _: &UnluckyEvent) {}
    }

    #[tokio::test]
    async fn a_panic_while_encoding_stays_with_its_command() {
        let store = FaultyStore::new(MemoryStore::new());
        let runtime = Runtime::builder().store(store.clone()).aggregate::<Unlucky>().start().await.unwrap();
        store.hold();
        let good = runtime.execute::<Unlucky>("x", 1_u64).dispatch().await.unwrap();
        store.held(1).await;
        let error = runtime.execute::<Unlucky>("x", 13_u64).await.unwrap_err();
        assert!(
            matches!(&error, ExecuteError::NotExecuted { kind: NotExecutedKind::Encode(_), .. }),
            "{error:?}"
        );
        assert!(error.to_string().contains("cannot write 13"), "{error}");
        store.release();
        good.await.unwrap();
        assert_eq!(runtime.execute::<Unlucky>("x", 2_u64).await.unwrap().version, Version::new(2));
    }
}
