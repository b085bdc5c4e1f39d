//! Concurrent commands, some of which have an event that the database refuses.

use std::future::IntoFuture;

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use storied::{
    Aggregate, Context, Decision, Event, EventStore, ExecuteError, NotExecutedKind, Runtime, StoreError,
};

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum OrderEvent {
    Placed {},
    Poison {},
}

impl Event for OrderEvent {
    const CATEGORY: &'static str = "order";
}

#[derive(Default, Serialize, Deserialize)]
struct Order;

#[derive(Debug, Serialize, Deserialize, thiserror::Error)]
#[error("never")]
struct Never;

impl Aggregate for Order {
    type Event = OrderEvent;
    type Command = bool;
    type Reply = ();
    type Error = Never;

    fn handle(&self, poison: &bool, _: &Context<'_>) -> Result<Decision<OrderEvent, ()>, Never> {
        Ok(Decision::event(if *poison { OrderEvent::Poison {} } else { OrderEvent::Placed {} }))
    }

    fn apply(&mut self, _: &OrderEvent) {}
}

/// Executes 60 concurrent commands on 20 aggregates, over a store that refuses `order.poison`.
///
/// Only the 9 commands with that event fail.
pub(crate) async fn fails_alone(store: impl EventStore) {
    let runtime = Runtime::builder().store(store).aggregate::<Order>().start().await.unwrap();
    let poisoned = |n: usize| n % 7 == 3;
    let commands =
        (0..60).map(|n| runtime.execute::<Order>(format!("own-{}", n % 20), poisoned(n)).into_future());
    for (n, result) in join_all(commands).await.into_iter().enumerate() {
        match result {
            Ok(_) => assert!(!poisoned(n), "{n}"),
            Err(ExecuteError::NotExecuted {
                kind: NotExecutedKind::Store(StoreError::Invalid { .. }),
                ..
            }) => assert!(poisoned(n), "{n}"),
            Err(error) => panic!("{n}: {error:?}"),
        }
    }
    let writer = runtime.status().await.writer;
    assert_eq!((writer.appends, writer.events, writer.failures), (51, 51, 9), "{writer:?}");
    assert!(writer.transactions < 60 + 9, "concurrent appends share transactions: {writer:?}");
    runtime.shutdown().await.unwrap();
}
