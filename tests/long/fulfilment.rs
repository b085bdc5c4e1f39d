//! examples/fulfilment as a user runs it, and its oracle.
//!
//! Orders are fulfilled by three processes. The test kills, pauses and restarts the processes, NATS
//! and PostgreSQL; every effect happens once. `STORIED_FULFILMENT_SECONDS` sets the duration, 20 by
//! default.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{NatsOptions, NatsServer, PostgresServer, example};
use serde::Deserialize;

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Report {
    orders: u64,
    completed: u64,
    compensated: u64,
    timed_out: u64,
    effects: u64,
    rejected: u64,
    contradicted: u64,
    captured: u64,
    refunded: u64,
    received: u64,
    shipped: u64,
    left: u64,
    per_second: f64,
    wrong: Vec<String>,
}

impl Report {
    fn check(&self) {
        assert_eq!(self.wrong, Vec::<String>::new(), "{self:?}");
        assert_eq!(self.orders, self.completed + self.compensated, "{self:?}");
        assert_eq!(self.received, self.shipped + self.left, "{self:?}");
        // A piece costs 5.
        assert_eq!(self.captured, self.refunded + 5 * self.shipped, "{self:?}");
        assert!(self.effects > self.orders && self.rejected < self.effects, "{self:?}");
        assert!(self.contradicted <= self.compensated && self.per_second > 0.0, "{self:?}");
    }
}

fn fulfilment(args: &[&str]) -> Command {
    let mut command = Command::new(example("fulfilment"));
    command.args(args).arg("--json").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // The faults and the retries explain a violation.
    command.env("RUST_LOG", "error,fulfilment=info,storied::process=debug");
    command
}

/// Waits for the end of a run, and returns its report.
fn report(run: Child) -> Report {
    let output = run.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let report = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}\n{report}\n{said}", output.status);
    serde_json::from_str(&report).unwrap()
}

/// Runs in one process, with each kind of provider.
#[test]
fn every_provider_leads_to_an_end() {
    let run = |args: &[&str]| {
        let report = report(fulfilment(args).spawn().unwrap());
        eprintln!("{report:?}");
        report.check();
        report
    };
    let fine = run(&[]);
    assert!(fine.orders == 200 && fine.completed > 0 && fine.compensated > 0, "{fine:?}");
    let failing = run(&["--provider", "failing", "--orders", "50"]);
    assert_eq!((failing.completed, failing.captured), (0, 0), "{failing:?}");
    let flaky = run(&["--provider", "flaky", "--orders", "50"]);
    assert!(flaky.completed > 0, "{flaky:?}");
    let slow = run(&["--provider", "slow", "--orders", "50", "--payment-timeout", "1000"]);
    assert!(slow.timed_out > 0 && slow.refunded > 0 && slow.completed > 0, "{slow:?}");
}

#[test]
fn nonsense_is_refused() {
    for args in [
        &["--nodes", "3"][..],
        &["--nodes", "65", "--store", "sqlite"],
        &["--faults"],
        &["--store", "tape"],
        &["--provider", "generous"],
        &["--orders", "0"],
        &["--orders", "1000001"],
        &["--callers", "0"],
        &["--seconds"],
        &["--payment-timeout", "0"],
        &["--wat"],
    ] {
        let output = fulfilment(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(String::from_utf8_lossy(&output.stderr).starts_with("error: "), "{args:?}");
    }
}

/// Three nodes over SQLite, which are killed and paused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_share_a_file_fulfil_every_order() {
    let nats = NatsServer::start(NatsOptions::core()).await;
    let directory = tempfile::tempdir().unwrap();
    let url = nats.url();
    let args = ["--nodes", "3", "--store", "sqlite", "--nats-url", &url, "--faults", "--provider", "flaky"];
    let run = fulfilment(&args)
        .args(["--orders", "0", "--seconds", "6", "--db"])
        .arg(directory.path().join("orders.db"))
        .spawn()
        .unwrap();
    let report = tokio::task::spawn_blocking(move || report(run)).await.unwrap();
    eprintln!("{report:?}");
    report.check();
}

/// I12: nodes, NATS and PostgreSQL are killed and paused, with a slow provider and time-outs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_crash_loses_or_repeats_an_effect() {
    let seconds = std::env::var("STORIED_FULFILMENT_SECONDS").map_or(20, |text| text.parse().unwrap());
    let mut postgres = PostgresServer::start().await;
    let mut nats = NatsServer::start(NatsOptions::core()).await;
    let (database, server, length) = (postgres.create_database().await, nats.url(), seconds.to_string());
    let run = fulfilment(&["--nodes", "3", "--store", "postgres", "--faults", "--orders", "0"])
        .args(["--database-url", &database, "--nats-url", &server, "--seconds", &length])
        .args(["--provider", "slow", "--payment-timeout", "2000"])
        .spawn()
        .unwrap();
    let run = tokio::task::spawn_blocking(move || report(run));

    // After the first stock is delivered: NATS and PostgreSQL, killed and paused in turn.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let end = Instant::now() + Duration::from_secs(u64::saturating_sub(seconds, 4));
    let mut faults = 0;
    for fault in (0..4).cycle() {
        if run.is_finished() || Instant::now() > end {
            break;
        }
        match fault {
            0 => {
                nats.kill();
                pause(500).await;
                nats.restart().await;
            }
            1 => {
                postgres.kill();
                pause(300).await;
                postgres.restart().await;
            }
            2 => {
                nats.pause();
                pause(1_500).await;
                nats.resume();
            }
            _ => {
                postgres.pause();
                pause(1_500).await;
                postgres.resume();
            }
        }
        faults += 1;
        pause(1_000).await;
    }
    let report = run.await.unwrap();
    eprintln!("{report:?}");
    assert!(faults > 1 && report.timed_out > 0, "{faults} faults: {report:?}");
    report.check();
}

async fn pause(millis: u64) {
    tokio::time::sleep(Duration::from_millis(millis)).await;
}
