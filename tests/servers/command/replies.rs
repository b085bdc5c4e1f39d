//! Replies that serde writes but cannot read: the outcome is known, and a repetition gets the same.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use storied::command::{HandleError, Handler, HandlerContext, HandlerOptions};
use storied::{
    Aggregate, Command, Context, Decided, Decision, Event, ExecuteError, MemoryStore, NeverRejects,
    NoReplyKind, Runtime, Version,
};
use uuid::Uuid;

use crate::command::cluster::{nats, server};

/// A reply that is encoded without its field if that is `None`, and then does not decode.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Half {
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "present")]
    whole: Option<u32>,
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    u32::deserialize(deserializer).map(Some)
}

#[derive(Default)]
struct Lamp;

#[derive(Serialize, Deserialize)]
enum LampEvent {
    Lit,
}

impl Event for LampEvent {
    const CATEGORY: &'static str = "lamp";
}

impl Aggregate for Lamp {
    type Event = LampEvent;
    type Command = bool;
    type Reply = Half;
    type Error = NeverRejects;

    fn handle(&self, light: &bool, _: &Context<'_>) -> Decided<Self> {
        let reply = Half { whole: None };
        Ok(if *light { Decision::event(LampEvent::Lit).reply(reply) } else { Decision::none().reply(reply) })
    }

    fn apply(&mut self, _: &LampEvent) {}
}

struct Halves(Arc<AtomicU64>);

impl Handler for Halves {
    const NAME: &'static str = "test.halves";
    type Command = ();
    type Reply = Half;
    type Error = NeverRejects;

    async fn handle(&self, (): &(), _: &HandlerContext) -> Result<Half, HandleError<NeverRejects>> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(Half { whole: None })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reply_that_cannot_be_read_has_a_known_outcome() {
    for remote in [false, true] {
        let server = server().await;
        let (store, handled) = (MemoryStore::new(), Arc::new(AtomicU64::new(0)));
        let worker = Runtime::builder().store(store.clone()).commands(nats(&server, "worker"));
        let worker = worker.aggregate::<Lamp>().handler_with(Halves(handled.clone()), HandlerOptions::new());
        let worker = worker.start().await.unwrap();
        let caller = match remote {
            true => {
                let caller = Runtime::builder().store(store.clone()).commands(nats(&server, "caller"));
                caller.start().await.unwrap()
            }
            false => worker.clone(),
        };
        let id = Uuid::now_v7();
        for _ in 0..2 {
            let error = caller.execute_handler::<Halves>(()).command_id(id).await.unwrap_err();
            assert!(!error.is_transient() && error.to_string().contains("was handled"), "{error}");
            let ExecuteError::NoReply { command_id, receipt: None, kind: NoReplyKind::Unreadable { reason } } =
                error
            else {
                panic!("{error}")
            };
            assert!(command_id == id && reason.contains("whole"), "{reason}");
        }
        assert_eq!(handled.load(Ordering::SeqCst), 1);
        // With events the reply would be stored. The command fails before.
        let refused = caller.execute::<Lamp>("a", true).await.unwrap_err();
        assert!(!refused.is_transient() && refused.to_string().contains("whole"), "{refused}");
        // Without events the reply is only sent.
        match caller.execute::<Lamp>("a", false).await {
            Ok(receipt) => assert!(!remote && receipt.reply.whole.is_none()),
            Err(ExecuteError::NoReply {
                receipt: Some(receipt),
                kind: NoReplyKind::Unreadable { .. },
                ..
            }) => {
                assert!(remote && receipt.events == 0 && receipt.version == Version::NONE);
            }
            Err(error) => panic!("{error}"),
        }
        worker.shutdown().await.unwrap();
    }
}

/// A caller that holds a dispatched command without awaiting it does not delay a shutdown.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_is_not_awaited_does_not_delay_the_end() {
    let handled = Arc::new(AtomicU64::new(0));
    let runtime = Runtime::builder().store(MemoryStore::new()).handler(Halves(handled.clone()));
    let runtime = runtime.start().await.unwrap();
    let kept = runtime.execute_handler::<Halves>(()).dispatch().await.unwrap();
    crate::command::cluster::eventually("the command is handled", || handled.load(Ordering::SeqCst) == 1)
        .await;
    let begun = Instant::now();
    runtime.shutdown().await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert!(matches!(kept.await, Err(ExecuteError::NoReply { kind: NoReplyKind::Unreadable { .. }, .. })));
}

/// An aggregate whose reply type differs between two versions of a program.
struct Changed<R>(PhantomData<R>);

impl<R> Default for Changed<R> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<R> Aggregate for Changed<R>
where
    R: From<u16> + Serialize + DeserializeOwned + Clone + Send + Sync + 'static,
{
    type Event = LampEvent;
    type Command = bool;
    type Reply = R;
    type Error = NeverRejects;

    fn handle(&self, _: &bool, _: &Context<'_>) -> Decided<Self> {
        Ok(Decision::event(LampEvent::Lit).reply(R::from(300)))
    }

    fn apply(&mut self, _: &LampEvent) {}
}

/// The new program repeats a command of the old one: the command took effect, and no retry helps.
#[tokio::test]
async fn a_reply_of_another_type_has_a_known_outcome() {
    let store = MemoryStore::new();
    let program = || Runtime::builder().store(store.clone());
    let old = program().aggregate::<Changed<f64>>().start().await.unwrap();
    let first = old.execute::<Changed<f64>>("a", true).await.unwrap();
    old.shutdown().await.unwrap();
    let new = program().aggregate::<Changed<u32>>().start().await.unwrap();
    for _ in 0..2 {
        let repeated = new.execute::<Changed<u32>>("a", true).command_id(first.command_id);
        let error = repeated.await.unwrap_err();
        assert!(!error.is_transient(), "{error}");
        let ExecuteError::NoReply {
            command_id,
            receipt: Some(receipt),
            kind: NoReplyKind::Unreadable { .. },
        } = error
        else {
            panic!("{error}")
        };
        assert_eq!(command_id, first.command_id);
        assert_eq!((receipt.version, receipt.position, receipt.events), (first.version, first.position, 1));
    }
    new.shutdown().await.unwrap();
}

/// An aggregate that gives each command its own reply.
#[derive(Default)]
struct Stock {
    units: u64,
}

#[derive(Serialize, Deserialize)]
enum StockEvent {
    Added { units: u64 },
}

impl Event for StockEvent {
    const CATEGORY: &'static str = "stock";
}

#[derive(Serialize, Deserialize)]
enum StockCommand {
    Add(Add),
    Describe,
}

#[derive(Serialize, Deserialize)]
enum StockReply {
    Total(u64),
    Description(String),
}

impl Aggregate for Stock {
    type Event = StockEvent;
    type Command = StockCommand;
    type Reply = StockReply;
    type Error = NeverRejects;

    fn handle(&self, command: &StockCommand, context: &Context<'_>) -> Decided<Self> {
        Ok(match command {
            StockCommand::Add(Add { units }) => Decision::event(StockEvent::Added { units: *units })
                .reply(StockReply::Total(self.units + units)),
            StockCommand::Describe => Decision::none().reply(StockReply::Description(format!(
                "{} units of {}",
                self.units,
                context.id()
            ))),
        })
    }

    fn apply(&mut self, StockEvent::Added { units }: &StockEvent) {
        self.units += units;
    }
}

#[derive(Clone, Serialize, Deserialize)]
struct Add {
    units: u64,
}

impl From<Add> for StockCommand {
    fn from(add: Add) -> Self {
        Self::Add(add)
    }
}

impl Command for Add {
    type Aggregate = Stock;
    type Reply = u64;

    fn reply(reply: StockReply) -> Option<u64> {
        if let StockReply::Total(units) = reply { Some(units) } else { None }
    }
}

struct Describe;

impl From<Describe> for StockCommand {
    fn from(_: Describe) -> Self {
        Self::Describe
    }
}

impl Command for Describe {
    type Aggregate = Stock;
    type Reply = String;

    fn reply(reply: StockReply) -> Option<String> {
        if let StockReply::Description(text) = reply { Some(text) } else { None }
    }
}

/// A command that expects the reply to another one.
struct Mistaken;

impl From<Mistaken> for StockCommand {
    fn from(_: Mistaken) -> Self {
        Self::Add(Add { units: 1 })
    }
}

impl Command for Mistaken {
    type Aggregate = Stock;
    type Reply = String;

    fn reply(reply: StockReply) -> Option<String> {
        Describe::reply(reply)
    }
}

struct Deliveries;

impl Handler for Deliveries {
    const NAME: &'static str = "test.deliveries";
    type Command = u64;
    type Reply = (u64, String);
    type Error = NeverRejects;

    async fn handle(
        &self,
        units: &u64,
        context: &HandlerContext,
    ) -> Result<(u64, String), HandleError<NeverRejects>> {
        let total = context.execute_command("tea", Add { units: *units }).await?.reply;
        Ok((total, context.execute_command("tea", Describe).await?.reply))
    }
}

/// In one process and over NATS, each command type has its own type of reply.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_command_type_gets_its_own_reply() {
    let server = server().await;
    for remote in [false, true] {
        let store = MemoryStore::new();
        let builder = |name| Runtime::builder().store(store.clone()).commands(nats(&server, name));
        let node = builder("stock").aggregate::<Stock>().handler(Deliveries).start().await.unwrap();
        let caller = if remote { builder("caller").start().await.unwrap() } else { node.clone() };

        let id = Uuid::now_v7();
        let add = || caller.execute_command("tea", Add { units: 3 }).with(|request| request.command_id(id));
        let first = add().await.unwrap();
        let (total, version): (u64, Version) = (first.reply, first.version);
        assert_eq!((total, version, first.duplicate), (3, Version::new(1), false));
        let described: String = caller.execute_command("tea", Describe).await.unwrap().reply;
        assert_eq!(described, "3 units of tea");
        let repeated = add().await.unwrap();
        assert_eq!((repeated.reply, repeated.duplicate), (3, true));
        // The enum of commands has the enum of replies.
        let reply = caller.execute::<Stock>("tea", Add { units: 1 }).await.unwrap().reply;
        assert!(matches!(reply, StockReply::Total(4)));
        assert_eq!(
            caller.execute_handler::<Deliveries>(2_u64).await.unwrap().reply,
            (6, "6 units of tea".to_owned())
        );

        let error = caller.execute_command("tea", Mistaken).await.unwrap_err();
        assert!(!error.is_transient() && error.to_string().contains("Mistaken"), "{error}");
        let ExecuteError::NoReply { receipt: Some(receipt), kind: NoReplyKind::Unreadable { .. }, .. } =
            error
        else {
            panic!("{error}")
        };
        assert_eq!(receipt.version, Version::new(4));
        if remote {
            caller.shutdown().await.unwrap();
        }
        node.shutdown().await.unwrap();
    }
}
