//! In-memory exporters of metrics, and a projection that fails.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry_sdk::metrics::data::{AggregatedMetrics, Metric, MetricData};
use opentelemetry_sdk::metrics::{InMemoryMetricExporter, PeriodicReader, SdkMeterProvider};
use storied::bus::{JetStreamOptions, NatsOptions};
use storied::projection::ApplyError;
use storied::{Projection, PublisherOptions, RecordedEvent, Telemetry};
use tokio::sync::RwLock;
use tokio::time::{Instant, sleep};

use crate::support::NatsServer;
pub use crate::support::PATIENCE;
pub use crate::support::counter::{Add, AddUpTo, Counter, CounterError, CounterEvent};

/// Exclusive for tests with a span subscriber, shared for all others.
///
/// `tracing` caches the interest in a span at its first use. If another thread installs a
/// subscriber at that time, the span may stay disabled. A program has one subscriber, from its
/// start.
pub static TURN: RwLock<()> = RwLock::const_new(());

/// Applies every event except 13.
pub struct Sums<T>(pub &'static str, pub std::marker::PhantomData<fn(T)>);

impl<T: Send + 'static> Projection for Sums<T> {
    const NAME: &'static str = "sums";
    type Event = CounterEvent;
    type Transaction = T;

    fn name(&self) -> &str {
        self.0
    }

    async fn apply(&mut self, event: CounterEvent, _: &RecordedEvent, _: &mut T) -> Result<(), ApplyError> {
        if event == (CounterEvent::Added { n: 13 }) {
            Err("13 is not for this projection".into())
        } else {
            Ok(())
        }
    }

    async fn reset(&mut self, _: &mut T) -> Result<(), ApplyError> {
        Ok(())
    }
}

pub fn sums<T>(name: &'static str) -> Sums<T> {
    Sums(name, std::marker::PhantomData)
}

/// Returns options with short intervals, to keep tests fast.
pub fn log_stream(server: &NatsServer) -> NatsOptions {
    quick(NatsOptions::jetstream(JetStreamOptions::new().max_bytes(100 << 20)).url(server.url()))
}

pub fn quick(options: NatsOptions) -> NatsOptions {
    options
        .reconnect_wait(Duration::from_millis(50))
        .ping_interval(Duration::from_millis(300))
        .answer_timeout(Duration::from_secs(5))
}

pub fn publishing() -> PublisherOptions {
    PublisherOptions::new().heartbeat(Duration::from_millis(200))
}

/// One data stream of a metric.
#[derive(Debug, Clone)]
pub struct Point {
    pub name: String,
    pub unit: String,
    pub kind: &'static str,
    pub attributes: BTreeMap<String, String>,
    /// The value; the sum of a histogram.
    pub value: f64,
    /// The number of records of a histogram.
    pub count: u64,
}

/// A meter provider, and its exports.
pub struct Meters {
    provider: SdkMeterProvider,
    exporter: InMemoryMetricExporter,
    seen: Mutex<Vec<Point>>,
}

impl Meters {
    pub fn new() -> Self {
        let exporter = InMemoryMetricExporter::default();
        let reader = PeriodicReader::builder(exporter.clone()).build();
        Self {
            provider: SdkMeterProvider::builder().with_reader(reader).build(),
            exporter,
            seen: Mutex::default(),
        }
    }

    pub fn telemetry(&self) -> Telemetry {
        Telemetry::of(&self.provider)
    }

    pub fn provider(&self) -> &SdkMeterProvider {
        &self.provider
    }

    /// Returns all current points.
    pub fn points(&self) -> Vec<Point> {
        self.exporter.reset();
        self.provider.force_flush().unwrap();
        let exported = self.exporter.get_finished_metrics().unwrap();
        let scopes = exported.iter().flat_map(|resource| resource.scope_metrics());
        let own = scopes.filter(|scope| scope.scope().name() == "storied");
        let points: Vec<_> = own.flat_map(|scope| scope.metrics()).flat_map(points).collect();
        self.seen.lock().unwrap().extend(points.iter().cloned());
        points
    }

    /// Returns all points of all exports so far.
    pub fn seen(&self) -> Vec<Point> {
        self.seen.lock().unwrap().clone()
    }

    /// Sums the values and the counts of a metric over points with these attributes.
    pub fn value(&self, name: &str, attributes: &[(&str, &str)]) -> Option<(f64, u64)> {
        let fits = |point: &&Point| {
            let has = |(key, value): &(&str, &str)| point.attributes.get(*key).is_some_and(|v| v == value);
            point.name == name && attributes.iter().all(has)
        };
        let points: Vec<_> = self.points();
        let points: Vec<_> = points.iter().filter(fits).collect();
        let sum = |sum: (f64, u64), point: &&Point| (sum.0 + point.value, sum.1 + point.count);
        (!points.is_empty()).then(|| points.iter().fold((0.0, 0), sum))
    }

    pub fn sum(&self, name: &str, attributes: &[(&str, &str)]) -> f64 {
        self.value(name, attributes).map_or(0.0, |(value, _)| value)
    }

    pub fn count(&self, name: &str, attributes: &[(&str, &str)]) -> u64 {
        self.value(name, attributes).map_or(0, |(_, count)| count)
    }

    /// Waits until the value satisfies a condition.
    pub async fn until(&self, name: &str, attributes: &[(&str, &str)], wanted: impl Fn(f64) -> bool) {
        let give_up = Instant::now() + PATIENCE;
        loop {
            let value = self.value(name, attributes);
            if value.is_some_and(|(value, _)| wanted(value)) {
                return;
            }
            assert!(
                Instant::now() < give_up,
                "{name} {attributes:?} is {value:?}; all: {:#?}",
                self.points()
            );
            sleep(Duration::from_millis(10)).await;
        }
    }
}

fn points(metric: &Metric) -> Vec<Point> {
    let point = |kind, attributes: Vec<&KeyValue>, value: f64, count| {
        let attribute = |one: &KeyValue| (one.key.to_string(), one.value.to_string());
        let attributes = attributes.into_iter().map(attribute).collect();
        let (name, unit) = (metric.name().to_owned(), metric.unit().to_owned());
        Point { name, unit, kind, attributes, value, count }
    };
    macro_rules! read {
        ($data:expr) => {
            match $data {
                MetricData::Gauge(gauge) => gauge
                    .data_points()
                    .map(|one| point("gauge", one.attributes().collect(), one.value() as f64, 0))
                    .collect(),
                MetricData::Sum(sum) => sum
                    .data_points()
                    .map(|one| {
                        let kind = if sum.is_monotonic() { "counter" } else { "level" };
                        point(kind, one.attributes().collect(), one.value() as f64, 0)
                    })
                    .collect(),
                MetricData::Histogram(histogram) => histogram
                    .data_points()
                    .map(|one| point("histogram", one.attributes().collect(), one.sum() as f64, one.count()))
                    .collect(),
                MetricData::ExponentialHistogram(_) => panic!("{} is no metric of ours", metric.name()),
            }
        };
    }
    match metric.data() {
        AggregatedMetrics::F64(data) => read!(data),
        AggregatedMetrics::U64(data) => read!(data),
        AggregatedMetrics::I64(data) => read!(data),
    }
}

/// The properties of a metric, without its values.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shape {
    pub name: String,
    pub kind: String,
    pub unit: String,
    pub attributes: BTreeSet<String>,
}

impl Shape {
    /// Returns the properties of all metrics of these points.
    pub fn of(points: &[Point]) -> BTreeMap<String, Self> {
        let mut shapes: BTreeMap<String, Self> = BTreeMap::new();
        for point in points {
            let shape = shapes.entry(point.name.clone()).or_insert_with(|| Self {
                name: point.name.clone(),
                kind: point.kind.to_owned(),
                unit: point.unit.clone(),
                attributes: BTreeSet::new(),
            });
            assert_eq!((shape.kind.as_str(), &shape.unit), (point.kind, &point.unit), "{}", point.name);
            shape.attributes.extend(point.attributes.keys().cloned());
        }
        shapes
    }
}
