//! The whole path through a runtime: commands, events and read models.
//!
//! Also recovery after every kind of end.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sqlx::{SqliteConnection, SqlitePool};
use storied::projection::{ApplyError, InMemory, Projection, ProjectionState, SqliteReadModel};
use storied::{
    Aggregate, AnyEvent, Context, Decided, Decision, Event, EventStore, ExecuteError, ExpectedVersion,
    MemoryStore, NotExecutedKind, Position, PublisherState, ReadLog, RecordedEvent, Runtime, SqliteStore,
};
use tempfile::TempDir;
use uuid::Uuid;

#[derive(Default)]
struct Account {
    balance: i64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Deposit(i64);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AccountEvent {
    Deposited { amount: i64 },
}

#[derive(Debug, Serialize, Deserialize, thiserror::Error)]
#[error("nothing to deposit")]
struct Nothing;

impl Event for AccountEvent {
    const CATEGORY: &'static str = "account";
}

impl Aggregate for Account {
    type Event = AccountEvent;
    type Command = Deposit;
    type Reply = i64;
    type Error = Nothing;

    fn handle(&self, Deposit(amount): &Deposit, _: &Context<'_>) -> Decided<Self> {
        if *amount == 0 {
            return Err(Nothing);
        }
        Ok(Decision::event(AccountEvent::Deposited { amount: *amount }).reply(self.balance + amount))
    }

    fn apply(&mut self, AccountEvent::Deposited { amount }: &AccountEvent) {
        self.balance += amount;
    }
}

/// Stores every applied event with its position, so that a repetition shows.
struct Ledger;

impl Projection for Ledger {
    const NAME: &'static str = "ledger";
    type Event = AccountEvent;
    type Transaction = SqliteConnection;

    async fn apply(
        &mut self,
        event: AccountEvent,
        recorded: &RecordedEvent,
        tx: &mut SqliteConnection,
    ) -> Result<(), ApplyError> {
        let AccountEvent::Deposited { amount } = event;
        let position = i64::try_from(recorded.position.get())?;
        sqlx::query("INSERT INTO ledger (position, amount) VALUES (?, ?)")
            .bind(position)
            .bind(amount)
            .execute(tx)
            .await?;
        Ok(())
    }
}

struct Count(tokio::sync::watch::Sender<u64>);

impl Projection for Count {
    const NAME: &'static str = "count";
    type Event = AnyEvent;
    type Transaction = ();

    async fn apply(&mut self, _: AnyEvent, _: &RecordedEvent, (): &mut ()) -> Result<(), ApplyError> {
        self.0.send_modify(|count| *count += 1);
        Ok(())
    }

    async fn reset(&mut self, (): &mut ()) -> Result<(), ApplyError> {
        self.0.send_replace(0);
        Ok(())
    }
}

/// Checks that the store of a runtime can be passed to the next runtime.
#[tokio::test]
async fn a_shared_store_is_taken_as_it_is() {
    let first = Runtime::builder().store(MemoryStore::new()).aggregate::<Account>();
    let first = first.start().await.unwrap();
    assert_eq!(first.execute::<Account>(1, Deposit(5)).await.unwrap().reply, 5);
    let store = first.store().clone();
    first.shutdown().await.unwrap();
    let second = Runtime::builder().store(store.clone()).aggregate::<Account>().start().await.unwrap();
    assert!(std::sync::Arc::ptr_eq(second.store(), &store));
    assert_eq!(second.execute::<Account>(1, Deposit(2)).await.unwrap().reply, 7);
    second.shutdown().await.unwrap();
    let typed = std::sync::Arc::new(MemoryStore::new());
    Runtime::builder().store(typed).start().await.unwrap().shutdown().await.unwrap();
}

/// Checks that a node ends with the tokio runtime that started it, and that its clones report that.
#[test]
fn a_node_without_its_tokio_runtime_reports_it() {
    let dir = TempDir::new().unwrap();
    let executor =
        || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (first, second) = (executor(), executor());
    let index = storied::projection::InMemoryIndex::new(
        "count",
        |count: &mut u64, _: AnyEvent, _: &RecordedEvent| {
            *count += 1;
            Ok(())
        },
    );
    let node = first.block_on(async {
        let store = SqliteStore::open(dir.path().join("events.db")).await.unwrap();
        let builder = Runtime::builder().store(store).aggregate::<Account>().in_memory_index(&index);
        let node = builder.start().await.unwrap();
        node.execute::<Account>(1, Deposit(5)).await.unwrap();
        node
    });
    drop(first);
    second.block_on(async {
        for _ in 0..3 {
            let error = node.execute::<Account>(1, Deposit(5)).await.unwrap_err();
            assert!(
                matches!(error, ExecuteError::NotExecuted { kind: NotExecutedKind::ExecutorEnded, .. })
                    && !error.is_transient(),
                "{error}"
            );
            assert!(error.to_string().contains("tokio runtime"), "{error}");
        }
        let status = node.projection("count").unwrap().status();
        assert_eq!(status.state, ProjectionState::Stopped);
        // The node may have received all earlier events; it never receives later ones.
        let store = SqliteStore::open(dir.path().join("events.db")).await.unwrap();
        let other = Runtime::builder().store(store).aggregate::<Account>().start().await.unwrap();
        other.execute::<Account>(1, Deposit(5)).await.unwrap();
        other.shutdown().await.unwrap();
        let error = index.ready(Duration::from_secs(10)).await.unwrap_err();
        assert!(error.to_string().contains("has stopped"), "{error}");
        let began = std::time::Instant::now();
        // Its result does not matter; the call must end.
        let _ = node.shutdown_within(Duration::from_secs(5)).await;
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        // The index is free for the next node.
        let store = SqliteStore::open(dir.path().join("events.db")).await.unwrap();
        let node = Runtime::builder().store(store).in_memory_index(&index).start().await.unwrap();
        index.ready(Duration::from_secs(10)).await.unwrap();
        assert_eq!(index.read(|count| *count), 2);
        node.shutdown().await.unwrap();
    });
}

/// The files of a shop.
struct Shop {
    directory: TempDir,
}

impl Shop {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    async fn store(&self) -> SqliteStore {
        SqliteStore::open(self.directory.path().join("shop.db")).await.unwrap()
    }

    async fn read(&self) -> SqlitePool {
        let path = self.directory.path().join("read.db");
        let read = SqlitePool::connect(&format!("sqlite:{}?mode=rwc", path.display())).await.unwrap();
        let create =
            "CREATE TABLE IF NOT EXISTS ledger (n INTEGER PRIMARY KEY, position INTEGER, amount INTEGER)";
        sqlx::query(create).execute(&read).await.unwrap();
        read
    }

    async fn open(&self) -> (Runtime, SqlitePool) {
        let read = self.read().await;
        let runtime = Runtime::builder()
            .store(self.store().await)
            .aggregate::<Account>()
            .projection(Ledger, SqliteReadModel::new(read.clone()))
            .start()
            .await
            .unwrap();
        (runtime, read)
    }
}

async fn ledger(read: &SqlitePool) -> Vec<(u64, i64)> {
    let rows: Vec<(i64, i64)> =
        sqlx::query_as("SELECT position, amount FROM ledger ORDER BY n").fetch_all(read).await.unwrap();
    rows.into_iter().map(|(position, amount)| (u64::try_from(position).unwrap(), amount)).collect()
}

async fn log(store: &dyn EventStore) -> Vec<(u64, i64)> {
    let page = store.read_log(ReadLog::after(Position::START).limit(usize::MAX)).await.unwrap();
    page.events
        .iter()
        .map(|event| {
            let AccountEvent::Deposited { amount } = event.decode().unwrap();
            (event.position.get(), amount)
        })
        .collect()
}

#[tokio::test]
async fn executed_commands_can_be_read() {
    let shop = Shop::new();
    let (runtime, read) = shop.open().await;
    for n in 1..=50 {
        let receipt = runtime.execute::<Account>(n % 5, Deposit(n)).await.unwrap();
        runtime.projection("ledger").unwrap().caught_up_to(receipt.position).await.unwrap();
        assert_eq!(ledger(&read).await.last(), Some(&(receipt.position.get(), n)));
    }
    let status = runtime.status().await;
    let json = serde_json::to_value(&status).unwrap();
    assert_eq!(json["high_water_mark"], 50);
    assert_eq!(json["projections"]["ledger"]["state"], "following");
    assert_eq!(json["projections"]["ledger"]["lag"], 0);
    assert_eq!(json["leases"][0]["lease"]["name"], "projection/ledger");
    assert_eq!(status.high_water_mark.unwrap(), Position::new(50));
    assert_eq!(status.projections["ledger"].state, ProjectionState::Following);
    assert_eq!(status.projections["ledger"].lag(), Some(0));
    assert_eq!(status.aggregates[0].live, 5);
    assert_eq!((status.writer.events, status.stall.unwrap()), (50, None));
    assert_eq!(status.leases.unwrap()[0].lease.name, "projection/ledger");
    let unknown = runtime.projection("stock").unwrap_err();
    assert_eq!(unknown.to_string(), "there is no projection \"stock\"; this node runs ledger");
    runtime.shutdown().await.unwrap();
}

/// F36: on a node without projections the error says so, and the command is not executed.
#[tokio::test]
async fn waiting_for_an_unknown_projection_executes_nothing() {
    let store = MemoryStore::new();
    let runtime = Runtime::builder().store(store.clone()).aggregate::<Account>().start().await.unwrap();
    let says =
        "there is no projection \"typo\"; this node runs no projection, register it with Runtime::builder()";
    let error = runtime.execute::<Account>("a", Deposit(1)).wait_for("typo").await.unwrap_err();
    assert!(
        matches!(error, ExecuteError::NotExecuted { kind: NotExecutedKind::UnknownProjection { .. }, .. })
            && !error.is_transient()
    );
    assert_eq!(error.to_string(), says);
    assert_eq!(runtime.projection("typo").unwrap_err().to_string(), says);
    assert_eq!(log(&store).await, []);
    runtime.shutdown().await.unwrap();
}

/// Checks that a reply without events is confirmed against the log.
///
/// The state of the node may be stale.
#[tokio::test]
async fn a_stale_node_answers_from_the_log() {
    let store = MemoryStore::new();
    let start = || Runtime::builder().store(store.clone()).aggregate::<Account>().start();
    let (one, other) = (start().await.unwrap(), start().await.unwrap());
    one.execute::<Account>("a", Deposit(1)).await.unwrap();
    let receipt = other.execute::<Account>("a", Deposit(2)).await.unwrap();
    let expected = ExpectedVersion::Exact(receipt.version);
    let next = one.execute::<Account>("a", Deposit(3)).expect_version(expected).await.unwrap();
    assert_eq!((next.reply, next.version), (6, receipt.version.next()));
    let late = other.execute::<Account>("a", Deposit(4)).expect_version(expected).await.unwrap_err();
    assert!(
        matches!(late, ExecuteError::NotExecuted { kind: NotExecutedKind::ExpectedVersion { actual, .. }, .. } if actual == next.version),
        "{late}"
    );
    one.shutdown().await.unwrap();
    other.shutdown().await.unwrap();
}

/// Checks that a node without a bus publishes nothing, and that without projections it does not read
/// its appends.
#[tokio::test]
async fn without_a_bus_and_projections_nothing_is_published_or_read() {
    let node = Runtime::builder().store(MemoryStore::new()).aggregate::<Account>().start().await.unwrap();
    for n in 1..=10 {
        node.execute::<Account>("a", Deposit(n)).await.unwrap();
    }
    let status = node.status().await;
    assert_eq!((status.bus, status.publisher.bus, status.publisher.published), (None, None, None));
    assert_eq!(status.publisher.state, PublisherState::Idle);
    assert_eq!(status.feed.position, None);
    let leases: Vec<_> = status.leases.unwrap().into_iter().map(|info| info.lease.name).collect();
    assert!(leases.iter().all(|name| name == "scheduler"), "without a publisher it has no lease: {leases:?}");
    node.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_restart_continues_and_a_new_projection_starts_from_the_beginning() {
    let shop = Shop::new();
    let (runtime, _) = shop.open().await;
    for n in 1..=20 {
        runtime.execute::<Account>("a", Deposit(n)).await.unwrap();
    }
    runtime.shutdown().await.unwrap();

    let count = tokio::sync::watch::Sender::new(0);
    let read = shop.read().await;
    let runtime = Runtime::builder()
        .store(shop.store().await)
        .aggregate::<Account>()
        .projection(Ledger, SqliteReadModel::new(read.clone()))
        .projection(Count(count.clone()), InMemory::new())
        .start()
        .await
        .unwrap();
    let receipt = runtime.execute::<Account>("a", Deposit(1)).await.unwrap();
    assert_eq!(receipt.reply, 211);
    for name in ["ledger", "count"] {
        runtime.projection(name).unwrap().caught_up_to(receipt.position).await.unwrap();
    }
    assert_eq!(*count.borrow(), 21);
    let store = shop.store().await;
    assert_eq!(ledger(&read).await, log(&store).await);
    runtime.shutdown().await.unwrap();
}

/// Drops the runtime at any moment, many times.
///
/// Each caller repeats unanswered commands with the same id.
#[tokio::test(flavor = "multi_thread")]
async fn dropping_a_runtime_loses_and_duplicates_nothing() {
    let shop = Shop::new();
    let mut acknowledged = 0;
    let commands: Vec<(u64, Uuid)> = (0..600).map(|n| (n % 7, Uuid::now_v7())).collect();
    let mut left = commands.clone();
    for round in 0..12_u64 {
        let (runtime, _) = shop.open().await;
        let mut tasks = tokio::task::JoinSet::new();
        for (account, id) in left.drain(..) {
            let runtime = runtime.clone();
            tasks.spawn(async move {
                let result = runtime.execute::<Account>(account, Deposit(1)).command_id(id).await;
                (account, id, result)
            });
        }
        if round < 11 {
            tokio::time::sleep(Duration::from_millis(1 + round * 2)).await;
            // The remaining tasks drop their clones; the last drop stops everything at once.
            drop(runtime);
            tasks.abort_all();
        }
        let mut answered = std::collections::HashSet::new();
        while let Some(task) = tasks.join_next().await {
            match task {
                Ok((_, id, Ok(_))) => _ = answered.insert(id),
                Ok((
                    _,
                    _,
                    Err(
                        ExecuteError::OutcomeUnknown { .. }
                        | ExecuteError::NotExecuted { kind: NotExecutedKind::Store(_), .. }
                        | ExecuteError::NotExecuted { kind: NotExecutedKind::ShuttingDown, .. },
                    ),
                )) => {}
                Ok((_, _, Err(error))) => panic!("{error}"),
                Err(aborted) => assert!(aborted.is_cancelled(), "{aborted}"),
            }
        }
        acknowledged += answered.len();
        // Repeating answered commands changes nothing.
        left = commands
            .iter()
            .copied()
            .filter(|(_, id)| !answered.contains(id) || id.as_u128() % 5 == 0)
            .collect();
    }
    assert!(acknowledged >= commands.len());
    let (runtime, read) = shop.open().await;
    runtime.projection("ledger").unwrap().wait_until_caught_up(Duration::from_secs(20)).await.unwrap();
    let store = shop.store().await;
    let events = log(&store).await;
    assert_eq!(events.len(), commands.len(), "each command took effect once");
    assert_eq!(ledger(&read).await, events, "the read model is the log, in order, each event once");
    runtime.shutdown().await.unwrap();
}

#[tokio::test]
async fn contradictory_registrations_do_not_start() {
    let twice = Runtime::builder()
        .store(MemoryStore::new())
        .projection(Count(tokio::sync::watch::Sender::new(0)), InMemory::new())
        .projection(Count(tokio::sync::watch::Sender::new(0)), InMemory::new());
    assert!(twice.start().await.unwrap_err().to_string().contains("duplicate projection name \"count\""));
}

#[test]
fn public_handles_can_be_shared() {
    fn shared<T: Send + Sync + 'static>() {}
    shared::<Runtime>();
    shared::<storied::projection::ProjectionHandle>();
    shared::<MemoryStore>();
    shared::<SqliteStore>();
    shared::<SqliteReadModel>();
    shared::<ExecuteError<Nothing>>();
    shared::<storied::StoreError>();
}

/// Checks that no public future holds a lock across an await.
///
/// Such a future could not be spawned, and could block a runtime.
#[tokio::test]
async fn public_futures_can_be_spawned() {
    fn spawnable<F: Future + Send>(_: &F) {}
    let runtime = Runtime::builder()
        .store(MemoryStore::new())
        .aggregate::<Account>()
        .projection(Count(tokio::sync::watch::Sender::new(0)), InMemory::new())
        .start()
        .await
        .unwrap();
    spawnable(&Runtime::builder().start());
    spawnable(&runtime.status());
    spawnable(&runtime.execute::<Account>(1, Deposit(1)).dispatch());
    spawnable(&runtime.execute::<Account>(1, Deposit(1)).into_future());
    let projection = runtime.projection("count").unwrap().clone();
    spawnable(&projection.caught_up_to(Position::START));
    spawnable(&projection.wait_until_caught_up(Duration::ZERO));
    spawnable(&projection.pause());
    spawnable(&projection.resume());
    spawnable(&projection.reset());
    spawnable(&projection.parked(1));
    spawnable(&projection.retry_parked(Position::START));
    spawnable(&projection.discard_parked(Position::START));
    spawnable(&runtime.shutdown());
}
