//! Scheduled commands under random faults: nodes end at any moment, and writes fail or lose their
//! answers.

use std::collections::BTreeMap;
use std::time::Duration;

use storied::schedule::{Cancellation, Recurrence};
use storied::store::ScheduledQuery;
use storied::{MemoryStore, Runtime};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::support::reminders::{Invoice, reminder, reminders};
use crate::support::{Dice, FaultyStore, eventually_async};

async fn node(inner: &MemoryStore, stores: &mut Vec<FaultyStore>) -> Runtime {
    let store = FaultyStore::new(inner.clone());
    store.fail_sometimes(8);
    stores.push(store.clone());
    loop {
        // The start writes too.
        match Runtime::builder().store(store.clone()).aggregate::<Invoice>().start().await {
            Ok(node) => return node,
            Err(error) => assert!(error.to_string().contains("by chance"), "{error}"),
        }
    }
}

/// Schedules a reminder under its id until an answer arrives.
async fn remind(caller: &Runtime, invoice: u64, id: Uuid, wait: Duration) {
    loop {
        let command = caller.execute::<Invoice>(invoice, reminder("once")).command_id(id);
        match command.after(wait).await {
            Ok(_) => return,
            Err(error) => assert!(error.to_string().contains("by chance"), "{error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_command_runs_once_whatever_fails() {
    let (inner, dice, mut stores) = (MemoryStore::new(), Dice::random(), Vec::new());
    let mut nodes = vec![node(&inner, &mut stores).await, node(&inner, &mut stores).await];
    let calm = MemoryStore::clone(&inner);
    let every = Recurrence::every(Duration::from_secs(1)).unwrap();
    loop {
        let tick = nodes[1].execute::<Invoice>("ticks", reminder("tick"));
        if tick.repeat("ticks", every.clone()).await.is_ok() {
            break;
        }
    }
    let end = Instant::now() + Duration::from_secs(8);
    let mut expected = BTreeMap::new();
    let mut count = 0;
    while Instant::now() < end {
        for _ in 0..dice.roll(12) {
            let id = if dice.roll(2) == 0 { Uuid::now_v7() } else { Uuid::new_v4() };
            remind(&nodes[1], count, id, Duration::from_millis(dice.roll(400))).await;
            let cancelled = dice.roll(8) == 0 && {
                let cancelled = loop {
                    if let Ok(cancelled) = nodes[1].scheduled_command(id).cancel().await {
                        break cancelled;
                    }
                };
                // After a lost answer, it is unknown whether it was cancelled.
                if cancelled == Cancellation::Unknown {
                    count += 1;
                    continue;
                }
                cancelled == Cancellation::Cancelled
            };
            expected.insert(count.to_string(), usize::from(!cancelled));
            count += 1;
        }
        sleep(Duration::from_millis(dice.roll(60))).await;
        if dice.roll(12) == 0 {
            // As a crash of its process: its lease expires.
            drop(nodes.remove(0));
            nodes.push(node(&inner, &mut stores).await);
        }
    }
    stores.iter().for_each(FaultyStore::heal);
    let ticks = nodes[1].schedule("ticks");
    ticks.pause().await.unwrap();
    let none_left = async || {
        use storied::store::ScheduleStore;
        calm.scheduled_commands(&ScheduledQuery::default(), None, 10).await.unwrap().is_empty()
    };
    eventually_async("all commands have ended", none_left).await;
    let mut found = BTreeMap::<String, usize>::new();
    for (invoice, _) in reminders(&calm).await {
        *found.entry(invoice).or_default() += 1;
    }
    for (invoice, times) in &expected {
        assert_eq!(found.get(invoice).copied().unwrap_or(0), *times, "{invoice} of {count}");
    }
    for node in &nodes {
        assert_eq!(node.status().await.scheduler.parked, 0);
    }
    let status = ticks.status().await.unwrap().unwrap();
    assert_eq!(found["ticks"] as u64, status.created, "{status:?}");
    let ticks = status.created + status.missed + status.skipped;
    assert!(status.created > 0 && ticks >= 6 && expected.len() > 20, "{status:?}, {count} commands");
    drop(nodes);
}
