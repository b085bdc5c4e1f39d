//! How fast storied is, beside the raw limit of what it stands on, measured in the same run.
//!
//! ```text
//! cargo bench --bench storied -- <workload> [--store memory|sqlite|postgres] [--bus local] [--callers N] [--events N]
//!                                [--payload BYTES] [--runs N] [--json FILE]
//! ```
//!
//! PostgreSQL is the one of `DATABASE_URL` (a schema of its own, dropped afterwards), or else a private one.
//!
//! Workloads: `commands`, `hot`, `rehydrate`, `catchup`, `publish` (into JetStream), `deliver` and `latency` (from the store over
//! NATS Core to a subscriber), `scale` (four processes on one PostgreSQL), `dispatch` and `remote` (commands over NATS Core), or
//! `all` (the default). NATS is a private server.
//! Ours and the limit take turns, `runs` times; the medians are printed, with their ratio and its spread. What each limit is
//! stands beside its function in `limits.rs`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a benchmark reports by panicking"
)]
#![allow(missing_docs, unreachable_pub, reason = "a benchmark is no library")]

mod args;
mod commands;
mod delivery;
mod domain;
mod limits;
mod measure;
mod scale;
mod stores;
#[path = "../../tests/support/mod.rs"]
mod support;
mod workloads;

use args::{Args, Workload};
use measure::{Comparison, Report};

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [first, node @ ..] = arguments.as_slice()
        && first == scale::NODE
    {
        return runtime.block_on(scale::node(node));
    }
    let args = match Args::parse(arguments.into_iter()) {
        Ok(args) => args,
        Err(message) => {
            eprintln!("{message}");
            std::process::exit(2);
        }
    };
    let mut reports = Vec::new();
    for plan in args.plans() {
        let mut comparisons = Vec::new();
        for _ in 0..plan.runs {
            comparisons.push(runtime.block_on(run(&plan)));
        }
        let report = Report::new(&plan, &comparisons);
        println!("{report}");
        reports.push(report);
    }
    if let Some(file) = &args.json {
        let json = match &reports[..] {
            [report] => report.json(),
            reports => reports.iter().map(Report::json).collect(),
        };
        std::fs::write(file, format!("{json}\n"))
            .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    }
}

async fn run(plan: &args::Plan) -> Comparison {
    match plan.workload {
        Workload::Commands => workloads::commands(plan).await,
        Workload::Hot => workloads::hot(plan).await,
        Workload::Rehydrate => workloads::rehydrate(plan).await,
        Workload::Catchup => workloads::catchup(plan).await,
        Workload::Publish => workloads::publish(plan).await,
        Workload::Deliver => delivery::deliver(plan).await,
        Workload::Latency => delivery::latency(plan).await,
        Workload::Scale => scale::scale(plan).await,
        Workload::Dispatch => commands::dispatch(plan).await,
        Workload::Remote => commands::remote(plan).await,
    }
}
