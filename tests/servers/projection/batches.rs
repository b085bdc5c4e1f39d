//! Number of events in a transaction.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sqlx::SqliteConnection;
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
use storied::projection::{ApplyError, AtLeastOnce, Delivery, SqliteReadModel};
use storied::{AnyEvent, EventStore, MemoryStore, Position, Projection, RecordedEvent};

use crate::projection::fixtures::*;

/// First position and number of events of each batch.
type Batches = Arc<Mutex<Vec<(Position, usize)>>>;

struct Paced {
    batches: Batches,
    /// Duration of an event, in milliseconds.
    pace: Arc<AtomicU64>,
}

impl Projection for Paced {
    const NAME: &'static str = "paced";
    type Event = AnyEvent;
    type Transaction = Delivery;

    async fn apply(
        &mut self,
        _: AnyEvent,
        _: &RecordedEvent,
        delivery: &mut Delivery,
    ) -> Result<(), ApplyError> {
        {
            let mut batches = self.batches.lock().unwrap();
            match batches.last_mut().filter(|(began, _)| *began == delivery.confirmed) {
                Some((_, events)) => *events += 1,
                None => batches.push((delivery.confirmed, 1)),
            }
        }
        match self.pace.load(Ordering::SeqCst) {
            0 => {}
            millis => tokio::time::sleep(Duration::from_millis(millis)).await,
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_are_as_large_as_their_time_allows() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let (batches, pace) = (Batches::default(), Arc::new(AtomicU64::new(10)));
    let sizes = || batches.lock().unwrap().drain(..).map(|(_, events)| events).collect::<Vec<_>>();
    append(&store, 0, 0..300).await;
    let node = local_node(&store).await;
    let options = options().batch_size(400).batch_time(Duration::from_millis(200));
    let paced = Paced { batches: batches.clone(), pace: pace.clone() };
    let handle = node.projection(paced, AtLeastOnce::new(), options).await;
    catch_up(&handle, store.high_water_mark().await.unwrap()).await;
    // An event takes 10 ms or more, so 20 of them are (nearly) too many.
    let slow = sizes();
    assert_eq!(slow[..2], [50, 25], "{slow:?}");
    assert!(slow[2..].iter().all(|&events| events <= 25) && slow.len() > 10, "{slow:?}");
    // Quick again: the batches reach the maximum size within a few transactions.
    pace.store(0, Ordering::SeqCst);
    handle.pause().await.unwrap();
    append(&store, 0, 0..6_000).await;
    handle.resume().await.unwrap();
    catch_up(&handle, store.high_water_mark().await.unwrap()).await;
    let quick = sizes();
    assert!(quick.contains(&400) && quick[0] <= 25, "{quick:?}");
    assert!(quick.iter().all(|&events| events <= 400), "{quick:?}");
    node.stop(PATIENCE).await.unwrap();
}

/// The same in a database: the checkpoint separates one transaction from the next.
struct Written(Batches);

impl Projection for Written {
    const NAME: &'static str = "written";
    type Event = AnyEvent;
    type Transaction = SqliteConnection;

    async fn apply(
        &mut self,
        _: AnyEvent,
        _: &RecordedEvent,
        tx: &mut SqliteConnection,
    ) -> Result<(), ApplyError> {
        let at = sqlx::query_scalar("SELECT max(position) FROM storied_checkpoints");
        let at: Option<i64> = at.fetch_one(tx).await?;
        let at = Position::new(at.unwrap_or(0) as u64);
        let mut batches = self.0.lock().unwrap();
        match batches.last_mut().filter(|(began, _)| *began == at) {
            Some((_, events)) => *events += 1,
            None => batches.push((at, 1)),
        }
        Ok(())
    }
}

/// A smaller batch would wait for a connection as long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_for_a_connection_makes_no_batch_smaller() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let database = Database::new().await;
    append(&store, 0, 0..300).await;
    let connect = SqliteConnectOptions::new().filename(database.path());
    let pool = SqlitePoolOptions::new().max_connections(1).connect_with(connect).await.unwrap();
    let node = local_node(&store).await;
    let batches = Batches::default();
    let time = Duration::from_millis(400);
    // Other tasks use the only connection all the time, each for longer than a batch may take.
    let others = tokio::spawn({
        let pool = pool.clone();
        async move {
            loop {
                let _connection = pool.acquire().await.unwrap();
                tokio::time::sleep(time * 3 / 2).await;
            }
        }
    });
    let options = options().batch_size(400).batch_time(time);
    let handle = node.projection(Written(batches.clone()), SqliteReadModel::new(pool), options).await;
    catch_up(&handle, store.high_water_mark().await.unwrap()).await;
    others.abort();
    let sizes: Vec<_> = batches.lock().unwrap().iter().map(|(_, events)| *events).collect();
    assert_eq!(sizes, [50, 100, 150], "a batch that was quick is followed by one of twice the size");
    node.stop(PATIENCE).await.unwrap();
}
