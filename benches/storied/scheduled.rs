//! Scheduled commands that are due at once.

use std::time::{Duration, Instant};

use chrono::{TimeDelta, Utc};
use storied::Runtime;
use storied::store::ScheduledQuery;

use crate::args::Plan;
use crate::domain::{Account, AccountCommand, text};
use crate::measure::{Comparison, Run, closed_loop};
use crate::stores::Store;
use crate::workloads::AGGREGATES;

/// Number of callers of the limit: as many commands as the scheduler has in flight.
const CALLERS: usize = 1_024;

/// Starts a node. Its store ends with the first value.
async fn start(plan: &Plan) -> (Store, Runtime) {
    let store = Store::fresh(plan.store).await;
    let runtime = store.builder().aggregate::<Account>().start().await.unwrap();
    closed_loop(64.min(AGGREGATES), AGGREGATES, |number| enter(&runtime, plan, number)).await;
    (store, runtime)
}

fn enter(runtime: &Runtime, plan: &Plan, number: usize) -> impl Future<Output = ()> + Send + 'static {
    let command = AccountCommand::Enter(text(plan.payload));
    let command = runtime.execute::<Account>(number % AGGREGATES, command);
    async move {
        command.await.unwrap();
    }
}

/// Schedules commands that are due at once, and measures the time from then to the last answer.
///
/// The limit gives the same commands directly, 1,024 at a time.
pub async fn scheduled(plan: &Plan) -> Comparison {
    let (_database, runtime) = start(plan).await;
    // Long enough to schedule all of them before.
    let due = Utc::now() + TimeDelta::milliseconds(3_000 + i64::try_from(plan.events).unwrap());
    closed_loop(CALLERS.min(plan.events), plan.events, |number| {
        let command = AccountCommand::Enter(text(plan.payload));
        let command = runtime.execute::<Account>(number % AGGREGATES, command);
        async move { _ = command.at(due).await.unwrap() }
    })
    .await;
    let wait = (due - Utc::now()).to_std().expect("all commands are scheduled before they are due");
    tokio::time::sleep(wait).await;
    let began = Instant::now();
    let store = runtime.store().clone();
    let all = ScheduledQuery::default();
    while !store.scheduled_commands(&all, None, 1).await.unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let ours = Run::whole(plan.events, began.elapsed());
    runtime.shutdown().await.unwrap();
    let (_database, runtime) = start(plan).await;
    let limit =
        closed_loop(CALLERS.min(plan.events), plan.events, |number| enter(&runtime, plan, number)).await;
    runtime.shutdown().await.unwrap();
    Comparison { ours, limit, note: "the limit gives the commands directly, 1,024 at a time".to_owned() }
}
