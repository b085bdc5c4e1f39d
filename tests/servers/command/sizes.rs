//! Commands, replies and rejections that exceed a NATS message have a known outcome.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use storied::command::{HandleError, Handler, HandlerContext, HandlerOptions};
use storied::store::ReadLog;
use storied::{
    Aggregate, Context, Decided, Decision, Event, EventStore, ExecuteError, MemoryStore, NoReplyKind,
    NotExecutedKind, Position, Runtime, Version,
};
use uuid::Uuid;

use crate::command::cluster::*;
use crate::support::{self, NatsServer};

const LIMIT: usize = 8_192;

#[derive(Default)]
struct Essay;

#[derive(Debug, Clone, Serialize, Deserialize)]
enum Write {
    Reply { ballast: String, size: usize },
    Refuse { size: usize },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum EssayEvent {
    Written,
}

#[derive(Debug, Clone, Serialize, Deserialize, thiserror::Error)]
#[error("refused: {0}")]
struct Refused(String);

impl Event for EssayEvent {
    const CATEGORY: &'static str = "essay";
}

impl Aggregate for Essay {
    type Event = EssayEvent;
    type Command = Write;
    type Reply = String;
    type Error = Refused;

    fn handle(&self, write: &Write, _: &Context<'_>) -> Decided<Self> {
        match write {
            Write::Reply { size, .. } => Ok(Decision::event(EssayEvent::Written).reply("x".repeat(*size))),
            Write::Refuse { size } => Err(Refused("y".repeat(*size))),
        }
    }

    fn apply(&mut self, _: &EssayEvent) {}
}

struct Printer(Arc<AtomicU64>);

impl Handler for Printer {
    const NAME: &'static str = "test.printer";
    type Command = usize;
    type Reply = String;
    type Error = Refused;

    async fn handle(&self, size: &usize, _: &HandlerContext) -> Result<String, HandleError<Refused>> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok("z".repeat(*size))
    }
}

fn reply(ballast: usize, size: usize) -> Write {
    Write::Reply { ballast: "b".repeat(ballast), size }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oversized_messages_have_a_known_outcome() {
    let config = vec![format!("max_payload: {LIMIT}")];
    let server = NatsServer::start(support::NatsOptions { config, ..support::NatsOptions::core() }).await;
    let (store, printed) = (MemoryStore::new(), Arc::new(AtomicU64::new(0)));
    let worker = Runtime::builder().store(store.clone()).commands(nats(&server, "worker"));
    let worker = worker.aggregate::<Essay>().handler_with(Printer(printed.clone()), HandlerOptions::new());
    let worker = worker.start().await.unwrap();
    let caller = Runtime::builder().store(store.clone()).commands(nats(&server, "caller"));
    let caller = caller.start().await.unwrap();
    let events = async || store.read_log(ReadLog::after(Position::START)).await.unwrap().events.len();

    // The largest command that fits together with its frame.
    let receipt = caller.execute::<Essay>("a", reply(LIMIT - 500, LIMIT - 500)).await.unwrap();
    assert_eq!((receipt.reply.len(), receipt.version), (LIMIT - 500, Version::new(1)));

    // For a reply, the receipt reports the outcome, and a repetition gets the same.
    let id = Uuid::now_v7();
    for duplicate in [false, true] {
        let error = caller.execute::<Essay>("a", reply(0, 20_000)).command_id(id).await.unwrap_err();
        assert!(!error.is_transient() && error.to_string().contains("took effect"), "{error}");
        let ExecuteError::NoReply { command_id, receipt, kind: NoReplyKind::TooLarge { size, limit } } =
            error
        else {
            panic!("{error}")
        };
        assert_eq!((command_id, limit), (id, LIMIT));
        assert!((20_000..20_010).contains(&size), "{size}");
        let receipt = receipt.unwrap();
        assert_eq!((receipt.version, receipt.events, receipt.duplicate), (Version::new(2), 1, duplicate));
        assert_eq!(receipt.position, store.high_water_mark().await.unwrap());
    }
    assert_eq!(events().await, 2);

    // For a handler's reply, the handler ran once.
    let id = Uuid::now_v7();
    for _ in 0..2 {
        let error = caller.execute_handler::<Printer>(20_000_usize).command_id(id).await.unwrap_err();
        assert!(
            matches!(
                error,
                ExecuteError::NoReply { receipt: None, kind: NoReplyKind::TooLarge { limit: LIMIT, .. }, .. }
            ),
            "{error}"
        );
    }
    assert_eq!(printed.load(Ordering::SeqCst), 1);

    // After a rejection, it is certain that nothing happened.
    let error = caller.execute::<Essay>("a", Write::Refuse { size: 20_000 }).await.unwrap_err();
    assert!(
        matches!(&error, ExecuteError::NotExecuted { kind: NotExecutedKind::Failed { reason }, .. } if reason.contains("refused: yyy")),
        "{error}"
    );
    assert!(error.to_string().len() < 2_000 && error.to_string().contains("8192"), "{error}");

    // A command that is too large is never sent.
    for size in [LIMIT, 100_000] {
        let error = caller.execute::<Essay>("a", reply(size, 0)).await.unwrap_err();
        assert!(!error.is_transient(), "{error}");
        let ExecuteError::NotExecuted {
            kind: NotExecutedKind::CommandTooLarge { size: found, limit }, ..
        } = error
        else {
            panic!("{error}")
        };
        assert!(found > size && limit == LIMIT, "{found} {limit}");
        let dispatched = caller.execute::<Essay>("a", reply(size, 0)).dispatch().await.err().unwrap();
        assert!(
            matches!(
                dispatched,
                ExecuteError::NotExecuted { kind: NotExecutedKind::CommandTooLarge { .. }, .. }
            ),
            "{dispatched}"
        );
    }
    assert_eq!(events().await, 2);
    // On the node that owns the aggregate there is no limit.
    assert_eq!(worker.execute::<Essay>("a", reply(100_000, 100_000)).await.unwrap().reply.len(), 100_000);
    caller.shutdown().await.unwrap();
    worker.shutdown().await.unwrap();
}
