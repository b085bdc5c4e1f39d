//! examples/bank as a user runs it, and the oracle.
//!
//! Money moves between accounts on three processes. The test kills, pauses and restarts the
//! processes, NATS and PostgreSQL; no money may be lost. `STORIED_BANK_SECONDS` sets the duration,
//! 15 by default.

#[path = "../../examples/bank/domain.rs"]
#[allow(dead_code, reason = "only its events are read here")]
mod domain;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{NatsOptions, NatsServer, PostgresServer, example};
use domain::{AccountEvent, OPENING};
use serde::Deserialize;
use storied::{EventStore, Position, PostgresOptions, ReadLog, RecordedEvent};
use uuid::Uuid;

#[derive(Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Report {
    accounts: u64,
    transfers: u64,
    committed: u64,
    refused: u64,
    unknown: u64,
    resolved: u64,
    total_before: i64,
    total_after: i64,
    overdrafts: u64,
    duplicates: u64,
    per_second: f64,
}

impl Report {
    fn check(&self, accounts: u64) {
        assert_eq!(self.accounts, accounts, "{self:?}");
        assert_eq!(self.transfers, self.committed + self.refused, "{self:?}");
        assert_eq!(self.unknown, self.resolved, "{self:?}");
        assert_eq!(self.total_before, (accounts * OPENING).cast_signed(), "{self:?}");
        assert_eq!(self.total_after, self.total_before, "{self:?}");
        assert_eq!((self.overdrafts, self.duplicates), (0, 0), "{self:?}");
        assert!(self.committed > 0 && self.per_second > 0.0, "{self:?}");
    }
}

fn bank(args: &[&str]) -> Command {
    let mut command = Command::new(example("bank"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Waits for the end of a run, and returns its report.
fn report(run: Child) -> Report {
    let output = run.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{said}", output.status);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Runs in one process, and in three over SQLite, with nodes killed and paused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn money_is_conserved_on_one_node_and_on_several() {
    report(bank(&["--transfers", "500", "--json"]).spawn().unwrap()).check(100);
    let nats = NatsServer::start(NatsOptions::core()).await;
    let directory = tempfile::tempdir().unwrap();
    let db = directory.path().join("bank.db");
    let url = nats.url();
    let args = ["--nodes", "3", "--store", "sqlite", "--bus", "core", "--nats-url", &url, "--accounts", "20"];
    let run = |more: &[&str]| {
        let child = bank(&args).arg("--db").arg(&db).args(more).spawn().unwrap();
        tokio::task::spawn_blocking(move || report(child))
    };
    run(&["--transfers", "300", "--json"]).await.unwrap().check(20);
    // Runs on the same accounts again, with faults.
    run(&["--transfers", "0", "--seconds", "5", "--faults", "--json"]).await.unwrap().check(20);
}

#[test]
fn nonsense_is_refused() {
    for args in [
        &["--nodes", "3"][..],
        &["--nodes", "0"],
        &["--faults"],
        &["--store", "tape"],
        &["--accounts", "1"],
        &["--transfers", "0"],
        &["--wat"],
        &["--seconds"],
        &["--seconds", "604801"],
        &["--nodes", "65"],
        &["--nodes", "18446744073709551615"],
        &["--callers", "0"],
        &["--callers", "10001"],
        &["--callers", "4000000000"],
        &["--callers", "18446744073709551615", "--transfers", "1"],
        &["--accounts", "100001"],
        &["--accounts", "18446744073709551615"],
        &["--transfers", "10000001"],
        &["--transfers", "-1"],
    ] {
        let output = bank(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(String::from_utf8_lossy(&output.stderr).starts_with("error: "), "{args:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_crash_loses_money() {
    const ACCOUNTS: u64 = 100;
    let seconds = std::env::var("STORIED_BANK_SECONDS").map_or(15, |text| text.parse().unwrap());
    let mut postgres = PostgresServer::start().await;
    let mut nats = NatsServer::start(NatsOptions::core()).await;
    let directory = tempfile::tempdir().unwrap();
    let journal = directory.path().join("journal");
    let (database, server, length) = (postgres.create_database().await, nats.url(), seconds.to_string());
    let run = bank(&["--nodes", "3", "--store", "postgres", "--bus", "core", "--transfers", "0", "--faults"])
        .args(["--database-url", &database, "--nats-url", &server, "--seconds", &length, "--json"])
        .arg("--journal")
        .arg(&journal)
        .spawn()
        .unwrap();
    let run = tokio::task::spawn_blocking(move || report(run));

    // After the accounts are opened: NATS and PostgreSQL, killed and paused in turn.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let end = Instant::now() + Duration::from_secs(u64::saturating_sub(seconds, 4));
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
        pause(1_000).await;
    }
    let report = run.await.unwrap();
    eprintln!("{report:?}");
    report.check(ACCOUNTS);

    let store = PostgresOptions::new().url(&*database).schema("storied_bank").connect().await.unwrap();
    check_log(&log(&store).await, &fs::read_to_string(journal).unwrap(), ACCOUNTS);
}

async fn pause(millis: u64) {
    tokio::time::sleep(Duration::from_millis(millis)).await;
}

async fn log(store: &dyn EventStore) -> Vec<RecordedEvent> {
    let (mut events, mut after) = (Vec::new(), Position::START);
    loop {
        let page = store.read_log(ReadLog::after(after)).await.unwrap();
        let more = page.has_more();
        after = page.scanned_to;
        events.extend(page.events);
        if !more {
            return events;
        }
    }
}

/// Repeats the checks of the example independently.
///
/// Checks every balance at every moment, every command once, and every transfer against the answer
/// of its caller.
fn check_log(log: &[RecordedEvent], journal: &str, accounts: u64) {
    let mut balances: HashMap<&str, i64> = HashMap::new();
    let mut commands = HashSet::new();
    let mut transfers: HashMap<Uuid, Vec<(&str, &str, i64)>> = HashMap::new();
    for event in log {
        let account = event.stream.id();
        assert!(commands.insert((account, event.command_id)), "a command took effect twice: {event:?}");
        let (transfer, what, change) = match event.decode::<AccountEvent>().unwrap() {
            AccountEvent::Opened { balance } => (None, "opened", balance.cast_signed()),
            AccountEvent::Withdrawn { transfer, amount } => {
                (Some(transfer), "withdrawn", -amount.cast_signed())
            }
            AccountEvent::Deposited { transfer, amount } => {
                (Some(transfer), "deposited", amount.cast_signed())
            }
            AccountEvent::Refused { transfer, .. } => (Some(transfer), "refused", 0),
            AccountEvent::Declined { transfer, .. } => (Some(transfer), "declined", 0),
            AccountEvent::Refunded { transfer, amount } => (Some(transfer), "refunded", amount.cast_signed()),
        };
        let balance = balances.entry(account).or_default();
        *balance += change;
        assert!(*balance >= 0, "overdraft: {event:?}");
        if let Some(transfer) = transfer {
            let metadata = event.decode_metadata().unwrap();
            assert_eq!(metadata.causation_id, Some(transfer), "{event:?}");
            transfers.entry(transfer).or_default().push((what, account, change));
        }
    }
    assert_eq!(balances.values().sum::<i64>(), (accounts * OPENING).cast_signed());
    for line in journal.lines() {
        let fields: Vec<_> = line.split(' ').collect();
        let [id, end, from, to, amount] = fields[..] else { panic!("{line}") };
        let amount: i64 = amount.parse().unwrap();
        let found = transfers.remove(&id.parse().unwrap()).unwrap_or_default();
        let committed = vec![("withdrawn", from, -amount), ("deposited", to, amount)];
        let refunded = vec![("withdrawn", from, -amount), ("declined", to, 0), ("refunded", from, amount)];
        match end {
            "committed" => assert_eq!(found, committed, "{line}"),
            _ => assert!(found == [("refused", from, 0)] || found == refunded, "{line}: {found:?}"),
        }
    }
    assert!(transfers.is_empty(), "transfers without an answer: {transfers:?}");
}
