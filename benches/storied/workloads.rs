use std::time::{Duration, Instant};

use storied::projection::{ApplyError, InMemory, Projection};
use storied::store::{Append, ExpectedVersion};
use storied::{Metadata, NewEvent, Position, ReadLog, RecordedEvent, StreamId, Version};

use crate::args::{Plan, StoreKind};
use crate::cpu::client_cpu;
use crate::domain::{Account, AccountCommand, AccountEvent, text};
use crate::limits;
use crate::measure::{Comparison, Run, closed_loop};
use crate::stores::Store;

pub const AGGREGATES: usize = 1_000;

/// Number of streams of each caller of `append`.
const STREAMS: usize = 100;

/// Runs `callers` callers over 1,000 live aggregates, one event per command.
pub async fn commands(plan: &Plan) -> Comparison {
    let Execution { run, per_transaction, .. } = execute(plan, AGGREGATES).await;
    let limit = inserts(plan, per_transaction, 2, AGGREGATES).await;
    let note = format!("{per_transaction} events a transaction, the limit's as well");
    Comparison { ours: run, limit, note }
}

/// Runs `callers` callers; each command is the first one of its aggregate.
pub async fn creations(plan: &Plan) -> Comparison {
    let Execution { run, per_transaction, .. } = execute_on(plan, plan.events, 0).await;
    let limit = inserts(plan, per_transaction, 2, plan.events).await;
    let note = format!("{per_transaction} events a transaction, the limit's as well");
    Comparison { ours: run, limit, note }
}

/// Runs `commands` while four readers read the log from its start, again and again.
///
/// The limit is the same without the readers.
pub async fn mixed(plan: &Plan) -> Comparison {
    let mut runs = Vec::new();
    for readers in [4, 0] {
        let store = Store::fresh(plan.store).await;
        store.fill(&Plan { events: 200_000.min(plan.events * 10), ..plan.clone() }, AGGREGATES).await;
        store.settle().await;
        let mut reading = tokio::task::JoinSet::new();
        for _ in 0..readers {
            let store = store.clone();
            reading.spawn(async move {
                let mut read = ReadLog::after(Position::START).limit(2_000);
                loop {
                    let page = store.port().read_log(read.clone()).await.unwrap();
                    read.after = if page.has_more() { page.scanned_to } else { Position::START };
                }
            });
        }
        runs.push(run_commands(plan, &store, AGGREGATES, AGGREGATES).await.run);
        reading.shutdown().await;
    }
    let [ours, limit] = <[Run; 2]>::try_from(runs).ok().unwrap();
    Comparison { ours, limit, note: "both are storied: beside four readers, and alone".into() }
}

/// Runs `callers` callers on one aggregate.
///
/// The limit is one commit after the other: the best case of an aggregate without a pipeline.
pub async fn hot(plan: &Plan) -> Comparison {
    let Execution { run, per_transaction, .. } = execute(plan, 1).await;
    let limit = inserts(&Plan { events: plan.events.min(2_000), ..plan.clone() }, 1, 1, 1).await;
    Comparison { ours: run, limit, note: format!("{per_transaction} events a transaction, the limit's 1") }
}

/// Appends `each` events at a time to separate streams, from `callers` callers.
///
/// The appends go directly to the store.
/// The limit inserts as many rows per commit on as many connections; SQLite has one writing
/// connection.
pub async fn append(plan: &Plan, each: usize) -> Comparison {
    let store = Store::fresh(plan.store).await;
    let event = AccountEvent::Entered { text: text(plan.payload) };
    let codec = store.port().info().codec;
    let appends = plan.events.div_ceil(each);
    let append = |n: usize| {
        let (caller, turn) = (n % plan.callers, n / plan.callers);
        let stream = StreamId::new("account", format!("{caller}-{}", turn % STREAMS)).unwrap();
        let expected = ExpectedVersion::Exact(Version::NONE.plus((turn / STREAMS * each) as u64));
        let new = || NewEvent::encode(&event, codec, &Metadata::default()).unwrap();
        let append = Append::one(stream, expected, (0..each).map(|_| new()).collect());
        let store = store.clone();
        async move {
            for answer in store.port().append(vec![append]).await {
                answer.unwrap();
            }
        }
    };
    let run = closed_loop(plan.callers, appends, append).await;
    let ours = run.of(each);
    let limit = inserts(plan, each, plan.callers, plan.callers * STREAMS).await;
    Comparison { ours, limit, note: "latencies are of an append".into() }
}

/// Executes the first command on an aggregate with a long stream and no snapshot.
///
/// The limit reads the rows.
pub async fn rehydrate(plan: &Plan) -> Comparison {
    let store = Store::fresh(plan.store).await;
    store.fill(plan, 1).await;
    store.settle().await;
    let runtime = store.builder().aggregate::<Account>().start().await.unwrap();
    let start = Instant::now();
    let receipt = runtime.execute::<Account>(0, AccountCommand::Look).await.unwrap();
    let ours = Run::whole(plan.events, start.elapsed());
    assert_eq!(receipt.reply, plan.events as u64);
    runtime.shutdown().await.unwrap();
    Comparison { ours, limit: read(plan, &store).await, note: String::new() }
}

/// Runs a new in-memory projection over a full log, decoding every event. The limit reads the rows.
pub async fn catchup(plan: &Plan) -> Comparison {
    let store = Store::fresh(plan.store).await;
    store.fill(plan, AGGREGATES).await;
    store.settle().await;
    let head = store.port().high_water_mark().await.unwrap();
    let start = Instant::now();
    let runtime = store.builder().projection(Bytes(0), InMemory::new()).start().await.unwrap();
    let projection = runtime.projection("bytes").unwrap();
    projection.caught_up_to_within(head, Duration::from_secs(600)).await.unwrap();
    let ours = Run::whole(plan.events, start.elapsed());
    assert_eq!(projection.status().events_applied, plan.events as u64);
    runtime.shutdown().await.unwrap();
    Comparison { ours, limit: read(plan, &store).await, note: String::new() }
}

pub struct Bytes(pub usize);

impl Projection for Bytes {
    const NAME: &'static str = "bytes";
    type Event = AccountEvent;
    type Transaction = ();

    async fn apply(&mut self, event: AccountEvent, _: &RecordedEvent, (): &mut ()) -> Result<(), ApplyError> {
        let AccountEvent::Entered { text } = event;
        self.0 += text.len();
        Ok(())
    }

    async fn reset(&mut self, (): &mut ()) -> Result<(), ApplyError> {
        self.0 = 0;
        Ok(())
    }
}

/// Commands that were executed.
pub struct Execution {
    pub run: Run,
    /// Mean number of events in a transaction.
    pub per_transaction: usize,
    /// CPU time of this process for a command, in nanoseconds.
    pub cpu: f64,
}

/// Executes commands on live aggregates of a new store.
pub async fn execute(plan: &Plan, aggregates: usize) -> Execution {
    execute_on(plan, aggregates, aggregates).await
}

async fn execute_on(plan: &Plan, aggregates: usize, live: usize) -> Execution {
    run_commands(plan, &Store::fresh(plan.store).await, aggregates, live).await
}

/// Executes commands on `aggregates` aggregates, the first of which are `live` before the measurement.
async fn run_commands(plan: &Plan, store: &Store, aggregates: usize, live: usize) -> Execution {
    let runtime = store.builder().aggregate::<Account>().start().await.unwrap();
    let look = |n: usize| {
        let runtime = runtime.clone();
        async move { drop(runtime.execute::<Account>(n % aggregates, AccountCommand::Look).await.unwrap()) }
    };
    closed_loop(64.min(aggregates), live, look).await;
    let text = text(plan.payload);
    let before = client_cpu();
    let run = closed_loop(plan.callers, plan.events, |n| {
        let (runtime, text) = (runtime.clone(), text.clone());
        async move {
            runtime.execute::<Account>(n % aggregates, AccountCommand::Enter(text)).await.unwrap();
        }
    })
    .await;
    let cpu = (client_cpu() - before) / plan.events as f64;
    let writer = runtime.status().await.writer;
    assert_eq!(writer.events, plan.events as u64);
    runtime.shutdown().await.unwrap();
    Execution { run, per_transaction: (writer.events / writer.transactions).max(1) as usize, cpu }
}

/// Inserts rows.
///
/// `writers` is the number of connections, if a store has more than one writing connection.
pub async fn inserts(plan: &Plan, per_transaction: usize, writers: usize, streams: usize) -> Run {
    match plan.store {
        StoreKind::Sqlite => limits::sqlite_inserts(plan, per_transaction).await,
        StoreKind::Memory => memory_appends(plan, per_transaction).await,
        StoreKind::Postgres => limits::postgres_inserts(plan, per_transaction, writers, streams).await,
    }
}

/// Calls the memory store directly, which is its limit.
async fn memory_appends(plan: &Plan, per_transaction: usize) -> Run {
    let store = Store::fresh(StoreKind::Memory).await;
    let event = AccountEvent::Entered { text: text(plan.payload) };
    let transactions = plan.events.div_ceil(per_transaction);
    let mut latencies = Vec::with_capacity(transactions);
    let start = Instant::now();
    for transaction in 0..transactions {
        let start = Instant::now();
        let batch = (0..per_transaction)
            .map(|n| {
                let stream =
                    StreamId::new("account", (transaction * per_transaction + n) % AGGREGATES).unwrap();
                let event =
                    NewEvent::encode(&event, store.port().info().codec, &Metadata::default()).unwrap();
                Append::one(stream, ExpectedVersion::Any, vec![event])
            })
            .collect();
        for answer in store.port().append(batch).await {
            answer.unwrap();
        }
        latencies.push(start.elapsed());
    }
    Run::new(transactions * per_transaction, start.elapsed(), latencies)
}

pub async fn read(plan: &Plan, store: &Store) -> Run {
    match store {
        Store::Sqlite(_, directory) => {
            limits::sqlite_read(plan.events, &directory.path().join("events.db")).await
        }
        Store::Postgres(_) => limits::postgres_read(plan.events).await,
        Store::Memory(_) => {
            let start = Instant::now();
            let page =
                store.port().read_log(ReadLog::after(Position::START).limit(plan.events)).await.unwrap();
            assert_eq!(page.events.len(), plan.events);
            Run::whole(plan.events, start.elapsed())
        }
    }
}
