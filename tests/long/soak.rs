//! The soak: three nodes under mixed load for a long time, with faults.
//!
//! From time to time, the test kills, pauses and restarts nodes, NATS and PostgreSQL. The memory
//! and open files of surviving processes and the lag of projections must not grow. At the end, both
//! read models and the receipts of callers must equal a sequential replay of the log.
//!
//! `scripts/soak 20` runs for 20 minutes with release builds. Without `STORIED_SOAK_SECONDS`, the
//! test takes 15 s, which only checks that the soak itself works.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::support::{NatsServer, PostgresServer, test_process};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use serde::{Deserialize, Serialize};
use sqlx::postgres::{PgConnection, PgPoolOptions};
use sqlx::{Connection, Executor};
use storied::bus::JetStreamOptions;
use storied::command::{CommandBus, HandleError, Handler, HandlerContext, NatsCommandOptions};
use storied::projection::{ApplyError, FollowMode, PerTarget};
use storied::{
    Aggregate, AggregateOptions, Context, Decided, Decision, Event, EventStore, ExecuteError, NatsOptions,
    NeverRejects, Position, PostgresReadModel, PostgresStore, Projection, ProjectionOptions, ReadLog,
    RecordedEvent, Runtime,
};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

const METERS: u64 = 300;
const CALLERS: u64 = 8;
/// Number of commands in the deduplication window of a meter.
///
/// It is small enough that all windows are full soon, so that their memory does not look like
/// growth. It covers some minutes, much longer than any retry.
const COMMAND_WINDOW: usize = 100;
/// Upper limit for a step. Only a failing soak waits for it.
const PATIENCE: Duration = Duration::from_secs(120);
/// Minimum duration for a check of growth.
const LONG: Duration = Duration::from_secs(240);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum MeterEvent {
    Counted { units: u64 },
}

impl Event for MeterEvent {
    const CATEGORY: &'static str = "meter";
}

#[derive(Debug, Default)]
struct Meter {
    total: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Count(u64);

impl Aggregate for Meter {
    type Event = MeterEvent;
    type Command = Count;
    type Reply = u64;
    type Error = NeverRejects;

    fn handle(&self, Count(units): &Count, _: &Context<'_>) -> Decided<Self> {
        Ok(Decision::event(MeterEvent::Counted { units: *units }).reply(self.total + units))
    }

    fn apply(&mut self, MeterEvent::Counted { units }: &MeterEvent) {
        self.total += units;
    }
}

/// A handler that counts on two meters.
struct Both;

#[derive(Debug, Clone, Serialize, Deserialize)]
struct CountBoth {
    meters: [u64; 2],
    units: u64,
}

impl Handler for Both {
    const NAME: &'static str = "soak.both";
    type Command = CountBoth;
    type Reply = ();
    type Error = NeverRejects;

    async fn handle(
        &self,
        CountBoth { meters, units }: &CountBoth,
        context: &HandlerContext,
    ) -> Result<(), HandleError<NeverRejects>> {
        for meter in meters {
            context.execute::<Meter>(meter, Count(*units)).await?;
        }
        Ok(())
    }
}

/// A partitioned projection of the total of each meter.
struct Totals;

impl Projection for Totals {
    const NAME: &'static str = "totals";
    type Event = MeterEvent;
    type Transaction = PgConnection;

    async fn apply(
        &mut self,
        event: MeterEvent,
        recorded: &RecordedEvent,
        tx: &mut PgConnection,
    ) -> Result<(), ApplyError> {
        let MeterEvent::Counted { units } = event;
        sqlx::query(
            "INSERT INTO totals AS t VALUES ($1, $2) ON CONFLICT (meter) DO UPDATE SET units = t.units + $2",
        )
        .bind(recorded.stream.id())
        .bind(units as i64)
        .execute(tx)
        .await?;
        Ok(())
    }
}

/// A projection of the overall total, on one node over a durable consumer.
struct Sum;

impl Projection for Sum {
    const NAME: &'static str = "sum";
    type Event = MeterEvent;
    type Transaction = PgConnection;

    async fn apply(
        &mut self,
        event: MeterEvent,
        _: &RecordedEvent,
        tx: &mut PgConnection,
    ) -> Result<(), ApplyError> {
        let MeterEvent::Counted { units } = event;
        sqlx::query("UPDATE sum SET units = units + $1").bind(units as i64).execute(tx).await?;
        Ok(())
    }
}

/// The entry point of a node process, which the soak starts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "for the soak"]
async fn a_node_process() {
    let parent = getppid();
    let url = std::env::var("SOAK_POSTGRES").unwrap();
    let pool = PgPoolOptions::new().max_connections(6).connect_lazy(&url).unwrap();
    let nats = std::env::var("SOAK_NATS").unwrap();
    let options = ProjectionOptions::new().lease(Duration::from_secs(2));
    let runtime = Runtime::builder()
        .store(PostgresStore::connect(&url).await.unwrap())
        .bus(NatsOptions::jetstream(JetStreamOptions::new()).url(&nats).bus())
        .commands(CommandBus::nats(NatsCommandOptions::new(NatsOptions::core().url(&nats))))
        .aggregate_with(AggregateOptions::<Meter>::new().command_window(COMMAND_WINDOW))
        .handler(Both)
        .projection_with(
            PerTarget::new(|_| Totals),
            PostgresReadModel::new(pool.clone()),
            options.clone().partitions(8),
        )
        .projection_with(Sum, PostgresReadModel::new(pool), options.follow(FollowMode::Durable))
        .start()
        .await
        .unwrap();
    while getppid() == parent {
        sleep(Duration::from_millis(50)).await;
    }
    drop(runtime);
}

struct Node(Child);

impl Node {
    fn start(postgres: &str, nats: &str) -> Self {
        let child = test_process(module_path!(), "a_node_process")
            .envs([("SOAK_POSTGRES", postgres), ("SOAK_NATS", nats)])
            .stdout(Stdio::null())
            .spawn();
        Self(child.unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().cast_signed()), signal).unwrap();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The shared state of the callers.
struct Load {
    stop: AtomicBool,
    commands: AtomicU64,
    /// Number of commands whose outcome was unknown at first.
    unknown: AtomicU64,
    units: [AtomicU64; METERS as usize],
}

/// Sends commands, and retries each one until its effect is certain. A third go to the handler.
async fn call(runtime: Runtime, load: Arc<Load>, caller: u64) {
    let mut n = caller;
    while !load.stop.load(Ordering::SeqCst) {
        n += CALLERS;
        let (id, units) = (Uuid::now_v7(), 1 + n % 9);
        let meters = [n % METERS, (n * 7 + 1) % METERS];
        let both = n.is_multiple_of(3) && meters[0] != meters[1];
        let patience = Instant::now() + PATIENCE;
        let mut unknown = false;
        loop {
            let failed: Option<ExecuteError<NeverRejects>> = if both {
                let command = CountBoth { meters, units };
                runtime.execute_handler::<Both>(command).command_id(id).await.err()
            } else {
                runtime.execute::<Meter>(meters[0], Count(units)).command_id(id).await.err()
            };
            let Some(error) = failed else { break };
            assert!(Instant::now() < patience, "a command failed for {PATIENCE:?}: {error}");
            unknown |= matches!(error, ExecuteError::OutcomeUnknown { .. });
            sleep(Duration::from_millis(50)).await;
        }
        for meter in &meters[..1 + usize::from(both)] {
            load.units[*meter as usize].fetch_add(units, Ordering::Relaxed);
        }
        load.commands.fetch_add(1, Ordering::Relaxed);
        load.unknown.fetch_add(u64::from(unknown), Ordering::Relaxed);
        sleep(Duration::from_millis(10)).await;
    }
}

/// The measurements at one point in time.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// Resident memory in KiB and open files of the caller and of the two surviving nodes.
    processes: [(u64, usize); 3],
    /// Maximum lag of a projection in positions.
    lag: i64,
}

async fn sample(url: &str, nodes: &[Node]) -> Option<Sample> {
    let mut connection = PgConnection::connect(url).await.ok()?;
    let lag = sqlx::query_scalar(
        "SELECT coalesce((SELECT max(position) FROM storied.events) - min(position), 0)
         FROM storied.checkpoints",
    );
    let lag = lag.fetch_one(&mut connection).await.ok()?;
    let process = |pid: u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
        let resident = line.split_whitespace().nth(1)?.parse().ok()?;
        Some((resident, fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count()))
    };
    let processes = [process(std::process::id())?, process(nodes[0].0.id())?, process(nodes[1].0.id())?];
    Some(Sample { processes, lag })
}

/// Returns the median of a figure over the samples of one quarter of the time, counted from 0.
fn median<T: Ord + Copy>(samples: &[Sample], quarter: usize, figure: impl Fn(&Sample) -> T) -> T {
    let length = samples.len() / 4;
    let mut values: Vec<_> = samples[quarter * length..(quarter + 1) * length].iter().map(figure).collect();
    values.sort_unstable();
    values[values.len() / 2]
}

fn assert_flat(samples: &[Sample]) {
    for (index, name) in ["the caller", "node 1", "node 2"].into_iter().enumerate() {
        let memory = [1, 3].map(|quarter| median(samples, quarter, |sample| sample.processes[index].0));
        let files = [1, 3].map(|quarter| median(samples, quarter, |sample| sample.processes[index].1));
        println!("{name}: {memory:?} KiB and {files:?} open files, in the second and the last quarter");
        assert!(memory[1] <= memory[0] * 5 / 4 + 8_192, "{name} grows");
        assert!(files[1] <= files[0] + 10, "{name} opens more and more files");
    }
    let lag = [1, 3].map(|quarter| median(samples, quarter, |sample| sample.lag));
    println!("lag: {lag:?} positions, in the second and the last quarter");
    assert!(lag[1] <= lag[0] * 2 + 1_000, "the lag of projections grows");
}

async fn fold(store: &PostgresStore) -> BTreeMap<String, u64> {
    let (mut totals, mut after) = (BTreeMap::new(), Position::START);
    loop {
        let page = store.read_log(ReadLog::after(after).limit(5_000)).await.unwrap();
        for event in &page.events {
            let MeterEvent::Counted { units } = event.decode().unwrap();
            *totals.entry(event.stream.id().to_owned()).or_default() += units;
        }
        after = page.scanned_to;
        if !page.has_more() {
            return totals;
        }
    }
}

/// Returns the contents of the two read models.
async fn read_models(url: &str) -> (BTreeMap<String, u64>, u64) {
    let mut connection = PgConnection::connect(url).await.unwrap();
    let rows: Vec<(String, i64)> =
        sqlx::query_as("SELECT meter, units FROM totals").fetch_all(&mut connection).await.unwrap();
    let sum: i64 = sqlx::query_scalar("SELECT units FROM sum").fetch_one(&mut connection).await.unwrap();
    (rows.into_iter().map(|(meter, units)| (meter, units as u64)).collect(), sum as u64)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_grows_and_nothing_is_lost() {
    let seconds = std::env::var("STORIED_SOAK_SECONDS").map_or(12, |seconds| seconds.parse().unwrap());
    let length = Duration::from_secs(seconds);
    // Rare enough for a realistic load, and frequent enough that a short run has every fault.
    let pause = (length / 24).clamp(Duration::from_millis(500), Duration::from_secs(15));
    let mut postgres = PostgresServer::start().await;
    let mut nats = NatsServer::start(crate::support::NatsOptions::jetstream()).await;
    let url = postgres.url();
    let store = PostgresStore::connect(&url).await.unwrap();
    PgConnection::connect(&url)
        .await
        .unwrap()
        .execute("CREATE TABLE totals (meter text PRIMARY KEY, units bigint); CREATE TABLE sum (units bigint); INSERT INTO sum VALUES (0)")
        .await
        .unwrap();
    let mut nodes: Vec<_> = (0..3).map(|_| Node::start(&url, &nats.url())).collect();
    let caller = Runtime::builder()
        .store(store.clone())
        .commands(CommandBus::nats(NatsCommandOptions::new(NatsOptions::core().url(nats.url()))))
        .start()
        .await
        .unwrap();
    let load = Arc::new(Load {
        stop: AtomicBool::new(false),
        commands: AtomicU64::new(0),
        unknown: AtomicU64::new(0),
        units: std::array::from_fn(|_| AtomicU64::new(0)),
    });
    let callers: Vec<_> = (0..CALLERS).map(|n| tokio::spawn(call(caller.clone(), load.clone(), n))).collect();

    let (began, mut samples, mut faults) = (Instant::now(), Vec::new(), 0_usize);
    let mut printed = began;
    while began.elapsed() < length {
        let until = Instant::now() + pause;
        while Instant::now() < until {
            sleep((pause / 4).min(Duration::from_secs(4))).await;
            samples.extend(sample(&url, &nodes).await);
        }
        if let Some(Sample { processes, lag }) = samples.last()
            && printed.elapsed() > Duration::from_secs(60)
        {
            printed = Instant::now();
            let commands = load.commands.load(Ordering::Relaxed);
            println!("{:>5} s: {commands} commands, {processes:?}, lag {lag}", began.elapsed().as_secs());
        }
        match faults % 6 {
            0 => {
                nodes[2].signal(Signal::SIGKILL);
                sleep(pause / 5).await;
                nodes[2] = Node::start(&url, &nats.url());
            }
            2 => {
                nats.kill();
                sleep(pause / 10).await;
                nats.restart().await;
            }
            4 => {
                postgres.stop_immediately().await;
                sleep(pause / 10).await;
                postgres.restart().await;
            }
            other => {
                // The pause is longer than its leases.
                let node = &nodes[other / 2 % 2];
                node.signal(Signal::SIGSTOP);
                sleep((pause / 3).max(Duration::from_secs(3))).await;
                node.signal(Signal::SIGCONT);
            }
        }
        faults += 1;
        // A node that met a dead server during its start has reported it and ended: restart it, as
        // an operator would.
        for (number, node) in nodes.iter_mut().enumerate() {
            if node.0.try_wait().unwrap().is_some() {
                assert!(number == 2 || faults < 3, "node {} ended by itself", number + 1);
                *node = Node::start(&url, &nats.url());
            }
        }
    }
    load.stop.store(true, Ordering::SeqCst);
    for caller in callers {
        caller.await.unwrap();
    }
    let expected = fold(&store).await;
    let sum: u64 = expected.values().sum();
    let told = load.units.iter().enumerate().filter_map(|(meter, units)| {
        let units = units.load(Ordering::Relaxed);
        (units > 0).then(|| (meter.to_string(), units))
    });
    assert_eq!(expected, told.collect(), "the log equals the receipts of callers");
    let patience = Instant::now() + PATIENCE;
    while read_models(&url).await != (expected.clone(), sum) {
        if Instant::now() > patience {
            let found = read_models(&url).await;
            assert_eq!(found, (expected, sum), "the read models equal a replay of the log");
            break;
        }
        sleep(Duration::from_millis(100)).await;
    }
    println!(
        "{} commands exact, {} of them unknown at first; {faults} faults in {:?}",
        load.commands.load(Ordering::Relaxed),
        load.unknown.load(Ordering::Relaxed),
        began.elapsed()
    );
    if length >= LONG {
        assert_flat(&samples);
    }
}
