//! Metrics that are recorded where the work happens.
//!
//! The runtime observes those that are part of a status.
//!
//! Attributes are bounded: kinds, names of types and of configuration, never ids.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use opentelemetry::KeyValue;
use opentelemetry::metrics::{Counter, Histogram, Meter};

use super::Telemetry;
use super::trace::Destination;

/// Bucket limits of durations in seconds: from a commit on a fast disk to an outage.
const SECONDS: [f64; 15] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Bucket limits of numbers of events.
const EVENTS: [f64; 10] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0];

/// The instruments. Default: none. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Metrics(Option<Arc<Instruments>>);

struct Instruments {
    command_duration: Histogram<f64>,
    command_retries: Counter<u64>,
    append_duration: Histogram<f64>,
    append_batch: Histogram<u64>,
    lease_changes: Counter<u64>,
    projection_duration: Histogram<f64>,
    snapshots: Counter<u64>,
    sent: Counter<u64>,
    operation_duration: Histogram<f64>,
    #[cfg(feature = "nats")]
    nats: Nats,
}

#[cfg(feature = "nats")]
struct Nats {
    connection_attempts: Counter<u64>,
    connection_errors: Counter<u64>,
    connection_losses: Counter<u64>,
    reconnections: Counter<u64>,
    start_duration: Histogram<f64>,
    close_duration: Histogram<f64>,
    consumed: Counter<u64>,
    redelivered: Counter<u64>,
    settled: Counter<u64>,
    process_duration: Histogram<f64>,
    dead_letters: Counter<u64>,
    consumer_pending: opentelemetry::metrics::Gauge<u64>,
    consumer_unsettled: opentelemetry::metrics::Gauge<u64>,
    stream_messages: opentelemetry::metrics::Gauge<u64>,
    stream_bytes: opentelemetry::metrics::Gauge<u64>,
}

/// The start of an operation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timer(Instant);

impl Timer {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    fn seconds(self) -> f64 {
        self.0.elapsed().as_secs_f64()
    }
}

fn counter(meter: &Meter, name: &'static str, unit: &'static str, what: &'static str) -> Counter<u64> {
    meter.u64_counter(name).with_unit(unit).with_description(what).build()
}

fn seconds(meter: &Meter, name: &'static str, what: &'static str) -> Histogram<f64> {
    let histogram = meter.f64_histogram(name).with_unit("s").with_description(what);
    histogram.with_boundaries(SECONDS.to_vec()).build()
}

impl Metrics {
    pub(crate) fn of(telemetry: &Telemetry) -> Self {
        let meter = telemetry.meter();
        Self(Some(Arc::new(Instruments {
            command_duration: seconds(
                meter,
                "storied.command.duration",
                "Time from the submission of a command to its answer, if the caller waits",
            ),
            command_retries: counter(
                meter,
                "storied.command.retries",
                "{retry}",
                "Commands decided again after a conflict",
            ),
            append_duration: seconds(
                meter,
                "storied.append.duration",
                "Transactions of the event store; each takes all queued appends",
            ),
            append_batch: meter
                .u64_histogram("storied.append.batch.size")
                .with_unit("{event}")
                .with_description("Events in one transaction of the event store")
                .with_boundaries(EVENTS.to_vec())
                .build(),
            lease_changes: counter(
                meter,
                "storied.lease.changes",
                "{change}",
                "Leases that this node acquired, lost or released",
            ),
            projection_duration: seconds(
                meter,
                "storied.projection.duration",
                "Transactions of projections: apply events, move the checkpoint",
            ),
            snapshots: counter(
                meter,
                "storied.projection.snapshots",
                "{snapshot}",
                "Snapshots of in-memory projections",
            ),
            sent: counter(meter, "messaging.client.sent.messages", "{message}", "Events handed to the bus"),
            operation_duration: seconds(
                meter,
                "messaging.client.operation.duration",
                "Publishing a batch of events until its confirmation, and acknowledging deliveries",
            ),
            #[cfg(feature = "nats")]
            nats: Nats::of(meter),
        })))
    }

    /// Records the answer of a command.
    pub(crate) fn command(&self, name: &'static str, took: Duration, error: Option<&'static str>) {
        let Some(instruments) = &self.0 else { return };
        let name = KeyValue::new("storied.command.name", name);
        with_error(error, [name], |attributes| {
            instruments.command_duration.record(took.as_secs_f64(), attributes);
        });
    }

    /// Counts a command that is decided again.
    pub(crate) fn command_retried(&self, name: &'static str) {
        let Some(instruments) = &self.0 else { return };
        instruments.command_retries.add(1, &[KeyValue::new("storied.command.name", name)]);
    }

    /// Records a transaction of `events` events. The error applies to the whole transaction.
    pub(crate) fn appended(&self, timer: Timer, events: usize, error: Option<&'static str>) {
        let Some(instruments) = &self.0 else { return };
        with_error(error, [], |attributes| {
            instruments.append_duration.record(timer.seconds(), attributes);
        });
        instruments.append_batch.record(events as u64, &[]);
    }

    /// Counts a lease change: `acquired`, `lost` or `released`.
    pub(crate) fn lease(&self, name: &str, change: &'static str) {
        let Some(instruments) = &self.0 else { return };
        let kind = match name.split(['/', '-', '@']).next() {
            Some("publisher") => "publisher",
            Some("scheduler") => "scheduler",
            Some("member") => "member",
            Some("rebuild") => "rebuild",
            Some("partition") => "partition",
            _ => "projection",
        };
        let attributes =
            [KeyValue::new("storied.lease.kind", kind), KeyValue::new("storied.lease.change", change)];
        instruments.lease_changes.add(1, &attributes);
    }

    /// Records a transaction of a projection.
    pub(crate) fn applied(&self, projection: &str, took: Duration) {
        let Some(instruments) = &self.0 else { return };
        let attributes = [KeyValue::new("storied.projection", projection.to_owned())];
        instruments.projection_duration.record(took.as_secs_f64(), &attributes);
    }

    /// Counts a snapshot of an in-memory projection, or its failure.
    pub(crate) fn snapshot(&self, projection: &str, error: Option<&'static str>) {
        let Some(instruments) = &self.0 else { return };
        let attributes = [KeyValue::new("storied.projection", projection.to_owned())];
        with_error(error, attributes, |attributes| instruments.snapshots.add(1, attributes));
    }

    /// Records a published batch, or its failure.
    pub(crate) fn published(
        &self,
        to: Destination<'_>,
        timer: Timer,
        events: usize,
        error: Option<&'static str>,
    ) {
        let Some(instruments) = &self.0 else { return };
        with_error(error, operation(to, "publish"), |attributes| {
            instruments.sent.add(events as u64, attributes);
        });
        instruments.operation(to, "publish", "send", timer, error);
    }
}

impl Instruments {
    fn operation(
        &self,
        to: Destination<'_>,
        name: &'static str,
        kind: &'static str,
        timer: Timer,
        error: Option<&'static str>,
    ) {
        let [system, destination, name] = operation(to, name);
        let kind = KeyValue::new("messaging.operation.type", kind);
        with_error(error, [system, destination, name, kind], |attributes| {
            self.operation_duration.record(timer.seconds(), attributes);
        });
    }
}

/// Returns the attributes of all messaging metrics.
fn operation(on: Destination<'_>, name: &'static str) -> [KeyValue; 3] {
    [
        KeyValue::new("messaging.system", on.system),
        KeyValue::new("messaging.destination.name", on.name.to_owned()),
        KeyValue::new("messaging.operation.name", name),
    ]
}

fn with_error<const N: usize>(
    error: Option<&'static str>,
    attributes: [KeyValue; N],
    record: impl FnOnce(&[KeyValue]),
) {
    match error {
        None => record(&attributes),
        Some(error) => {
            let mut attributes = Vec::from(attributes);
            attributes.push(KeyValue::new("error.type", error));
            record(&attributes);
        }
    }
}

#[cfg(feature = "nats")]
impl Nats {
    fn of(meter: &Meter) -> Self {
        let gauge = |name: &'static str, unit: &'static str, what: &'static str| {
            meter.u64_gauge(name).with_unit(unit).with_description(what).build()
        };
        Self {
            connection_attempts: counter(
                meter,
                "storied.nats.connection.attempts",
                "{attempt}",
                "Attempts to connect to NATS, reconnects included",
            ),
            connection_errors: counter(
                meter,
                "storied.nats.connection.errors",
                "{error}",
                "Failed connections, and errors reported by a server or the driver",
            ),
            connection_losses: counter(meter, "storied.nats.connection.losses", "{loss}", "Connections lost"),
            reconnections: counter(
                meter,
                "storied.nats.connection.reconnections",
                "{reconnection}",
                "Connections restored after a loss",
            ),
            start_duration: seconds(
                meter,
                "storied.nats.connection.start.duration",
                "Time to connect, or to fail",
            ),
            close_duration: seconds(
                meter,
                "storied.nats.connection.close.duration",
                "Time to close a connection in order, or to give up",
            ),
            consumed: counter(
                meter,
                "messaging.client.consumed.messages",
                "{message}",
                "Events that raw subscriptions received, redeliveries included",
            ),
            redelivered: counter(
                meter,
                "storied.consumer.redeliveries",
                "{message}",
                "Redelivered events among them",
            ),
            settled: counter(
                meter,
                "storied.consumer.settled",
                "{message}",
                "Deliveries ended by ack, nak or term",
            ),
            process_duration: seconds(
                meter,
                "messaging.process.duration",
                "Time to handle one event of a raw subscription",
            ),
            dead_letters: counter(
                meter,
                "storied.consumer.dead_letters",
                "{message}",
                "Events published as dead letters",
            ),
            consumer_pending: gauge(
                "storied.consumer.pending",
                "{message}",
                "Messages of the stream not yet delivered by a consumer",
            ),
            consumer_unsettled: gauge(
                "storied.consumer.unsettled",
                "{message}",
                "Messages delivered by a consumer and not acknowledged",
            ),
            stream_messages: gauge("storied.nats.stream.messages", "{message}", "Messages in the log stream"),
            stream_bytes: gauge("storied.nats.stream.size", "By", "Bytes in the log stream"),
        }
    }
}

/// Returns the attribute of a connection to NATS: `events` or `commands`.
#[cfg(feature = "nats")]
fn connection_attribute(connection: &'static str) -> KeyValue {
    KeyValue::new("storied.connection", connection)
}

#[cfg(feature = "nats")]
impl Metrics {
    pub(crate) fn connecting(&self, connection: &'static str) {
        let Some(Instruments { nats, .. }) = self.0.as_deref() else { return };
        nats.connection_attempts.add(1, &[connection_attribute(connection)]);
    }

    /// Records the end of the first connection attempt.
    pub(crate) fn connected(&self, connection: &'static str, timer: Timer, error: Option<&'static str>) {
        let Some(Instruments { nats, .. }) = self.0.as_deref() else { return };
        with_error(error, [connection_attribute(connection)], |attributes| {
            nats.start_duration.record(timer.seconds(), attributes);
            if error.is_some() {
                nats.connection_errors.add(1, attributes);
            }
        });
    }

    /// Counts an error reported by a server or the driver.
    pub(crate) fn connection_failed(&self, connection: &'static str, error: &'static str) {
        let Some(Instruments { nats, .. }) = self.0.as_deref() else { return };
        nats.connection_errors
            .add(1, &[connection_attribute(connection), KeyValue::new("error.type", error)]);
    }

    pub(crate) fn connection_lost(&self, connection: &'static str) {
        let Some(Instruments { nats, .. }) = self.0.as_deref() else { return };
        nats.connection_losses.add(1, &[connection_attribute(connection)]);
    }

    pub(crate) fn reconnected(&self, connection: &'static str) {
        let Some(Instruments { nats, .. }) = self.0.as_deref() else { return };
        nats.reconnections.add(1, &[connection_attribute(connection)]);
    }

    pub(crate) fn closed(&self, connection: &'static str, timer: Timer, error: Option<&'static str>) {
        let Some(Instruments { nats, .. }) = self.0.as_deref() else { return };
        with_error(error, [connection_attribute(connection)], |attributes| {
            nats.close_duration.record(timer.seconds(), attributes);
        });
    }

    /// Counts an event of a raw subscription; `redelivered` marks a redelivery.
    pub(crate) fn consumed(&self, from: Destination<'_>, redelivered: bool) {
        let Some(Instruments { nats, .. }) = self.0.as_deref() else { return };
        let attributes = operation(from, "receive");
        nats.consumed.add(1, &attributes);
        if redelivered {
            nats.redelivered.add(1, &attributes[..2]);
        }
    }

    /// Records the end of a delivery by `ack`, `nak` or `term`, or the failure to end it.
    pub(crate) fn settled(
        &self,
        from: Destination<'_>,
        how: &'static str,
        timer: Timer,
        error: Option<&'static str>,
    ) {
        let Some(instruments) = self.0.as_deref() else { return };
        with_error(error, operation(from, how), |attributes| {
            instruments.nats.settled.add(1, attributes);
        });
        instruments.operation(from, how, "settle", timer, error);
    }

    /// Records the end of a handler.
    pub(crate) fn processed(&self, from: Destination<'_>, timer: Timer, error: Option<&'static str>) {
        let Some(Instruments { nats, .. }) = self.0.as_deref() else { return };
        with_error(error, operation(from, "process"), |attributes| {
            nats.process_duration.record(timer.seconds(), attributes);
        });
    }

    pub(crate) fn dead_letter(&self, from: Destination<'_>) {
        let Some(Instruments { nats, .. }) = self.0.as_deref() else { return };
        nats.dead_letters.add(1, &operation(from, "process")[..2]);
    }

    /// Records the counts that the server reports for a consumer.
    pub(crate) fn consumer(&self, from: Destination<'_>, name: &str, pending: u64, unsettled: u64) {
        let Some(Instruments { nats, .. }) = self.0.as_deref() else { return };
        let [system, destination, _] = operation(from, "receive");
        let name = KeyValue::new("messaging.consumer.group.name", name.to_owned());
        let attributes = [system, destination, name];
        nats.consumer_pending.record(pending, &attributes);
        nats.consumer_unsettled.record(unsettled, &attributes);
    }

    /// Records the size that the server reports for the log stream.
    pub(crate) fn log_stream(&self, stream: Destination<'_>, messages: u64, bytes: u64) {
        let Some(Instruments { nats, .. }) = self.0.as_deref() else { return };
        let attributes = &operation(stream, "publish")[..2];
        nats.stream_messages.record(messages, attributes);
        nats.stream_bytes.record(bytes, attributes);
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Metrics").field(&self.0.is_some()).finish()
    }
}
