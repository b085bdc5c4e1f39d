//! The oracle of the log stream: after any faults, its messages are the log, in order, each once.

use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use storied::bus::{LogStreamEnd, NatsBus, Resume};
use storied::testing::Node;
use storied::{EventBus, EventStore, FeedOptions, SqliteStore};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::bus::fixtures::*;
use crate::support::{Dice, NatsOptions, NatsServer, test_process};

/// Another process that publishes until it is killed.
struct Publisher(Child);

impl Publisher {
    fn start(database: &TempDir, server: &NatsServer) -> Self {
        let mut command = test_process(module_path!(), "a_publisher_process");
        command
            .env("ORACLE_STORE", database.path().join("events.db"))
            .env("ORACLE_NATS", server.url())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Self(command.spawn().unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().cast_signed()), signal).unwrap();
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Almost without a deduplication window: the sequence check must suffice without the ids.
fn bus(url: &str) -> NatsBus {
    let log_stream = log_stream().window(64).duplicate_window(Duration::from_millis(100));
    quick(storied::bus::NatsOptions::jetstream(log_stream).url(url)).bus()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "for the oracle"]
async fn a_publisher_process() {
    let parent = getppid();
    let store = SqliteStore::open(std::env::var("ORACLE_STORE").unwrap()).await.unwrap();
    let bus = bus(&std::env::var("ORACLE_NATS").unwrap());
    let _node = Node::start(Arc::new(store), Some(Arc::new(bus)), FeedOptions::new(), publishing()).await;
    while getppid() == parent {
        pause(100).await;
    }
}

/// Publishes without a lease or a checkpoint, like a node that has missed the loss of both.
fn zombie(store: &Arc<dyn EventStore>, server: &NatsServer, stop: &Arc<AtomicBool>) -> JoinHandle<u64> {
    let (store, bus, stop) = (store.clone(), bus(&server.url()), stop.clone());
    tokio::spawn(async move {
        let mut refusals = 0;
        while !stop.load(Ordering::SeqCst) {
            let turn = async {
                let mut publisher = bus.publisher(store.info().id).await?;
                let Resume::After(end) = publisher.resume(LogStreamEnd::default()).await? else {
                    panic!("no log stream")
                };
                for batch in batches(&store, end.position, 50).await {
                    publisher.publish(batch).await?;
                }
                Ok::<_, storied::bus::BusError>(())
            };
            refusals += u64::from(turn.await.is_err());
            pause(20).await;
        }
        refusals
    })
}

/// Returns the positions in the stream, in order, and the last sequence number.
pub async fn positions_in_stream(url: &str) -> (Vec<u64>, u64) {
    let context = async_nats::jetstream::new(async_nats::connect(url).await.unwrap());
    let stream = context.get_stream("STORIED_EVENTS").await.unwrap();
    let state = &stream.cached_info().state;
    let (count, last) = (state.messages, state.last_sequence);
    let consumer = async_nats::jetstream::consumer::pull::OrderedConfig::default();
    let mut messages = stream.create_consumer(consumer).await.unwrap().messages().await.unwrap();
    let mut positions = Vec::new();
    for _ in 0..count {
        let message = timeout(PATIENCE, messages.next()).await.unwrap().unwrap().unwrap();
        let position = message.headers.as_ref().unwrap().get("Storied-Position").unwrap();
        positions.push(position.as_str().parse().unwrap());
    }
    (positions, last)
}

async fn round(seed: u64) {
    let dice = Dice::new(seed);
    let database = TempDir::new().unwrap();
    let open = async || {
        let store = SqliteStore::open(database.path().join("events.db")).await.unwrap();
        Arc::new(store) as Arc<dyn EventStore>
    };
    let store = open().await;
    write(&store, 0, 300).await;
    let mut server = NatsServer::start(NatsOptions::jetstream()).await;
    let follower = Recording::start(&store, bus(&server.url()), blind()).await;
    let mut publishers = [Publisher::start(&database, &server), Publisher::start(&database, &server)];
    let stop = Arc::new(AtomicBool::new(false));
    let zombie = zombie(&open().await, &server, &stop);
    let writers = [1, 2].map(|n| Writer::start(&store, n, n, Duration::from_millis(2)));
    let mut deeds = Vec::new();
    for turn in 0..7 {
        pause(100 + dice.roll(400)).await;
        // Each kind of fault occurs in every run, in a different order.
        let deed = (turn + seed) % 7;
        deeds.push(deed);
        let victim = dice.roll(2) as usize;
        match deed {
            0 | 1 => {
                server.kill();
                pause(dice.roll(500)).await;
                server.restart().await;
            }
            2 => {
                server.pause();
                pause(500 + dice.roll(1_500)).await;
                server.resume();
            }
            3 => {
                server.kill();
                server.wipe();
                pause(dice.roll(300)).await;
                server.restart().await;
            }
            4 => publishers[victim] = Publisher::start(&database, &server),
            // Longer than the lease: another publisher takes over before this one resumes.
            5 => {
                publishers[victim].signal(Signal::SIGSTOP);
                pause(1_600 + dice.roll(500)).await;
                publishers[victim].signal(Signal::SIGCONT);
            }
            _ => {
                publishers[victim].signal(Signal::SIGSTOP);
                server.kill();
                if dice.roll(2) == 0 {
                    server.wipe();
                }
                server.restart().await;
                pause(1_600).await;
                publishers[victim].signal(Signal::SIGCONT);
            }
        }
    }
    pause(200).await;
    let mut longest = Duration::ZERO;
    for writer in writers {
        longest = longest.max(writer.done().await.1);
    }
    // Outages together are longer than this. A busy machine alone has taken two seconds.
    assert!(longest < Duration::from_secs(4), "seed {seed}: an append took {longest:?}");
    stop.store(true, Ordering::SeqCst);
    let refusals = zombie.await.unwrap();

    let log: Vec<u64> = log(&store).await.iter().map(|position| position.get()).collect();
    let give_up = Instant::now() + PATIENCE;
    let mut found = positions_in_stream(&server.url()).await;
    while found.0.len() < log.len() && Instant::now() < give_up {
        pause(100).await;
        found = positions_in_stream(&server.url()).await;
    }
    let (log_stream, last) = found;
    let (short, wanted) = (log_stream.len(), log.len());
    let differs = log_stream.iter().zip(&log).position(|(log_stream, log)| log_stream != log);
    let from = differs.unwrap_or(short.min(wanted)).saturating_sub(2);
    let around: Vec<&u64> = log_stream.iter().skip(from).take(6).collect();
    assert!(
        log_stream == log,
        "seed {seed}, {deeds:?}: {short} of {wanted}, from message {from} on {around:?}"
    );
    assert_eq!(last, log.len() as u64, "seed {seed}");
    follower.reaches(&format!("seed {seed}"), &store).await;
    println!("seed {seed}: {wanted} events, {refusals} refusals, longest append {longest:?}");
    follower.node.kill();
}

/// One run, or `ORACLE_RUNS` runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_stream_is_the_log() {
    let runs = std::env::var("ORACLE_RUNS").map_or(1, |runs| runs.parse().unwrap());
    let first = std::env::var("ORACLE_SEED").ok().map(|seed| seed.parse().unwrap());
    let first = first.unwrap_or_else(|| u64::from(std::process::id()));
    for seed in first..first + runs {
        round(seed).await;
    }
}
