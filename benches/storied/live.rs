//! Appends to a read model in PostgreSQL on another node, which follows the bus.
//!
//! The projection writes its checkpoint only, so that the numbers show the delivery.

use std::time::{Duration, Instant};

use sqlx::{PgConnection, PgPool};
use storied::projection::{ApplyError, FollowMode, PostgresReadModel, Projection};
use storied::{ProjectionOptions, PublisherState, RecordedEvent, Runtime};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::args::{BusKind, Plan};
use crate::domain::AccountEvent;
use crate::latency::{append, ticks};
use crate::measure::{Comparison, Run};
use crate::nats::Nats;
use crate::stores::{POSTGRES_SCHEMA, Store};
use crate::workloads::AGGREGATES;

/// Measures appends of 50 events at full speed, until the read model has the last event.
///
/// The limit is the same projection on the node that appends, without a bus.
pub async fn throughput(plan: &Plan) -> Comparison {
    let mut runs = Vec::new();
    for bus in [plan.bus, BusKind::Local] {
        let mut scene = Scene::open(plan, bus).await;
        let filled = {
            let (store, plan) = (scene.store.clone(), plan.clone());
            async move { store.fill_in(&plan, AGGREGATES, 50).await }
        };
        let start = Instant::now();
        let filling = tokio::spawn(filled);
        for _ in 0..plan.events {
            scene.seen.recv().await.unwrap();
        }
        runs.push(Run::whole(plan.events, start.elapsed()));
        filling.await.unwrap();
        scene.close().await;
    }
    let [ours, limit] = <[Run; 2]>::try_from(runs).ok().unwrap();
    Comparison { ours, limit, note: NOTE.into() }
}

/// Measures the time from before an append until the event is applied, 200 times a second.
///
/// The limit is the same projection on the node that appends, without a bus.
pub async fn latency(plan: &Plan) -> Comparison {
    let mut runs = Vec::new();
    for bus in [plan.bus, BusKind::Local] {
        let mut scene = Scene::open(plan, bus).await;
        let mut ticks = ticks();
        let mut latencies = Vec::with_capacity(plan.events);
        for n in 0..plan.events {
            ticks.tick().await;
            let (start, id) = append(&scene.store, plan, n).await;
            while scene.seen.recv().await.unwrap() != id {}
            latencies.push(start.elapsed());
        }
        runs.push(Run::each(latencies));
        scene.close().await;
    }
    let [ours, limit] = <[Run; 2]>::try_from(runs).ok().unwrap();
    Comparison { ours, limit, note: NOTE.into() }
}

const NOTE: &str = "both are storied: over the bus, and on the node that appends";

/// A publishing node and a node with the read model; without a bus one node is both.
struct Scene {
    store: Store,
    nodes: Vec<Runtime>,
    seen: mpsc::UnboundedReceiver<Uuid>,
    nats: Option<Nats>,
}

impl Scene {
    async fn open(plan: &Plan, bus: BusKind) -> Self {
        let store = Store::fresh(plan.store).await;
        let (sender, seen) = mpsc::unbounded_channel();
        let pool = PgPool::connect(&store.place().await).await.unwrap();
        // Dropped together with its event store.
        let read_model = PostgresReadModel::new(pool).schema(POSTGRES_SCHEMA).unwrap();
        let mut nodes = Vec::new();
        let mut nats = None;
        let follower = match bus {
            BusKind::Local => store.builder().projection(Seen(sender), read_model),
            BusKind::Core | BusKind::JetStream => {
                let server = Nats::start(bus).await;
                let node = store.builder().bus(server.events(bus)).start().await.unwrap();
                while node.status().await.publisher.state != PublisherState::Publishing {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                nodes.push(node);
                let follow = match bus {
                    BusKind::JetStream => FollowMode::Durable,
                    _ => FollowMode::default(),
                };
                let options = ProjectionOptions::new().follow(follow);
                let other = Store::existing(plan.store, &store.place().await).await;
                let builder = other.builder().bus(server.events(bus));
                nats = Some(server);
                builder.projection_with(Seen(sender), read_model, options)
            }
        };
        let follower = follower.start().await.unwrap();
        follower.projection("seen").unwrap().wait_until_caught_up(Duration::from_secs(30)).await.unwrap();
        nodes.push(follower);
        Self { store, nodes, seen, nats }
    }

    async fn close(self) {
        // The follower first, so that it does not take over the publisher.
        for node in self.nodes.into_iter().rev() {
            node.shutdown().await.unwrap();
        }
        if let Some(nats) = self.nats {
            nats.drop_log_stream().await;
        }
    }
}

struct Seen(mpsc::UnboundedSender<Uuid>);

impl Projection for Seen {
    const NAME: &'static str = "seen";
    type Event = AccountEvent;
    type Transaction = PgConnection;

    async fn apply(
        &mut self,
        event: AccountEvent,
        recorded: &RecordedEvent,
        _: &mut PgConnection,
    ) -> Result<(), ApplyError> {
        let AccountEvent::Entered { .. } = event;
        self.0.send(recorded.id).map_err(|_| "the receiver is closed".into())
    }

    async fn reset(&mut self, _: &mut PgConnection) -> Result<(), ApplyError> {
        Ok(())
    }
}
