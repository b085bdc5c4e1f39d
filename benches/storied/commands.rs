//! Commands over NATS.

use futures_util::StreamExt;
use storied::Runtime;
use storied::command::{CommandBus, HandleError, Handler, HandlerContext, HandlerOptions};

use crate::args::Plan;
use crate::domain::{Account, AccountCommand, Never, text};
use crate::measure::{Comparison, Run, closed_loop};
use crate::stores::Store;
use crate::support::{NatsOptions, NatsServer};

const AGGREGATES: usize = 1_000;

/// Does nothing; what became of the command is recorded all the same.
struct Nothing;

impl Handler for Nothing {
    const NAME: &'static str = "nothing";
    type Command = String;
    type Reply = ();
    type Error = Never;

    async fn handle(&self, _: &String, _: &HandlerContext) -> Result<(), HandleError<Never>> {
        Ok(())
    }
}

/// A command from one node to a handler on another. The limit is a bare request and its reply between the same two ends.
pub async fn dispatch(plan: &Plan) -> Comparison {
    let server = NatsServer::start(NatsOptions::core()).await;
    let store = Store::fresh(plan.store).await;
    let bus = || CommandBus::nats(server.url());
    let options = HandlerOptions::new().workers(64);
    let node = store.builder().commands(bus()).handler_with(Nothing, options).start().await.unwrap();
    let caller = store.builder().commands(bus()).start().await.unwrap();
    let text = text(plan.payload);
    let ours = closed_loop(plan.callers, plan.events, |_| {
        let (caller, text) = (caller.clone(), text.clone());
        async move { _ = caller.command::<Nothing>(text).await.unwrap() }
    })
    .await;
    stop([caller, node]).await;
    let limit = requests(plan, &server).await;
    Comparison { ours, limit, note: "a record for each of ours".into() }
}

/// A command from one node to an aggregate of another. The limit is the same command where the aggregate is.
pub async fn remote(plan: &Plan) -> Comparison {
    let server = NatsServer::start(NatsOptions::core()).await;
    let store = Store::fresh(plan.store).await;
    let bus = || CommandBus::nats(server.url());
    let node = store.builder().commands(bus()).aggregate::<Account>().start().await.unwrap();
    let caller = store.builder().commands(bus()).start().await.unwrap();
    let ours = enter(plan, &caller).await;
    let limit = enter(plan, &node).await;
    stop([caller, node]).await;
    Comparison { ours, limit, note: String::new() }
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

async fn requests(plan: &Plan, server: &NatsServer) -> Run {
    let answerer = async_nats::connect(server.url()).await.unwrap();
    let mut questions = answerer.subscribe("question").await.unwrap();
    answerer.flush().await.unwrap();
    let answering = tokio::spawn(async move {
        while let Some(question) = questions.next().await {
            answerer.publish(question.reply.unwrap(), "".into()).await.unwrap();
        }
    });
    let client = async_nats::connect(server.url()).await.unwrap();
    let text = text(plan.payload);
    let run = closed_loop(plan.callers, plan.events, |_| {
        let (client, text) = (client.clone(), text.clone());
        async move { drop(client.request("question", text.into()).await.unwrap()) }
    })
    .await;
    answering.abort();
    run
}

async fn stop(runtimes: [Runtime; 2]) {
    for runtime in runtimes {
        runtime.shutdown().await.unwrap();
    }
}
