//! When the group commit starts a transaction beside another one. The clock stands still.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use storied::{Aggregate, Context, Decided, Decision, Event, MemoryStore, NeverRejects, Runtime};
use tokio::task::yield_now;
use tokio::time::advance;

use crate::support::FaultyStore;

#[derive(Default)]
struct Note;

/// Notes this many events.
#[derive(Serialize, Deserialize)]
struct Write(usize);

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum NoteEvent {
    Written,
}

impl Event for NoteEvent {
    const CATEGORY: &'static str = "note";
}

impl Aggregate for Note {
    type Event = NoteEvent;
    type Command = Write;
    type Reply = ();
    type Error = NeverRejects;

    fn handle(&self, Write(events): &Write, _: &Context<'_>) -> Decided<Self> {
        Ok(Decision::events(std::iter::repeat_n(NoteEvent::Written, *events)))
    }

    fn apply(&mut self, _: &NoteEvent) {}
}

/// A store whose appends wait, and a runtime that keeps up to two of them in flight.
async fn waiting() -> (FaultyStore, Runtime) {
    let store = FaultyStore::new(MemoryStore::new()).with_append_concurrency(2);
    let runtime = Runtime::builder().store(store.clone()).aggregate::<Note>().start().await.unwrap();
    store.hold();
    (store, runtime)
}

async fn write(runtime: &Runtime, id: &str, events: usize) {
    drop(runtime.execute::<Note>(id, Write(events)).dispatch().await.unwrap());
}

/// Lets all tasks do what they can without time.
async fn settle() {
    for _ in 0..200 {
        yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_second_transaction_starts_beside_a_small_one() {
    let (store, runtime) = waiting().await;
    for (id, in_flight) in [("a", 1), ("b", 2), ("c", 2)] {
        write(&runtime, id, 4).await;
        settle().await;
        assert_eq!(store.appends_held(), in_flight, "after {id}");
    }
    store.release();
    settle().await;
    assert_eq!(runtime.status().await.writer.events, 12);
    runtime.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn beside_a_large_one_it_starts_when_that_is_slow() {
    let (store, runtime) = waiting().await;
    write(&runtime, "a", 5).await;
    store.held(1).await;
    write(&runtime, "b", 1).await;
    write(&runtime, "c", 1).await;
    settle().await;
    assert_eq!(store.appends_held(), 1);
    advance(Duration::from_micros(1_100)).await;
    settle().await;
    assert_eq!(store.appends_held(), 2);
    store.release();
    settle().await;
    let writer = runtime.status().await.writer;
    assert_eq!((writer.transactions, writer.events), (2, 7), "those that waited share a transaction");
    runtime.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_next_one_starts_at_the_end_of_a_large_one() {
    let (store, runtime) = waiting().await;
    write(&runtime, "a", 5).await;
    store.held(1).await;
    write(&runtime, "b", 1).await;
    settle().await;
    assert_eq!(store.appends_held(), 1);
    store.release();
    settle().await;
    let writer = runtime.status().await.writer;
    assert_eq!((writer.transactions, writer.events), (2, 6), "without waiting for the time");
    runtime.shutdown().await.unwrap();
}
