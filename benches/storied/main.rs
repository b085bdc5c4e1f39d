//! The speed of storied and the raw limit of its base, measured in the same run.
//!
//! ```text
//! cargo bench --bench storied -- <workload> [--store memory|sqlite|postgres] [--bus local|core|jetstream] [--callers N]
//!                                [--events N] [--payload BYTES] [--runs N] [--json FILE]
//! cargo bench --bench storied -- table FILE.json...
//! ```
//!
//! Workloads: `codec`, `commands`, `hot`, `append`, `cpu`, `creations`, `mixed`, `reactions`, `scheduled`,
//! `catchup`, `rehydrate`, `publish`, `acks`, `latency`, `live`, `dispatch`, `remote`, `memory`, `scale`, or `all` (the default),
//! on every store and every bus that is not excluded. storied and the limit run in turns, `runs` times. The report
//! has the medians, and their ratio with its spread. The function of a workload describes its limit.
//! To interpret the numbers: `docs/performance.md`.
//!
//! PostgreSQL is that of `DATABASE_URL` (in its own schema, dropped afterwards), NATS that of
//! `NATS_URL` (in its own namespace), or else private servers. `scale` always uses a private
//! PostgreSQL, because it sets `commit_delay`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a benchmark reports by panicking"
)]
#![allow(missing_docs, unreachable_pub, reason = "a benchmark is not an API")]

mod args;
mod codec;
mod commands;
mod commits;
mod cpu;
mod delivery;
mod domain;
mod growth;
mod latency;
mod limits;
mod live;
mod measure;
mod memory;
mod nats;
mod reactions;
mod scale;
mod scheduled;
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
        [first, rest @ ..] if first == "growth" => return runtime.block_on(growth::run(rest)),
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
        // Written after each workload, so that an interrupted run keeps its results.
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
        Workload::Cpu(streams) => cpu::server(plan, streams).await,
        Workload::CpuClient => cpu::client(plan).await,
        Workload::Creations => workloads::creations(plan).await,
        Workload::Mixed => workloads::mixed(plan).await,
        Workload::Reactions => reactions::reactions(plan).await,
        Workload::Scheduled => scheduled::scheduled(plan).await,
        Workload::Catchup => workloads::catchup(plan).await,
        Workload::Rehydrate => workloads::rehydrate(plan).await,
        Workload::Publish if plan.bus == BusKind::JetStream => delivery::log_stream(plan).await,
        Workload::Publish => delivery::deliver(plan).await,
        Workload::AcksAwaited => delivery::awaited(plan).await,
        Workload::AcksDedup => delivery::deduplicated(plan).await,
        Workload::Latency if plan.bus == BusKind::Local => latency::to_projection(plan).await,
        Workload::Latency => latency::to_subscriber(plan).await,
        Workload::Codec(codec) => codec::encode(plan, codec),
        Workload::Live => live::throughput(plan).await,
        Workload::LiveLatency => live::latency(plan).await,
        Workload::Dispatch(nodes) => commands::dispatch(plan, nodes).await,
        Workload::Remote(nodes) => commands::remote(plan, nodes).await,
        Workload::MemoryIdle => memory::idle(plan).await,
        Workload::MemoryCatchup => memory::catchup(plan).await,
        Workload::Scale(nodes) => scale::scale(plan, nodes).await,
    }
}
