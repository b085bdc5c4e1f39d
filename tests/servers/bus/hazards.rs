//! Measured hazards of NATS for the publisher, the log stream and raw subscriptions.
//!
//! Each test uses a real server that is killed, paused, wiped and restarted on its port.
//! docs/dev/hazards.md has the table of all hazards.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use storied::bus::{
    BusError, BusState, ConsumerOptions, Gap, HandleOptions, NatsBus, NatsOptions, Received,
    SubscribeOptions, Subscription,
};
use storied::{EventBus, EventStore, Position, PublisherState};
use tokio::time::{Instant, timeout};

use crate::bus::fixtures::*;
use crate::bus::link::Link;
use crate::bus::oracle::positions_in_stream;
use crate::bus::raw::{Press, listen, received, take};
use crate::support::{self, NatsServer, oldest_nats_server};

async fn positions(store: &Arc<dyn EventStore>) -> Vec<u64> {
    log(store).await.iter().map(|position| position.get()).collect()
}

/// Waits until the whole log is published, and checks that the stream is exact.
async fn exact(recording: &Recording, store: &Arc<dyn EventStore>, server: &NatsServer) {
    let head = store.high_water_mark().await.unwrap();
    eventually("published", || recording.node.publisher().published == Some(head)).await;
    assert_eq!(positions_in_stream(&server.url()).await.0, positions(store).await);
}

/// Checks that the log stream is the log up to `upto`, also after the rest of the refused batch.
async fn unchanged(server: &NatsServer, store: &Arc<dyn EventStore>, upto: Position) {
    pause(100).await;
    let log = positions(store).await.into_iter().filter(|&position| position <= upto.get());
    assert_eq!(positions_in_stream(&server.url()).await.0, log.collect::<Vec<_>>());
}

/// With the default timeouts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_05_a_server_that_hangs_is_noticed_and_nothing_counts_as_published() {
    let hangs = async |kind| {
        let mut server = NatsServer::start(support::NatsOptions::jetstream()).await;
        let options = match kind {
            Kind::Core => NatsOptions::core(),
            _ => NatsOptions::jetstream(log_stream()),
        };
        let bus = options.url(server.url()).bus();
        let store = store();
        let recording = Recording::start(&store, bus.clone(), blind()).await;
        let before = write(&store, 0, 100).await;
        let published = || recording.node.publisher().published;
        eventually("published", || published() == Some(before)).await;
        server.pause();
        let paused = Instant::now();
        let head = write(&store, 0, 100).await;
        eventually("noticed", || matches!(bus.state(), BusState::Disconnected { .. })).await;
        // Three unanswered pings of 5 s each, plus a reserve for a busy machine.
        assert!(paused.elapsed() < Duration::from_secs(25), "{kind:?}: {:?}", paused.elapsed());
        assert_eq!(published(), Some(before), "{kind:?}");
        server.resume();
        recording.reaches("back", &store).await;
        eventually("published", || published() == Some(head)).await;
        if kind == Kind::JetStream {
            exact(&recording, &store, &server).await;
        }
        recording.node.stop(PATIENCE).await.unwrap();
    };
    tokio::join!(hangs(Kind::Core), hangs(Kind::JetStream));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_07_a_server_that_is_killed_in_the_middle_of_a_window() {
    let mut server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let store = store();
    let bus = quick(NatsOptions::jetstream(log_stream().window(2_000)).url(server.url())).bus();
    let recording = Recording::start(&store, bus, blind()).await;
    for _ in 0..3 {
        exact(&recording, &store, &server).await;
        let before = store.high_water_mark().await.unwrap();
        let mut head = before;
        for _ in 0..20 {
            head = write(&store, 0, 1_000).await;
        }
        let published = || recording.node.publisher().published.unwrap_or_default();
        eventually("the node publishes", || published() > before).await;
        server.kill();
        assert!(published() < head, "killed too late: {}", published());
        server.restart().await;
    }
    exact(&recording, &store, &server).await;
    recording.node.stop(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_08_unconfirmed_messages_of_a_hanging_server_are_not_published_twice() {
    let mut server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let store = store();
    // The connection stays, so it does not reveal the hang.
    let bus = quick(NatsOptions::jetstream(log_stream()).url(server.url()))
        .ping_interval(Duration::from_secs(3_600))
        .answer_timeout(Duration::from_millis(500))
        .bus();
    let recording = Recording::start(&store, bus.clone(), blind()).await;
    for _ in 0..3 {
        exact(&recording, &store, &server).await;
        server.pause();
        let before = store.high_water_mark().await.unwrap();
        // The batch is in the server's socket, and stored when the server resumes.
        write(&store, 0, 200).await;
        eventually("the publisher retries", || {
            matches!(recording.node.publisher().state, PublisherState::Retrying { .. })
        })
        .await;
        assert_eq!(recording.node.publisher().published, Some(before));
        server.resume();
    }
    exact(&recording, &store, &server).await;
    assert!(matches!(bus.state(), BusState::Connected { .. }));
    recording.node.stop(PATIENCE).await.unwrap();
}

/// The messages of a stopped process stay in flight beyond the deduplication window.
/// They arrive after another publisher's messages. Only the expected sequence of each message can
/// reject them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_08_delayed_messages_of_a_publisher_arrive_after_another_one() {
    for binary in [None, Some(oldest_nats_server())] {
        let options = support::NatsOptions { binary, ..support::NatsOptions::jetstream() };
        let server = NatsServer::start(options).await;
        let store = store();
        write(&store, 0, 600).await;
        let link = Link::to(&server).await;
        // The connection and the timeouts stay, so they do not reveal the delay.
        let bus = |url| {
            let options = log_stream().duplicate_window(Duration::from_millis(100));
            let options = quick(NatsOptions::jetstream(options).url(url));
            options.ping_interval(Duration::from_secs(3_600)).answer_timeout(PATIENCE).bus()
        };
        let (away, present) = (bus(link.url()), bus(server.url()));
        for round in 0..2 {
            let batches = batches(&store, Position::new(300 * round), 100).await;
            let mut zombie = publisher(&away, &store).await;
            zombie.publish(batches[0].clone()).await.unwrap();
            link.hold();
            let late = batches[1].clone();
            let late = tokio::spawn(async move { zombie.publish(late).await });
            link.holds_something().await;
            let mut other = publisher(&present, &store).await;
            // As far as the first publisher's batch, or further.
            let (before, behind) = batches[1..3].split_at(1 + round as usize);
            for batch in before {
                other.publish(batch.clone()).await.unwrap();
            }
            pause(300).await;
            link.release();
            let error = timeout(PATIENCE, late).await.unwrap().unwrap().unwrap_err();
            assert!(matches!(error, BusError::Fenced { .. }), "{error}");
            unchanged(&server, &store, before.last().unwrap().upto).await;
            for batch in behind {
                other.publish(batch.clone()).await.unwrap();
            }
        }
        assert_eq!(positions_in_stream(&server.url()).await.0, positions(&store).await);
    }
}

/// The server's deduplication window is finite. The expected sequence of each message always holds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_09_after_the_deduplication_window_nothing_is_stored_twice() {
    for binary in [None, Some(oldest_nats_server())] {
        let options = support::NatsOptions { binary, ..support::NatsOptions::jetstream() };
        let mut server = NatsServer::start(options).await;
        let store = store();
        write(&store, 0, 200).await;
        let options = log_stream().duplicate_window(Duration::from_millis(100));
        let bus =
            |server: &NatsServer| quick(NatsOptions::jetstream(options.clone()).url(server.url())).bus();
        let open = async |bus: &NatsBus| publisher(bus, &store).await;
        let (mut quick, mut slow) = (open(&bus(&server)).await, open(&bus(&server)).await);
        let batch = batches(&store, Position::START, 200).await.remove(0);
        quick.publish(batch.clone()).await.unwrap();
        pause(300).await;
        let error = slow.publish(batch.clone()).await.unwrap_err();
        assert!(matches!(error, BusError::Fenced { .. }), "{error}");
        // A server that is killed at once loses the last stored messages.
        unchanged(&server, &store, batch.upto).await;
        // A publisher that missed a restart stores nothing twice either.
        server.kill();
        server.restart().await;
        let mut late = open(&bus(&server)).await;
        write(&store, 0, 200).await;
        let more = batches(&store, batch.upto, 200).await.remove(0);
        assert_eq!(late.publish(more).await.unwrap().sequence, 400);
        assert!(slow.publish(batch).await.is_err());
        assert_eq!(positions_in_stream(&server.url()).await.0, positions(&store).await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_11_a_stream_that_is_wiped_is_rebuilt_from_the_log() {
    let mut server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let store = store();
    write(&store, 0, 2_000).await;
    let recording = Recording::start(&store, options(Kind::JetStream, &server).bus(), blind()).await;
    exact(&recording, &store, &server).await;
    // The checkpoint in the store refers to a stream that no longer exists.
    let give_up = Instant::now() + PATIENCE;
    while store.publisher_checkpoint().await.unwrap().sequence < 2_000 {
        assert!(Instant::now() < give_up, "the end of the log stream is not remembered");
        pause(10).await;
    }
    server.kill();
    server.wipe();
    server.restart().await;
    let last = write(&store, 0, 10).await;
    let status = || recording.node.publisher();
    eventually("published", || status().published == Some(last)).await;
    exact(&recording, &store, &server).await;
    recording.reaches("wiped", &store).await;
    // Recovered: no further failures.
    let error = status().last_error;
    let head = write(&store, 0, 10).await;
    eventually("published", || status().published == Some(head)).await;
    assert_eq!((status().state, status().last_error), (PublisherState::Publishing, error));
    recording.node.stop(PATIENCE).await.unwrap();
}

/// While the reader reads. (If the reader is away, the server moves the consumer without a trace.)
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_12_messages_purged_before_the_read_are_a_gap() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let bus = options(Kind::JetStream, &server).bus();
    let mut press = Press::new(&bus).await;
    let consumer = ConsumerOptions::durable("x").max_ack_pending(1);
    let mut subscriber = listen(&bus, &["*"], SubscribeOptions::new().consumer(consumer)).await;
    press.written(10).await;
    take(&mut subscriber, 5).await;
    let context = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    context.get_stream("STORIED_EVENTS").await.unwrap().purge().await.unwrap();
    let printed = press.written(10).await;
    let (mut gaps, mut seen) = (Vec::new(), Vec::new());
    while gaps.is_empty() || seen.last() != printed.last().map(|event| event.position).as_ref() {
        match received(&mut subscriber).await {
            Received::Event(delivery) => {
                let _ = delivery.ack().await;
                seen.push(delivery.event().position);
            }
            Received::Gap(gap) => gaps.push(gap),
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(&gaps[..], [Gap::Consumer { .. }]), "{gaps:?}");
}

/// Many events are buffered, and the server receives progress for the whole time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_17_a_handler_slower_than_ack_wait_with_a_full_buffer() {
    let handles = async |push| {
        let server = NatsServer::start(support::NatsOptions::jetstream()).await;
        let bus = options(Kind::JetStream, &server).bus();
        let mut press = Press::new(&bus).await;
        let consumer = ConsumerOptions::durable("x").ack_wait(Duration::from_millis(1_500));
        let consumer = if push { consumer.push() } else { consumer };
        let options = SubscribeOptions::new().capacity(2).consumer(consumer);
        let subscription = listen(&bus, &["note.written"], options).await;
        let handled = Arc::new(AtomicUsize::new(0));
        let count = handled.clone();
        let handling = subscription
            .for_each(HandleOptions::new(), move |_| {
                let count = count.clone();
                async move {
                    pause(1_800).await;
                    count.fetch_add(1, Ordering::SeqCst);
                    Ok(())
                }
            })
            .unwrap();
        press.written(4).await;
        eventually("handled", || handled.load(Ordering::SeqCst) == 4).await;
        pause(1_700).await;
        assert_eq!(handled.load(Ordering::SeqCst), 4, "each once");
        let stats = handling.stats();
        assert_eq!((stats.received, stats.redelivered), (4, 0), "push: {push}");
        handling.stop(PATIENCE).await.unwrap();
    };
    tokio::join!(handles(false), handles(true));
}

/// Whether the oversized event is announced before the next event.
async fn announced(raw: &mut Subscription, large: Position, small: Position) -> bool {
    let mut omitted = false;
    loop {
        match received(raw).await {
            Received::Gap(Gap::Omitted { position }) => omitted |= position == large,
            Received::Event(delivery) => {
                let _ = delivery.ack().await;
                if delivery.event().position == small {
                    return omitted;
                }
            }
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_29_an_event_too_large_for_the_server_is_appended_and_announced() {
    for kind in NATS {
        let config = vec!["max_payload: 8192".into()];
        let options = support::NatsOptions { config, ..support::NatsOptions::jetstream() };
        let mut server = NatsServer::start(options).await;
        let store = store();
        let bus = crate::bus::fixtures::options(kind, &server).bus();
        let recording = Recording::start(&store, bus.clone(), blind()).await;
        let mut raw = listen(&bus, &["*"], SubscribeOptions::new()).await;
        for round in 0..2 {
            if round == 1 {
                server.kill();
                server.restart().await;
            }
            let mut tries = 0;
            loop {
                let large = append(&store, 1, vec![note(&store, 1, 20_000)]).await;
                let small = write(&store, 1, 1).await;
                recording.reaches("both", &store).await;
                // Over Core, events appended before every node is back are in the store only.
                let patience = if kind == Kind::Core { Duration::from_secs(2) } else { PATIENCE };
                if let Ok(true) = timeout(patience, announced(&mut raw, large, small)).await {
                    break;
                }
                tries += 1;
                assert!(kind == Kind::Core && tries < 20, "{kind:?} {round}");
            }
        }
        recording.node.stop(PATIENCE).await.unwrap();
    }
}
