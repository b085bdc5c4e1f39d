//! How fast storied is, beside the raw limit of what it stands on, measured in the same run.
//!
//! ```text
//! cargo bench --bench storied -- <workload> [--store memory|sqlite|postgres] [--bus local|core|jetstream] [--callers N]
//!                                [--events N] [--payload BYTES] [--runs N] [--json FILE]
//! cargo bench --bench storied -- table FILE.json...
//! ```
//!
//! Workloads: `commands`, `hot`, `append`, `catchup`, `rehydrate`, `publish`, `acks`, `latency`, `dispatch`, `remote`, `memory`,
//! `scale`, or `all` (the default), on every store and over every bus that was not excluded.
//! Ours and the limit take turns, `runs` times; the medians are printed, with their ratio and its spread. What each limit is
//! stands beside its workload's function. How to read the numbers: `docs/performance.md`.
//!
//! PostgreSQL is the one of `DATABASE_URL` (a schema of its own, dropped afterwards) and NATS the one of `NATS_URL` (a namespace
//! of its own), or else private ones. `scale` always has a private PostgreSQL: it sets `commit_delay`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a benchmark reports by panicking"
)]
#![allow(missing_docs, unreachable_pub, reason = "a benchmark is no library")]

mod args;
mod commands;
mod commits;
mod delivery;
mod domain;
mod latency;
mod limits;
mod measure;
mod memory;
mod nats;
mod scale;
mod stores;
#[path = "../../tests/support/mod.rs"]
mod support;
mod workloads;

use args::{Args, BusKind, Workload};
use measure::{Comparison, Report};

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let arguments: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    match arguments.as_slice() {
        [first, rest @ ..] if first == scale::NODE => return runtime.block_on(scale::node(rest)),
        [first, rest @ ..] if first == memory::CHILD => return runtime.block_on(memory::child(rest)),
        [first, files @ ..] if first == "table" => return print!("{}", measure::table(files)),
        _ => {}
    }
    let (plans, args) = match Args::parse(arguments.into_iter()).and_then(|args| Ok((args.plans()?, args))) {
        Ok(parsed) => parsed,
        Err(message) => {
            eprintln!("{message}");
            std::process::exit(2);
        }
    };
    let mut reports = Vec::new();
    for plan in plans {
        let mut comparisons = Vec::new();
        for _ in 0..plan.runs {
            comparisons.push(runtime.block_on(run(&plan)));
        }
        let report = Report::new(&plan, &comparisons);
        println!("{report}");
        reports.push(report);
        // After each: who ends it early keeps what there is.
        if let Some(file) = &args.json {
            let json = match &reports[..] {
                [report] => report.json(),
                reports => reports.iter().map(Report::json).collect(),
            };
            std::fs::write(file, format!("{json:#}\n"))
                .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        }
    }
    runtime.block_on(stores::clean());
}

async fn run(plan: &args::Plan) -> Comparison {
    match plan.workload {
        Workload::Commands => workloads::commands(plan).await,
        Workload::Hot => workloads::hot(plan).await,
        Workload::Append(events) => workloads::append(plan, events).await,
        Workload::Catchup => workloads::catchup(plan).await,
        Workload::Rehydrate => workloads::rehydrate(plan).await,
        Workload::Publish if plan.bus == BusKind::JetStream => delivery::mirror(plan).await,
        Workload::Publish => delivery::deliver(plan).await,
        Workload::AcksAwaited => delivery::awaited(plan).await,
        Workload::AcksDedup => delivery::deduplicated(plan).await,
        Workload::Latency if plan.bus == BusKind::Local => latency::to_projection(plan).await,
        Workload::Latency => latency::to_subscriber(plan).await,
        Workload::Dispatch(nodes) => commands::dispatch(plan, nodes).await,
        Workload::Remote(nodes) => commands::remote(plan, nodes).await,
        Workload::MemoryIdle => memory::idle(plan).await,
        Workload::MemoryCatchup => memory::catchup(plan).await,
        Workload::Scale(nodes) => scale::scale(plan, nodes).await,
    }
}
