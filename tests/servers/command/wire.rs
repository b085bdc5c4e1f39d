//! The frames of the command bus, as another program sees them; see `docs/wire-format.md`.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use async_nats::{Client, Subscriber};
use futures_util::StreamExt;
use storied::ciborium::{self, Value};
use storied::command::{CommandBus, Handler, HandlerOptions, NatsCommandOptions};
use storied::{MemoryStore, NatsOptions, Runtime};
use tokio::time::timeout;
use uuid::Uuid;

use crate::command::cluster::*;
use crate::command::domain::{Add, AddUpTo, Counter, Shared, Work, Worker};
use crate::support::NatsServer;

/// Replaces the parts of a frame that differ between runs, so that the bytes can be compared.
fn fixed(payload: &[u8]) -> (Value, Vec<u8>) {
    fn fix(value: &mut Value) {
        let Value::Map(entries) = value else { return };
        for (key, value) in entries {
            match key.as_text() {
                Some("incarnation" | "store") => *value = Value::Bytes(vec![0; 16]),
                // In `sent`, `node` is the incarnation; in a presence, it is the name.
                Some("node") if value.is_bytes() => *value = Value::Bytes(vec![0; 16]),
                Some("runtime" | "clock") => *value = 7.into(),
                _ => fix(value),
            }
        }
    }
    let mut value: Value = ciborium::from_reader(payload).unwrap();
    fix(&mut value);
    let mut bytes = Vec::new();
    ciborium::into_writer(&value, &mut bytes).unwrap();
    (value, bytes)
}

fn show(text: &mut String, what: &str, payload: &[u8]) -> Value {
    let (value, bytes) = fixed(payload);
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    writeln!(text, "{what}\n  {hex}").unwrap();
    value
}

async fn next(subscriber: &mut Subscriber) -> async_nats::Message {
    timeout(PATIENCE, subscriber.next()).await.unwrap().unwrap()
}

fn bus(server: &NatsServer, name: &str) -> CommandBus {
    let options = NatsOptions::core().url(server.url()).namespace("shop");
    // No heartbeat occurs during the test.
    CommandBus::nats(NatsCommandOptions::new(options).node(name).heartbeat(Duration::from_secs(60)))
}

pub fn map(entries: Vec<(&str, Value)>) -> Value {
    Value::Map(entries.into_iter().map(|(key, value)| (key.into(), value)).collect())
}

pub async fn publish(client: &Client, subject: impl AsRef<str>, frame: &Value) {
    let mut bytes = Vec::new();
    ciborium::into_writer(frame, &mut bytes).unwrap();
    client.publish(subject.as_ref().to_owned(), bytes.into()).await.unwrap();
}

/// A program without storied accepts a command, and sends one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn command_frames_keep_their_format() {
    let server = server().await;
    let store = MemoryStore::new();
    let raw = async_nats::connect(server.url()).await.unwrap();
    let mut presence = raw.subscribe("shop.commands.presence").await.unwrap();
    raw.flush().await.unwrap();
    let mut text = String::new();

    let shared = Arc::new(Shared::default());
    let node = Runtime::builder().store(store.clone()).commands(bus(&server, "node-1"));
    let node = node.aggregate::<Counter>().handler_with(Worker(shared), HandlerOptions::new());
    let node = node.start().await.unwrap();
    let said = next(&mut presence).await;
    show(&mut text, "presence, of a node that starts", &said.payload);
    let caller = Runtime::builder().store(store.clone()).commands(bus(&server, "caller"));
    let caller = caller.start().await.unwrap();

    // Another program announces a handler, and gets a command.
    let incarnation = Uuid::now_v7();
    let mut commands = raw.subscribe(format!("shop.commands.node.{incarnation}")).await.unwrap();
    let uuid = |id: Uuid| Value::Bytes(id.as_bytes().to_vec());
    let of_store = store_id(&caller).await;
    let me = map(vec![
        ("wire", 1.into()),
        ("node", "elsewhere".into()),
        ("incarnation", uuid(incarnation)),
        ("store", uuid(of_store)),
        ("aggregates", Value::Array(vec![])),
        ("handlers", Value::Array(vec![Elsewhere::NAME.into()])),
    ]);
    publish(&raw, "shop.commands.presence", &me).await;
    raw.flush().await.unwrap();
    let id = Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_c000);
    let request = |caller: &Runtime| {
        let request = caller.execute_handler::<Elsewhere>("hello".to_owned()).command_id(id);
        request.correlation_id(Uuid::from_u128(7)).metadata("tenant", "acme").timeout(Duration::ZERO)
    };
    // If the command is sent before the presence arrives, it waits for the presence.
    let dispatch = tokio::spawn(request(&caller).dispatch());
    let message = next(&mut commands).await;
    show(&mut text, "command, for a handler, dispatched", &message.payload);
    let says =
        |says: Value| map(vec![("wire", 1.into()), ("incarnation", uuid(incarnation)), ("says", says)]);
    let reply = message.reply.unwrap();
    publish(&raw, &reply, &says("accepted".into())).await;
    let dispatched = dispatch.await.unwrap().unwrap();
    publish(&raw, &reply, &says("alive".into())).await;
    let done = map(vec![("reply", Value::Bytes(vec![0x18, 0x2a]))]);
    let executed = map(vec![("runtime", 5_000.into()), ("outcome", map(vec![("done", done)]))]);
    publish(&raw, &reply, &says(map(vec![("executed", executed)]))).await;
    let report = dispatched.report().await;
    assert_eq!((report.result.unwrap().reply, report.runtime), (42, Duration::from_millis(5)));

    // The other program sends commands to the node in the same format.
    let subject = format!("shop.commands.node.{}", node.status().await.node);
    let mut inbox = raw.subscribe("answers").await.unwrap();
    let command = |kind: &str, name: &str, key: Option<&str>, payload: &dyn erased::Payload, more| {
        let mut entries = vec![
            ("wire", 1.into()),
            ("id", uuid(Uuid::now_v7())),
            ("kind", kind.into()),
            ("name", name.into()),
            ("payload", Value::Bytes(payload.cbor())),
            ("metadata", Value::Bytes(vec![0xa0])),
            ("attempt", 1.into()),
        ];
        entries.extend(key.map(|key| ("key", key.into())));
        entries.extend(more);
        map(entries)
    };
    let add = command("aggregate", "counter", Some("a"), &Add(3), vec![]);
    let prompt = command("aggregate", "counter", Some("a"), &Add(4), vec![("prompt", true.into())]);
    let too_much = AddUpTo { add: 9, limit: 8 };
    let rejected = command("aggregate", "counter", Some("a"), &too_much, vec![]);
    let exact = map(vec![("exact", 1.into())]);
    let version = command("aggregate", "counter", Some("a"), &Add(1), vec![("expected", exact)]);
    let refuse = Work::Refuse { code: 3, text: "no".into() };
    let refused = command("handler", Worker::NAME, None, &refuse, vec![]);
    let note = command("handler", Worker::NAME, None, &Work::Note { n: 5, wait: false }, vec![]);
    let late = command("handler", Worker::NAME, None, &refuse, vec![("left", 0.into())]);
    let nobody = command("handler", "nobody", None, &refuse, vec![]);
    for (what, frame, replies) in [
        ("an aggregate's receipt", add, 1),
        ("accepted, and executed", prompt, 2),
        ("an aggregate's refusal", rejected, 1),
        ("another version than expected", version, 1),
        ("a handler's refusal", refused, 1),
        ("a handler's reply", note, 1),
        ("refused: too late", late, 1),
        ("refused: no such handler", nobody, 1),
    ] {
        let mut bytes = Vec::new();
        ciborium::into_writer(&frame, &mut bytes).unwrap();
        raw.publish_with_reply(subject.clone(), "answers", bytes.into()).await.unwrap();
        for _ in 0..replies {
            show(&mut text, what, &next(&mut inbox).await.payload);
        }
    }
    assert_eq!(text, include_str!("../../golden/commands.txt"), "{text}");
    caller.shutdown().await.unwrap();
    node.shutdown().await.unwrap();
}

/// Another program has an arbitrary clock and short deadlines.
///
/// Only the time left minus the transit time counts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_whose_clocks_differ_execute_each_others_commands() {
    let server = server().await;
    let store = MemoryStore::new();
    let raw = async_nats::connect(server.url()).await.unwrap();
    let node = Runtime::builder().store(store.clone()).commands(bus(&server, "node"));
    let node = node.aggregate::<Counter>().start().await.unwrap();
    let subject = format!("shop.commands.node.{}", node.status().await.node);
    let mut inbox = raw.subscribe("answers").await.unwrap();
    let uuid = |id: Uuid| Value::Bytes(id.as_bytes().to_vec());
    let mut total = 0;
    for clock in [0_u64, 15_000, 1 << 40, u64::MAX - 60_000] {
        let program = Uuid::now_v7();
        let presence = map(vec![
            ("wire", 1.into()),
            ("node", format!("program-{clock}").into()),
            ("incarnation", uuid(program)),
            ("store", uuid(store_id(&node).await)),
            ("aggregates", Value::Array(vec![])),
            ("handlers", Value::Array(vec![])),
            ("clock", clock.into()),
        ]);
        publish(&raw, "shop.commands.presence", &presence).await;
        raw.flush().await.unwrap();
        let known = async || match node.status().await.commands {
            storied::command::CommandBusStatus::Connected { nodes, .. } => {
                nodes.contains(&format!("program-{clock}"))
            }
            _ => false,
        };
        timeout(PATIENCE, async {
            while !known().await {
                tokio::task::yield_now().await
            }
        })
        .await
        .unwrap();
        let mut payload = Vec::new();
        ciborium::into_writer(&Add(1), &mut payload).unwrap();
        // One command is sent now. The other was sent before the presence message, by more than its
        // time left, so it is late.
        for (sent, late) in [(clock + 30_000, false), (clock.saturating_sub(30_000), clock >= 30_000)] {
            let command = map(vec![
                ("wire", 1.into()),
                ("id", uuid(Uuid::now_v7())),
                ("kind", "aggregate".into()),
                ("name", "counter".into()),
                ("key", "a".into()),
                ("payload", Value::Bytes(payload.clone())),
                ("metadata", Value::Bytes(vec![0xa0])),
                ("attempt", 1.into()),
                ("left", 20_000.into()),
                ("sent", map(vec![("node", uuid(program)), ("clock", sent.into())])),
            ]);
            let mut bytes = Vec::new();
            ciborium::into_writer(&command, &mut bytes).unwrap();
            raw.publish_with_reply(subject.clone(), "answers", bytes.into()).await.unwrap();
            let (reply, _) = fixed(&next(&mut inbox).await.payload);
            let says = format!("{reply:?}");
            assert_eq!(says.contains("after its deadline"), late, "{clock} {sent}: {says}");
            total += u64::from(!late);
        }
    }
    let receipt = node.execute::<Counter>("a", crate::command::domain::Look).await.unwrap();
    assert_eq!(receipt.reply, total);
    node.shutdown().await.unwrap();
}

pub async fn store_id(runtime: &Runtime) -> Uuid {
    runtime.status().await.store.id
}

/// A handler that exists only in another program.
pub struct Elsewhere;

impl Handler for Elsewhere {
    const NAME: &'static str = "test.elsewhere";
    type Command = String;
    type Reply = u64;
    type Error = crate::command::domain::WorkError;

    async fn handle(
        &self,
        _: &String,
        _: &storied::command::HandlerContext,
    ) -> Result<u64, storied::command::HandleError<crate::command::domain::WorkError>> {
        unreachable!("it is another program's")
    }
}

mod erased {
    /// A value that encodes as CBOR.
    pub trait Payload {
        fn cbor(&self) -> Vec<u8>;
    }

    impl<T: serde::Serialize> Payload for T {
        fn cbor(&self) -> Vec<u8> {
            let mut bytes = Vec::new();
            storied::ciborium::into_writer(self, &mut bytes).unwrap();
            bytes
        }
    }
}
