//! Commands over NATS.

use futures_util::StreamExt;
use storied::command::{HandleError, Handler, HandlerContext, HandlerOptions};
use storied::{NeverRejects, Runtime};

use crate::args::Plan;
use crate::domain::{Account, AccountCommand, text};
use crate::measure::{Comparison, Run, closed_loop};
use crate::nats::{Nats, subscribe};
use crate::stores::Store;
use crate::workloads::{AGGREGATES, execute};

/// An empty handler; the record of the command is stored all the same.
struct Nothing;

impl Handler for Nothing {
    const NAME: &'static str = "nothing";
    type Command = String;
    type Reply = ();
    type Error = NeverRejects;

    async fn handle(&self, _: &String, _: &HandlerContext) -> Result<(), HandleError<NeverRejects>> {
        Ok(())
    }
}

/// Measures commands from one node to a handler on any of `nodes` others, all in this process.
///
/// The limit is a bare request and its reply between the same two ends, with one responder.
pub async fn dispatch(plan: &Plan, nodes: usize) -> Comparison {
    let nats = Nats::start(plan.bus).await;
    let store = Store::fresh(plan.store).await;
    let mut all = Vec::new();
    for _ in 0..nodes {
        let options = HandlerOptions::new().workers(64);
        let node = store.builder().commands(nats.commands()).handler_with(Nothing, options);
        all.push(node.start().await.unwrap());
    }
    let caller = store.builder().commands(nats.commands()).start().await.unwrap();
    let text = text(plan.payload);
    let command = |_| {
        let (caller, text) = (caller.clone(), text.clone());
        async move { _ = caller.execute_handler::<Nothing>(text).await.unwrap() }
    };
    closed_loop(plan.callers, plan.callers * nodes, command).await;
    let ours = closed_loop(plan.callers, plan.events, command).await;
    all.insert(0, caller);
    stop(all).await;
    let limit = requests(plan, &nats).await;
    Comparison { ours, limit, note: "a record for each of ours".into() }
}

/// Measures commands from one node to the aggregates of `nodes` others, all in this process.
///
/// The limit is the same command on the node of the aggregates.
pub async fn remote(plan: &Plan, nodes: usize) -> Comparison {
    let nats = Nats::start(plan.bus).await;
    let store = Store::fresh(plan.store).await;
    let mut all = Vec::new();
    for _ in 0..nodes {
        let node = store.builder().commands(nats.commands()).aggregate::<Account>();
        all.push(node.start().await.unwrap());
    }
    let caller = store.builder().commands(nats.commands()).start().await.unwrap();
    let ours = enter(plan, &caller).await;
    let live = all.iter().map(live);
    let note = format!("aggregates per node: {:?}", futures_util::future::join_all(live).await);
    all.insert(0, caller);
    stop(all).await;
    let limit = execute(plan, AGGREGATES).await.run;
    Comparison { ours, limit, note }
}

async fn live(runtime: &Runtime) -> usize {
    runtime.status().await.aggregates.iter().map(|one| one.live).sum()
}

async fn enter(plan: &Plan, runtime: &Runtime) -> Run {
    let look = |n: usize| {
        let runtime = runtime.clone();
        async move { drop(runtime.execute::<Account>(n, AccountCommand::Look).await.unwrap()) }
    };
    closed_loop(64, AGGREGATES, look).await;
    let text = text(plan.payload);
    closed_loop(plan.callers, plan.events, |n| {
        let (runtime, text) = (runtime.clone(), text.clone());
        async move {
            runtime.execute::<Account>(n % AGGREGATES, AccountCommand::Enter(text)).await.unwrap();
        }
    })
    .await
}

async fn requests(plan: &Plan, nats: &Nats) -> Run {
    let answerer = nats.connect().await;
    let mut questions = subscribe(&answerer, "storied_bench.question".into()).await;
    let answering = tokio::spawn(async move {
        while let Some(question) = questions.next().await {
            answerer.publish(question.reply.unwrap(), "".into()).await.unwrap();
        }
    });
    let client = nats.connect().await;
    let text = text(plan.payload);
    let run = closed_loop(plan.callers, plan.events, |_| {
        let (client, text) = (client.clone(), text.clone());
        async move { drop(client.request("storied_bench.question", text.into()).await.unwrap()) }
    })
    .await;
    answering.abort();
    run
}

async fn stop(runtimes: Vec<Runtime>) {
    for runtime in runtimes {
        runtime.shutdown().await.unwrap();
    }
}
