//! Reactions of a process: an event, an append to the instance, a command to another aggregate.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use storied::process::{Input, Next, Process, ProcessContext, Routes};
use storied::{Aggregate, Context, Decided, Event, NeverRejects, Runtime};
use tokio::sync::oneshot;

use crate::args::Plan;
use crate::commits::SingleCommits;
use crate::domain::{Account, AccountCommand, AccountEvent, text};
use crate::measure::{Comparison, Run, closed_loop};
use crate::stores::Store;
use crate::workloads::AGGREGATES;

/// The target of the reactions.
#[derive(Default)]
struct Copy;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum CopyEvent {
    Made { text: String },
}

impl Event for CopyEvent {
    const CATEGORY: &'static str = "copy";
}

impl Aggregate for Copy {
    type Event = CopyEvent;
    type Command = CopyEvent;
    type Reply = ();
    type Error = NeverRejects;

    fn handle(&self, command: &CopyEvent, _: &Context<'_>) -> Decided<Self> {
        Ok(command.clone().into())
    }

    fn apply(&mut self, _: &CopyEvent) {}
}

/// Copies each entry of an account. The number of an entry is the first word of its text.
#[derive(Default)]
struct Copies;

impl Process for Copies {
    const NAME: &'static str = "copies";
    type Event = AccountEvent;

    fn routes() -> Routes<AccountEvent> {
        Routes::new().starts_or_continues(["entered"], |_: &AccountEvent, event| event.stream.id().to_owned())
    }

    fn react(&self, input: Input<'_, AccountEvent>, context: &ProcessContext<'_>) -> Next {
        match input {
            Input::Event(AccountEvent::Entered { text }) => {
                let number = text.split_whitespace().next().unwrap_or_default();
                Next::new().execute::<Copy>(number, context.id(), CopyEvent::Made { text: text.clone() })
            }
            // The command is durable.
            Input::Done { effect, .. } => {
                if let Some(done) = waiting().remove(effect) {
                    let _ = done.send(Instant::now());
                }
                Next::none()
            }
            _ => Next::none(),
        }
    }
}

/// The callers that wait for the reaction to an entry, by its number.
static WAITING: LazyLock<Mutex<HashMap<String, oneshot::Sender<Instant>>>> = LazyLock::new(Mutex::default);

fn waiting() -> MutexGuard<'static, HashMap<String, oneshot::Sender<Instant>>> {
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn entry(plan: &Plan, number: usize) -> String {
    format!("{number} {}", text(plan.payload))
}

/// Enters a text, and waits for the reaction. Returns the time from commit to commit.
async fn react(runtime: &Runtime, plan: &Plan, number: usize) -> Duration {
    let (done, is_done) = oneshot::channel();
    waiting().insert(number.to_string(), done);
    let enter = AccountCommand::Enter(entry(plan, number));
    runtime.execute::<Account>(number % AGGREGATES, enter).await.unwrap();
    let committed = Instant::now();
    is_done.await.unwrap().saturating_duration_since(committed)
}

/// Runs callers that enter a text and wait for its copy, on instances that exist.
///
/// With one caller, the number is the time from the commit of the trigger to the commit of the
/// target, and the limit is a commit of one row. With several, the limit gives both commands
/// directly, the second after the first.
pub async fn reactions(plan: &Plan) -> Comparison {
    let store = Store::fresh(plan.store).await;
    let builder = store.builder().aggregate::<Account>().aggregate::<Copy>();
    let runtime = builder.process::<Copies>().start().await.unwrap();
    let existing = if plan.callers == 1 { 10 } else { AGGREGATES };
    closed_loop(64.min(existing), existing, |number| {
        let (runtime, plan) = (runtime.clone(), plan.clone());
        async move { _ = react(&runtime, &plan, number).await }
    })
    .await;
    let (ours, limit, note);
    if plan.callers == 1 {
        let mut latencies = Vec::with_capacity(plan.events);
        for number in 0..plan.events {
            tokio::time::sleep(Duration::from_millis(5)).await;
            latencies.push(react(&runtime, plan, AGGREGATES * 10 + number % 10).await);
        }
        ours = Run::each(latencies);
        let mut table = SingleCommits::open(plan.store).await;
        let body = vec![b'x'; plan.payload];
        let mut latencies = Vec::with_capacity(plan.events);
        for _ in 0..plan.events {
            tokio::time::sleep(Duration::from_millis(5)).await;
            let start = Instant::now();
            table.insert(&body).await;
            latencies.push(start.elapsed());
        }
        table.close().await;
        limit = Run::each(latencies);
        note = "from commit to commit; the limit is one commit".to_owned();
    } else {
        ours = closed_loop(plan.callers, plan.events, |number| {
            let (runtime, plan) = (runtime.clone(), plan.clone());
            async move { _ = react(&runtime, &plan, AGGREGATES * 10 + number).await }
        })
        .await;
        limit = directly(plan).await;
        note = "the limit gives both commands directly".to_owned();
    }
    runtime.shutdown().await.unwrap();
    Comparison { ours, limit, note }
}

/// Gives the trigger and the command of its reaction directly.
async fn directly(plan: &Plan) -> Run {
    let store = Store::fresh(plan.store).await;
    let runtime = store.builder().aggregate::<Account>().aggregate::<Copy>().start().await.unwrap();
    let both = async |number: usize| {
        let (id, text) = (number % AGGREGATES, entry(plan, number));
        runtime.execute::<Account>(id, AccountCommand::Enter(text.clone())).await.unwrap();
        runtime.execute::<Copy>(id, CopyEvent::Made { text }).await.unwrap();
    };
    for number in 0..AGGREGATES {
        both(number).await;
    }
    let run = closed_loop(plan.callers, plan.events, |number| {
        let (runtime, plan) = (runtime.clone(), plan.clone());
        async move {
            let (id, text) = (number % AGGREGATES, entry(&plan, number));
            runtime.execute::<Account>(id, AccountCommand::Enter(text.clone())).await.unwrap();
            runtime.execute::<Copy>(id, CopyEvent::Made { text }).await.unwrap();
        }
    })
    .await;
    runtime.shutdown().await.unwrap();
    run
}
