//! The spans: command → decide → append → publish of one trace, and those that are linked to it: process, apply.
//!
//! All have the target `storied::trace` and the level `DEBUG`. Where a subscriber listens that hands spans to OpenTelemetry,
//! the command's span goes into the metadata of its events, and from there over the bus.

use tracing::field::Empty;
use tracing::span::EnteredSpan;
use tracing::{Level, Span, debug_span, span_enabled};
use uuid::Uuid;

use super::context;
use crate::event::{Metadata, RecordedEvent};

/// The target of all spans, so that a filter can ask for them alone.
const TARGET: &str = "storied::trace";

/// How many links a span gets at most, which is what an SDK keeps by default.
const LINKS: usize = 128;

fn is_wanted() -> bool {
    span_enabled!(target: TARGET, Level::DEBUG)
}

/// The span of a command. It ends with the last of its clones. Commands are moved often: nothing, mostly, in eight bytes.
#[derive(Debug, Clone)]
pub(crate) struct CommandSpan(Option<Box<Span>>);

impl CommandSpan {
    /// Of a command that is given here. What travels with it names this span from now on.
    pub(crate) fn given(name: &str, key: Option<&str>, id: Uuid, metadata: &mut Metadata) -> Self {
        Self::begin("internal", name, key, id, metadata)
    }

    /// Of a command of another node.
    pub(crate) fn taken(name: &str, key: Option<&str>, id: Uuid, metadata: &mut Metadata) -> Self {
        Self::begin("server", name, key, id, metadata)
    }

    fn begin(kind: &'static str, name: &str, key: Option<&str>, id: Uuid, metadata: &mut Metadata) -> Self {
        if !is_wanted() {
            // Who traces without a subscriber of ours still has a span around the command.
            context::inject(&Span::none(), metadata);
            return Self(None);
        }
        let span = {
            let _parent = context::enter(metadata);
            debug_span!(
                target: TARGET,
                "command",
                otel.name = format_args!("command {name}"),
                otel.kind = kind,
                otel.status_code = Empty,
                "error.type" = Empty,
                storied.command.name = name,
                storied.command.key = key,
                storied.command.id = %id,
            )
        };
        context::inject(&span, metadata);
        Self(Some(Box::new(span)))
    }

    /// The span that what is done for the command belongs under.
    pub(crate) fn span(&self) -> Span {
        self.0.as_deref().cloned().unwrap_or(Span::none())
    }

    /// Around the user's decision.
    pub(crate) fn decide(&self, attempt: u32) -> EnteredSpan {
        let decide = |command: &Span| debug_span!(target: TARGET, parent: command, "decide", storied.attempt = attempt);
        self.0.as_deref().map_or(Span::none(), decide).entered()
    }

    /// From a decision until its events are durable, or are not going to be.
    pub(crate) fn append(&self, events: usize) -> Option<Box<Span>> {
        let append =
            |command: &Span| debug_span!(target: TARGET, parent: command, "append", storied.events = events);
        self.0.as_deref().map(|command| Box::new(append(command)))
    }

    /// How it ended: without an error, or with one of this kind.
    pub(crate) fn ended(&self, error: Option<&'static str>) {
        if let Some(span) = &self.0 {
            failed(span, error);
        }
    }
}

impl Drop for CommandSpan {
    fn drop(&mut self) {
        if let Some(span) = &self.0 {
            // What turns spans into OpenTelemetry's takes the last exit for the end.
            span.in_scope(|| ());
        }
    }
}

fn failed(span: &Span, error: Option<&'static str>) {
    if let Some(error) = error {
        span.record("error.type", error);
        span.record("otel.status_code", "ERROR");
    }
}

/// What events are published to, or came from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Destination<'a> {
    /// `nats`, or `storied` inside the process.
    pub(crate) system: &'static str,
    /// The stream, or what all subjects begin with.
    pub(crate) name: &'a str,
}

/// The spans of events on their way to the bus: each belongs to the trace of its command, as far as somebody keeps that.
pub(crate) struct Publishing(Vec<Span>);

impl Publishing {
    pub(crate) fn begin(destination: Destination<'_>, events: &[RecordedEvent]) -> Self {
        if !is_wanted() {
            return Self(Vec::new());
        }
        let traced = events.iter().filter_map(|event| {
            let metadata = event.decode_metadata().ok().filter(context::is_sampled)?;
            let _parent = context::enter(&metadata);
            Some(debug_span!(
                target: TARGET,
                "publish",
                otel.name = format_args!("publish {}", destination.name),
                otel.kind = "producer",
                otel.status_code = Empty,
                "error.type" = Empty,
                messaging.system = destination.system,
                messaging.destination.name = destination.name,
                messaging.operation.name = "publish",
                messaging.operation.type = "send",
                messaging.message.id = %event.id,
                messaging.message.body.size = event.payload.len(),
                storied.event = event.name.as_str(),
                storied.position = event.position.get(),
            ))
        });
        Self(traced.collect())
    }

    pub(crate) fn ended(self, error: Option<&'static str>) {
        self.0.iter().for_each(|span| failed(span, error));
    }
}

/// Around a subscriber's work on one event: a trace of its own, linked to the command's.
#[cfg(feature = "nats")]
pub(crate) fn process(destination: Destination<'_>, group: Option<&str>, event: &RecordedEvent) -> Span {
    if !is_wanted() {
        return Span::none();
    }
    let span = debug_span!(
        target: TARGET,
        parent: None,
        "process",
        otel.name = format_args!("process {}", destination.name),
        otel.kind = "consumer",
        otel.status_code = Empty,
        "error.type" = Empty,
        messaging.system = destination.system,
        messaging.destination.name = destination.name,
        messaging.operation.name = "process",
        messaging.operation.type = "process",
        messaging.consumer.group.name = group,
        messaging.message.id = %event.id,
        messaging.message.body.size = event.payload.len(),
        storied.event = event.name.as_str(),
        storied.position = event.position.get(),
    );
    context::link(&span, event.decode_metadata().iter());
    span
}

/// Says how the work under `span` ended.
#[cfg(feature = "nats")]
pub(crate) fn processed(span: &Span, error: Option<&'static str>) {
    failed(span, error);
}

/// Around the transaction of a projection: a trace of its own, linked to those of the commands whose events it applies.
pub(crate) fn apply<'a>(
    projection: &str,
    count: usize,
    events: impl Iterator<Item = &'a RecordedEvent>,
) -> Span {
    if !is_wanted() {
        return Span::none();
    }
    let span = debug_span!(
        target: TARGET,
        parent: None,
        "apply",
        otel.name = format_args!("apply {projection}"),
        otel.kind = "consumer",
        storied.projection = projection,
        storied.events = count,
    );
    let metadata: Vec<Metadata> =
        events.take(LINKS).filter_map(|event| event.decode_metadata().ok()).collect();
    context::link(&span, metadata.iter());
    span
}

/// What a bus is in the words of OpenTelemetry.
pub(crate) fn system(bus: &str) -> &'static str {
    if bus.starts_with("nats") { "nats" } else { "storied" }
}
