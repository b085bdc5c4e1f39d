//! Claims of docs/nats.md that the documentation tests do not compile.

use std::time::Duration;

use async_nats::jetstream;
use futures_util::StreamExt;
use storied::bus::{ConsumerOptions, SubscribeOptions};

use crate::bus::fixtures::*;
use crate::bus::raw::{Press, listen, take};
use crate::support::{self, NatsServer};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_and_buckets_work_through_the_client() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let bus = options(Kind::JetStream, &server).bus();
    let client = bus.client().await.unwrap();
    let error = client.request("shop.price", "SKU-1".into()).await.unwrap_err();
    assert_eq!(error.kind(), async_nats::RequestErrorKind::NoResponders);
    let mut questions = client.queue_subscribe("shop.price", "prices".into()).await.unwrap();
    let answering = client.clone();
    tokio::spawn(async move {
        while let Some(question) = questions.next().await {
            answering.publish(question.reply.unwrap(), "42".into()).await.unwrap();
        }
    });
    for _ in 0..5 {
        assert_eq!(client.request("shop.price", "SKU-1".into()).await.unwrap().payload, "42");
    }

    let context = jetstream::new(client);
    let config = jetstream::kv::Config {
        bucket: "settings".into(),
        history: 5,
        max_bytes: 1 << 20,
        ..Default::default()
    };
    let settings = context.create_key_value(config).await.unwrap();
    let mut changes = settings.watch("app.>").await.unwrap();
    let revision = settings.put("app.name", "shop".into()).await.unwrap();
    settings.put("db.host", "not watched".into()).await.unwrap();
    settings.update("app.name", "store".into(), revision).await.unwrap();
    assert!(settings.update("app.name", "late".into(), revision).await.is_err());
    assert_eq!(settings.get("app.name").await.unwrap().as_deref(), Some(&b"store"[..]));
    settings.delete("app.name").await.unwrap();
    let mut operations = Vec::new();
    for _ in 0..3 {
        let change = changes.next().await.unwrap().unwrap();
        assert_eq!(change.key, "app.name");
        operations.push(change.operation);
    }
    use jetstream::kv::Operation::{Delete, Put};
    assert_eq!(operations, [Put, Put, Delete]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn buckets_made_opened_listed_limited_and_forgetting() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let bus = options(Kind::JetStream, &server).bus();
    let context = jetstream::new(bus.client().await.unwrap());
    assert!(context.get_key_value("settings").await.is_err(), "not there yet");
    let config = jetstream::kv::Config {
        bucket: "settings".into(),
        history: 3,
        max_value_size: 1_000,
        max_bytes: 4_000,
        ..Default::default()
    };
    context.create_key_value(config).await.unwrap();
    // Opened by another program.
    let other = options(Kind::Core, &server).bus();
    let settings = jetstream::new(other.client().await.unwrap()).get_key_value("settings").await.unwrap();
    settings.create("app.name", "shop".into()).await.unwrap();
    let there = settings.create("app.name", "store".into()).await.unwrap_err();
    assert_eq!(there.kind(), jetstream::kv::CreateErrorKind::AlreadyExists);
    settings.put("app.port", "80".into()).await.unwrap();
    settings.put("app.port", "81".into()).await.unwrap();
    let keys = async || {
        let mut keys: Vec<String> = settings.keys().await.unwrap().map(Result::unwrap).collect().await;
        keys.sort_unstable();
        keys
    };
    assert_eq!(keys().await, ["app.name", "app.port"]);
    // A handle has the state of the time when it was opened.
    let status = context.get_key_value("settings").await.unwrap().status().await.unwrap();
    // Every revision counts, up to `history` per key.
    assert_eq!((status.bucket(), status.values(), status.history()), ("settings", 3, 3));
    settings.delete("app.name").await.unwrap();
    assert_eq!(settings.get("app.name").await.unwrap(), None);
    assert_eq!(keys().await, ["app.port"]);

    // Limits of a value and of the bucket.
    let message = server_limit(&other).await;
    assert!(message > 1_001, "the value's limit is the one that counts: {message}");
    assert!(settings.put("large", vec![0; 1_001].into()).await.is_err());
    settings.put("large", vec![0; 990].into()).await.unwrap();
    let mut refused = false;
    for n in 0..5 {
        refused |= settings.put(format!("more.{n}"), vec![0; 990].into()).await.is_err();
    }
    assert!(refused, "a full bucket takes no more");

    // A bucket with a TTL.
    let config = jetstream::kv::Config {
        bucket: "sessions".into(),
        max_age: Duration::from_millis(500),
        ..Default::default()
    };
    let sessions = context.create_key_value(config).await.unwrap();
    assert_eq!(sessions.status().await.unwrap().max_age(), Duration::from_millis(500));
    sessions.put("ann", "1".into()).await.unwrap();
    let give_up = tokio::time::Instant::now() + PATIENCE;
    while sessions.get("ann").await.unwrap().is_some() {
        assert!(tokio::time::Instant::now() < give_up, "still there");
        pause(50).await;
    }
}

/// Returns the maximum message size of the server.
async fn server_limit(bus: &storied::NatsBus) -> usize {
    bus.client().await.unwrap().server_info().max_payload
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stream_and_consumer_report_their_state() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let bus = options(Kind::JetStream, &server).namespace("shop").bus();
    let mut press = Press::new(&bus).await;
    press.written(10).await;
    let durable = SubscribeOptions::new()
        .load_balancer("shipping")
        .capacity(4)
        .consumer(ConsumerOptions::durable("shipping"));
    let mut subscriber = listen(&bus, &["note.written"], durable).await;
    take(&mut subscriber, 2).await;
    let context = jetstream::new(bus.client().await.unwrap());
    let mut stream = context.get_stream("SHOP_EVENTS").await.unwrap();
    let state = stream.info().await.unwrap().state.clone();
    assert_eq!((state.messages, state.last_sequence, state.consumer_count), (10, 10, 1));
    let info = stream.consumer_info("shipping:shipping=3Anote_written:note_written").await.unwrap();
    assert_eq!(info.ack_floor.stream_sequence, 2);
    assert!(info.num_ack_pending <= 8 && info.num_pending <= 8, "{info:?}");
    // A durable consumer stays until it is deleted.
    subscriber.close(PATIENCE).await.unwrap();
    assert_eq!(stream.info().await.unwrap().state.consumer_count, 1);
    stream.delete_consumer("shipping:shipping=3Anote_written:note_written").await.unwrap();
    assert_eq!(stream.info().await.unwrap().state.consumer_count, 0);
}

/// Returns the answer of the server's monitoring port.
pub async fn monitored(port: u16, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut connection = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_monitoring_port_shows_names_groups_and_health() {
    let port = support::Port::claim();
    let config = vec![format!("http: \"127.0.0.1:{}\"", port.number())];
    let server =
        NatsServer::start(support::NatsOptions { config, ..support::NatsOptions::jetstream() }).await;
    let bus = options(Kind::Core, &server).name("shipping-7").bus();
    let subscription =
        listen(&bus, &["order.placed"], SubscribeOptions::new().load_balancer("shipping")).await;
    let port = port.number();
    assert!(monitored(port, "/connz").await.contains("\"name\": \"shipping-7\""));
    let subscriptions = monitored(port, "/subsz?subs=1").await;
    assert!(subscriptions.contains("shipping:order.placed"), "{subscriptions}");
    assert!(monitored(port, "/healthz?js-enabled-only=true").await.contains("\"ok\""));
    subscription.close(PATIENCE).await.unwrap();
    let mut tries = 0;
    while monitored(port, "/subsz?subs=1").await.contains("shipping:order.placed") {
        tries += 1;
        assert!(tries < 1_000, "still subscribed");
        pause(5).await;
    }
}
