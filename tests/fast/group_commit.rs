//! When the group commit starts a transaction beside another one. The clock stands still.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use storied::event::Tags;
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

/// Events with a tag of their own.
#[derive(Default)]
struct Label;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum LabelEvent {
    Attached { n: u32 },
}

impl Event for LabelEvent {
    const CATEGORY: &'static str = "label";

    fn tags(&self) -> Tags {
        let LabelEvent::Attached { n } = self;
        Tags::new().tag("n", n)
    }
}

impl Aggregate for Label {
    type Event = LabelEvent;
    type Command = u32;
    type Reply = ();
    type Error = NeverRejects;

    fn handle(&self, n: &u32, _: &Context<'_>) -> Decided<Self> {
        Ok(LabelEvent::Attached { n: *n }.into())
    }

    fn apply(&mut self, _: &LabelEvent) {}
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

/// Appends of one stream are merged, as far as one append may have their tags.
#[tokio::test(start_paused = true)]
async fn merged_appends_have_a_limited_number_of_tags() {
    let store = FaultyStore::new(MemoryStore::new()).with_append_concurrency(2);
    let runtime = Runtime::builder().store(store.clone()).aggregate::<Label>().start().await.unwrap();
    store.hold();
    for n in 0..101_u32 {
        drop(runtime.execute::<Label>("a", n).dispatch().await.unwrap());
    }
    store.held(1).await;
    settle().await;
    store.release();
    while runtime.status().await.writer.events < 101 {
        settle().await;
    }
    // 64 and 37; a refused transaction would count, too.
    let writer = runtime.status().await.writer;
    assert_eq!((writer.appends, writer.transactions), (101, 2));
    runtime.shutdown().await.unwrap();
}
