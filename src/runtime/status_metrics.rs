//! Metrics that are read from the status of a node at collection time. They have no other cost.

use std::sync::{Arc, Weak};

use opentelemetry::KeyValue;
use opentelemetry::metrics::AsyncInstrument;

use super::inner::Inner;
use crate::publisher::PublisherState;
use crate::telemetry::Telemetry;

/// A name, a unit and a description.
type Named = (&'static str, &'static str, &'static str);

/// Registers the metrics. Holds the node weakly: after it is dropped, they report nothing.
pub(super) fn observe(telemetry: &Telemetry, inner: &Arc<Inner>) {
    let meter = telemetry.meter();
    let node = Arc::downgrade(inner);
    let counter = |(name, unit, what): Named, read: Read<u64>| {
        let node = node.clone();
        let counter = meter.u64_observable_counter(name).with_unit(unit).with_description(what);
        counter.with_callback(move |observer| of(&node, observer, read)).build();
    };
    let level = |(name, unit, what): Named, read: Read<i64>| {
        let node = node.clone();
        let level = meter.i64_observable_up_down_counter(name).with_unit(unit).with_description(what);
        level.with_callback(move |observer| of(&node, observer, read)).build();
    };
    let seconds = |(name, unit, what): Named, read: Read<f64>| {
        let node = node.clone();
        let gauge = meter.f64_observable_gauge(name).with_unit(unit).with_description(what);
        gauge.with_callback(move |observer| of(&node, observer, read)).build();
    };
    let gauge = |(name, unit, what): Named, read: Read<u64>| {
        let node = node.clone();
        let gauge = meter.u64_observable_gauge(name).with_unit(unit).with_description(what);
        gauge.with_callback(move |observer| of(&node, observer, read)).build();
    };
    counter(("storied.append.count", "{append}", "Appends to streams, by outcome"), |inner, observer| {
        let status = inner.writer.status();
        let ends =
            [("committed", status.appends), ("conflict", status.conflicts), ("failed", status.failures)];
        for (outcome, count) in ends {
            observer.observe(count, &[KeyValue::new("storied.outcome", outcome)]);
        }
    });
    counter(("storied.append.events", "{event}", "Events that became durable"), |inner, observer| {
        observer.observe(inner.writer.status().events, &[]);
    });
    level(("storied.append.queue", "{append}", "Appends queued for a transaction"), |inner, observer| {
        observer.observe(signed(inner.writer.status().queued), &[]);
    });
    level(("storied.aggregate.live", "{aggregate}", "Aggregates in memory"), |inner, observer| {
        for status in inner.commands.registry().aggregates() {
            let category = KeyValue::new("storied.command.name", status.category);
            observer.observe(signed(status.live), &[category]);
        }
    });
    level(("storied.command.active", "{command}", "Commands in flight on this node"), |inner, observer| {
        let registry = inner.commands.registry();
        for status in registry.aggregates() {
            let name = KeyValue::new("storied.command.name", status.category);
            observer.observe(signed(status.in_flight), &[name]);
        }
        for status in registry.handlers() {
            let name = KeyValue::new("storied.command.name", status.name);
            observer.observe(signed(status.in_flight), &[name]);
        }
    });
    let lag = "Positions of the log not yet published; reported by the publishing node";
    gauge(("storied.publisher.lag", "{position}", lag), |inner, observer| {
        let status = inner.publisher.status().borrow().clone();
        let publishes = matches!(status.state, PublisherState::Publishing | PublisherState::Retrying { .. });
        if let (Some(published), Some(head), true) = (status.published, status.head, publishes) {
            let bus = KeyValue::new("storied.bus", status.bus);
            observer.observe(head.get().saturating_sub(published.get()), &[bus]);
        }
    });
    counter(
        ("storied.feed.repairs", "{repair}", "Reads of the store after a gap or delay of the bus"),
        |inner, observer| {
            observer.observe(inner.feed.status().repairs, &[]);
        },
    );
    seconds(
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
    gauge(("storied.projection.lag", "{position}", lag), |inner, observer| {
        for (name, status) in projections(inner) {
            if let Some(lag) = status.lag() {
                observer.observe(lag, &[name]);
            }
        }
    });
    counter(
        ("storied.projection.events", "{event}", "Events that projections applied on this node"),
        |inner, observer| {
            for (name, status) in projections(inner) {
                observer.observe(status.events_applied, &[name]);
            }
        },
    );
    counter(
        ("storied.projection.parked", "{event}", "Events that projections parked on this node"),
        |inner, observer| {
            for (name, status) in projections(inner) {
                observer.observe(status.events_parked, &[name]);
            }
        },
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
    inner.projections.iter().map(move |projection| (named(projection.name()), projection.status()))
}

fn signed(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
