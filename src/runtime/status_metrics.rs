//! Metrics that are read from the status of a node at collection time. They have no other cost.

use std::sync::{Arc, Weak};

use opentelemetry::KeyValue;
use opentelemetry::metrics::{AsyncInstrument, Meter};

use super::inner::Inner;
use crate::publisher::PublisherState;
use crate::telemetry::Telemetry;

/// A name, a unit and a description.
type Named = (&'static str, &'static str, &'static str);

/// Registers the metrics. Holds the node weakly: after it is dropped, they report nothing.
pub(super) fn observe(telemetry: &Telemetry, inner: &Arc<Inner>) {
    let node = Observed { meter: telemetry.meter(), inner: Arc::downgrade(inner) };
    observe_appends(&node);
    observe_commands(&node);
    observe_log(&node);
    observe_projections(&node);
    observe_processes(&node);
    observe_scheduler(&node);
}

/// A node with the meter of its metrics.
struct Observed<'a> {
    meter: &'a Meter,
    inner: Weak<Inner>,
}

impl Observed<'_> {
    fn counter(&self, (name, unit, what): Named, read: Read<u64>) {
        let inner = self.inner.clone();
        let counter = self.meter.u64_observable_counter(name).with_unit(unit).with_description(what);
        counter.with_callback(move |observer| of(&inner, observer, read)).build();
    }

    fn level(&self, (name, unit, what): Named, read: Read<i64>) {
        let inner = self.inner.clone();
        let level = self.meter.i64_observable_up_down_counter(name).with_unit(unit).with_description(what);
        level.with_callback(move |observer| of(&inner, observer, read)).build();
    }

    fn seconds(&self, (name, unit, what): Named, read: Read<f64>) {
        let inner = self.inner.clone();
        let gauge = self.meter.f64_observable_gauge(name).with_unit(unit).with_description(what);
        gauge.with_callback(move |observer| of(&inner, observer, read)).build();
    }

    fn gauge(&self, (name, unit, what): Named, read: Read<u64>) {
        let inner = self.inner.clone();
        let gauge = self.meter.u64_observable_gauge(name).with_unit(unit).with_description(what);
        gauge.with_callback(move |observer| of(&inner, observer, read)).build();
    }
}

fn observe_appends(node: &Observed<'_>) {
    node.counter(
        ("storied.append.count", "{append}", "Appends to streams, by outcome"),
        |inner, observer| {
            let status = inner.writer.status();
            let ends =
                [("committed", status.appends), ("conflict", status.conflicts), ("failed", status.failures)];
            for (outcome, count) in ends {
                observer.observe(count, &[KeyValue::new("storied.outcome", outcome)]);
            }
        },
    );
    node.counter(("storied.append.events", "{event}", "Events that became durable"), |inner, observer| {
        observer.observe(inner.writer.status().events, &[]);
    });
    node.level(
        ("storied.append.queue", "{append}", "Appends queued for a transaction"),
        |inner, observer| {
            observer.observe(signed(inner.writer.status().queued), &[]);
        },
    );
}

fn observe_commands(node: &Observed<'_>) {
    node.level(("storied.aggregate.live", "{aggregate}", "Aggregates in memory"), |inner, observer| {
        for status in inner.commands.registry().status().0 {
            let category = KeyValue::new("storied.command.name", status.category);
            observer.observe(signed(status.live), &[category]);
        }
    });
    node.level(
        ("storied.command.active", "{command}", "Commands in flight on this node"),
        |inner, observer| {
            let (aggregates, handlers) = inner.commands.registry().status();
            for status in aggregates {
                let name = KeyValue::new("storied.command.name", status.category);
                observer.observe(signed(status.in_flight), &[name]);
            }
            for status in handlers {
                let name = KeyValue::new("storied.command.name", status.name);
                observer.observe(signed(status.in_flight), &[name]);
            }
        },
    );
}

/// Registers the metrics of the publisher and the feed.
fn observe_log(node: &Observed<'_>) {
    let lag = "Positions of the log not yet published; reported by the publishing node";
    node.gauge(("storied.publisher.lag", "{position}", lag), |inner, observer| {
        let status = inner.publisher_status();
        let publishes = matches!(status.state, PublisherState::Publishing | PublisherState::Retrying { .. });
        if let (Some(bus), Some(published), Some(head), true) =
            (status.bus, status.published, status.head, publishes)
        {
            let bus = KeyValue::new("storied.bus", bus);
            observer.observe(head.get().saturating_sub(published.get()), &[bus]);
        }
    });
    node.counter(
        ("storied.feed.repairs", "{repair}", "Reads after a lost or late notification of events"),
        |inner, observer| {
            observer.observe(inner.feed.status().repairs, &[]);
        },
    );
}

fn observe_projections(node: &Observed<'_>) {
    node.seconds(
        ("storied.projection.lag.time", "s", "Age of the oldest event not yet applied by a projection"),
        |inner, observer| {
            for (name, status) in projections(inner) {
                if let Some(lag) = status.lag_time() {
                    observer.observe(lag.as_secs_f64(), &[name]);
                }
            }
        },
    );
    let lag = "Positions of the log not yet applied by a projection; an upper bound of the events";
    node.gauge(("storied.projection.lag", "{position}", lag), |inner, observer| {
        for (name, status) in projections(inner) {
            if let Some(lag) = status.lag() {
                observer.observe(lag, &[name]);
            }
        }
    });
    node.counter(
        ("storied.projection.events", "{event}", "Events that projections applied on this node"),
        |inner, observer| {
            for (name, status) in projections(inner) {
                observer.observe(status.events_applied, &[name]);
            }
        },
    );
    node.counter(
        ("storied.projection.parked", "{event}", "Events that projections parked on this node"),
        |inner, observer| {
            for (name, status) in projections(inner) {
                observer.observe(status.events_parked, &[name]);
            }
        },
    );
}

fn observe_processes(node: &Observed<'_>) {
    node.counter(
        ("storied.process.inputs", "{input}", "Inputs of instances on this node, by outcome"),
        |inner, observer| {
            for status in inner.processes.iter().map(|process| process.status()) {
                let name = KeyValue::new("storied.process", status.name);
                let outcomes = [
                    ("reacted", status.reacted),
                    ("held", status.held),
                    ("parked", status.parked),
                    ("ignored", status.ignored),
                ];
                for (outcome, count) in outcomes {
                    observer.observe(count, &[name.clone(), KeyValue::new("storied.outcome", outcome)]);
                }
            }
        },
    );
    let active = "Instances with a reaction or a command in progress on this node";
    node.level(("storied.process.active", "{instance}", active), |inner, observer| {
        for status in inner.processes.iter().map(|process| process.status()) {
            observer.observe(signed(status.active), &[KeyValue::new("storied.process", status.name)]);
        }
    });
}

fn observe_scheduler(node: &Observed<'_>) {
    node.counter(
        ("storied.scheduler.commands", "{command}", "Ends of scheduled commands on this node, by outcome"),
        |inner, observer| {
            let status = inner.scheduler_status();
            let outcomes =
                [("executed", status.executed), ("parked", status.parked), ("postponed", status.postponed)];
            for (outcome, count) in outcomes {
                observer.observe(count, &[KeyValue::new("storied.outcome", outcome)]);
            }
        },
    );
    let active = "Scheduled commands that were started and have no answer yet";
    node.level(("storied.scheduler.active", "{command}", active), |inner, observer| {
        observer.observe(signed(inner.scheduler_status().started), &[]);
    });
    node.counter(
        ("storied.scheduler.ticks", "{tick}", "Ticks of recurring schedules that became commands"),
        |inner, observer| observer.observe(inner.scheduler_status().ticks, &[]),
    );
}

type Read<T> = fn(&Inner, &dyn AsyncInstrument<T>);

fn of<T>(node: &Weak<Inner>, observer: &dyn AsyncInstrument<T>, read: Read<T>) {
    if let Some(inner) = node.upgrade() {
        read(&inner, observer);
    }
}

fn projections(inner: &Inner) -> impl Iterator<Item = (KeyValue, crate::ProjectionStatus)> {
    let named = |name: &str| KeyValue::new("storied.projection", name.to_owned());
    let followers = inner.processes.iter().map(|process| process.follower());
    inner
        .projections
        .iter()
        .chain(followers)
        .map(move |projection| (named(projection.name()), projection.status()))
}

fn signed(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
