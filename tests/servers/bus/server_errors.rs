//! Asynchronous errors of the server: they reach status, events and errors, and no refused event
//! counts as published.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use storied::PublisherState;
use storied::bus::{BusError, BusState, ConsumerOptions, NatsEvent, NatsOptions, SubscribeOptions};
use storied::store::{Append, ExpectedVersion};
use storied::{EventBus, Position, StreamId};
use tokio::time::Instant;

use crate::bus::fixtures::*;
use crate::support::{self, NatsServer};

/// Starts a server with a login `node` that has these permissions.
async fn server(publish: &[&str], subscribe: &[&str]) -> NatsServer {
    let list = |subjects: &[&str]| format!("{subjects:?}");
    let config = vec![format!(
        "authorization {{ users: [{{ user: admin, password: x }}, {{ user: node, password: x, permissions: {{ publish: {}, \
         subscribe: {} }} }}] }}",
        list(publish),
        list(subscribe)
    )];
    NatsServer::start(support::NatsOptions { config, ..support::NatsOptions::jetstream() }).await
}

fn login(options: NatsOptions, server: &NatsServer) -> NatsOptions {
    quick(options.url(server.url()).user_and_password("node", "x").namespace("shop"))
}

const REST: [&str; 3] = ["shop.head", "shop.hint", "_INBOX.>"];
const ALL: [&str; 1] = [">"];

#[track_caller]
fn refused(error: &BusError, sentence: &str) {
    assert!(matches!(error, BusError::Incompatible { reason } if reason.contains(sentence)), "{error}");
}

/// A node over Core that may not publish events, over an own or a borrowed connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_the_server_refuses_is_never_counted_as_published() {
    let sentence = "Permissions Violation for Publish to \"shop.events.note.written\"";
    for borrowed in [false, true] {
        let server = server(&REST, &ALL).await;
        let heard: Arc<Mutex<Vec<NatsEvent>>> = Arc::default();
        let events = heard.clone();
        let mut options =
            login(NatsOptions::core(), &server).on_event(move |event| events.lock().unwrap().push(event));
        if borrowed {
            let connect = async_nats::ConnectOptions::with_user_and_password("node".into(), "x".into());
            options = options.client(connect.connect(server.url()).await.unwrap());
        }
        let (bus, store) = (options.bus(), store());
        write(&store, 0, 3).await;
        let before = *log(&store).await.last().unwrap();
        let node = Recording::start(&store, bus.clone(), storied::FeedOptions::new()).await;
        eventually("publishing", || node.node.publisher().state == PublisherState::Publishing).await;
        write(&store, 0, 2).await;
        for _ in 0..20 {
            eventually("refused", || matches!(node.node.publisher().state, PublisherState::Retrying { .. }))
                .await;
            let status = node.node.publisher();
            assert_eq!(status.published, Some(before), "{status:?}");
            let expected =
                if borrowed { "did not deliver a message to shop.events.note.written" } else { sentence };
            let error = status.last_error.unwrap();
            assert!(error.contains(expected), "{error}");
            pause(20).await;
        }
        if !borrowed {
            let BusState::Connected { last_error, .. } = bus.state() else { panic!("{:?}", bus.state()) };
            assert_eq!(last_error.as_deref(), Some(sentence));
            let told = |event: &NatsEvent| *event == NatsEvent::ServerError { error: sentence.into() };
            assert!(heard.lock().unwrap().iter().any(told), "{heard:?}");
        }
        node.reaches("the node itself", &store).await;
        node.node.kill();
    }
}

/// Some events may be published and others not: events before the first refused one are published
/// once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publishing_stops_before_the_first_event_that_is_refused() {
    let server = server(&[&REST[..], &["shop.events.note.written"]].concat(), &ALL).await;
    let store = store();
    let watch = async_nats::ConnectOptions::with_user_and_password("admin".into(), "x".into());
    let watch = watch.connect(server.url()).await.unwrap();
    let mut messages = watch.subscribe("shop.events.>").await.unwrap();
    watch.flush().await.unwrap();
    let bus = login(NatsOptions::core(), &server).bus();
    let node = Recording::start(&store, bus, storied::FeedOptions::new()).await;
    eventually("publishing", || node.node.publisher().state == PublisherState::Publishing).await;
    let codec = store.info().codec;
    let torn = storied::NewEvent::encode(&Note::Torn, codec, &storied::Metadata::default()).unwrap();
    let last =
        append(&store, 0, vec![note(&store, 0, 1), note(&store, 1, 1), torn, note(&store, 2, 1)]).await;
    let expected = Position::new(last.get() - 2);
    for _ in 0..10 {
        eventually("refused", || matches!(node.node.publisher().state, PublisherState::Retrying { .. }))
            .await;
        assert!(node.node.publisher().published <= Some(expected), "{:?}", node.node.publisher());
        pause(50).await;
    }
    eventually("the allowed ones", || node.node.publisher().published == Some(expected)).await;
    node.node.kill();
    let mut received = 0;
    while let Ok(Some(_)) =
        tokio::time::timeout(Duration::from_millis(300), futures_util::StreamExt::next(&mut messages)).await
    {
        received += 1;
    }
    assert_eq!(received, 2, "each of them once");
}

/// A login without permissions: every request ends with the server's error, well before its
/// timeout.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_request_ends_with_the_servers_error() {
    let may_nothing = server(&["nothing"], &["nothing"]).await;
    let may_not_publish = server(&["nothing"], &ALL).await;
    let may_not_subscribe = server(&ALL, &["nothing"]).await;
    let stream = storied::bus::JetStreamOptions::new;
    for server in [&may_nothing, &may_not_publish, &may_not_subscribe] {
        let started = Instant::now();
        let bus = |options| login(options, server).answer_timeout(PATIENCE).bus();
        for bus in [bus(NatsOptions::core()), bus(NatsOptions::jetstream(stream()))] {
            let core = !bus.is_durable();
            if core {
                // With a permitted inbox, Core only needs a subscription.
                let error = bus.subscribe(["*"], SubscribeOptions::new()).await.unwrap_err();
                refused(&error, "Permissions Violation");
                refused(
                    &EventBus::subscribe(&bus, store().info().id).await.err().unwrap(),
                    "Permissions Violation",
                );
            } else {
                let durable = SubscribeOptions::new().consumer(ConsumerOptions::durable("x"));
                refused(&bus.subscribe(["*"], durable).await.unwrap_err(), "Permissions Violation");
                refused(&bus.inspect(store().info().id).await.unwrap_err(), "Permissions Violation");
                refused(
                    &bus.read_log_stream(store().info().id).await.err().unwrap(),
                    "Permissions Violation",
                );
            }
            let store = store();
            write(&store, 0, 1).await;
            let publishing = async {
                let mut publisher = bus.publisher(store.info().id).await?;
                publisher.resume(Default::default()).await?;
                let batch = batches(&store, Position::START, 1).await.remove(0);
                publisher.publish(batch).await.map(drop)
            };
            refused(&publishing.await.unwrap_err(), "Permissions Violation");
        }
        assert!(started.elapsed() < PATIENCE / 2, "{:?}", started.elapsed());
    }
}

/// Events of the log stream are refused, but requests about the stream are not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_event_of_the_log_stream_is_reported() {
    let server = server(&["$JS.API.>", "shop.hint", "_INBOX.>"], &ALL).await;
    let bus = login(NatsOptions::jetstream(log_stream()), &server).answer_timeout(PATIENCE).bus();
    let store = store();
    write(&store, 0, 2).await;
    let mut publisher = publisher(&bus, &store).await;
    let batch = batches(&store, Position::START, 2).await.remove(0);
    let error = publisher.publish(batch).await.unwrap_err();
    refused(&error, "Permissions Violation for Publish to \"shop.events.note.written\"");
}

/// A program of the user that does something forbidden a thousand times.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_errors_is_reported_at_a_bounded_rate() {
    let server = server(&REST, &ALL).await;
    let heard: Arc<Mutex<Vec<NatsEvent>>> = Arc::default();
    let events = heard.clone();
    let bus =
        login(NatsOptions::core(), &server).on_event(move |event| events.lock().unwrap().push(event)).bus();
    let client = bus.client().await.unwrap();
    let started = Instant::now();
    for _ in 0..1_000 {
        client.publish("forbidden", "".into()).await.unwrap();
    }
    client.flush().await.unwrap();
    let last = "Permissions Violation for Publish to \"forbidden\"";
    eventually(
        "shown",
        || matches!(bus.state(), BusState::Connected { last_error: Some(error), .. } if error == last),
    )
    .await;
    pause(300).await;
    let errors =
        heard.lock().unwrap().iter().filter(|event| matches!(event, NatsEvent::ServerError { .. })).count();
    let most = started.elapsed().as_millis() / 200 + 2;
    assert!((1..=most).contains(&(errors as u128)), "{errors} reports");
}

/// The headers of one event exceed the limit of the server: no later event is published.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_whose_headers_are_too_large_is_never_counted_as_published() {
    let config = vec!["max_payload: 1024".into()];
    let server =
        NatsServer::start(support::NatsOptions { config, ..support::NatsOptions::jetstream() }).await;
    for kind in NATS {
        let store = store();
        write(&store, 0, 3).await;
        let before = *log(&store).await.last().unwrap();
        let bus = options(kind, &server).namespace(if kind == Kind::Core { "a" } else { "b" }).bus();
        let node = Recording::start(&store, bus, storied::FeedOptions::new()).await;
        eventually("published", || node.node.publisher().published == Some(before)).await;
        let long = StreamId::new("note", "é".repeat(190)).unwrap();
        let large = Append::one(long, ExpectedVersion::Any, vec![note(&store, 0, 10)]);
        store.append(vec![large]).await.remove(0).unwrap();
        write(&store, 0, 1).await;
        for _ in 0..20 {
            eventually("refused", || matches!(node.node.publisher().state, PublisherState::Retrying { .. }))
                .await;
            let status = node.node.publisher();
            assert_eq!(status.published, Some(before), "{kind:?}: {status:?}");
            let error = status.last_error.unwrap();
            assert!(error.contains("too small for the headers of one event"), "{kind:?}: {error}");
            pause(20).await;
        }
        node.reaches("the node itself", &store).await;
        node.node.kill();
    }
}
