//! Connection events for the user, and the connection in `status()`.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use storied::bus::{BusState, NatsEvent, NatsOptions};
use storied::{EventBus, Position};

use crate::bus::fixtures::*;
use crate::support::{self, NatsServer};

#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<NatsEvent>>>);

impl Heard {
    fn by(&self, options: NatsOptions) -> NatsOptions {
        let heard = self.clone();
        options.on_event(move |event| heard.0.lock().unwrap().push(event))
    }

    fn names(&self) -> Vec<&'static str> {
        let name = |event: &NatsEvent| match event {
            NatsEvent::Connected { .. } => "connected",
            NatsEvent::Disconnected { .. } => "disconnected",
            NatsEvent::SlowConsumer { .. } => "slow",
            NatsEvent::LameDuck => "lame duck",
            NatsEvent::Closed => "closed",
            _ => "?",
        };
        self.0.lock().unwrap().iter().map(name).collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_transition_is_reported_once() {
    let mut server = NatsServer::start(support::NatsOptions::core()).await;
    let heard = Heard::default();
    let bus = heard.by(options(Kind::Core, &server)).bus();
    assert!(heard.names().is_empty());
    bus.connect().await.unwrap();
    assert_eq!(heard.names(), ["connected"]);
    for round in 0..5 {
        server.kill();
        let away = 2 * round + 2;
        eventually("the disconnect is reported", || heard.names().len() == away).await;
        assert!(matches!(bus.state(), BusState::Disconnected { .. }));
        server.restart().await;
        eventually("the reconnect is reported", || heard.names().len() == away + 1).await;
        assert!(matches!(bus.state(), BusState::Connected { .. }));
    }
    bus.disconnect().await;
    bus.disconnect().await;
    pause(300).await;
    let round = ["disconnected", "connected"];
    let expected: Vec<_> = std::iter::once("connected").chain(round.repeat(5)).chain(["closed"]).collect();
    assert_eq!(heard.names(), expected);
    assert_eq!(bus.state(), BusState::Closed);
    let NatsEvent::Connected { to } = heard.0.lock().unwrap()[0].clone() else { panic!() };
    assert!(to.contains("nats-server") && to.contains("127.0.0.1"), "{to}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_shorter_than_the_poll_is_reported() {
    let mut server = NatsServer::start(support::NatsOptions::core()).await;
    let heard = Heard::default();
    let bus = heard.by(options(Kind::Core, &server).reconnect_wait(Duration::from_millis(1))).bus();
    bus.connect().await.unwrap();
    for round in 1..=10 {
        server.restart().await;
        eventually("both", || heard.names().len() == 1 + 2 * round).await;
        assert_eq!(heard.names()[2 * round - 1..], ["disconnected", "connected"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_consumers_and_lame_ducks() {
    let config = vec!["lame_duck_duration: \"30s\"".into(), "lame_duck_grace_period: \"1s\"".into()];
    let server = NatsServer::start(support::NatsOptions { config, ..support::NatsOptions::core() }).await;
    let heard = Heard::default();
    // A handler that panics changes nothing.
    let inner = heard.clone();
    let handler = move |event: NatsEvent| {
        inner.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(event);
        panic!("on purpose");
    };
    let bus = options(Kind::Core, &server).subscription_capacity(10).on_event(handler).bus();
    let store = store();
    let _slow = subscribe(&bus, &store).await;
    // In a flood of overflows async-nats may lose an event: another connection receives the lame
    // duck event.
    let duck = Heard::default();
    let other = duck.by(options(Kind::Core, &server)).bus();
    write(&store, 0, 500).await;
    let mut publisher = publisher(&other, &store).await;
    for batch in batches(&store, Position::START, 500).await {
        publisher.publish(batch).await.unwrap();
    }
    eventually("slow", || heard.names().contains(&"slow")).await;
    let NatsEvent::SlowConsumer { overflows } = heard.0.lock().unwrap()[1].clone() else { panic!() };
    assert!(overflows > 0);
    server.signal(nix::sys::signal::Signal::SIGUSR2);
    eventually("lame duck", || duck.names().contains(&"lame duck")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_borrowed_connection_reports_connects_and_disconnects() {
    let mut server = NatsServer::start(support::NatsOptions::core()).await;
    let connect = async_nats::ConnectOptions::new().reconnect_delay_callback(|_| Duration::from_millis(50));
    let client = connect.connect(server.url()).await.unwrap();
    let heard = Heard::default();
    let bus = heard.by(options(Kind::Core, &server)).client(client.clone()).bus();
    bus.connect().await.unwrap();
    server.kill();
    eventually("away", || heard.names().len() == 2).await;
    server.restart().await;
    eventually("back", || heard.names().len() == 3).await;
    bus.disconnect().await;
    assert_eq!(heard.names(), ["connected", "disconnected", "connected", "closed"]);
    client.flush().await.unwrap();
}
