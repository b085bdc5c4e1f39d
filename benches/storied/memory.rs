//! Memory use, measured in separate processes.
//!
//! One workload could reuse memory that another has freed.

use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef};
use storied::AggregateOptions;
use storied::projection::InMemory;
use tokio::process::Command;

use crate::args::{Plan, StoreKind};
use crate::domain::{Account, AccountCommand};
use crate::limits;
use crate::measure::{Comparison, Run, closed_loop};
use crate::stores::Store;
use crate::workloads::{AGGREGATES, Bytes};

/// First argument of a measured process.
pub const CHILD: &str = "memory-child";

/// Measures the bytes of a live aggregate with a number as state and a stream of one event.
///
/// On the memory store, the stream has no event. The limit is an actor of ractor with a number.
pub async fn idle(plan: &Plan) -> Comparison {
    let store = Store::fresh(plan.store).await;
    if plan.store != StoreKind::Memory {
        store.fill(plan, plan.events).await;
    }
    let ours = measure("aggregates", plan, &store.place().await).await;
    let limit = measure("actors", plan, "").await;
    Comparison { ours: Run::bytes(ours), limit: Run::bytes(limit), note: "bytes each; less is better".into() }
}

/// Measures the peak resident memory of a process in which a new projection reads a full log.
///
/// The limit is a process that reads the rows.
pub async fn catchup(plan: &Plan) -> Comparison {
    let store = Store::fresh(plan.store).await;
    store.fill(plan, AGGREGATES).await;
    store.settle().await;
    let place = store.place().await;
    let ours = measure("projection", plan, &place).await;
    let limit = measure("rows", plan, &place).await;
    Comparison { ours: Run::bytes(ours), limit: Run::bytes(limit), note: "peak; less is better".into() }
}

/// Runs a measured process and returns its result.
async fn measure(what: &str, plan: &Plan, place: &str) -> f64 {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args([CHILD, what, plan.store.name(), place, &plan.events.to_string()]);
    if plan.store == StoreKind::Postgres && !place.is_empty() {
        child.env("DATABASE_URL", place);
    }
    let output = child.stderr(std::process::Stdio::inherit()).output().await.unwrap();
    assert!(output.status.success(), "{what} ended with {}", output.status);
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

/// Runs the measurement in such a process.
pub async fn child(args: &[String]) {
    let [what, store, place, events] = args else { panic!("{CHILD} needs four arguments") };
    let store = StoreKind::parse(store).unwrap();
    let events = events.parse().unwrap();
    let bytes = match what.as_str() {
        "aggregates" => aggregates(Store::existing(store, place).await, events).await,
        "actors" => actors(events).await,
        "projection" => projection(Store::existing(store, place).await, events).await as f64,
        "rows" => {
            match store {
                StoreKind::Sqlite => limits::sqlite_read(events, std::path::Path::new(place)).await,
                _ => limits::postgres_read(events).await,
            };
            resident("VmHWM:") as f64
        }
        other => panic!("unknown measurement {other:?}"),
    };
    println!("{bytes}");
}

/// Number of warm-up items: threads, connections and the first pages exist before the measurement.
const FIRST: usize = 64;

/// Returns the bytes of each aggregate.
async fn aggregates(store: Store, count: usize) -> f64 {
    let options = AggregateOptions::new().max_live(count).idle_timeout(Duration::from_secs(3_600));
    let runtime = store.builder().aggregate_with::<Account>(options).start().await.unwrap();
    let look = |n: usize| {
        let runtime = runtime.clone();
        async move { drop(runtime.execute::<Account>(n, AccountCommand::Look).await.unwrap()) }
    };
    let first = FIRST.min(count / 2);
    closed_loop(FIRST, first, look).await;
    let before = resident("VmRSS:");
    closed_loop(FIRST, count, look).await;
    let after = resident("VmRSS:");
    let live: usize = runtime.status().await.aggregates.iter().map(|one| one.live).sum();
    assert_eq!(live, count);
    after.saturating_sub(before) as f64 / (count - first) as f64
}

struct Number;

impl Actor for Number {
    type Msg = ();
    type State = u64;
    type Arguments = ();

    async fn pre_start(&self, _: ActorRef<()>, (): ()) -> Result<u64, ActorProcessingErr> {
        Ok(0)
    }
}

/// Returns the bytes of each actor.
async fn actors(count: usize) -> f64 {
    let first = FIRST.min(count / 2);
    let mut actors = Vec::with_capacity(count);
    let mut before = 0;
    for n in 0..count {
        if n == first {
            before = resident("VmRSS:");
        }
        actors.push(Actor::spawn(None, Number, ()).await.unwrap());
    }
    resident("VmRSS:").saturating_sub(before) as f64 / (count - first) as f64
}

async fn projection(store: Store, events: usize) -> u64 {
    let head = store.port().high_water_mark().await.unwrap();
    let runtime = store.builder().projection(Bytes(0), InMemory::new()).start().await.unwrap();
    let projection = runtime.projection("bytes").unwrap();
    projection.caught_up_to_within(head, Duration::from_secs(600)).await.unwrap();
    assert_eq!(projection.status().events_applied, events as u64);
    resident("VmHWM:")
}

/// Returns the memory of this process in bytes, as Linux counts it.
///
/// `VmRSS:` is the current value, `VmHWM:` the peak.
fn resident(line: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("memory is measured on Linux");
    let found = status.lines().find_map(|text| text.strip_prefix(line)).unwrap();
    let kilobytes: u64 = found.trim().trim_end_matches(" kB").parse().unwrap();
    kilobytes * 1_024
}
