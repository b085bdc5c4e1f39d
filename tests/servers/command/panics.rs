//! Panics of user code around a command: in serde, in `Display`, in filters and hooks.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use storied::command::{CommandBus, CommandInfo, HandleError, Handler, HandlerContext};
use storied::store::MemoryStore;
use storied::{Aggregate, Context, Decided, Decision, Event, ExecuteError, NotExecutedKind, Runtime};
use tokio::time::{Instant, timeout};

use crate::command::cluster::*;

/// Whether a `Part` of 2 panics when it is decoded.
static READING: AtomicBool = AtomicBool::new(false);

/// A value that panics when it is encoded (1), decoded (2) or displayed (3).
#[derive(Debug, Clone)]
struct Part(u8);

impl Serialize for Part {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        assert!(self.0 != 1, "on purpose");
        serializer.serialize_u8(self.0)
    }
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let part = u8::deserialize(deserializer)?;
        assert!(part != 2 || !READING.load(Ordering::SeqCst), "on purpose");
        Ok(Self(part))
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
enum Give {
    Event(u8),
    Reply(u8),
    Refusal(u8),
    Command(Part),
    Key,
    Nothing,
}

#[derive(Debug, Serialize, Deserialize)]
struct Refusal(Part);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        assert!(self.0.0 != 3, "on purpose");
        f.write_str("refused")
    }
}

impl std::error::Error for Refusal {}

#[derive(Debug, Serialize, Deserialize)]
enum FragileEvent {
    Given { part: Part },
}

impl Event for FragileEvent {
    const CATEGORY: &'static str = "fragile";
}

#[derive(Default)]
struct Fragile;

impl Aggregate for Fragile {
    type Event = FragileEvent;
    type Command = Give;
    type Reply = Part;
    type Error = Refusal;

    fn handle(&self, give: &Give, _: &Context<'_>) -> Decided<Self> {
        let event = |part| Decision::event(FragileEvent::Given { part: Part(part) });
        match give {
            Give::Event(part) => Ok(event(*part).reply(Part(0))),
            Give::Reply(part) => Ok(event(0).reply(Part(*part))),
            Give::Refusal(part) => Err(Refusal(Part(*part))),
            _ => Ok(event(0).reply(Part(0))),
        }
    }

    fn apply(&mut self, _: &FragileEvent) {}
}

struct Desk;

impl Handler for Desk {
    const NAME: &'static str = "test.desk";
    type Command = Give;
    type Reply = Part;
    type Error = Refusal;

    async fn handle(&self, give: &Give, _: &HandlerContext) -> Result<Part, HandleError<Refusal>> {
        match give {
            Give::Reply(part) => Ok(Part(*part)),
            Give::Refusal(part) => Err(HandleError::Rejected(Refusal(Part(*part)))),
            _ => Ok(Part(0)),
        }
    }

    fn key(give: &Give) -> Option<String> {
        assert!(!matches!(give, Give::Key), "on purpose");
        Some("one".into())
    }
}

/// Upper limit for an answer, and less than the timeout of a command.
const SOON: Duration = Duration::from_secs(10);

/// Each panic is answered at once, in one process and over NATS, and affects only its command.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_around_a_command_is_answered_at_once() {
    let server = server().await;
    let store = MemoryStore::new();
    let node = async |bus: CommandBus| {
        let builder = Runtime::builder().store(store.clone()).commands(bus);
        builder.aggregate::<Fragile>().handler(Desk).start().await.unwrap()
    };
    let local = node(CommandBus::local()).await;
    let worker = node(nats(&server, "worker")).await;
    let builder = Runtime::builder().store(store.clone()).commands(nats(&server, "caller"));
    let remote = builder.start().await.unwrap();
    let all = [
        Give::Event(1),
        Give::Event(2),
        Give::Reply(1),
        Give::Reply(2),
        Give::Refusal(1),
        Give::Refusal(2),
        Give::Refusal(3),
        Give::Command(Part(1)),
        Give::Command(Part(2)),
        Give::Key,
    ];
    for (caller, is_remote) in [(&local, false), (&remote, true)] {
        for give in all.clone() {
            let begun = Instant::now();
            READING.store(true, Ordering::SeqCst);
            let command = caller.execute_handler::<Desk>(give.clone()).timeout(PATIENCE);
            // A rejection that is not encoded reaches its caller unchanged. So does any answer
            // within the process.
            let handled =
                tokio::spawn(async move { command.await.map(drop).map_err(|error| format!("{error:?}")) });
            let handled = timeout(SOON, handled).await.unwrap_or_else(|_| panic!("{give:?}: silence"));
            let execute = caller.execute::<Fragile>("a", give.clone()).timeout(PATIENCE);
            let executed =
                tokio::spawn(async move { execute.await.map(drop).map_err(|error| format!("{error:?}")) });
            let executed = timeout(SOON, executed).await.unwrap_or_else(|_| panic!("{give:?}: silence"));
            READING.store(false, Ordering::SeqCst);
            let (handled, executed) =
                (handled.expect("the caller's task"), executed.expect("the caller's task"));
            let said = format!("{give:?} remote {is_remote}: {handled:?} {executed:?}");
            match give {
                Give::Event(_) => assert!(handled.is_ok() && executed.is_err(), "{said}"),
                Give::Key => assert!(handled.is_err() && executed.is_ok(), "{said}"),
                Give::Command(Part(2)) if !is_remote => {
                    assert!(handled.is_ok() && executed.is_ok(), "{said}")
                }
                _ => assert!(handled.is_err() && executed.is_err(), "{said}"),
            }
            // No component restarts, and other commands are not affected.
            caller.execute_handler::<Desk>(Give::Nothing).timeout(SOON).await.unwrap();
            caller.execute::<Fragile>("a", Give::Nothing).timeout(SOON).await.unwrap();
            assert!(begun.elapsed() < PATIENCE, "{said}");
        }
    }
    for runtime in [local, remote, worker] {
        runtime.shutdown().await.unwrap();
    }
}

/// A panic in a filter or a before-hook refuses the command; one in an after-hook has no effect.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_of_a_filter_or_a_hook_reaches_no_task() {
    fn no<T>(_: &CommandInfo<'_>) -> T {
        panic!("on purpose")
    }
    let buses = [
        ("filter", CommandBus::local().filter(no)),
        ("before", CommandBus::local().before_all(no)),
        ("before", CommandBus::local().before("fragile", no).before("test.desk", no)),
        ("after", CommandBus::local().after_all(|_, _| panic!("on purpose"))),
    ];
    for (what, bus) in buses {
        let builder = Runtime::builder().store(MemoryStore::new()).commands(bus);
        let runtime = builder.aggregate::<Fragile>().handler(Desk).start().await.unwrap();
        let executed = runtime.execute::<Fragile>("a", Give::Nothing).await.map(drop);
        let handled = runtime.execute_handler::<Desk>(Give::Nothing).await.map(drop);
        for result in [executed, handled] {
            match (what, result) {
                ("after", result) => result.unwrap(),
                (_, result) => {
                    let error = result.unwrap_err();
                    assert!(
                        matches!(
                            error,
                            ExecuteError::NotExecuted { kind: NotExecutedKind::NotAccepted { .. }, .. }
                        ),
                        "{what}: {error:?}"
                    );
                    assert!(error.to_string().contains("on purpose"), "{error}");
                }
            }
        }
        runtime.shutdown().await.unwrap();
    }
}
