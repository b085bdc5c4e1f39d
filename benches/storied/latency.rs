//! Latency from an append to the receiver of the event.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use storied::bus::Received;
use storied::projection::{ApplyError, InMemory, Projection};
use storied::store::{Append, ExpectedVersion};
use storied::{Metadata, NewEvent, RecordedEvent, StreamId, Version};
use tokio::sync::mpsc;
use tokio::time::{Interval, MissedTickBehavior, interval};
use uuid::Uuid;

use crate::args::{BusKind, Plan};
use crate::commits::SingleCommits;
use crate::delivery::Scene;
use crate::domain::{AccountEvent, text};
use crate::measure::{Comparison, Run};
use crate::nats::subscribe;
use crate::stores::Store;
use crate::workloads::AGGREGATES;

/// Measures the latency from an append to a projection of the same process, 200 times a second.
///
/// The limit commits a single row and reads it on another connection. On the memory store, the
/// limit is that store itself.
pub async fn to_projection(plan: &Plan) -> Comparison {
    let store = Store::fresh(plan.store).await;
    let (sender, mut seen) = mpsc::unbounded_channel();
    let runtime = store.builder().projection(Seen(sender), InMemory::new()).start().await.unwrap();
    runtime.projection("seen").unwrap().wait_until_caught_up(Duration::from_secs(10)).await.unwrap();
    let mut ticks = ticks();
    let mut latencies = Vec::with_capacity(plan.events);
    for n in 0..plan.events {
        ticks.tick().await;
        let (start, id) = append(&store, plan, n).await;
        while seen.recv().await.unwrap() != id {}
        latencies.push(start.elapsed());
    }
    let ours = Run::each(latencies);
    runtime.shutdown().await.unwrap();

    let mut table = SingleCommits::open(plan.store).await;
    let body = vec![b'x'; plan.payload];
    let mut latencies = Vec::with_capacity(plan.events);
    for _ in 0..plan.events {
        ticks.tick().await;
        let start = Instant::now();
        table.insert(&body).await;
        table.read_last().await;
        latencies.push(start.elapsed());
    }
    table.close().await;
    Comparison { ours, limit: Run::each(latencies), note: NOTE.into() }
}

/// Measures the time from an append to a subscriber on another connection, 200 times a second.
///
/// The limit commits a single row, then publishes one message and receives it. With JetStream, a
/// stream listens to the subject, and the limit does not wait for its answer.
pub async fn to_subscriber(plan: &Plan) -> Comparison {
    let mut scene = Scene::open(plan).await;
    let mut ticks = ticks();
    // Messages published before the server knows the subscription never arrive.
    let mut tries = 0;
    while !arrives(&mut scene, plan, tries, Duration::from_secs(1)).await.1 {
        tries += 1;
        assert!(tries < 10, "nothing comes over the bus");
    }
    let mut latencies = Vec::with_capacity(plan.events);
    for n in tries + 1..=tries + plan.events {
        ticks.tick().await;
        let (latency, came) = arrives(&mut scene, plan, n, Duration::from_secs(10)).await;
        assert!(came, "an event did not come over the bus");
        latencies.push(latency);
    }
    let ours = Run::each(latencies);
    let mut message = scene.message().await;
    let nats = scene.close().await;

    // The stream would reject copies.
    message.headers = message.headers.map(|headers| {
        let kept = headers.iter().filter(|(name, _)| !AsRef::<str>::as_ref(*name).starts_with("Nats-"));
        kept.flat_map(|(name, values)| values.iter().map(move |value| (name.clone(), value.clone())))
            .collect()
    });
    let [publisher, subscriber] = [nats.connect().await, nats.connect().await];
    let mut messages = subscribe(&subscriber, message.subject.clone()).await;
    let mut table = SingleCommits::open(plan.store).await;
    let mut latencies = Vec::with_capacity(plan.events);
    for _ in 0..plan.events {
        ticks.tick().await;
        let start = Instant::now();
        table.insert(&message.payload).await;
        let headers = message.headers.clone().unwrap_or_default();
        publisher
            .publish_with_headers(message.subject.clone(), headers, message.payload.clone())
            .await
            .unwrap();
        let coming = tokio::time::timeout(Duration::from_secs(10), messages.next());
        assert!(matches!(coming.await, Ok(Some(_))), "a message did not come");
        latencies.push(start.elapsed());
    }
    table.close().await;
    if plan.bus == BusKind::JetStream {
        nats.drop_log_stream().await;
    }
    Comparison { ours, limit: Run::each(latencies), note: NOTE.into() }
}

/// Returns the time from before an append to the arrival of its event, and whether it arrived.
async fn arrives(scene: &mut Scene, plan: &Plan, n: usize, patience: Duration) -> (Duration, bool) {
    let (start, id) = append(&scene.store, plan, n).await;
    let coming = async {
        loop {
            if let Received::Event(delivery) = scene.subscription.next().await.unwrap()
                && delivery.event().id == id
            {
                break;
            }
        }
    };
    let came = tokio::time::timeout(patience, coming).await.is_ok();
    (start.elapsed(), came)
}

const NOTE: &str = "rates are of the mean latency; the ratio is the limit's to ours";

struct Seen(mpsc::UnboundedSender<Uuid>);

impl Projection for Seen {
    const NAME: &'static str = "seen";
    type Event = AccountEvent;
    type Transaction = ();

    async fn apply(
        &mut self,
        event: AccountEvent,
        recorded: &RecordedEvent,
        (): &mut (),
    ) -> Result<(), ApplyError> {
        let AccountEvent::Entered { .. } = event;
        self.0.send(recorded.id).map_err(|_| "no receiver waits".into())
    }

    async fn reset(&mut self, (): &mut ()) -> Result<(), ApplyError> {
        Ok(())
    }
}

pub async fn append(store: &Store, plan: &Plan, n: usize) -> (Instant, Uuid) {
    let event = AccountEvent::Entered { text: text(plan.payload) };
    let new = NewEvent::encode(&event, store.port().info().codec, &Metadata::default()).unwrap();
    let id = new.id;
    // As commands append.
    let stream = StreamId::new("account", n % AGGREGATES).unwrap();
    let expected = ExpectedVersion::Exact(Version::new((n / AGGREGATES) as u64));
    let start = Instant::now();
    for answer in store.port().append(vec![Append::one(stream, expected, vec![new])]).await {
        answer.unwrap();
    }
    (start, id)
}

/// Returns the interval of the appends.
pub fn ticks() -> Interval {
    let mut ticks = interval(Duration::from_millis(5));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
