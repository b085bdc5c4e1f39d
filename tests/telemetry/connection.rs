//! The metrics of a connection to NATS, from its first attempt on.

use storied::bus::NatsOptions;
use storied::{MemoryStore, Runtime};

use crate::meters::*;
use crate::support::{self, NatsServer};

const EVENTS: [(&str, &str); 1] = [("storied.connection", "events")];

pub async fn scenario(meters: &Meters) {
    let mut server = NatsServer::start(support::NatsOptions::core()).await;
    let before = |name: &str| (meters.sum(name, &EVENTS), meters.count(name, &EVENTS));
    let start = "storied.nats.connection.start.duration";
    let close = "storied.nats.connection.close.duration";
    let names =
        ["attempts", "errors", "losses", "reconnections"].map(|n| format!("storied.nats.connection.{n}"));
    let [attempts, errors, losses, reconnections] = &names;
    let [a, e, l, r] = names.each_ref().map(|name| before(name).0);
    let (starts, closes) = (before(start).1, before(close).1);
    let bus = quick(NatsOptions::core().url(server.url())).telemetry(&meters.telemetry()).bus();

    // No server is running.
    server.kill();
    bus.connect().await.unwrap_err();
    assert_eq!(meters.sum(attempts, &EVENTS) - a, 1.0);
    assert_eq!(meters.sum(errors, &EVENTS) - e, 1.0);
    assert_eq!(meters.count(start, &EVENTS) - starts, 1);
    assert!(meters.count(start, &[EVENTS[0], ("error.type", "unavailable")]) >= 1);

    server.restart().await;
    bus.connect().await.unwrap();
    assert_eq!(meters.sum(attempts, &EVENTS) - a, 2.0);
    assert_eq!(meters.sum(errors, &EVENTS) - e, 1.0);
    assert_eq!(meters.count(start, &EVENTS) - starts, 2);
    assert_eq!((meters.sum(losses, &EVENTS) - l, meters.sum(reconnections, &EVENTS) - r), (0.0, 0.0));

    server.kill();
    meters.until(losses, &EVENTS, |losses| losses - l == 1.0).await;
    // The bus keeps retrying.
    meters.until(attempts, &EVENTS, |attempts| attempts - a >= 5.0).await;
    assert_eq!(meters.sum(reconnections, &EVENTS) - r, 0.0);
    server.restart().await;
    meters.until(reconnections, &EVENTS, |again| again - r == 1.0).await;

    bus.disconnect().await;
    assert_eq!(meters.count(close, &EVENTS) - closes, 1);
    assert_eq!(meters.sum(losses, &EVENTS) - l, 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_attempts_errors_losses_and_returns() {
    let _turn = TURN.read().await;
    scenario(&Meters::new()).await;
}

/// Checks that the default is the global provider at the time of the connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_global_provider_is_the_default_and_an_option_comes_first() {
    let _turn = TURN.read().await;
    let (global, own) = (Meters::new(), Meters::new());
    let server = NatsServer::start(support::NatsOptions::core()).await;
    let early = NatsOptions::core().url(server.url()).bus();
    let told = NatsOptions::core().url(server.url()).telemetry(&own.telemetry()).bus();
    opentelemetry::global::set_meter_provider(global.provider().clone());
    early.connect().await.unwrap();
    told.connect().await.unwrap();
    let attempts = "storied.nats.connection.attempts";
    assert_eq!(own.sum(attempts, &EVENTS), 1.0);
    // Other tests of this process may use the global provider too.
    assert!(global.sum(attempts, &EVENTS) >= 1.0);
}

/// Checks that the provider of a runtime applies to a bus that has connected before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bus_connected_before_the_start_uses_the_provider_of_the_runtime() {
    let _turn = TURN.read().await;
    let (meters, own) = (Meters::new(), Meters::new());
    let mut server = NatsServer::start(support::NatsOptions::core()).await;
    let bus = quick(NatsOptions::core().url(server.url())).bus();
    let told = quick(NatsOptions::core().url(server.url())).telemetry(&own.telemetry()).bus();
    for bus in [&bus, &told] {
        bus.connect().await.unwrap();
    }
    let mut nodes = Vec::new();
    for bus in [&bus, &told] {
        let builder = Runtime::builder().store(MemoryStore::new()).telemetry(meters.telemetry());
        nodes.push(builder.bus(bus.clone()).start().await.unwrap());
    }
    let losses = "storied.nats.connection.losses";
    server.kill();
    meters.until(losses, &EVENTS, |losses| losses == 1.0).await;
    // An explicit option takes precedence.
    own.until(losses, &EVENTS, |losses| losses == 1.0).await;
    assert_eq!(meters.sum(losses, &EVENTS), 1.0);
    server.restart().await;
    meters.until("storied.nats.connection.reconnections", &EVENTS, |again| again == 1.0).await;
    for node in nodes {
        node.shutdown().await.unwrap();
    }
}
