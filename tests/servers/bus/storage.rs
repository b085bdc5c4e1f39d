//! Storage of the log stream: in memory, and in streams that NATS derives from it.

use async_nats::jetstream::stream::{Config, Source, StorageType};
use futures_util::StreamExt;
use storied::bus::NatsOptions;
use storied::{EventStore, Position};

use crate::bus::fixtures::*;
use crate::bus::oracle::positions_in_stream;
use crate::support::{self, NatsServer};

async fn positions(store: &std::sync::Arc<dyn EventStore>) -> Vec<u64> {
    log(store).await.iter().map(|position| position.get()).collect()
}

/// The log stream is lost with the server, and rebuilt from the log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_stream_in_memory_is_rebuilt_after_a_restart() {
    let mut server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let store = store();
    write(&store, 0, 700).await;
    let options = NatsOptions::jetstream(log_stream().memory_storage(true)).url(server.url());
    let recording = Recording::start(&store, quick(options).bus(), blind()).await;
    let published = || recording.node.publisher().published;
    let stored = async || {
        let context = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
        context.get_stream("STORIED_EVENTS").await.unwrap().cached_info().config.storage
    };
    eventually("published", || published() == Some(Position::new(700))).await;
    assert_eq!(stored().await, StorageType::Memory);
    assert_eq!(positions_in_stream(&server.url()).await.0, positions(&store).await);
    for _ in 0..2 {
        server.kill();
        server.restart().await;
        let head = write(&store, 0, 10).await;
        eventually("published", || published() == Some(head)).await;
        assert_eq!(positions_in_stream(&server.url()).await.0, positions(&store).await);
    }
    recording.node.stop(PATIENCE).await.unwrap();
}

/// A NATS log stream stream, and a stream with it as a source.
/// Both have each message with its headers, in order, also after a restart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nats_may_copy_the_stream() {
    let mut server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let store = store();
    write(&store, 0, 300).await;
    let recording = Recording::start(&store, options(Kind::JetStream, &server).bus(), blind()).await;
    eventually("published", || recording.node.publisher().published == Some(Position::new(300))).await;
    let context = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let source = || Source { name: "STORIED_EVENTS".into(), ..Source::default() };
    let copies = [
        Config { name: "COPY".into(), mirror: Some(source()), ..Config::default() },
        Config { name: "AGGREGATED".into(), sources: Some(vec![source()]), ..Config::default() },
    ];
    for copy in copies {
        context.create_stream(copy).await.unwrap();
    }
    server.kill();
    server.restart().await;
    let head = write(&store, 0, 300).await;
    eventually("published", || recording.node.publisher().published == Some(head)).await;
    let context = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    for name in ["COPY", "AGGREGATED"] {
        let stream = context.get_stream(name).await.unwrap();
        let consumer = async_nats::jetstream::consumer::pull::OrderedConfig::default();
        let mut messages = stream.create_consumer(consumer).await.unwrap().messages().await.unwrap();
        let mut copied: Vec<u64> = Vec::new();
        while copied.len() < 600 {
            let message = tokio::time::timeout(PATIENCE, messages.next()).await.unwrap().unwrap().unwrap();
            assert_eq!(message.subject.as_str(), "storied.events.note.written");
            let position = message.headers.as_ref().unwrap().get("Storied-Position").unwrap();
            copied.push(position.as_str().parse().unwrap());
        }
        assert_eq!(copied, positions(&store).await, "{name}");
    }
    recording.node.stop(PATIENCE).await.unwrap();
}
