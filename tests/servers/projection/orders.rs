//! Orders of an operator, as those of the command-line tool, whose node dies while it carries them out.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use storied::projection::{Answer, ApplyError, Operator, PerTarget, Request};
use storied::testing::Node;
use storied::{AnyEvent, EventStore, Filter, Position, Projection, ProjectionHandle, RecordedEvent};
use tokio::time::Instant;

use crate::projection::conformance::place::{InPostgres, InSqlite, Outside, Place};
use crate::projection::fixtures::*;

/// Writes down what it applies, and in `resets` the number of each of its resets.
struct Noted<P> {
    place: P,
    version: u64,
    resets: Arc<AtomicU64>,
    /// Closed, it stops a reset that is all but done.
    gate: Gate,
}

impl<P> Noted<P> {
    fn table(version: u64) -> String {
        format!("noted@{version}")
    }
}

impl<P: Place> Projection for Noted<P> {
    const NAME: &'static str = "noted";
    type Event = AnyEvent;
    type Transaction = P::Tx;

    async fn apply(&mut self, _: AnyEvent, event: &RecordedEvent, tx: &mut P::Tx) -> Result<(), ApplyError> {
        self.place.write(&Self::table(self.version), event.position, tx).await
    }

    async fn reset(&mut self, tx: &mut P::Tx) -> Result<(), ApplyError> {
        let number = self.resets.fetch_add(1, Ordering::SeqCst) + 1;
        self.place.clear(&Self::table(self.version), tx).await?;
        self.place.write("resets", Position::new(number), tx).await?;
        self.gate.pass().await
    }
}

/// What the nodes of a test share.
struct Scene<P> {
    store: Arc<dyn EventStore>,
    place: P,
    resets: Arc<AtomicU64>,
}

impl<P: Place> Scene<P> {
    fn new(store: &Arc<dyn EventStore>, place: P) -> Self {
        Self { store: store.clone(), place, resets: Arc::default() }
    }

    async fn node(&self, gate: &Gate) -> (Node, ProjectionHandle) {
        let node = local_node(&self.store).await;
        let (place, resets, gate) = (self.place.clone(), self.resets.clone(), gate.clone());
        let make = move |target: storied::projection::BuildTarget| Noted {
            place: place.clone(),
            version: target.version,
            resets: resets.clone(),
            gate: gate.clone(),
        };
        let handle = node.projection(PerTarget::new(make), self.place.model().await, short_lived()).await;
        (node, handle)
    }

    /// A node dies in the reset by which it carries out an order, and another one takes over. A third one must find nothing more
    /// to do. Orders are kept in `orders`.
    async fn dies_in_its_reset(self, request: Request, orders: &impl Place) {
        append(&self.store, 0, 0..10).await;
        let (shut, open) = (Gate::closed(), Gate::closed());
        open.open();
        let (dying, handle) = self.node(&shut).await;
        catch_up(&handle, self.store.high_water_mark().await.unwrap()).await;
        // Not earlier: the first node has made the tables.
        let operator = Operator::new(self.store.clone(), orders.model().await).await.unwrap();
        let asked = operator.ask("noted", request).await.unwrap();
        shut.reached().await;
        dying.kill();
        assert_eq!(operator.answer(&asked).await.unwrap(), Answer::Waiting, "{request}");

        let version = u64::from(request == Request::Rebuild);
        let (heir, handle) = self.node(&open).await;
        let give_up = Instant::now() + PATIENCE;
        while operator.answer(&asked).await.unwrap() != Answer::Taken {
            assert!(Instant::now() < give_up, "{request} was not taken: {:?}", handle.status());
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        eventually("its version is live", || handle.status().version == version).await;
        self.is_exact(&handle, version).await;
        heir.stop(PATIENCE).await.unwrap();

        let (next, handle) = self.node(&open).await;
        self.is_exact(&handle, version).await;
        assert_eq!(handle.status().version, version, "{request}");
        assert_eq!(self.resets.load(Ordering::SeqCst), 2, "{request}");
        // What the first node did is gone with its transaction, if there was one.
        let kept: &[u64] = if P::TOGETHER { &[2] } else { &[1, 2] };
        assert_eq!(
            self.place.seen("resets").await,
            kept.iter().map(|n| Position::new(*n)).collect::<Vec<_>>()
        );
        let record = operator.projection("noted").await.unwrap().unwrap();
        assert_eq!((record.requests, record.rebuild), (Vec::new(), None), "{request}");
        next.stop(PATIENCE).await.unwrap();
    }

    async fn is_exact(&self, handle: &ProjectionHandle, version: u64) {
        catch_up(handle, append(&self.store, 0, [0]).await).await;
        let seen = self.place.seen(&Noted::<P>::table(version)).await;
        assert_eq!(seen, log(&self.store, &Filter::all()).await);
    }
}

async fn in_sql<P: Place>(request: Request) {
    let (store, place) = P::open().await;
    Scene::new(&store, place.clone()).dies_in_its_reset(request, &place).await;
}

/// The order is removed in the transaction that carries it out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_whose_node_dies_happens_once() {
    tokio::join!(
        in_sql::<InSqlite>(Request::Reset),
        in_sql::<InSqlite>(Request::Rebuild),
        in_sql::<InPostgres>(Request::Reset),
        in_sql::<InPostgres>(Request::Rebuild),
    );
}

/// Outside, no transaction has both the order and its effect: the next node does it again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_outside_whose_node_dies_happens_at_least_once() {
    let (store, database) = InPostgres::open().await;
    Scene::new(&store, Outside::default()).dies_in_its_reset(Request::Reset, &database).await;
}
