//! Processes on PostgreSQL and SQLite, through the ends of nodes and servers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use storied::command::{HandleError, Handler, HandlerContext, HandlerOptions};
use storied::process::{Input, InstanceState, Next, Process, ProcessContext, Routes};
use storied::{
    EventStore, NeverRejects, PostgresStore, ProcessOptions, RecordedEvent, Runtime, SqliteStore, StreamId,
    Version,
};
use tokio::time::Instant;
use uuid::Uuid;

use crate::support::fulfilment::{Fulfilment, Order, OrderEvent, Stock, record};
use crate::support::fulfilment_oracle::{check, ended};
use crate::support::{Dice, PATIENCE, PostgresServer, eventually_async, eventually_some};

/// The shortest lease, so that a takeover is fast.
const LEASE: Duration = Duration::from_secs(1);

async fn postgres(url: &str) -> Arc<dyn EventStore> {
    Arc::new(PostgresStore::connect(url).await.unwrap())
}

async fn node(store: Arc<dyn EventStore>) -> Runtime {
    let builder = Runtime::builder().store(store).aggregate::<Order>().aggregate::<Stock>();
    builder.process_with::<Fulfilment>(ProcessOptions::new().lease(LEASE)).start().await.unwrap()
}

fn placed(lines: impl IntoIterator<Item = String>) -> OrderEvent {
    OrderEvent::Placed { lines: lines.into_iter().collect() }
}

fn noted(text: &str) -> OrderEvent {
    OrderEvent::Noted { text: text.to_owned() }
}

/// Three lines of 40 products, of which two pieces exist each.
fn lines(dice: &Dice) -> Vec<String> {
    let mut lines: Vec<_> = (0..3).map(|_| format!("product {}", dice.roll(40))).collect();
    lines.sort();
    lines.dedup();
    lines
}

/// Waits until one of the nodes owns the process, and returns its index.
async fn owner_of(nodes: &[Runtime]) -> usize {
    let owns = |node: &Runtime| node.projection("process fulfilment").unwrap().status().epoch > 0;
    eventually_some("a node owns the process", async || nodes.iter().position(owns)).await
}

/// I12: nodes end without a shutdown, and the server is killed, while orders are placed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn effects_happen_once_whatever_is_killed() {
    let mut server = PostgresServer::start().await;
    let url = server.url();
    let dice = Dice::random();
    // It never owns the process.
    let builder = Runtime::builder().store(postgres(&url).await).aggregate::<Order>();
    let callers = builder.start().await.unwrap();
    let mut nodes = vec![node(postgres(&url).await).await, node(postgres(&url).await).await];
    for round in 0..8 {
        for order in 0..15 {
            record(&callers, &format!("{round}-{order}"), placed(lines(&dice))).await;
        }
        match round % 4 {
            1 => {
                server.kill();
                server.restart().await;
            }
            3 => {}
            _ => {
                // As a crash of its process: no lease is released, no checkpoint is saved.
                drop(nodes.remove(owner_of(&nodes).await));
                nodes.push(node(postgres(&url).await).await);
            }
        }
    }
    let store = callers.store().clone();
    eventually_async("all instances have ended", async || ended(&*store).await == 120).await;
    check(&*store).await;
    for node in nodes {
        node.shutdown().await.unwrap();
    }
    callers.shutdown().await.unwrap();
}

/// A command of the handler that hangs on the first node.
#[derive(Serialize, Deserialize)]
struct Charge;

struct Hanging {
    hangs: bool,
    called: Arc<AtomicBool>,
}

impl Handler for Hanging {
    const NAME: &'static str = "charge";
    type Command = Charge;
    type Reply = Uuid;
    type Error = NeverRejects;

    async fn handle(&self, _: &Charge, context: &HandlerContext) -> Result<Uuid, HandleError<NeverRejects>> {
        self.called.store(true, Ordering::Release);
        if self.hangs {
            std::future::pending::<()>().await;
        }
        Ok(context.command_id())
    }
}

#[derive(Default)]
struct Charges;

impl Process for Charges {
    const NAME: &'static str = "charges";
    type Event = OrderEvent;

    fn routes() -> Routes<OrderEvent> {
        Routes::new().starts(["placed"], |_: &OrderEvent, event| event.stream.id().to_owned())
    }

    fn react(&self, input: Input<'_, OrderEvent>, _: &ProcessContext<'_>) -> Next {
        match input {
            Input::Event(_) => Next::new().execute_handler::<Hanging>("charge", Charge),
            Input::Done { .. } => Next::new().complete(),
            _ => Next::none(),
        }
    }
}

async fn charging(store: Arc<dyn EventStore>, hangs: bool) -> (Runtime, Arc<AtomicBool>) {
    let called = Arc::new(AtomicBool::new(false));
    let handler = Hanging { hangs, called: called.clone() };
    let builder = Runtime::builder().store(store).aggregate::<Order>();
    let builder = builder.handler_with(handler, HandlerOptions::new().workers(64));
    let options = ProcessOptions::new().lease(LEASE);
    (builder.process_with::<Charges>(options).start().await.unwrap(), called)
}

/// The second node sends the commands with the same ids: at once, and also those that hang for long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_node_sends_the_commands_of_a_dead_one() {
    for hang in [Duration::ZERO, Duration::from_secs(7)] {
        let url = PostgresServer::shared().await.create_database().await;
        let (first, called) = charging(postgres(&url).await, true).await;
        let (second, _) = charging(postgres(&url).await, false).await;
        let owned = async || first.projection("process charges").unwrap().status().epoch > 0;
        eventually_async("the first node owns the process", owned).await;
        record(&first, "1", placed([])).await;
        crate::support::eventually("the handler is called", || called.load(Ordering::Acquire)).await;
        tokio::time::sleep(hang).await;
        let sent = second.process::<Charges>("1").status().await.unwrap().unwrap().effects[0].command_id;
        drop(first);
        let died = Instant::now();
        let completed = async || {
            let status = second.process::<Charges>("1").status().await.unwrap().unwrap();
            status.state == InstanceState::Completed
        };
        eventually_async("the second node has sent the command", completed).await;
        let took = died.elapsed();
        assert!(took < LEASE + Duration::from_secs(2), "it took {took:?} after {hang:?}");
        let record = second.store().command(sent).await.unwrap();
        assert!(record.is_some(), "the command has the id of the first attempt");
        second.shutdown().await.unwrap();
    }
}

/// A timer is durable, and due by the clock of the store, also if no node runs meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn timers_survive_the_end_of_all_nodes() {
    let directory = tempfile::tempdir().unwrap();
    let url = PostgresServer::shared().await.create_database().await;
    for sqlite in [false, true] {
        let store = async || -> Arc<dyn EventStore> {
            match sqlite {
                true => Arc::new(SqliteStore::open(directory.path().join("timers.db")).await.unwrap()),
                false => postgres(&url).await,
            }
        };
        let first = node(store().await).await;
        for (id, text) in [("second", "second"), ("later", "later"), ("never", "second")] {
            record(&first, id, placed([])).await;
            record(&first, id, noted(text)).await;
        }
        record(&first, "never", noted("never")).await;
        let kept = first.store().clone();
        let stored = async || {
            let timers = kept.timers(None, None, 10).await.unwrap();
            let mut instances: Vec<_> = timers.into_iter().map(|timer| timer.instance).collect();
            instances.sort();
            instances == ["later", "second"]
        };
        eventually_async("two timers are stored", stored).await;
        drop(first);
        let due = async || !kept.due_timers("fulfilment", 10).await.unwrap().timers.is_empty();
        eventually_async("a timer is due", due).await;
        let second = node(store().await).await;
        let state = async |id: &str| {
            let status = second.process::<Fulfilment>(id).status().await.unwrap().unwrap();
            (status.state, status.timers.len())
        };
        let fired = async || state("second").await.0 == InstanceState::Completed;
        eventually_async("the timer has fired", fired).await;
        assert_eq!(state("later").await, (InstanceState::Running, 1));
        assert_eq!(state("never").await, (InstanceState::Running, 0));
        second.shutdown().await.unwrap();
    }
}

/// Returns how many timers of an instance have fired.
async fn fired_in(store: &dyn EventStore, instance: u32) -> usize {
    let stream = StreamId::new("fulfilment", instance).unwrap();
    let events = store.read_stream(&stream, Version::NONE, 100).await.unwrap();
    let fired = |event: &&RecordedEvent| {
        let payload = &serde_json::to_value(event).unwrap()["payload"];
        payload["source"].get("due").is_some()
    };
    events.iter().filter(fired).count()
}

/// A timer fires, or it is cancelled. `STORIED_CANCEL_RACES` sets the number of races, 304 by default.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelling_races_with_firing() {
    const LANES: u32 = 8;
    let races = std::env::var("STORIED_CANCEL_RACES").map_or(304, |text| text.parse().unwrap());
    let url = PostgresServer::shared().await.create_database().await;
    let runtime = node(postgres(&url).await).await;
    let dice = Dice::random();
    // Few at a time: a timer waits for the events that were recorded before it was due.
    let lanes = (0..LANES).map(|lane| {
        let (runtime, mut wait) = (runtime.clone(), Duration::from_millis(50 + dice.roll(50)));
        async move {
            for id in (lane..races).step_by(LANES as usize) {
                let id = id.to_string();
                record(&runtime, &id, placed([])).await;
                record(&runtime, &id, noted("soon")).await;
                tokio::time::sleep(wait).await;
                record(&runtime, &id, noted("never")).await;
                let ended = async || {
                    let status = runtime.process::<Fulfilment>(&id).status().await.unwrap()?;
                    status.timers.is_empty().then_some(status.state)
                };
                let state = eventually_some("the timer has ended", ended).await;
                // The next race is closer, however fast the machine is.
                wait = match state {
                    InstanceState::Completed => wait.saturating_sub(Duration::from_millis(7)),
                    _ => wait + Duration::from_millis(5),
                };
            }
        }
    });
    futures_util::future::join_all(lanes).await;
    let follower = runtime.projection("process fulfilment").unwrap();
    follower.wait_until_caught_up(PATIENCE).await.unwrap();
    let store = runtime.store().clone();
    let no_timers = async || store.timers(None, None, 1).await.unwrap().is_empty();
    eventually_async("no timer is left", no_timers).await;
    let (mut fired, mut cancelled) = (0, 0);
    for id in 0..races {
        let status = runtime.process::<Fulfilment>(id).status().await.unwrap().unwrap();
        assert_eq!((status.timers.len(), status.held), (0, 0));
        match (status.state, fired_in(&*store, id).await) {
            (InstanceState::Completed, 1) => fired += 1,
            (InstanceState::Running, 0) => cancelled += 1,
            other => panic!("{id}: {other:?}"),
        }
    }
    assert!(fired > 0 && cancelled > 0, "{fired} fired, {cancelled} cancelled");
    runtime.shutdown().await.unwrap();
}
