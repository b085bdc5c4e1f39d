//! The chaos oracle: a partitioned projection survives random faults without loss.
//!
//! Three nodes share a projection in eight partitions. Random faults kill nodes, pause them past
//! their leases, and restart NATS and PostgreSQL. The read model records the events in the order of
//! their application. At the end it must equal a sequential replay of the log: no event is missing
//! or applied twice, and the events of each aggregate are in order.
//!
//! `STORIED_CHAOS_SECONDS=300` sets a run of 5 minutes. `STORIED_CHAOS_SEED` repeats a run.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::{Dice, NatsServer, PATIENCE, PostgresServer, test_process};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use serde::{Deserialize, Serialize};
use sqlx::postgres::{PgConnection, PgPool, PgPoolOptions};
use storied::bus::JetStreamOptions;
use storied::projection::{ApplyError, BuildTarget, PerTarget};
use storied::store::Append;
use storied::{
    Codec, Event, EventStore, ExpectedVersion, Metadata, NatsOptions, NewEvent, Partition, Position,
    PostgresReadModel, PostgresStore, Projection, ProjectionOptions, ReadLog, RecordedEvent, Runtime,
    StreamId,
};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use uuid::Uuid;

const PARTITIONS: u16 = 8;
const LEASE: Duration = Duration::from_secs(1);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Tick {
    Tock { n: u64 },
}

impl Event for Tick {
    const CATEGORY: &'static str = "tick";
}

/// A projection that records events in the order of their application.
struct Seen(BuildTarget);

impl Projection for Seen {
    const NAME: &'static str = "seen";
    type Event = Tick;
    type Transaction = PgConnection;

    async fn apply(
        &mut self,
        event: Tick,
        recorded: &RecordedEvent,
        tx: &mut PgConnection,
    ) -> Result<(), ApplyError> {
        let Tick::Tock { n } = event;
        sqlx::query("INSERT INTO seen (partition, position, n) VALUES ($1, $2, $3)")
            .bind(i32::from(self.0.partition.index()))
            .bind(recorded.position.get() as i64)
            .bind(n as i64)
            .execute(tx)
            .await?;
        // This delay makes most pauses fall into a transaction.
        tokio::time::sleep(Duration::from_millis(2)).await;
        Ok(())
    }
}

/// The entry point of a node process, which the oracle starts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "for the oracle"]
async fn a_node_process() {
    let parent = getppid();
    let url = std::env::var("CHAOS_POSTGRES").unwrap();
    let pool = PgPoolOptions::new().max_connections(6).connect(&url).await.unwrap();
    let nats = NatsOptions::jetstream(JetStreamOptions::new()).url(std::env::var("CHAOS_NATS").unwrap());
    let runtime = Runtime::builder()
        .store(PostgresStore::connect(&url).await.unwrap())
        .bus(nats.bus())
        .projection_with(
            PerTarget::new(Seen),
            PostgresReadModel::new(pool),
            ProjectionOptions::new().lease(LEASE).batch_size(50).partitions(PARTITIONS),
        )
        .start()
        .await
        .unwrap();
    let node = runtime.status().await.node.to_string();
    std::fs::write(std::env::var("CHAOS_ID").unwrap(), node).unwrap();
    while getppid() == parent {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

struct Node {
    process: Child,
    id_file: PathBuf,
    /// Returns the log of the node, which shows why it ended.
    log: PathBuf,
}

impl Node {
    fn start(dir: &TempDir, postgres: &str, nats: &str) -> Self {
        let id_file = dir.path().join(Uuid::new_v4().to_string());
        let log = id_file.with_extension("log");
        let output = std::fs::File::create(&log).unwrap();
        let process = test_process(module_path!(), "a_node_process")
            .env("CHAOS_POSTGRES", postgres)
            .env("CHAOS_NATS", nats)
            .env("CHAOS_ID", &id_file)
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        Self { process, id_file, log }
    }

    /// Returns the id of the node in its leases, or `None` while it is starting.
    fn id(&self) -> Option<Uuid> {
        std::fs::read_to_string(&self.id_file).ok()?.parse().ok()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id().cast_signed()), signal).unwrap();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The nodes and servers under test.
struct Scene {
    dir: TempDir,
    postgres: PostgresServer,
    url: String,
    nats: NatsServer,
    store: PostgresStore,
    nodes: Vec<Node>,
}

impl Scene {
    /// Restarts nodes that met a dead server during their start.
    ///
    /// Such a node reports the error and ends, and an operator restarts it. No fault in this test
    /// may end a node that runs.
    fn start_again(&mut self) {
        self.start_again_but(None);
    }

    /// Restarts such nodes, except the one that the test killed.
    fn start_again_but(&mut self, killed: Option<Uuid>) {
        for node in self.nodes.iter_mut().filter(|node| killed.is_none() || node.id() != killed) {
            if let Some(status) = node.process.try_wait().unwrap() {
                let log = std::fs::read_to_string(&node.log).unwrap_or_default();
                assert!(node.id().is_none(), "a node ended by itself, {status}:\n{log}");
                println!(
                    "a node did not start: {}",
                    log.lines().find(|line| line.contains("rror")).unwrap_or("?")
                );
                *node = Node::start(&self.dir, &self.url, &self.nats.url());
            }
        }
    }

    /// Returns the owner of each partition, or `None` if it has no owner or the owner is unknown.
    async fn owners(&self) -> Vec<Option<Uuid>> {
        let leases = self.store.leases().await.unwrap_or_default();
        let live: BTreeMap<_, _> = leases
            .into_iter()
            .filter(|info| info.live)
            .map(|info| (info.lease.name, info.lease.owner))
            .collect();
        (0..PARTITIONS).map(|index| live.get(&format!("partition/{index}/seen")).copied()).collect()
    }

    /// Waits until the three nodes own 3, 3 and 2 partitions.
    async fn balanced(&mut self) -> Duration {
        let began = Instant::now();
        loop {
            self.start_again();
            let owners = self.owners().await;
            let mut sizes: Vec<_> = self
                .nodes
                .iter()
                .map(|node| owners.iter().flatten().filter(|owner| Some(**owner) == node.id()).count())
                .collect();
            sizes.sort_unstable();
            if sizes == [2, 3, 3] {
                return began.elapsed();
            }
            assert!(began.elapsed() < PATIENCE, "never balanced: {sizes:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until other nodes own the partitions of `node`.
    ///
    /// Returns the time that this took, or `None` if the node owned no partition.
    async fn taken_over(&mut self, node: Option<Uuid>, owners: &[Option<Uuid>]) -> Option<Duration> {
        let began = Instant::now();
        let owned: Vec<_> =
            (0..owners.len()).filter(|&index| node.is_some() && owners[index] == node).collect();
        loop {
            self.start_again_but(node);
            let owners = self.owners().await;
            if owned.iter().all(|&index| owners[index].is_some_and(|owner| Some(owner) != node)) {
                return (!owned.is_empty()).then(|| began.elapsed());
            }
            assert!(began.elapsed() < PATIENCE, "no takeover of {owned:?}: {owners:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Appends to several streams until the stop signal.
///
/// A failed append may or may not be in the log. The oracle compares with the log.
fn load(store: &PostgresStore, task: u64, stop: &Arc<AtomicBool>) -> JoinHandle<()> {
    let (store, stop) = (store.clone(), stop.clone());
    tokio::spawn(async move {
        let mut n = 0;
        while !stop.load(Ordering::SeqCst) {
            let events = (0..1 + n % 3).map(|k| {
                NewEvent::encode(&Tick::Tock { n: n + k }, Codec::default(), &Metadata::default()).unwrap()
            });
            let stream = StreamId::new("tick", task * 1_000 + n % 20).unwrap();
            let append = Append::one(stream, ExpectedVersion::Any, events.collect());
            let _ = store.append(vec![append]).await;
            n += 1;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
}

/// Returns the log's events of each partition.
async fn fold(store: &PostgresStore) -> BTreeMap<u16, Vec<i64>> {
    let mut partitions: BTreeMap<u16, Vec<i64>> = BTreeMap::new();
    let mut after = Position::START;
    loop {
        let page = store.read_log(ReadLog::after(after)).await.unwrap();
        for event in &page.events {
            let partition = Partition::of(&event.stream, PARTITIONS).index();
            partitions.entry(partition).or_default().push(event.position.get() as i64);
        }
        after = page.scanned_to;
        if !page.has_more() {
            return partitions;
        }
    }
}

/// Returns the read model's events of each partition, in order.
async fn seen(url: &str) -> BTreeMap<u16, Vec<i64>> {
    let pool = PgPool::connect(url).await.unwrap();
    let rows: Vec<(i32, i64)> =
        sqlx::query_as("SELECT partition, position FROM seen ORDER BY id").fetch_all(&pool).await.unwrap();
    let mut partitions: BTreeMap<u16, Vec<i64>> = BTreeMap::new();
    for (partition, position) in rows {
        partitions.entry(partition as u16).or_default().push(position);
    }
    partitions
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_read_model_matches_a_sequential_replay() {
    let seconds = std::env::var("STORIED_CHAOS_SECONDS").map_or(12, |seconds| seconds.parse().unwrap());
    let seed = std::env::var("STORIED_CHAOS_SEED")
        .map_or_else(|_| Uuid::new_v4().as_u64_pair().0 >> 32, |seed| seed.parse().unwrap());
    println!("STORIED_CHAOS_SEED={seed}");
    let dice = Dice::new(seed);
    let postgres = PostgresServer::start().await;
    let nats = NatsServer::start(crate::support::NatsOptions::jetstream()).await;
    let url = postgres.url();
    let store = PostgresStore::connect(&url).await.unwrap();
    let pool = PgPool::connect(&url).await.unwrap();
    sqlx::raw_sql(
        "CREATE TABLE seen (id bigint GENERATED ALWAYS AS IDENTITY, partition integer, position bigint, n bigint)",
    )
    .execute(&pool)
    .await
    .unwrap();
    pool.close().await;
    let mut scene = Scene { dir: TempDir::new().unwrap(), postgres, url, nats, store, nodes: Vec::new() };
    for _ in 0..3 {
        scene.nodes.push(Node::start(&scene.dir, &scene.url, &scene.nats.url()));
    }
    println!("balanced {:?} after the start", scene.balanced().await);
    let stop = Arc::new(AtomicBool::new(false));
    let loads: Vec<_> = (0..4).map(|task| load(&scene.store, task, &stop)).collect();

    let (mut kills, mut pauses, mut restarts) = (Vec::new(), Vec::new(), 0);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut turn = 0;
    while Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(dice.roll(500))).await;
        let (owners, first) = (scene.owners().await, dice.roll(3) as usize);
        let owns = |node: &Node| owners.iter().flatten().any(|owner| Some(*owner) == node.id());
        // Choose a node that owns a partition, if there is one.
        let victim = (0..3).map(|n| (first + n) % 3).find(|&n| owns(&scene.nodes[n])).unwrap_or(first);
        let node = scene.nodes[victim].id();
        // The shortest run has every fault. Later faults have a random order.
        let what = if turn < 4 { turn } else { dice.roll(4) };
        turn += 1;
        match what {
            0 => {
                scene.nodes[victim].signal(Signal::SIGKILL);
                kills.extend(scene.taken_over(node, &owners).await);
                scene.nodes[victim] = Node::start(&scene.dir, &scene.url, &scene.nats.url());
            }
            1 => {
                scene.nodes[victim].signal(Signal::SIGSTOP);
                pauses.extend(scene.taken_over(node, &owners).await);
                tokio::time::sleep(Duration::from_millis(dice.roll(500))).await;
                // The node resumes in the middle of its work, without knowledge of the takeover.
                scene.nodes[victim].signal(Signal::SIGCONT);
            }
            2 => {
                scene.nats.kill();
                tokio::time::sleep(Duration::from_millis(dice.roll(800))).await;
                scene.nats.restart().await;
                restarts += 1;
            }
            _ => {
                scene.postgres.stop_immediately().await;
                tokio::time::sleep(Duration::from_millis(dice.roll(800))).await;
                scene.postgres.restart().await;
                restarts += 1;
            }
        }
    }
    println!("balanced {:?} after the last fault", scene.balanced().await);
    stop.store(true, Ordering::SeqCst);
    for load in loads {
        load.await.unwrap();
    }
    let expected = fold(&scene.store).await;
    let events: usize = expected.values().map(Vec::len).sum();
    let caught_up = Instant::now() + PATIENCE;
    let found = loop {
        let found = seen(&scene.url).await;
        if found.values().map(Vec::len).sum::<usize>() >= events || Instant::now() > caught_up {
            break found;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    for (partition, expected) in &expected {
        let found = found.get(partition).map_or(&[][..], Vec::as_slice);
        let unique: BTreeSet<_> = found.iter().collect();
        let missing = expected.iter().filter(|position| !unique.contains(position)).count();
        let twice = found.len() - unique.len();
        assert_eq!((missing, twice), (0, 0), "partition {partition}: missing, twice");
        assert_eq!(found, expected, "partition {partition} is in the order of the log");
    }
    assert_eq!(found.len(), expected.len());
    let told = |times: &mut Vec<Duration>| {
        times.sort_unstable();
        let at = |index: usize| times.get(index).copied().unwrap_or_default();
        let (median, longest) = (at(times.len() / 2), at(times.len().saturating_sub(1)));
        format!("{} (median {median:?}, longest {longest:?})", times.len())
    };
    println!("{events} events exact; takeovers after a kill: {}", told(&mut kills));
    println!("after a pause: {}; restarts of servers: {restarts}", told(&mut pauses));
}
