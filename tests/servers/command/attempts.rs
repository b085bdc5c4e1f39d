//! Remote dispatch to nodes that answer late, are full, request presence often or hang.

use std::time::Duration;

use async_nats::{Client, Subscriber};
use futures_util::StreamExt;
use storied::ciborium::Value;
use storied::command::{CommandBus, CommandBusStatus, Handler, HandlerOptions, NatsCommandOptions};
use storied::{ExecuteError, MemoryStore, NatsOptions, NotExecutedKind, Runtime};
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::command::cluster::*;
use crate::command::domain::{Add, Counter, Work, Worker};
use crate::command::wire::{Elsewhere, map, publish, store_id};
use crate::support::NatsServer;

/// A node without storied that sends the replies of a test.
struct Stranger {
    client: Client,
    commands: Subscriber,
    incarnation: Uuid,
    store: Uuid,
}

fn bytes(id: Uuid) -> Value {
    Value::Bytes(id.as_bytes().to_vec())
}

impl Stranger {
    async fn new(server: &NatsServer, of: &Runtime) -> Self {
        let client = async_nats::connect(server.url()).await.unwrap();
        let incarnation = Uuid::now_v7();
        let commands = client.subscribe(format!("storied.commands.node.{incarnation}")).await.unwrap();
        Self { client, commands, incarnation, store: store_id(of).await }
    }

    async fn beat(&self, ask: bool) {
        let presence = map(vec![
            ("wire", 1.into()),
            ("node", "elsewhere".into()),
            ("incarnation", bytes(self.incarnation)),
            ("store", bytes(self.store)),
            ("aggregates", Value::Array(vec![])),
            ("handlers", Value::Array(vec![Elsewhere::NAME.into()])),
            ("ask", ask.into()),
        ]);
        publish(&self.client, "storied.commands.presence", &presence).await;
    }

    async fn say(&self, to: &str, says: Value) {
        let reply = map(vec![("wire", 1.into()), ("incarnation", bytes(self.incarnation)), ("says", says)]);
        publish(&self.client, to, &reply).await;
    }
}

async fn caller(server: &NatsServer) -> Runtime {
    let builder = Runtime::builder().store(MemoryStore::new()).commands(nats(server, "caller"));
    builder.start().await.unwrap()
}

async fn sees(caller: &Runtime, nodes: &[&str]) {
    let expected = CommandBusStatus::Connected {
        nodes: nodes.iter().map(ToString::to_string).collect(),
        last_error: None,
    };
    let give_up = Instant::now() + PATIENCE;
    while caller.status().await.commands != expected {
        assert!(Instant::now() < give_up, "{:?}", caller.status().await.commands);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_answer_counts_after_the_last_attempt() {
    let server = server().await;
    let caller = caller(&server).await;
    let mut stranger = Stranger::new(&server, &caller).await;
    stranger.beat(false).await;
    sees(&caller, &["elsewhere"]).await;
    let command = caller.execute_handler::<Elsewhere>("hello".to_owned()).timeout(PATIENCE);
    let dispatch = tokio::spawn(command.dispatch());
    let message = timeout(PATIENCE, stranger.commands.next()).await.unwrap().unwrap();
    let reply = message.reply.unwrap();
    stranger.say(&reply, "accepted".into()).await;
    let dispatched = dispatch.await.unwrap().unwrap();
    // The node sends nothing more, and counts as lost.
    sees(&caller, &[]).await;
    tokio::time::sleep(BEAT * 5).await;
    let done = map(vec![("reply", Value::Bytes(vec![0x18, 0x2a]))]);
    let executed = map(vec![("runtime", 5_000.into()), ("outcome", map(vec![("done", done)]))]);
    stranger.say(&reply, map(vec![("executed", executed)])).await;
    let answer = timeout(PATIENCE / 4, dispatched).await.expect("at once").unwrap();
    assert_eq!(answer.reply, 42);
    caller.shutdown().await.unwrap();
}

/// The other node's shutdown concerns only that node.
///
/// The caller's runtime accepts commands, and another node may execute this one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_shutdown_of_another_node_is_not_the_callers() {
    let server = server().await;
    let caller = caller(&server).await;
    let mut stranger = Stranger::new(&server, &caller).await;
    stranger.beat(false).await;
    sees(&caller, &["elsewhere"]).await;
    let failure =
        || map(vec![("code", "shutting_down".into()), ("message", "elsewhere is shutting down".into())]);
    let refused = map(vec![("refused", failure())]);
    let ended = map(vec![("runtime", 5.into()), ("outcome", map(vec![("error", failure())]))]);
    let mut answers = vec![refused, map(vec![("executed", ended)])];
    let give_up = Instant::now() + PATIENCE;
    while let Some(says) = answers.pop() {
        let mut command = caller.execute_handler::<Elsewhere>("hello".to_owned()).into_future();
        // While the caller does not know all other nodes yet, it tries again.
        let error = loop {
            tokio::select! {
                answer = &mut command => break answer.unwrap_err(),
                message = stranger.commands.next() => {
                    stranger.say(&message.unwrap().reply.unwrap(), says.clone()).await;
                }
            }
        };
        // On a busy machine its answer may be so late that the node counts as silent, and the
        // outcome is unknown.
        if matches!(error, ExecuteError::OutcomeUnknown { .. }) && Instant::now() < give_up {
            answers.push(says);
            continue;
        }
        let unavailable = matches!(&error, ExecuteError::NotExecuted { kind: NotExecutedKind::Unavailable { reason }, .. } if reason.contains("elsewhere is"));
        assert!(unavailable && error.is_transient(), "{error:?}");
    }
    caller.shutdown().await.unwrap();
}

/// A failure of one attempt says nothing about the other attempt, which the node may still execute.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_failed_attempt_does_not_resolve_the_other() {
    let server = server().await;
    let caller = caller(&server).await;
    let mut stranger = Stranger::new(&server, &caller).await;
    stranger.beat(false).await;
    sees(&caller, &["elsewhere"]).await;
    for answered in 0..2 {
        let command = caller.execute_handler::<Elsewhere>(format!("hello {answered}")).timeout(PATIENCE);
        let command = tokio::spawn(command.into_future());
        let mut sent = Vec::new();
        let sent_twice = async {
            while sent.len() < 2 {
                tokio::select! {
                    message = stranger.commands.next() => sent.push(message.unwrap().reply.unwrap()),
                    () = tokio::time::sleep(BEAT / 2) => stranger.beat(false).await,
                }
            }
        };
        timeout(PATIENCE, sent_twice).await.unwrap();
        if answered == 0 {
            // Wait until the second attempt counts as silent and no node is left.
            for _ in 0..5 {
                tokio::time::sleep(BEAT / 2).await;
                stranger.beat(false).await;
            }
        }
        let failure = map(vec![("code", "panicked".into()), ("message", "it panicked".into())]);
        let executed = map(vec![("runtime", 5.into()), ("outcome", map(vec![("error", failure)]))]);
        stranger.say(&sent[answered], map(vec![("executed", executed)])).await;
        let error = timeout(PATIENCE / 4, command).await.expect("at once").unwrap().unwrap_err();
        assert!(matches!(error, ExecuteError::OutcomeUnknown { .. }), "{answered}: {error:?}");
        // Ignore the third attempt, which does not belong to the next command.
        while timeout(BEAT, stranger.commands.next()).await.is_ok() {}
        stranger.beat(false).await;
    }
    caller.shutdown().await.unwrap();
}

/// The buffer to the server is full, and every sender waits for space.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_end_at_their_deadline_if_the_server_hangs() {
    let mut server = server().await;
    let store = MemoryStore::new();
    // Neither pings nor heartbeats detect the hang.
    let bus = |name: &str| {
        let options = NatsOptions::core().url(server.url()).ping_interval(Duration::from_secs(3_600));
        CommandBus::nats(NatsCommandOptions::new(options).node(name).heartbeat(Duration::from_secs(60)))
    };
    let node = Runtime::builder().store(store.clone()).commands(bus("node")).aggregate::<Counter>();
    let node = node.start().await.unwrap();
    let caller = Runtime::builder().store(store).commands(bus("caller")).start().await.unwrap();
    caller.execute::<Counter>("a", Add(1)).await.unwrap();
    server.pause();
    let started = Instant::now();
    let commands: Vec<_> = (0..4_000)
        .map(|n| {
            let add = caller.execute::<Counter>(n, Add(1)).metadata("ballast", "x".repeat(10_000));
            tokio::spawn(async move { add.timeout(Duration::from_secs(2)).await })
        })
        .collect();
    for command in commands {
        let answer = timeout(PATIENCE / 2, command).await.expect("it ends").unwrap();
        let error = answer.unwrap_err();
        assert!(
            matches!(
                error,
                ExecuteError::OutcomeUnknown { .. }
                    | ExecuteError::NotExecuted { kind: NotExecutedKind::Unavailable { .. }, .. }
            ),
            "{error}"
        );
    }
    assert!(started.elapsed() < PATIENCE / 2, "{:?}", started.elapsed());
    server.resume();
    caller.shutdown().await.unwrap();
    node.shutdown().await.unwrap();
}

/// A full node refuses a command before its silence counts, regardless of its admission timeout.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_node_refuses_before_its_silence_counts() {
    let options = HandlerOptions::new().max_in_flight(1).admission_timeout(PATIENCE);
    let cluster = Setup::new(Kind::Nats).options(options).start().await;
    let mut all = Vec::new();
    for n in 0..2 {
        let work = cluster.caller.execute_handler::<Worker>(Work::Note { n, wait: true });
        all.push(work.dispatch().await.unwrap());
    }
    let third = cluster.caller.execute_handler::<Worker>(Work::Note { n: 3, wait: false });
    let error = third.timeout(PATIENCE / 4).await.unwrap_err();
    assert!(
        matches!(error, ExecuteError::NotExecuted { kind: NotExecutedKind::Overloaded { limit: 1, .. }, .. }),
        "{error}"
    );
    cluster.open();
    for one in all {
        one.await.unwrap();
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn presence_requests_do_not_delay_heartbeats() {
    let server = server().await;
    let node = caller(&server).await;
    let stranger = Stranger::new(&server, &node).await;
    let mut presence = stranger.client.subscribe("storied.commands.presence").await.unwrap();
    let of = node.status().await.node;
    // Much earlier than the delayed answer.
    let asking = tokio::spawn(async move {
        loop {
            stranger.beat(true).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    let heard = async {
        for _ in 0..20 {
            loop {
                let message = presence.next().await.unwrap();
                let said: Value = storied::ciborium::from_reader(&message.payload[..]).unwrap();
                let from =
                    said.as_map().unwrap().iter().find(|(key, _)| key.as_text() == Some("incarnation"));
                if from.is_some_and(|(_, value)| *value == bytes(of)) {
                    break;
                }
            }
        }
    };
    timeout(BEAT * 25, heard).await.expect("as often as without them");
    asking.abort();
    node.shutdown().await.unwrap();
}

/// After the end of a node, the dispatch of its commands ends too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn remote_dispatch_ends_with_its_node() {
    let cluster = Setup::new(Kind::Nats).start().await;
    let builder = Runtime::builder().store(cluster.store.clone());
    let asks = builder.commands(nats(cluster.server.as_ref().unwrap(), "asks")).start().await.unwrap();
    let work = asks.execute_handler::<Worker>(Work::Note { n: 1, wait: true }).timeout(Duration::ZERO);
    let asked = work.dispatch().await.unwrap();
    drop(asks);
    let error = timeout(PATIENCE, asked).await.expect("it ends").unwrap_err();
    assert!(matches!(error, ExecuteError::OutcomeUnknown { .. }), "{error}");
    cluster.open();
    cluster.stop().await;
}
