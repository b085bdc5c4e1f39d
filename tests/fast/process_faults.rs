//! I12 under random faults: nodes end at any moment, and writes fail or lose their answers.

use std::time::Duration;

use storied::process::InstanceState;
use storied::{MemoryStore, ProcessOptions, Runtime};
use tokio::time::{Instant, sleep};

use crate::support::fulfilment::{Fulfilment, Order, OrderEvent, Stock, record};
use crate::support::fulfilment_oracle::{check, ended};
use crate::support::{Dice, FaultyStore, PATIENCE, eventually_async};

async fn node(store: &FaultyStore) -> Runtime {
    loop {
        let options = ProcessOptions::new().lease(Duration::from_secs(1));
        let builder = Runtime::builder().store(store.clone()).aggregate::<Order>().aggregate::<Stock>();
        // The start writes too.
        match builder.process_with::<Fulfilment>(options).start().await {
            Ok(node) => return node,
            Err(error) => assert!(error.to_string().contains("by chance"), "{error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn effects_happen_once_whatever_fails() {
    let (inner, dice) = (MemoryStore::new(), Dice::random());
    let healthy = FaultyStore::new(inner.clone());
    // It never owns the process.
    let callers = Runtime::builder().store(healthy).aggregate::<Order>().start().await.unwrap();
    let mut stores = Vec::new();
    let mut faulty = || {
        let store = FaultyStore::new(inner.clone());
        store.fail_sometimes(8);
        stores.push(store.clone());
        store
    };
    let mut nodes = vec![node(&faulty()).await, node(&faulty()).await];
    let end = Instant::now() + Duration::from_secs(6);
    let mut orders = 0;
    while Instant::now() < end {
        for _ in 0..dice.roll(12) {
            let order = orders.to_string();
            orders += 1;
            let lines: Vec<_> = (0..dice.roll(4)).map(|_| format!("product {}", dice.roll(60))).collect();
            let lines: std::collections::BTreeSet<_> = lines.into_iter().collect();
            let (timer, instance) = (lines.is_empty(), order.clone());
            record(&callers, &order, OrderEvent::Placed { lines: lines.into_iter().collect() }).await;
            if timer {
                let text = if dice.roll(2) == 0 { "soon" } else { "later" };
                record(&callers, &instance, OrderEvent::Noted { text: text.into() }).await;
                record(&callers, &instance, OrderEvent::Noted { text: "soon".into() }).await;
            }
        }
        sleep(Duration::from_millis(dice.roll(60))).await;
        if dice.roll(8) == 0 {
            // As a crash of its process.
            drop(nodes.remove(0));
            nodes.push(node(&faulty()).await);
        }
    }
    // The rest takes a known time: a rejection waits until no earlier attempt can be alive.
    stores.iter().for_each(FaultyStore::heal);
    let store = callers.store().clone();
    let state = async |order: usize| callers.process::<Fulfilment>(order).status().await.unwrap();
    let all_ended = async || ended(&*store).await == orders;
    let waited = tokio::time::timeout(PATIENCE, async {
        while !all_ended().await {
            sleep(Duration::from_millis(20)).await;
        }
    });
    if waited.await.is_err() {
        for order in 0..orders {
            let status = state(order).await;
            let running = status.as_ref().is_none_or(|status| status.state == InstanceState::Running);
            if running || status.as_ref().is_some_and(|status| status.parked.is_some()) {
                println!("{order}: {status:?}");
            }
        }
        println!("timers: {:?}", store.timers(None, None, 100).await.unwrap());
        for node in &nodes {
            println!("status: {:?}", node.status().await.processes);
            println!("{:?}", node.projection("process fulfilment").unwrap().status());
        }
        panic!("some of {orders} instances have not ended");
    }
    check(&*store).await;
    let no_timers = async || store.timers(None, None, 1).await.unwrap().is_empty();
    eventually_async("no timer is left", no_timers).await;
    drop(nodes);
    callers.shutdown().await.unwrap();
}
