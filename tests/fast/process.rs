//! Processes on the memory store.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use storied::command::{HandleError, Handler, HandlerContext, HandlerOptions};
use storied::process::{Input, InstanceState, InstanceStatus, Next, Process, ProcessContext, Routes};
use storied::projection::ProjectionState;
use storied::runtime::StartError;
use storied::store::ReadLog;
use storied::{
    Aggregate, Context, Decided, Event, Filter, MemoryStore, NeverRejects, Position, ProcessOptions,
    RecordedEvent, Runtime, SqliteStore,
};

use serde::{Deserialize, Serialize};

use storied::testing::given_process;

use crate::support::fulfilment::{Fulfilment, Order, OrderEvent, SoldOut, Stock, StockCommand};
use crate::support::{FaultyStore, eventually_some};

async fn start() -> Runtime {
    let builder = Runtime::builder().store(MemoryStore::new()).aggregate::<Order>().aggregate::<Stock>();
    builder.process::<Fulfilment>().start().await.unwrap()
}

async fn place(runtime: &Runtime, order: &str, lines: &[&str]) {
    let lines = lines.iter().map(|line| (*line).to_owned()).collect();
    runtime.execute::<Order>(order, OrderEvent::Placed { lines }).await.unwrap();
}

async fn note(runtime: &Runtime, order: &str, text: &str) {
    runtime.execute::<Order>(order, OrderEvent::Noted { text: text.into() }).await.unwrap();
}

async fn log(runtime: &Runtime) -> Vec<RecordedEvent> {
    let read = ReadLog::after(Position::START).filter(Filter::all()).limit(10_000);
    runtime.store().read_log(read).await.unwrap().events
}

async fn names(runtime: &Runtime, stream: &str) -> Vec<String> {
    let log = log(runtime).await.into_iter().filter(|event| event.stream.to_string() == stream);
    log.map(|event| event.name.to_string()).collect()
}

async fn status(runtime: &Runtime, id: &str) -> Option<InstanceStatus> {
    runtime.process::<Fulfilment>(id).status().await.unwrap()
}

async fn until(runtime: &Runtime, id: &str, state: InstanceState) -> InstanceStatus {
    let found = async || status(runtime, id).await.filter(|status| status.state == state);
    eventually_some(&format!("{id} is {state:?}"), found).await
}

#[tokio::test]
async fn an_instance_completes_after_its_commands() {
    let runtime = start().await;
    place(&runtime, "17", &["tea", "milk"]).await;
    let done = until(&runtime, "17", InstanceState::Completed).await;
    assert!(done.effects.is_empty() && done.timers.is_empty() && done.held == 0);
    let events = names(&runtime, "fulfilment/17").await;
    assert_eq!(
        events,
        [
            "fulfilment.input",
            "fulfilment.effect",
            "fulfilment.effect",
            "fulfilment.input",
            "fulfilment.input",
            "fulfilment.ended"
        ]
    );
    assert_eq!(names(&runtime, "stock/tea").await, ["stock.reserved"]);
    // The correlation of the order goes on to everything that it caused.
    let log = log(&runtime).await;
    let correlation = log[0].command_id;
    for event in &log[1..] {
        assert_eq!(event.decode_metadata().unwrap().correlation_id, Some(correlation), "{}", event.name);
    }
    runtime.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_refusal_undoes_what_was_done() {
    let runtime = start().await;
    place(&runtime, "1", &["tea"]).await;
    place(&runtime, "2", &["tea"]).await;
    until(&runtime, "2", InstanceState::Completed).await;
    place(&runtime, "3", &["milk", "tea", "bread"]).await;
    until(&runtime, "3", InstanceState::Compensated).await;
    assert_eq!(names(&runtime, "stock/tea").await, ["stock.reserved", "stock.reserved"]);
    for line in ["milk", "bread"] {
        assert_eq!(names(&runtime, &format!("stock/{line}")).await, ["stock.reserved", "stock.released"]);
    }
    runtime.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_timer_fires_once_or_is_cancelled() {
    let runtime = start().await;
    for id in ["fires", "cancelled", "replaced"] {
        place(&runtime, id, &[]).await;
    }
    note(&runtime, "cancelled", "second").await;
    note(&runtime, "cancelled", "never").await;
    note(&runtime, "replaced", "second").await;
    note(&runtime, "replaced", "later").await;
    note(&runtime, "fires", "second").await;
    // Due last, so the others were due before.
    until(&runtime, "fires", InstanceState::Completed).await;
    for (id, timers) in [("cancelled", 0), ("replaced", 1)] {
        let status = status(&runtime, id).await.unwrap();
        assert_eq!((status.state, status.timers.len()), (InstanceState::Running, timers), "{id}");
    }
    // Late inputs are ignored, and counted.
    note(&runtime, "fires", "soon").await;
    place(&runtime, "replaced", &["tea"]).await;
    note(&runtime, "unknown", "soon").await;
    let ignored = async || (runtime.status().await.processes[0].ignored == 3).then_some(());
    eventually_some("three events are ignored", ignored).await;
    assert_eq!(status(&runtime, "unknown").await, None);
    assert_eq!(names(&runtime, "stock/tea").await.len(), 0);
    runtime.shutdown().await.unwrap();
}

/// Timers follow the clock of the store, which a test moves.
#[tokio::test]
async fn a_moved_clock_makes_timers_due() {
    let store = MemoryStore::new();
    let builder = Runtime::builder().store(store.clone()).aggregate::<Order>().aggregate::<Stock>();
    let runtime = builder.process::<Fulfilment>().start().await.unwrap();
    for id in ["later", "second"] {
        place(&runtime, id, &[]).await;
    }
    note(&runtime, "later", "later").await;
    let started = async || status(&runtime, "later").await.filter(|status| status.timers.len() == 1);
    eventually_some("the timer has started", started).await;
    store.advance_clock(Duration::from_secs(3_590));
    note(&runtime, "second", "second").await;
    // Its second begins at the moved time.
    until(&runtime, "second", InstanceState::Completed).await;
    assert_eq!(status(&runtime, "later").await.unwrap().state, InstanceState::Running);
    store.advance_clock(Duration::from_secs(10));
    until(&runtime, "later", InstanceState::Completed).await;
    let log = log(&runtime).await;
    let took = log[log.len() - 1].recorded_at - log[0].recorded_at;
    assert!(took >= chrono::TimeDelta::hours(1), "{took}");
    runtime.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_panic_parks_this_instance_alone() {
    let runtime = start().await;
    place(&runtime, "1", &[]).await;
    place(&runtime, "2", &[]).await;
    note(&runtime, "1", "panic").await;
    note(&runtime, "1", "soon").await;
    note(&runtime, "2", "soon").await;
    until(&runtime, "2", InstanceState::Completed).await;
    let parked = until(&runtime, "1", InstanceState::Parked).await;
    assert_eq!(parked.parked.as_deref(), Some("the process panicked: as noted"));
    let held = async || status(&runtime, "1").await.filter(|status| status.held == 2);
    eventually_some("two inputs are held", held).await;
    // It panics again.
    let one = runtime.process::<Fulfilment>("1");
    one.retry().await.unwrap();
    let parked_twice = async || (runtime.status().await.processes[0].parked >= 2).then_some(());
    eventually_some("it is parked again", parked_twice).await;
    until(&runtime, "1", InstanceState::Parked).await;
    assert!(runtime.process::<Fulfilment>("2").retry().await.unwrap_err().to_string().contains("not parked"));
    assert!(
        runtime.process::<Fulfilment>("3").cancel().await.unwrap_err().to_string().contains("no instance")
    );
    one.cancel().await.unwrap();
    let cancelled = until(&runtime, "1", InstanceState::Cancelled).await;
    assert_eq!((cancelled.held, cancelled.parked), (0, None));
    runtime.shutdown().await.unwrap();
}

/// A later version of [`Fulfilment`], without the fault.
#[derive(Default)]
struct Repaired;

impl Process for Repaired {
    const NAME: &'static str = Fulfilment::NAME;
    type Event = OrderEvent;

    fn routes() -> Routes<OrderEvent> {
        Fulfilment::routes()
    }

    fn react(&self, input: Input<'_, OrderEvent>, _: &ProcessContext<'_>) -> Next {
        match input {
            Input::Event(OrderEvent::Noted { text }) if text == "soon" => Next::new().complete(),
            _ => Next::none(),
        }
    }
}

#[tokio::test]
async fn a_retry_after_a_deploy_reacts_to_the_held_inputs_in_order() {
    let runtime = start().await;
    place(&runtime, "1", &[]).await;
    note(&runtime, "1", "panic").await;
    note(&runtime, "1", "soon").await;
    let held = async || status(&runtime, "1").await.filter(|status| status.held == 2);
    eventually_some("two inputs are held", held).await;
    let store = runtime.store().clone();
    runtime.shutdown().await.unwrap();
    let runtime =
        Runtime::builder().store(store).aggregate::<Order>().process::<Repaired>().start().await.unwrap();
    runtime.process::<Repaired>("1").retry().await.unwrap();
    until(&runtime, "1", InstanceState::Completed).await;
    runtime.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_reset_of_the_follower_has_no_effect() {
    let runtime = start().await;
    for order in 0..20 {
        place(&runtime, &order.to_string(), &[&format!("line {order}")]).await;
    }
    for order in 0..20 {
        until(&runtime, &order.to_string(), InstanceState::Completed).await;
    }
    place(&runtime, "timed", &[]).await;
    note(&runtime, "timed", "later").await;
    let timers = async || runtime.store().timers(None, None, 10).await.unwrap();
    let stored = async || Some(timers().await).filter(|timers| timers.len() == 1);
    let timer = eventually_some("the timer is stored", stored).await;
    let before = log(&runtime).await.len();
    let follower = runtime.projection("process fulfilment").unwrap();
    follower.wait_until_caught_up(Duration::from_secs(10)).await.unwrap();
    let applied = follower.status().events_applied;
    follower.reset().await.unwrap();
    follower.wait_until_caught_up(Duration::from_secs(10)).await.unwrap();
    assert_eq!(follower.status().events_applied, 2 * applied, "all events were delivered again");
    assert_eq!((log(&runtime).await.len(), timers().await), (before, timer));
    runtime.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_new_process_starts_at_the_end_of_the_log() {
    let store: Arc<dyn storied::EventStore> = Arc::new(MemoryStore::new());
    let runtime = Runtime::builder().store(store.clone()).aggregate::<Order>().start().await.unwrap();
    place(&runtime, "old", &[]).await;
    runtime.shutdown().await.unwrap();
    let builder = Runtime::builder().store(store).aggregate::<Order>().aggregate::<Stock>();
    let runtime = builder.process::<Fulfilment>().start().await.unwrap();
    place(&runtime, "new", &["tea"]).await;
    until(&runtime, "new", InstanceState::Completed).await;
    let follower = runtime.projection("process fulfilment").unwrap();
    follower.reset().await.unwrap();
    follower.wait_until_caught_up(Duration::from_secs(10)).await.unwrap();
    assert_eq!(status(&runtime, "old").await, None);
    runtime.shutdown().await.unwrap();
}

/// A process without state whose route is unknown.
#[derive(Default)]
struct Misrouted;

impl Process for Misrouted {
    const NAME: &'static str = "misrouted";
    type Event = OrderEvent;

    fn routes() -> Routes<OrderEvent> {
        Routes::new().starts(["shipped"], |_: &OrderEvent, recorded| recorded.stream.id().to_owned())
    }

    fn react(&self, _: Input<'_, OrderEvent>, _: &ProcessContext<'_>) -> Next {
        Next::none()
    }
}

#[tokio::test]
async fn invalid_registrations_do_not_start() {
    let builder = || Runtime::builder().store(MemoryStore::new());
    let error = builder().process::<Misrouted>().start().await.unwrap_err();
    assert!(matches!(error, StartError::Route { name: "misrouted", .. }), "{error}");
    assert!(error.to_string().contains("has no variant \"shipped\""), "{error}");
    let error = builder().process::<Fulfilment>().process::<Repaired>().start().await.unwrap_err();
    assert!(matches!(error, StartError::SameProcess { name: "fulfilment" }), "{error}");
    let options = ProcessOptions::new().max_depth(0);
    let error = builder().process_with::<Fulfilment>(options).start().await.unwrap_err();
    assert!(error.to_string().contains("ProcessOptions::max_depth"), "{error}");
}

/// A command of the shared handler.
#[derive(Serialize, Deserialize)]
struct Charge {
    order: String,
}

struct Slow;

impl Handler for Slow {
    const NAME: &'static str = "charge";
    type Command = Charge;
    type Reply = String;
    type Error = NeverRejects;

    async fn handle(&self, charge: &Charge, _: &HandlerContext) -> Result<String, HandleError<NeverRejects>> {
        if charge.order == "slow" {
            tokio::time::sleep(Duration::from_millis(400)).await;
        }
        Ok(format!("charged {}", charge.order))
    }
}

/// Charges each placed order: the small case.
#[derive(Default)]
struct Charges;

impl Process for Charges {
    const NAME: &'static str = "charges";
    type Event = OrderEvent;

    fn routes() -> Routes<OrderEvent> {
        Routes::new().starts_or_continues(["placed"], |_: &OrderEvent, e| e.stream.id().to_owned())
    }

    fn react(&self, input: Input<'_, OrderEvent>, context: &ProcessContext<'_>) -> Next {
        match input {
            Input::Event(_) => {
                Next::new().execute_handler::<Slow>("charge", Charge { order: context.id().to_owned() })
            }
            Input::Done { reply, .. } => {
                assert_eq!(reply.decode::<String>().unwrap(), format!("charged {}", context.id()));
                Next::none()
            }
            _ => Next::none(),
        }
    }
}

#[tokio::test]
async fn a_slow_command_delays_no_other_instance_and_no_shutdown_loses_it() {
    let store: Arc<dyn storied::EventStore> = Arc::new(MemoryStore::new());
    let start = async || {
        let builder = Runtime::builder().store(store.clone()).aggregate::<Order>();
        builder
            .handler_with(Slow, HandlerOptions::new().workers(4))
            .process::<Charges>()
            .start()
            .await
            .unwrap()
    };
    let runtime = start().await;
    place(&runtime, "slow", &[]).await;
    place(&runtime, "fast", &[]).await;
    let instance = |id: &'static str| {
        let handle = runtime.process::<Charges>(id);
        async move || {
            handle
                .status()
                .await
                .unwrap()
                .filter(|status| status.effects.is_empty() && status.version.get() == 3)
        }
    };
    eventually_some("the fast one is charged", instance("fast")).await;
    assert!(instance("slow")().await.is_none(), "the slow one is still running");
    runtime.shutdown().await.unwrap();
    let runtime = start().await;
    let handle = runtime.process::<Charges>("slow");
    let charged = async || handle.status().await.unwrap().filter(|status| status.effects.is_empty());
    eventually_some("the slow one is charged", charged).await;
    assert_eq!(handle.status().await.unwrap().unwrap().parked, None);
    runtime.shutdown().await.unwrap();
}

/// Two processes whose aggregates trigger each other.
#[derive(Default)]
struct Ping;

impl Process for Ping {
    const NAME: &'static str = "ping";
    type Event = OrderEvent;

    fn routes() -> Routes<OrderEvent> {
        Routes::new().starts_or_continues(["noted"], |_: &OrderEvent, _| "only".to_owned())
    }

    fn react(&self, input: Input<'_, OrderEvent>, context: &ProcessContext<'_>) -> Next {
        match input {
            Input::Event(OrderEvent::Noted { text }) => Next::new().execute::<Order>(
                "again",
                context.event().unwrap().stream.id(),
                OrderEvent::Noted { text: format!("{text}!") },
            ),
            _ => Next::none(),
        }
    }
}

#[tokio::test]
async fn a_circle_of_reactions_stops_at_the_depth_limit() {
    let options = ProcessOptions::new().max_depth(5);
    let builder = Runtime::builder().store(MemoryStore::new()).aggregate::<Order>();
    let runtime = builder.process_with::<Ping>(options).start().await.unwrap();
    note(&runtime, "1", "a").await;
    let handle = runtime.process::<Ping>("only");
    let parked = async || handle.status().await.unwrap().and_then(|status| status.parked);
    let reason = eventually_some("the instance is parked", parked).await;
    assert!(reason.contains("depth 5 (limit 5)"), "{reason}");
    let follower = runtime.projection("process ping").unwrap();
    follower.wait_until_caught_up(Duration::from_secs(10)).await.unwrap();
    assert_eq!(names(&runtime, "order/1").await.len(), 6);
    runtime.shutdown().await.unwrap();
}

/// Its instance ids are the texts of the notes, also invalid ones.
#[derive(Default)]
struct Texts;

impl Process for Texts {
    const NAME: &'static str = "texts";
    type Event = OrderEvent;

    fn routes() -> Routes<OrderEvent> {
        Routes::new().starts(["noted"], |event: &OrderEvent, _| match event {
            OrderEvent::Noted { text } if text == "panic" => panic!("in a route"),
            OrderEvent::Noted { text } => text.clone(),
            OrderEvent::Placed { .. } => unreachable!(),
        })
    }

    fn react(&self, input: Input<'_, OrderEvent>, _: &ProcessContext<'_>) -> Next {
        match input {
            Input::Event(OrderEvent::Noted { text }) if text == "twice" => Next::new()
                .execute::<Order>("same", "1", OrderEvent::Noted { text: "x".into() })
                .execute::<Order>("same", "1", OrderEvent::Noted { text: "x".into() }),
            Input::Event(OrderEvent::Noted { text }) if text == "nowhere" => {
                Next::new().execute::<Stock>("lost", "1", StockCommand::Release { order: "1".into() })
            }
            Input::Event(OrderEvent::Noted { text }) if text == "timers" => {
                (0..101).fold(Next::new(), |next, n| next.after(n.to_string(), Duration::from_secs(60)))
            }
            Input::Event(OrderEvent::Noted { text }) if text == "unnamed" => {
                Next::new().after("", Duration::ZERO)
            }
            _ => Next::none(),
        }
    }
}

#[tokio::test]
async fn what_is_wrong_is_parked_alone_with_its_reason() {
    let builder = Runtime::builder().store(MemoryStore::new()).aggregate::<Order>();
    let runtime = builder.process::<Texts>().start().await.unwrap();
    let long = "x".repeat(401);
    for text in ["", "panic", "a\u{0}b", &long, "twice", "nowhere", "timers", "unnamed", "good"] {
        note(&runtime, "1", text).await;
    }
    let status = async |id: &str| runtime.process::<Texts>(id).status().await.unwrap();
    eventually_some("the last event is consumed", async || status("good").await).await;
    for (id, reason) in [
        ("twice", "two commands with the key \"same\""),
        ("nowhere", "no node handles commands for \"stock\""),
        ("timers", "too many timers: 101 (limit 100)"),
        ("unnamed", "invalid timer name \"\": empty"),
    ] {
        let parked = async || status(id).await.and_then(|status| status.parked);
        let found = eventually_some("the instance is parked", parked).await;
        assert!(found.contains(reason), "{id}: {found}");
    }
    let follower = runtime.projection("process texts").unwrap();
    let parked = follower.parked(10).await.unwrap();
    let reasons: Vec<_> = parked.iter().map(|event| event.error.clone()).collect();
    assert_eq!(reasons.len(), 4, "{reasons:?}");
    for (reason, expected) in
        reasons.iter().zip(["empty aggregate id", "in a route", "control character", "aggregate id too long"])
    {
        assert!(reason.contains(expected), "{reason}");
    }
    runtime.shutdown().await.unwrap();
}

#[test]
fn a_process_is_tested_without_a_runtime() {
    let lines = vec!["tea".to_owned(), "milk".to_owned()];
    let reserve = || StockCommand::Reserve { order: "17".into() };
    let done = given_process::<Fulfilment>("17")
        .when_event("17", OrderEvent::Placed { lines: lines.clone() })
        .then_executes::<Stock>("reserve tea", "tea", reserve())
        .then_executes::<Stock>("reserve milk", "milk", reserve())
        .then_nothing()
        .when_event("17", OrderEvent::Noted { text: "later".into() })
        .then_starts_timer("soon", Duration::from_secs(3_600))
        .when_event("17", OrderEvent::Noted { text: "never".into() })
        .then_cancels_timer("soon")
        .when_done("reserve tea", 1_u32)
        .then_nothing();
    assert_eq!(done.state().reserved, 1);
    done.when_rejected("reserve milk", SoldOut(2))
        .then_compensates()
        .then_executes::<Stock>("undo reserve tea", "tea", StockCommand::Release { order: "17".into() })
        .then_nothing()
        .when_done("undo reserve tea", 0_u32)
        .then_is_compensated();
    given_process::<Fulfilment>("17")
        .when_event("17", OrderEvent::Placed { lines: vec![] })
        .when_event("17", OrderEvent::Noted { text: "panic".into() })
        .then_is_parked("the process panicked: as noted");
}

#[tokio::test]
async fn a_copied_store_runs_no_process() {
    let directory = tempfile::tempdir().unwrap();
    let [file, copy] = ["shop.db", "copy.db"].map(|name| directory.path().join(name));
    let start = async |file: &std::path::Path| {
        let builder = Runtime::builder().store(SqliteStore::open(file).await.unwrap());
        builder.aggregate::<Order>().aggregate::<Stock>().process::<Fulfilment>().start().await.unwrap()
    };
    let original = start(&file).await;
    place(&original, "1", &["tea"]).await;
    until(&original, "1", InstanceState::Completed).await;
    original.shutdown().await.unwrap();
    for end in ["", "-wal"] {
        let name = |name: &str| directory.path().join(format!("{name}.db{end}"));
        // Without a log of writes, everything is in the file.
        let copied = std::fs::copy(name("shop"), name("copy"));
        assert!(copied.is_ok() || end == "-wal", "{copied:?}");
    }
    let copied = start(&copy).await;
    place(&copied, "2", &["tea"]).await;
    let failed = async || {
        let status = copied.projection("process fulfilment").unwrap().status();
        (status.state == ProjectionState::Failed).then_some(status.last_error.unwrap_or_default())
    };
    let error = eventually_some("the process has failed", failed).await;
    assert!(error.contains("storied store adopt"), "{error}");
    assert_eq!(status(&copied, "2").await, None);
    copied.shutdown().await.unwrap();
}

/// An aggregate whose code panics on one command.
#[derive(Default)]
struct Fragile;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum FragileEvent {
    Used { text: String },
}

impl Event for FragileEvent {
    const CATEGORY: &'static str = "fragile";
}

impl Aggregate for Fragile {
    type Event = FragileEvent;
    type Command = FragileEvent;
    type Reply = ();
    type Error = NeverRejects;

    fn handle(&self, command: &FragileEvent, _: &Context<'_>) -> Decided<Self> {
        let FragileEvent::Used { text } = command;
        assert_ne!(text, "break");
        Ok(command.clone().into())
    }

    fn apply(&mut self, _: &FragileEvent) {}
}

#[derive(Default)]
struct Breaks;

impl Process for Breaks {
    const NAME: &'static str = "breaks";
    type Event = OrderEvent;

    fn routes() -> Routes<OrderEvent> {
        Routes::new().starts(["placed"], |_: &OrderEvent, event| event.stream.id().to_owned())
    }

    fn react(&self, input: Input<'_, OrderEvent>, _: &ProcessContext<'_>) -> Next {
        let used = |text: &str| FragileEvent::Used { text: text.to_owned() };
        match input {
            Input::Event(_) => Next::new()
                .execute::<Fragile>("first", "1", used("break"))
                .execute::<Fragile>("second", "1", used("do"))
                .undo::<Fragile>("1", used("undo")),
            _ => Next::none(),
        }
    }
}

/// The second command waits for the first one to the same target, which fails for good.
#[tokio::test]
async fn an_instance_that_a_command_has_parked_can_compensate() {
    let builder = Runtime::builder().store(MemoryStore::new()).aggregate::<Order>().aggregate::<Fragile>();
    let runtime = builder.process::<Breaks>().start().await.unwrap();
    place(&runtime, "1", &[]).await;
    let handle = runtime.process::<Breaks>("1");
    let state = async |expected| handle.status().await.unwrap().filter(|status| status.state == expected);
    let parked = eventually_some("it is parked", async || state(InstanceState::Parked).await).await;
    assert!(parked.parked.unwrap().contains("\"first\""));
    assert_eq!(names(&runtime, "fragile/1").await.len(), 0);
    handle.compensate().await.unwrap();
    eventually_some("it has compensated", async || state(InstanceState::Compensated).await).await;
    assert_eq!(names(&runtime, "fragile/1").await.len(), 2, "the second command, and its undo");
    runtime.shutdown().await.unwrap();
}

/// Whether the route of [`Late`] panics.
static BROKEN: AtomicBool = AtomicBool::new(true);

#[derive(Default)]
struct Late;

impl Process for Late {
    const NAME: &'static str = "late";
    type Event = OrderEvent;

    fn routes() -> Routes<OrderEvent> {
        Routes::new().starts_or_continues(["placed", "noted"], |event: &OrderEvent, _| {
            let breaks = matches!(event, OrderEvent::Placed { .. }) && BROKEN.load(Ordering::Relaxed);
            assert!(!breaks, "by order of the test");
            "only".to_owned()
        })
    }

    fn react(&self, input: Input<'_, OrderEvent>, _: &ProcessContext<'_>) -> Next {
        match input {
            Input::Event(OrderEvent::Placed { .. }) => {
                Next::new().execute::<Stock>("reserve", "1", StockCommand::Reserve { order: "1".into() })
            }
            _ => Next::none(),
        }
    }
}

/// I12: an event that the follower had parked comes after later ones, and its append loses its answer.
#[tokio::test]
async fn a_parked_event_is_consumed_once_and_its_effects_are_sent() {
    let store = FaultyStore::new(MemoryStore::new());
    let builder = Runtime::builder().store(store.clone()).aggregate::<Order>().aggregate::<Stock>();
    let runtime = builder.process::<Late>().start().await.unwrap();
    place(&runtime, "1", &[]).await;
    note(&runtime, "1", "later").await;
    let handle = runtime.process::<Late>("only");
    let later = async || handle.status().await.unwrap();
    eventually_some("the later event is consumed", later).await;
    let follower = runtime.projection("process late").unwrap();
    let parked = follower.parked(10).await.unwrap();
    assert_eq!(parked.len(), 1);
    BROKEN.store(false, Ordering::Relaxed);
    store.append_and_forget();
    let position = parked[0].position;
    let retry = tokio::spawn({
        let follower = follower.clone();
        async move { follower.retry_parked(position).await }
    });
    let recorded = async || handle.status().await.unwrap().filter(|status| status.effects.len() == 1);
    eventually_some("the input is recorded", recorded).await;
    store.heal();
    let reserved = async || (names(&runtime, "stock/1").await.len() == 1).then_some(());
    eventually_some("the command is sent", reserved).await;
    retry.await.unwrap().unwrap();
    assert_eq!(follower.parked(10).await.unwrap().len(), 0);
    // A second delivery has no effect.
    follower.reset().await.unwrap();
    follower.wait_until_caught_up(Duration::from_secs(10)).await.unwrap();
    assert_eq!(names(&runtime, "late/only").await.iter().filter(|name| *name == "late.input").count(), 3);
    assert_eq!(names(&runtime, "stock/1").await.len(), 1);
    runtime.shutdown().await.unwrap();
}
