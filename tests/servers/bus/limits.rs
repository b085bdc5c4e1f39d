//! Every option of the NATS bus at 0, 1 and its maximum: refused with its name and range, or it
//! works.

use std::time::Duration;

use storied::bus::{
    BusError, ConsumerOptions, HandleOptions, JetStreamOptions, NatsOptions, RetryPolicy, StartFrom,
    SubscribeOptions,
};
use storied::command::{CommandBus, NatsCommandOptions};
use storied::runtime::StartError;
use storied::{EventBus, MemoryStore, Runtime};
use tokio::time::timeout;

use crate::bus::fixtures::*;
use crate::bus::raw::{Press, listen, take};
use crate::support::{self, NatsServer};

const TIMES: [Duration; 4] = [Duration::ZERO, Duration::from_nanos(1), Duration::from_secs(1), Duration::MAX];

/// Checks that a value is refused by name before anything starts, or works.
async fn refused_or_works(server: &NatsServer, name: &str, options: NatsOptions) -> bool {
    let options = options.url(server.url());
    let runtime = Runtime::builder().store(MemoryStore::new()).bus(options.clone().bus());
    match timeout(PATIENCE, runtime.start()).await.unwrap() {
        Err(StartError::Bus(error)) => {
            let says = error.to_string();
            assert!(
                says.contains(name) && says.contains("between") || says.contains("must not exceed"),
                "{says}"
            );
            let again = options.bus().connect().await.unwrap_err();
            assert_eq!(again.to_string(), says);
            false
        }
        Err(error) => panic!("{name}: {error}"),
        Ok(runtime) => {
            runtime.shutdown().await.unwrap();
            let bus = options.bus();
            timeout(PATIENCE, bus.connect()).await.unwrap().unwrap();
            if bus.is_durable() {
                // The stream belongs to the store of that runtime.
                let jetstream = async_nats::jetstream::new(bus.client().await.unwrap());
                let _ = jetstream.delete_stream("STORIED_EVENTS").await;
            }
            let mut press = Press::new(&bus).await;
            let mut subscription = listen(&bus, &["*"], SubscribeOptions::new()).await;
            for _ in 0..2 {
                press.written(1).await;
                take(&mut subscription, 1).await;
            }
            if bus.is_durable() {
                let jetstream = async_nats::jetstream::new(bus.client().await.unwrap());
                jetstream.delete_stream("STORIED_EVENTS").await.unwrap();
            }
            true
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_option_of_the_bus_is_refused_or_works() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let mut worked = 0;
    for time in TIMES {
        for (name, options) in [
            ("reconnect_wait", NatsOptions::core().reconnect_wait(time)),
            ("ping_interval", NatsOptions::core().ping_interval(time)),
            ("connection_timeout", NatsOptions::core().connection_timeout(time)),
            ("answer_timeout", NatsOptions::core().answer_timeout(time)),
            (
                "max_age",
                NatsOptions::jetstream(log_stream().max_age(time).duplicate_window(Duration::from_secs(1))),
            ),
            ("duplicate_window", NatsOptions::jetstream(log_stream().duplicate_window(time))),
        ] {
            worked += usize::from(refused_or_works(&server, name, options).await);
        }
    }
    assert_eq!(worked, 6, "a second is right everywhere");
    for count in [0, 1, usize::MAX] {
        for (name, options) in [
            ("subscription_capacity", NatsOptions::core().subscription_capacity(count)),
            ("window", NatsOptions::jetstream(log_stream().window(count))),
            ("replicas", NatsOptions::jetstream(log_stream().replicas(count))),
        ] {
            assert_eq!(refused_or_works(&server, name, options).await, count == 1, "{name} {count}");
        }
    }
    for bytes in [0, u64::MAX] {
        let options = NatsOptions::jetstream(JetStreamOptions::new().max_bytes(bytes));
        assert!(!refused_or_works(&server, "max_bytes", options).await);
    }
    for name in ["", " ", "a b", "a.b", "a/b", "a*", ">", &"x".repeat(300)] {
        let bus = NatsOptions::jetstream(log_stream().stream(name)).url(server.url()).bus();
        let error = bus.connect().await.unwrap_err();
        assert!(
            matches!(&error, BusError::Incompatible { reason } if reason.contains("stream name")),
            "{error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_option_of_a_subscription_is_refused_or_works() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let bus = options(Kind::JetStream, &server).bus();
    let mut press = Press::new(&bus).await;
    let printed = press.written(3).await;
    let durable = || ConsumerOptions::durable("x");
    let consumer = |options| SubscribeOptions::new().consumer(options);
    let plain = || consumer(durable());
    let mut tried: Vec<(&str, bool, SubscribeOptions)> = Vec::new();
    for time in TIMES {
        let second = time == Duration::from_secs(1);
        tried.push(("pull_timeout", second, plain().pull_timeout(time)));
        tried.push(("ack_wait", second, consumer(durable().ack_wait(time))));
        tried.push(("backoff", second, consumer(durable().max_deliver(3).backoff([time, time]))));
        let early = ConsumerOptions::ephemeral().start(StartFrom::Beginning);
        tried.push(("inactive_threshold", second, consumer(early.inactive_threshold(time))));
    }
    for (count, fits) in [(0, false), (1, true), (usize::MAX, false)] {
        tried.push(("capacity", fits, plain().capacity(count)));
        tried.push(("max_ack_pending", fits, consumer(durable().max_ack_pending(count))));
    }
    for (times, fits) in [(0, false), (1, true), (u32::MAX, true)] {
        tried.push(("max_deliver", fits, consumer(durable().max_deliver(times))));
    }
    tried.push(("max_deliver", false, consumer(durable().max_deliver(1).backoff([Duration::from_secs(1)]))));
    tried.push(("backoff", false, consumer(durable().backoff(vec![Duration::from_secs(1); 1_001]))));
    tried.push(("Sequence", false, consumer(durable().start(StartFrom::Sequence(0)))));
    tried.push(("durable", false, consumer(ConsumerOptions::durable(""))));
    tried.push(("durable", false, consumer(ConsumerOptions::durable(" "))));
    tried.push(("durable", false, consumer(ConsumerOptions::durable_as(""))));
    tried.push(("durable", false, consumer(ConsumerOptions::durable_with(|_, _| String::new()))));
    let jetstream = async_nats::jetstream::new(bus.client().await.unwrap());
    for (name, fits, options) in tried {
        let shown = format!("{name}: {options:?}");
        match timeout(PATIENCE, bus.subscribe(["*"], options)).await.unwrap() {
            Ok(mut subscription) => {
                assert!(fits, "{shown}");
                take(&mut subscription, printed.len()).await;
                subscription.close(PATIENCE).await.unwrap();
                let stream = jetstream.get_stream("STORIED_EVENTS").await.unwrap();
                // An ephemeral consumer is gone.
                let _ = stream.delete_consumer("x:$noqueue:$all").await;
            }
            Err(BusError::Incompatible { reason }) => {
                assert!(!fits && reason.contains(name), "{shown}: {reason}")
            }
            Err(error) => panic!("{shown}: {error}"),
        }
    }
    for names in [&["thing"][..], &["note.written", "thing"], &["note.$x"], &["note.a:b.>"]] {
        let error = bus.subscribe(names, SubscribeOptions::new()).await.unwrap_err();
        assert!(
            matches!(&error, BusError::Incompatible { reason } if reason.contains("event names")),
            "{error}"
        );
    }
}

/// The longest waits are long, not zero. An option that needs a stream is refused over Core.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_without_end_waits_and_dead_letters_need_a_stream() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let bus = options(Kind::JetStream, &server).bus();
    let mut press = Press::new(&bus).await;
    let subscribe = || SubscribeOptions::new().consumer(ConsumerOptions::durable("x"));
    let subscription = listen(&bus, &["note.written"], subscribe()).await;
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    let forever =
        RetryPolicy::new().initial_backoff(Duration::MAX).max_backoff(Duration::MAX).max_attempts(u64::MAX);
    let handling =
        subscription.for_each(HandleOptions::new().retry(forever).concurrency(usize::MAX), move |delivery| {
            tell.send(delivery.attempt()).unwrap();
            std::future::ready(Err(storied::bus::HandleError::retry("not yet")))
        });
    let handling = handling.unwrap();
    press.written(1).await;
    assert_eq!(timeout(PATIENCE, told.recv()).await.unwrap(), Some(1));
    assert!(timeout(Duration::from_millis(500), told.recv()).await.is_err(), "it came again at once");
    handling.stop(PATIENCE).await.unwrap();
    let listening =
        listen(&bus, &["*"], SubscribeOptions::new().consumer(ConsumerOptions::durable("y"))).await;
    let mut listening = listening;
    let delivery = crate::bus::raw::delivery(&mut listening).await;
    delivery.nak_with_delay(Duration::MAX).await.unwrap();
    crate::bus::raw::nothing(&mut listening, 500).await;

    let core = options(Kind::Core, &server).bus();
    let subscription = listen(&core, &["*"], SubscribeOptions::new()).await;
    let error = subscription
        .for_each(HandleOptions::new().dead_letters(), |_| std::future::ready(Ok(())))
        .unwrap_err();
    assert!(
        matches!(&error, BusError::Incompatible { reason } if reason.contains("dead_letters")),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_option_of_the_command_bus_is_refused_or_works() {
    let server = NatsServer::start(support::NatsOptions::core()).await;
    let commands = || NatsCommandOptions::new(NatsOptions::core().url(server.url()));
    let start = async |commands: NatsCommandOptions| {
        let runtime = Runtime::builder().store(MemoryStore::new()).commands(CommandBus::nats(commands));
        timeout(PATIENCE, runtime.start()).await.unwrap()
    };
    let named = |error: StartError, option: &str| {
        assert!(matches!(&error, StartError::Option(error) if error.option == option), "{error}");
    };
    for time in TIMES {
        match start(commands().heartbeat(time)).await {
            Ok(runtime) if time == Duration::from_secs(1) => runtime.shutdown().await.unwrap(),
            other => named(other.unwrap_err(), "NatsCommandOptions::heartbeat"),
        }
    }
    for count in [0, 1, usize::MAX] {
        match start(commands().max_in_flight(count)).await {
            Ok(runtime) if count == 1 => runtime.shutdown().await.unwrap(),
            other => named(other.unwrap_err(), "NatsCommandOptions::max_in_flight"),
        }
    }
    for age in TIMES {
        let bus = CommandBus::local().command_retention(age);
        let error = Runtime::builder().store(MemoryStore::new()).commands(bus).start().await.unwrap_err();
        named(error, "CommandBus::command_retention");
    }
    let bus = CommandBus::local().command_retention(Duration::from_secs(60));
    Runtime::builder().store(MemoryStore::new()).commands(bus).start().await.unwrap();
    for name in ["", " ", "a\nb", &"x".repeat(201)] {
        let error = start(commands().node(name)).await.unwrap_err();
        assert!(
            matches!(&error, StartError::Bus(error) if error.to_string().contains("node name")),
            "{error}"
        );
    }
    let wrong = NatsCommandOptions::new(NatsOptions::core().url(server.url()).answer_timeout(Duration::MAX));
    assert!(matches!(start(wrong).await.unwrap_err(), StartError::Bus(_)));
    let wrong = NatsCommandOptions::new(NatsOptions::core().url("http://x"));
    assert!(matches!(start(wrong).await.unwrap_err(), StartError::Bus(_)));
}
