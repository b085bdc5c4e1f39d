//! Traces of a program that passes spans to OpenTelemetry with tracing-opentelemetry.

use std::str::FromStr;

use opentelemetry::context::FutureExt;
use opentelemetry::trace::{
    SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId, TraceState, TracerProvider,
};
use opentelemetry_sdk::trace::{
    InMemorySpanExporter, Sampler, SdkTracerProvider, SpanData, TracerProviderBuilder,
};
use sqlx::postgres::PgPoolOptions;
use storied::bus::{ConsumerOptions, HandleOptions, SubscribeOptions};
use storied::command::{CommandBus, HandleError, Handler, HandlerContext, NatsCommandOptions};
use storied::projection::InMemory;
use storied::store::Append;
use storied::{
    EventStore, ExecuteError, ExpectedVersion, MemoryStore, Metadata, NatsOptions, NewEvent, NotExecutedKind,
    Position, PostgresOptions, PostgresReadModel, ProjectionOptions, ReadLog, RecordedEvent, Runtime,
    StreamId,
};
use tokio::time::{Instant, sleep};
use tracing::{Instrument, Level, info_span};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;

use crate::meters::*;
use crate::support::{self, NatsServer, PostgresServer, ThreadSubscriber};

const CAME: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const UNSAMPLED: &str = "00-1bf7651916cd43dd8448eb211c80319c-c7ad6b7169203331-00";

/// The spans of this thread, which runs everything of a test.
struct Spans {
    exporter: InMemorySpanExporter,
    _subscriber: ThreadSubscriber,
}

impl Spans {
    fn listen() -> Self {
        Self::listen_with(|provider| provider)
    }

    /// With a provider that differs from the default.
    fn listen_with(change: impl FnOnce(TracerProviderBuilder) -> TracerProviderBuilder) -> Self {
        let exporter = InMemorySpanExporter::default();
        let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone());
        let provider = change(provider).build();
        let wanted =
            Targets::new().with_target("storied::trace", Level::DEBUG).with_target("telemetry", Level::INFO);
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test")).with_filter(wanted);
        let _subscriber = ThreadSubscriber::set(tracing_subscriber::registry().with(layer));
        Self { exporter, _subscriber }
    }

    fn named(&self, name: &str) -> Vec<SpanData> {
        let spans = self.exporter.get_finished_spans().unwrap();
        spans.into_iter().filter(|span| span.name == name).collect()
    }

    /// Waits for the only span of that name.
    async fn one(&self, name: &str) -> SpanData {
        let give_up = Instant::now() + PATIENCE;
        while self.named(name).is_empty() {
            assert!(Instant::now() < give_up, "no {name}; {:#?}", self.exporter.get_finished_spans());
            sleep(std::time::Duration::from_millis(5)).await;
        }
        let mut spans = self.named(name);
        assert_eq!(spans.len(), 1, "{name}");
        spans.remove(0)
    }
}

fn attribute(span: &SpanData, key: &str) -> Option<String> {
    span.attributes.iter().find(|one| one.key.as_str() == key).map(|one| one.value.to_string())
}

fn traceparent(span: &SpanData) -> String {
    format!("00-{}-{}-01", span.span_context.trace_id(), span.span_context.span_id())
}

fn assert_child(child: &SpanData, parent: &SpanData) {
    assert_eq!(child.span_context.trace_id(), parent.span_context.trace_id(), "{}", child.name);
    assert_eq!(child.parent_span_id, parent.span_context.span_id(), "{}", child.name);
}

/// Expects a separate trace with one link.
fn assert_linked(span: &SpanData, to: &SpanData) {
    assert_ne!(span.span_context.trace_id(), to.span_context.trace_id(), "{}", span.name);
    assert_eq!(span.parent_span_id, SpanId::INVALID, "{}", span.name);
    let links: Vec<_> = span.links.iter().map(|link| &link.span_context).collect();
    assert_eq!(links.len(), 1, "{}", span.name);
    assert_eq!(links[0].trace_id(), to.span_context.trace_id());
    assert_eq!(links[0].span_id(), to.span_context.span_id());
}

async fn log(store: &dyn EventStore) -> Vec<RecordedEvent> {
    store.read_log(ReadLog::after(Position::START)).await.unwrap().events
}

async fn metadata(store: &dyn EventStore) -> Metadata {
    log(store).await.last().unwrap().decode_metadata().unwrap()
}

/// Appends an event with each of these contexts.
async fn append(store: &dyn EventStore, contexts: impl IntoIterator<Item = Option<String>>) -> Position {
    let encode = |traceparent| {
        let mut metadata = Metadata::default();
        metadata.traceparent = traceparent;
        NewEvent::encode(&CounterEvent::Added { n: 1 }, store.info().codec, &metadata).unwrap()
    };
    let events: Vec<_> = contexts.into_iter().map(encode).collect();
    let append = Append::one(StreamId::new("counter", "a").unwrap(), ExpectedVersion::Any, events);
    let appended = store.append(vec![append]).await.remove(0).unwrap();
    *appended.positions.last().unwrap()
}

#[tokio::test]
async fn a_command_is_one_trace_and_those_across_the_bus_are_linked_to_it() {
    let _turn = TURN.write().await;
    let spans = Spans::listen();
    let url = PostgresServer::shared().await.create_database().await;
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let pool = PgPoolOptions::new().max_connections(5).connect(&url).await.unwrap();
    let bus = log_stream(&server).bus();
    let node = Runtime::builder()
        .store(PostgresOptions::new().pool(pool.clone()).connect().await.unwrap())
        .bus(bus.clone())
        .publisher(publishing())
        .aggregate::<Counter>()
        .projection(sums("sums"), PostgresReadModel::new(pool))
        .start()
        .await
        .unwrap();
    let consumer = ConsumerOptions::durable_as("reader");
    let reader = bus.subscribe(["*"], SubscribeOptions::new().consumer(consumer)).await.unwrap();
    let handling = reader
        .for_each(HandleOptions::new(), |_| async {
            tracing::info!("handled");
            Ok(())
        })
        .unwrap();

    let request = async { node.execute::<Counter>("a", Add(1)).await };
    request.instrument(info_span!("request")).await.unwrap();

    let (request, command) = (spans.one("request").await, spans.one("command counter").await);
    assert_child(&command, &request);
    assert_eq!(command.span_kind, SpanKind::Internal);
    assert_eq!(attribute(&command, "storied.command.key").as_deref(), Some("a"));
    let (decide, append) = (spans.one("decide").await, spans.one("append").await);
    assert_child(&decide, &command);
    assert!(decide.events.iter().any(|event| event.name == "the user's own line"), "{decide:?}");
    assert_child(&append, &command);
    assert!(command.start_time <= decide.start_time && decide.end_time <= append.end_time);
    assert!(
        append.start_time < append.end_time && append.end_time <= command.end_time,
        "{append:?} {command:?}"
    );

    let event = log(&**node.store()).await.remove(0);
    assert_eq!(event.decode_metadata().unwrap().traceparent, Some(traceparent(&command)));
    let jetstream = async_nats::jetstream::new(bus.client().await.unwrap());
    let publish = spans.one("publish STORIED_EVENTS").await;
    let message = jetstream.get_stream("STORIED_EVENTS").await.unwrap().get_raw_message(1).await.unwrap();
    assert_eq!(message.headers.get("traceparent").unwrap().as_str(), traceparent(&command));
    assert_child(&publish, &command);
    assert_eq!(publish.span_kind, SpanKind::Producer);
    let process = spans.one("process STORIED_EVENTS").await;
    assert_eq!(process.span_kind, SpanKind::Consumer);
    assert_linked(&process, &command);
    assert!(process.events.iter().any(|event| event.name == "handled"), "{process:?}");
    assert_eq!(attribute(&process, "messaging.consumer.group.name").as_deref(), Some("reader"));
    for span in [&publish, &process] {
        let id = event.id.to_string();
        let size = event.payload.len().to_string();
        for (key, value) in [
            ("messaging.system", "nats"),
            ("messaging.destination.name", "STORIED_EVENTS"),
            ("messaging.message.id", id.as_str()),
            ("messaging.message.body.size", size.as_str()),
            ("storied.event", "counter.added"),
        ] {
            assert_eq!(attribute(span, key).as_deref(), Some(value), "{} {key}", span.name);
        }
    }
    let apply = spans.one("apply sums").await;
    assert_eq!(apply.span_kind, SpanKind::Consumer);
    assert_linked(&apply, &command);
    handling.stop(PATIENCE).await.unwrap();
    node.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_transaction_of_a_projection_is_linked_to_every_command_in_it() {
    let _turn = TURN.write().await;
    let spans = Spans::listen();
    let store = MemoryStore::new();
    let writer = Runtime::builder().store(store.clone()).aggregate::<Counter>().start().await.unwrap();
    for n in 1..=3 {
        writer.execute::<Counter>("a", Add(n)).await.unwrap();
    }
    writer.shutdown().await.unwrap();
    let builder = Runtime::builder().store(store).projection(sums::<()>("sums"), InMemory::new());
    let reader = builder.start().await.unwrap();
    let apply = spans.one("apply sums").await;
    let commands: Vec<_> =
        spans.named("command counter").iter().map(|span| span.span_context.span_id()).collect();
    let links: Vec<_> = apply.links.iter().map(|link| link.span_context.span_id()).collect();
    assert_eq!((links.len(), links), (3, commands));
    reader.shutdown().await.unwrap();
}

/// The sampler here keeps every span that begins. The publisher must not begin one.
#[tokio::test]
async fn an_event_that_is_not_sampled_has_no_publish_span() {
    let _turn = TURN.write().await;
    let spans = Spans::listen_with(|provider| provider.with_sampler(Sampler::AlwaysOn));
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let store = MemoryStore::new();
    let builder =
        Runtime::builder().store(store.clone()).bus(log_stream(&server).bus()).publisher(publishing());
    let node = builder.start().await.unwrap();
    // The sampled event is the last one: when its span ends, the spans of the others have ended.
    let contexts = [None, Some(UNSAMPLED), Some("unreadable"), Some(CAME)];
    let last = append(&store, contexts.map(|context| context.map(str::to_owned))).await;
    let publish = spans.one("publish STORIED_EVENTS").await;
    assert_eq!(attribute(&publish, "storied.position"), Some(last.to_string()));
    assert_eq!(publish.span_context.trace_id().to_string(), "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(publish.parent_span_id.to_string(), "b7ad6b7169203331");
    node.shutdown().await.unwrap();
}

#[tokio::test]
async fn an_apply_span_has_at_most_128_links() {
    const LINKS: usize = 128;
    let _turn = TURN.write().await;
    // By default an SDK keeps no more links than that, and would hide a longer list.
    let spans = Spans::listen_with(|provider| provider.with_max_links_per_span(10_000));
    let store = MemoryStore::new();
    let trace = |n: u64| Some(format!("00-{n:032x}-{n:016x}-01"));
    let last = append(&store, (1..=700).map(trace)).await;
    // Batches grow from 50 events on. The time is so long that none is too slow for the next one to grow.
    let options = ProjectionOptions::new().batch_time(std::time::Duration::from_secs(3_600));
    let builder = Runtime::builder().store(store);
    let builder = builder.projection_with(sums::<()>("sums"), InMemory::new(), options);
    let reader = builder.start().await.unwrap();
    reader.projection("sums").unwrap().caught_up_to_within(last, PATIENCE).await.unwrap();
    reader.shutdown().await.unwrap();
    let counts = |span: &SpanData| -> (usize, usize) {
        let events = attribute(span, "storied.events").unwrap();
        (events.parse().unwrap(), span.links.iter().count())
    };
    let counts: Vec<_> = spans.named("apply sums").iter().map(counts).collect();
    assert!(counts.iter().all(|(events, links)| *links == LINKS.min(*events)), "{counts:?}");
    assert!(counts.iter().any(|(events, _)| *events > LINKS), "{counts:?}");
}

struct Doubler;

impl Handler for Doubler {
    const NAME: &'static str = "double";
    type Command = u64;
    type Reply = u64;
    type Error = CounterError;

    async fn handle(&self, &n: &u64, context: &HandlerContext) -> Result<u64, HandleError<CounterError>> {
        let receipt = context.execute::<Counter>("doubled", Add(2 * n)).await;
        receipt.map(|receipt| receipt.reply).map_err(|error| HandleError::Failed(error.to_string()))
    }
}

#[tokio::test]
async fn commands_across_nodes_stay_in_the_trace() {
    let _turn = TURN.write().await;
    let spans = Spans::listen();
    let server = NatsServer::start(support::NatsOptions::core()).await;
    let commands = |name: &str| {
        CommandBus::nats(NatsCommandOptions::new(quick(NatsOptions::core().url(server.url()))).node(name))
    };
    let store = MemoryStore::new();
    let worker = Runtime::builder().store(store.clone()).commands(commands("worker"));
    let worker = worker.aggregate::<Counter>().handler(Doubler).start().await.unwrap();
    let caller = Runtime::builder().store(store.clone()).commands(commands("caller")).start().await.unwrap();
    assert_eq!(caller.execute_handler::<Doubler>(4_u64).await.unwrap().reply, 8);

    let inner = spans.one("command counter").await;
    let handled = spans.named("command double");
    let [there, here] = &handled[..] else { panic!("{handled:#?}") };
    assert_eq!((&here.span_kind, &there.span_kind), (&SpanKind::Internal, &SpanKind::Server));
    assert_eq!(here.parent_span_id, SpanId::INVALID);
    assert_child(there, here);
    assert!(there.parent_span_is_remote);
    assert_child(&inner, there);
    assert_eq!(metadata(&store).await.traceparent, Some(traceparent(&inner)));
    caller.shutdown().await.unwrap();
    worker.shutdown().await.unwrap();
}

/// Checks a refused command that another node may still execute.
#[tokio::test]
async fn a_refused_command_is_an_error_of_its_span() {
    let _turn = TURN.write().await;
    let server = NatsServer::start(support::NatsOptions::core()).await;
    let commands = |name: &str| {
        CommandBus::nats(NatsCommandOptions::new(quick(NatsOptions::core().url(server.url()))).node(name))
    };
    let store = MemoryStore::new();
    let picky = commands("worker").filter(|info| info.key != Some("filtered"));
    let picky = picky.before_all(|info| if info.key == Some("hooked") { Err("no".into()) } else { Ok(()) });
    let worker = Runtime::builder().store(store.clone()).commands(picky);
    let worker = worker.aggregate::<Counter>().start().await.unwrap();
    let caller = Runtime::builder().store(store.clone()).commands(commands("caller")).start().await.unwrap();
    for key in ["filtered", "hooked"] {
        let spans = Spans::listen();
        let error = caller.execute::<Counter>(key, Add(1)).await.unwrap_err();
        assert!(
            matches!(error, ExecuteError::NotExecuted { kind: NotExecutedKind::NotAccepted { .. }, .. }),
            "{error}"
        );
        let commands = spans.named("command counter");
        let server = commands.iter().find(|span| span.span_kind == SpanKind::Server).unwrap();
        assert_eq!(attribute(server, "error.type").as_deref(), Some("not_accepted"), "{key}");
        assert!(matches!(server.status, Status::Error { .. }), "{key}: {:?}", server.status);
    }
    caller.shutdown().await.unwrap();
    worker.shutdown().await.unwrap();
}

#[tokio::test]
async fn the_callers_context_is_the_parent_and_errors_are_marked() {
    let _turn = TURN.write().await;
    let spans = Spans::listen();
    let store = MemoryStore::new();
    let node = Runtime::builder().store(store.clone()).aggregate::<Counter>().start().await.unwrap();
    node.execute::<Counter>("a", Add(1)).traceparent(CAME).await.unwrap();
    let command = spans.one("command counter").await;
    assert_eq!(command.span_context.trace_id().to_string(), "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(command.parent_span_id.to_string(), "b7ad6b7169203331");
    assert_eq!(metadata(&store).await.traceparent, Some(traceparent(&command)));

    node.execute::<Counter>("b", AddUpTo { add: 1, limit: 0 }).await.unwrap_err();
    let refused = spans.named("command counter").pop().unwrap();
    assert_eq!(attribute(&refused, "error.type").as_deref(), Some("rejected"));
    assert!(matches!(refused.status, Status::Error { .. }), "{:?}", refused.status);
    node.shutdown().await.unwrap();
}

#[tokio::test]
async fn without_a_subscriber_only_the_callers_context_travels() {
    let _turn = TURN.write().await;
    let store = MemoryStore::new();
    let node = Runtime::builder().store(store.clone()).aggregate::<Counter>().start().await.unwrap();
    node.execute::<Counter>("a", Add(1)).await.unwrap();
    let carried = metadata(&store).await;
    assert_eq!((carried.traceparent, carried.tracestate), (None, None));
    node.execute::<Counter>("a", Add(2)).traceparent(CAME).await.unwrap();
    assert_eq!(metadata(&store).await.traceparent.as_deref(), Some(CAME));
    // Other tracers are found through the current context.
    let span = SpanContext::new(
        TraceId::from_hex("0af7651916cd43dd8448eb211c80319c").unwrap(),
        SpanId::from_hex("00f067aa0ba902b7").unwrap(),
        TraceFlags::SAMPLED,
        false,
        TraceState::from_str("vendor=value").unwrap(),
    );
    let context = opentelemetry::Context::new().with_remote_span_context(span);
    let command = async { node.execute::<Counter>("a", Add(3)).await };
    command.with_context(context).await.unwrap();
    let carried = metadata(&store).await;
    let inner = "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01";
    assert_eq!(carried.traceparent.as_deref(), Some(inner));
    assert_eq!(carried.tracestate.as_deref(), Some("vendor=value"));
    node.shutdown().await.unwrap();
}
