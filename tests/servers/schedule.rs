//! Scheduled commands and recurring schedules on PostgreSQL, with nodes and servers that are killed.

use std::collections::BTreeMap;
use std::time::Duration;

use storied::schedule::{Recurrence, SchedulerState};
use storied::store::ScheduledQuery;
use storied::{EventStore, PostgresStore, Runtime, SqliteStore};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::support::reminders::{Invoice, reminder, reminders};
use crate::support::{Dice, PostgresServer, eventually_async, eventually_some};

const SECOND: Duration = Duration::from_secs(1);

/// TTL of the lease of the scheduler.
const LEASE: Duration = Duration::from_secs(6);

async fn postgres(url: &str) -> PostgresStore {
    PostgresStore::connect(url).await.unwrap()
}

async fn node(store: impl storied::store::IntoEventStore) -> Runtime {
    Runtime::builder().store(store).aggregate::<Invoice>().start().await.unwrap()
}

async fn is_empty(store: &dyn EventStore) -> bool {
    store.scheduled_commands(&ScheduledQuery::default(), None, 1).await.is_ok_and(|page| page.is_empty())
}

/// Returns the index of the node that starts what is due.
async fn owner_of(nodes: &[Runtime]) -> usize {
    let owner = async || {
        for (index, node) in nodes.iter().enumerate() {
            if node.status().await.scheduler.state == SchedulerState::Running {
                return Some(index);
            }
        }
        None
    };
    eventually_some("a node runs the scheduler", owner).await
}

/// No tick runs twice, and none is forgotten: it runs, is skipped, or counts as missed.
/// `STORIED_SCHEDULE_SECONDS` sets the duration, 20 by default.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_command_and_every_tick_runs_once_whatever_is_killed() {
    let seconds = std::env::var("STORIED_SCHEDULE_SECONDS").map_or(20, |text| text.parse().unwrap());
    let mut server = PostgresServer::start().await;
    let (url, dice) = (server.url(), Dice::random());
    let mut nodes = Vec::new();
    for _ in 0..3 {
        nodes.push(node(postgres(&url).await).await);
    }
    let every = Recurrence::every(SECOND).unwrap();
    nodes[0].execute::<Invoice>("ticks", reminder("tick")).repeat("ticks", every).await.unwrap();
    let created = nodes[0].schedule("ticks").status().await.unwrap().unwrap().next_at.unwrap();
    let (end, mut count, mut round) = (Instant::now() + seconds * SECOND, 0, 0);
    while Instant::now() < end {
        for _ in 0..20 {
            let id = if dice.roll(2) == 0 { Uuid::now_v7() } else { Uuid::new_v4() };
            let wait = Duration::from_millis(dice.roll(3_000));
            let scheduling = async || {
                let command = nodes[0].execute::<Invoice>(count, reminder("once")).command_id(id);
                command.after(wait).await.ok()
            };
            eventually_some("the command is scheduled", scheduling).await;
            count += 1;
        }
        sleep(Duration::from_millis(dice.roll(800))).await;
        round += 1;
        if round % 4 == 0 {
            // As a crash of its process: no lease is released.
            let owner = owner_of(&nodes).await;
            drop(nodes.remove(owner));
            nodes.push(node(postgres(&url).await).await);
        } else if round % 4 == 2 {
            server.kill();
            server.restart().await;
        }
    }
    let ticks = nodes[0].schedule("ticks");
    let paused = async || ticks.pause().await.ok();
    eventually_some("the schedule is paused", paused).await;
    let passed = (chrono::Utc::now() - created).num_seconds() + 1;
    let store = nodes[0].store().clone();
    eventually_async("all commands have ended", async || is_empty(&*store).await).await;
    let mut found = BTreeMap::<String, usize>::new();
    for (invoice, _) in reminders(&*store).await {
        *found.entry(invoice).or_default() += 1;
    }
    let status = ticks.status().await.unwrap().unwrap();
    assert_eq!(found.remove("ticks").unwrap_or(0) as u64, status.created, "{status:?}");
    let expected: BTreeMap<_, _> = (0..count).map(|invoice| (invoice.to_string(), 1)).collect();
    assert_eq!(found, expected);
    // Every second has its tick.
    let ticks = (status.created + status.skipped + status.missed).cast_signed();
    assert!(status.created > 1 && (ticks - passed).abs() <= 1, "{status:?}, {passed}");
    for node in nodes {
        node.shutdown().await.unwrap();
    }
}

/// All nodes die at once just after the answer; the next one starts after the due time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledged_command_survives_the_end_of_all_nodes() {
    let url = PostgresServer::shared().await.create_database().await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("log.db");
    for sqlite in [false, true] {
        let open = async || match sqlite {
            true => node(SqliteStore::open(&file).await.unwrap()).await,
            false => node(postgres(&url).await).await,
        };
        let nodes = [open().await, open().await];
        let owner = owner_of(&nodes).await;
        let caller = &nodes[1 - owner];
        let scheduled = caller.execute::<Invoice>("1", reminder("due")).after(SECOND).await.unwrap();
        let dropped = Instant::now();
        drop(nodes);
        sleep(2 * SECOND).await;
        let next = open().await;
        let ended = async || next.scheduled_command(scheduled.id).status().await.unwrap().is_none();
        eventually_async("the command has run", ended).await;
        assert!(dropped.elapsed() < LEASE + 3 * SECOND, "{:?}", dropped.elapsed());
        assert_eq!(reminders(&**next.store()).await, [("1".to_owned(), "due".to_owned())]);
        next.shutdown().await.unwrap();
    }
}

/// Many commands that are due at once do not wait for each other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_starts_in_time() {
    let url = PostgresServer::shared().await.create_database().await;
    let runtime = node(postgres(&url).await).await;
    owner_of(std::slice::from_ref(&runtime)).await;
    let due = chrono::Utc::now() + chrono::TimeDelta::seconds(3);
    let commands = (0..1_000).map(|invoice| {
        let runtime = runtime.clone();
        async move { runtime.execute::<Invoice>(invoice, reminder("due")).at(due).await.unwrap() }
    });
    futures_util::future::join_all(commands).await;
    let store = runtime.store().clone();
    eventually_async("all commands have ended", async || is_empty(&*store).await).await;
    let page = store.read_log(storied::ReadLog::after(storied::Position::START).limit(2_000)).await.unwrap();
    let mut late: Vec<_> = page.events.iter().map(|event| event.recorded_at - due).collect();
    late.sort();
    assert_eq!(late.len(), 1_000);
    println!("lateness: median {}, p99 {}, most {}", late[500], late[990], late[999]);
    assert!(late[0] >= chrono::TimeDelta::zero(), "not before its time: {}", late[0]);
    // The aim is 1 s; tests share their processors.
    assert!(
        late[500] < chrono::TimeDelta::seconds(3) && late[990] < chrono::TimeDelta::seconds(6),
        "{}",
        late[990]
    );
    runtime.shutdown().await.unwrap();
}
