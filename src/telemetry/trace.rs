//! Spans: command → decide → append → publish in one trace, and process and apply linked to it.
//!
//! All have the target `storied::trace` and the level `DEBUG`. If a subscriber passes spans to
//! OpenTelemetry, the span of the command goes into the metadata of its events, and with them over
//! the bus.

use tracing::field::Empty;
use tracing::span::EnteredSpan;
use tracing::{Level, Span, debug_span, span_enabled};
use uuid::Uuid;

use super::context;
use crate::event::{Metadata, RecordedEvent};

/// The target of all spans, for filters.
const TARGET: &str = "storied::trace";

/// Maximum number of links of a span, which is the default limit of an SDK.
const LINKS: usize = 128;

fn is_wanted() -> bool {
    span_enabled!(target: TARGET, Level::DEBUG)
}

/// The span of a command, which ends with its last clone.
///
/// Eight bytes, mostly `None`, because commands move often.
#[derive(Debug, Clone)]
pub(crate) struct CommandSpan(Option<Box<Span>>);

impl CommandSpan {
    /// Starts the span of a command submitted here. The metadata refers to this span from now on.
    pub(crate) fn given(name: &str, key: Option<&str>, id: Uuid, metadata: &mut Metadata) -> Self {
        Self::begin("internal", name, key, id, metadata)
    }

    /// Starts the span of a command from another node.
    pub(crate) fn taken(name: &str, key: Option<&str>, id: Uuid, metadata: &mut Metadata) -> Self {
        Self::begin("server", name, key, id, metadata)
    }

    fn begin(kind: &'static str, name: &str, key: Option<&str>, id: Uuid, metadata: &mut Metadata) -> Self {
        if !is_wanted() {
            // A program that traces without `tracing` still has a current context around the
            // command.
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

    /// Returns the parent span of the work for this command.
    pub(crate) fn span(&self) -> Span {
        self.0.as_deref().cloned().unwrap_or(Span::none())
    }

    /// Enters the span of a decision of the aggregate.
    pub(crate) fn decide(&self, attempt: u32) -> EnteredSpan {
        let decide = |command: &Span| debug_span!(target: TARGET, parent: command, "decide", storied.attempt = attempt);
        self.0.as_deref().map_or(Span::none(), decide).entered()
    }

    /// Starts the span from a decision until its events are durable or the append has failed.
    pub(crate) fn append(&self, events: usize) -> Option<Box<Span>> {
        let append =
            |command: &Span| debug_span!(target: TARGET, parent: command, "append", storied.events = events);
        self.0.as_deref().map(|command| Box::new(append(command)))
    }

    /// Records the end of the command: success, or a kind of error.
    pub(crate) fn ended(&self, error: Option<&'static str>) {
        if let Some(span) = &self.0 {
            failed(span, error);
        }
    }
}

impl Drop for CommandSpan {
    fn drop(&mut self) {
        if let Some(span) = &self.0 {
            // The layer that converts spans for OpenTelemetry takes the last exit as the end.
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

/// The target or the source of published events.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Destination<'a> {
    /// `nats`, or `storied` within the process.
    pub(crate) system: &'static str,
    /// The stream, or the common prefix of all subjects.
    pub(crate) name: &'a str,
}

/// The spans of events that are being published, in the sampled traces of their commands.
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

/// Starts the span of a subscriber that handles one event.
///
/// It is a new trace, linked to that of the command.
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

/// Records the end of the work in `span`.
#[cfg(feature = "nats")]
pub(crate) fn processed(span: &Span, error: Option<&'static str>) {
    failed(span, error);
}

/// Starts the span of a projection's transaction.
///
/// It is a new trace, linked to the commands of its events.
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

/// Returns the OpenTelemetry name of a bus.
pub(crate) fn system(bus: &str) -> &'static str {
    if bus.starts_with("nats") { "nats" } else { "storied" }
}
