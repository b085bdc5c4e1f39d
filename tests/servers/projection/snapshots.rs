//! Snapshots of in-memory read models, on every store.
//!
//! A start from a snapshot has the result of the whole log, and reads only the events after it.

mod faults;
mod sharing;
mod unusable;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use storied::projection::{ApplyError, InMemory, InMemoryIndex, SnapshotState};
use storied::store::Snapshot;
use storied::testing::Node;
use storied::{
    AnyEvent, EventStore, Filter, MemoryStore, Position, PostgresStore, Projection, ProjectionHandle,
    ProjectionOptions, ReadLog, RecordedEvent, Runtime, SnapshotRevision, SqliteStore, StreamId,
};
use tempfile::TempDir;

use crate::projection::fixtures::*;
use crate::support::PostgresServer;

/// So many that only an orderly stop takes a snapshot.
const NEVER: u64 = 1_000_000;

/// State in memory. It depends on the order of the events.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct State {
    sums: BTreeMap<String, u64>,
    order: u64,
}

impl State {
    fn add(&mut self, event: &RecordedEvent) -> Result<(), ApplyError> {
        let (Thing::Even { n } | Thing::Odd { n }) = event.decode()? else { return Ok(()) };
        *self.sums.entry(event.stream.id().to_owned()).or_default() += n;
        self.order = self.order.wrapping_mul(31).wrapping_add(event.position.get());
        Ok(())
    }
}

type Shared = Arc<RwLock<State>>;

struct Sums {
    filter: Filter,
    hook: Hook,
    firm: bool,
    resets: u32,
    state: Shared,
    /// Number of events received.
    seen: Arc<AtomicU64>,
}

impl Projection for Sums {
    const NAME: &'static str = "sums";
    type Event = AnyEvent;
    type Transaction = ();

    fn filter(&self) -> Filter {
        self.filter.clone()
    }

    async fn apply(&mut self, _: AnyEvent, event: &RecordedEvent, _: &mut ()) -> Result<(), ApplyError> {
        self.seen.fetch_add(1, Ordering::SeqCst);
        (self.hook)(event).await?;
        self.state.write().map_err(|_| "poisoned")?.add(event)
    }

    async fn reset(&mut self, _: &mut ()) -> Result<(), ApplyError> {
        // The first reset is that of the start.
        self.resets += 1;
        if self.firm && self.resets > 1 {
            return Err("no".into());
        }
        *self.state.write().map_err(|_| "poisoned")? = State::default();
        Ok(())
    }
}

/// Setup of a run.
#[derive(Clone)]
struct Trial {
    every: u64,
    revision: u32,
    filter: Filter,
    hook: Hook,
    /// Whether it refuses to be reset.
    firm: bool,
    options: ProjectionOptions,
}

impl Trial {
    fn every(events: u64) -> Self {
        let (filter, hook) = (Filter::all(), hook(|_| Ok(())));
        Self { every: events, revision: 1, filter, hook, firm: false, options: options() }
    }

    async fn start(&self, link: &Link) -> Running {
        let state = Shared::default();
        self.start_with(link, state.clone(), state).await
    }

    /// Runs until the end of the log; the state must then equal the fold of the log.
    async fn caught_up(&self, link: &Link) -> Running {
        let running = self.start(link).await;
        running.assert_exact(link).await;
        running
    }

    /// A start has the whole state and applies nothing again.
    async fn assert_kept(&self, link: &Link, store: &str) {
        let running = self.caught_up(link).await;
        assert_eq!(running.seen(), 0, "{store}");
        running.stop().await;
    }

    async fn start_with(&self, link: &Link, state: Shared, saved: Arc<impl SnapshotState>) -> Running {
        let seen = Arc::new(AtomicU64::new(0));
        let (filter, hook) = (self.filter.clone(), self.hook.clone());
        let sums =
            Sums { filter, hook, firm: self.firm, resets: 0, state: state.clone(), seen: seen.clone() };
        let store: Arc<dyn EventStore> = Arc::new(link.clone());
        let node = local_node(&store).await;
        let model = InMemory::new().snapshot_every(self.every, SnapshotRevision(self.revision), saved);
        let handle = node.projection(sums, model, self.options.clone()).await;
        Running { node, handle, state, seen, filter: self.filter.clone() }
    }
}

struct Running {
    node: Node,
    handle: ProjectionHandle,
    state: Shared,
    seen: Arc<AtomicU64>,
    filter: Filter,
}

impl Running {
    fn seen(&self) -> u64 {
        self.seen.load(Ordering::SeqCst)
    }

    fn state(&self) -> State {
        self.state.read().unwrap().clone()
    }

    /// Catches up; the state must then equal the fold of the log.
    async fn assert_exact(&self, link: &Link) {
        catch_up(&self.handle, link.high_water_mark().await.unwrap()).await;
        assert_eq!(self.state(), fold(link, &self.filter, None).await);
    }

    async fn stop(self) {
        self.node.stop(PATIENCE).await.unwrap();
    }
}

/// Returns the fold of the log up to a position.
async fn fold(store: &Link, filter: &Filter, upto: Option<u64>) -> State {
    let (mut state, mut after) = (State::default(), Position::START);
    loop {
        let mut read = ReadLog::after(after).filter(filter.clone());
        if let Some(upto) = upto {
            read = read.upto(Position::new(upto));
        }
        let page = store.read_log(read).await.unwrap();
        page.events.iter().for_each(|event| state.add(event).unwrap());
        if page.scanned_to == after {
            return state;
        }
        after = page.scanned_to;
    }
}

/// Every snapshot through this link must equal the fold of the log up to its position.
async fn assert_true(link: &Link, filter: &Filter) {
    let saved = std::mem::take(&mut *link.shelf.saved.lock().unwrap());
    for (_, snapshot) in saved {
        if !snapshot.state.is_empty() {
            let upto = snapshot.version.get();
            assert_eq!(state_in(&snapshot), fold(link, filter, Some(upto)).await, "at {upto}");
        }
    }
}

fn state_in(snapshot: &Snapshot) -> State {
    let packed: BTreeMap<String, ciborium::Value> = ciborium::from_reader(&*snapshot.state).unwrap();
    ciborium::from_reader(&**packed["state"].as_bytes().unwrap()).unwrap()
}

/// Returns the stored snapshot, as the link saw it: its stream and its content.
async fn kept(link: &Link) -> Option<(StreamId, Snapshot)> {
    let stream = link.shelf.saved.lock().unwrap().last()?.0.clone();
    let snapshot = link.snapshot(&stream).await.unwrap()?;
    Some((stream, snapshot))
}

/// Returns all kinds of stores.
async fn links() -> Vec<(&'static str, Link, Option<TempDir>)> {
    let dir = TempDir::new().unwrap();
    let sqlite = SqliteStore::open(dir.path().join("events.db")).await.unwrap();
    let url = PostgresServer::shared().await.create_database().await;
    let postgres = PostgresStore::connect(&url).await.unwrap();
    vec![
        ("memory", Link::new(&(Arc::new(MemoryStore::new()) as _)), None),
        ("sqlite", Link::new(&(Arc::new(sqlite) as _)), Some(dir)),
        ("postgres", Link::new(&(Arc::new(postgres) as _)), None),
    ]
}

async fn more(link: &Link, stream: u64, numbers: impl IntoIterator<Item = u64>) -> Position {
    append(&(Arc::new(link.clone()) as _), stream, numbers).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_reads_only_events_after_the_snapshot() {
    for (store, link, _dir) in links().await {
        let trial = Trial::every(NEVER);
        more(&link, 1, 0..1_000).await;
        let running = trial.caught_up(&link).await;
        assert_eq!(running.seen(), 1_000, "{store}");
        assert_eq!(link.shelf.asked.load(Ordering::SeqCst), 0, "{store}: before its time");
        running.stop().await;

        more(&link, 2, 0..50).await;
        let running = trial.caught_up(&link).await;
        assert_eq!(running.seen(), 50, "{store}");
        running.stop().await;

        // Without new events, nothing is written.
        trial.assert_kept(&link, store).await;
        assert_eq!(link.shelf.saved.lock().unwrap().len(), 2, "{store}");
        assert_true(&link, &trial.filter).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_is_taken_every_n_events() {
    for (store, link, _dir) in links().await {
        let trial = Trial { options: options().batch_size(10), filter: evens(), ..Trial::every(100) };
        let running = trial.start(&link).await;
        for n in 0..10 {
            let head = more(&link, n, 0..100).await;
            catch_up(&running.handle, head).await;
            // Half of the events do not match the filter.
            let due = (n + 1) * 50 / 100;
            eventually("it is kept", || link.shelf.saved.lock().unwrap().len() as u64 == due).await;
        }
        running.node.kill();

        let head = more(&link, 1, 0..20).await;
        let kept = kept(&link).await.unwrap().1.version.get();
        assert!(kept + 220 >= head.get(), "{store}: {kept} of {head}");
        let running = trial.caught_up(&link).await;
        assert!((1..=110).contains(&running.seen()), "{store}: {}", running.seen());
        running.stop().await;
        assert_true(&link, &trial.filter).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_starts_from_its_snapshot() {
    for (store, link, _dir) in links().await {
        let folded = Arc::new(AtomicU64::new(0));
        let index = || {
            let folded = folded.clone();
            let fold = move |state: &mut State, _: Thing, event: &RecordedEvent| {
                folded.fetch_add(1, Ordering::SeqCst);
                state.add(event)
            };
            InMemoryIndex::new("sums", fold).snapshot_every(100, SnapshotRevision(1))
        };
        more(&link, 1, 0..500).await;
        for (come, all) in [(500, 500), (7, 507), (0, 507)] {
            if come < 500 && come > 0 {
                more(&link, 2, 0..come).await;
            }
            folded.store(0, Ordering::SeqCst);
            let index = index();
            let runtime =
                Runtime::builder().store(link.clone()).in_memory_index(&index).start().await.unwrap();
            index.ready(PATIENCE).await.unwrap();
            assert_eq!(folded.load(Ordering::SeqCst), come, "{store}: {all}");
            let expected = fold(&link, &Filter::all(), None).await;
            assert_eq!(index.read(State::clone), expected, "{store}: {all}");
            runtime.shutdown().await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_kill_at_any_moment_the_state_equals_the_log() {
    let dice = Dice::new(17);
    for (_, link, _dir) in links().await {
        let store: Arc<dyn EventStore> = Arc::new(link.clone());
        let writers = Writers::start(&store, 3, 150, 6);
        for round in 0..20 {
            let trial =
                Trial { options: options().batch_size(1 + dice.roll(20) as usize), ..Trial::every(7) };
            let running = trial.start(&link).await;
            dice.pause(Duration::from_millis(40)).await;
            if round % 5 == 4 {
                running.assert_exact_at(&link).await;
            }
            if round % 4 == 3 {
                running.stop().await;
            } else {
                running.node.kill();
            }
        }
        writers.done().await;
        let running = Trial::every(7).start(&link).await;
        running.assert_exact(&link).await;
        let all = log(&store, &Filter::all()).await.len() as u64;
        assert!(running.seen() < all, "it has never started from a snapshot");
        running.stop().await;
        assert_true(&link, &Filter::all()).await;
    }
}

impl Running {
    /// During appends: while paused, the state must equal the fold of the log up to the position.
    async fn assert_exact_at(&self, link: &Link) {
        self.handle.pause().await.unwrap();
        let upto = self.handle.status().position.get();
        assert_eq!(self.state(), fold(link, &self.filter, Some(upto)).await, "at {upto}");
        self.handle.resume().await.unwrap();
    }
}
