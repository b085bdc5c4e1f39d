//! The log stream of the JetStream driver: created, compared, lost, emptied, tampered with; and
//! unsupported servers.

use std::io::Write;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::stream::Config;
use storied::bus::{BusError, BusState, JetStreamOptions, LogStreamEnd, NatsBus, ProvisionPolicy, Resume};
use storied::store::PublisherCheckpoint;
use storied::{EventBus, EventStore, Position, PublisherState};

use crate::bus::fixtures::*;
use crate::bus::oracle::positions_in_stream;
use crate::support::{self, NatsServer, oldest_nats_server, too_old_nats_server};

async fn jetstream(server: &NatsServer) -> async_nats::jetstream::Context {
    async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap())
}

fn bus(server: &NatsServer, options: JetStreamOptions) -> NatsBus {
    quick(storied::bus::NatsOptions::jetstream(options).url(server.url())).bus()
}

async fn resume(
    bus: &NatsBus,
    store: &Arc<dyn EventStore>,
    known: LogStreamEnd,
) -> Result<(Box<dyn storied::bus::BusPublisher>, LogStreamEnd), BusError> {
    let mut publisher = bus.publisher(store.info().id).await?;
    match publisher.resume(known).await? {
        Resume::After(end) => Ok((publisher, end)),
        Resume::AtHighWaterMark => panic!("a log stream"),
    }
}

/// Starts a publisher that must be refused, and returns the error.
async fn refused(bus: &NatsBus, store: &Arc<dyn EventStore>) -> String {
    match resume(bus, store, LogStreamEnd::default()).await {
        Err(error @ BusError::Incompatible { .. }) => error.to_string(),
        Err(error) => panic!("{error:?}"),
        Ok(_) => panic!("not refused"),
    }
}

/// Publishes the log from the end of the log stream.
async fn fill(bus: &NatsBus, store: &Arc<dyn EventStore>) {
    let (mut publisher, end) = resume(bus, store, LogStreamEnd::default()).await.unwrap();
    for batch in batches(store, end.position, 100).await {
        publisher.publish(batch).await.unwrap();
    }
}

async fn positions(store: &Arc<dyn EventStore>) -> Vec<u64> {
    log(store).await.iter().map(|position| position.get()).collect()
}

#[tokio::test]
async fn a_stream_that_differs_is_named_and_left_alone() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let store = store();
    let context = jetstream(&server).await;
    fill(&bus(&server, log_stream()), &store).await;
    let stream = async || context.get_stream("STORIED_EVENTS").await.unwrap().cached_info().config.clone();
    let made = stream().await;
    assert_eq!(made.subjects, ["storied.events.>"]);
    assert_eq!(made.metadata["storied.store_id"], store.info().id.to_string());
    fill(&bus(&server, log_stream()), &store).await;

    let changed = log_stream().max_age(Duration::from_secs(3_600)).max_bytes(50 << 20);
    let error = refused(&bus(&server, changed.clone()), &store).await;
    assert!(error.contains("max_age: is 604800s, should be 3600s"), "{error}");
    assert!(error.contains("max_bytes: is 104857600, should be 52428800"), "{error}");
    assert_eq!(stream().await, made);

    // An operator may choose other options, as long as the stream is exact.
    fill(&bus(&server, changed.clone().policy(ProvisionPolicy::RequireExisting)), &store).await;
    assert_eq!(stream().await, made);

    fill(&bus(&server, changed.clone().policy(ProvisionPolicy::CreateOrUpdate)), &store).await;
    let now = stream().await;
    assert_eq!((now.max_age, now.max_bytes), (Duration::from_secs(3_600), 50 << 20));
    // Options that no server can change.
    let error =
        refused(&bus(&server, changed.memory_storage(true).policy(ProvisionPolicy::CreateOrUpdate)), &store)
            .await;
    assert!(error.contains("storage: is File, should be Memory"), "{error}");
    assert_eq!(stream().await, now);

    for policy in [ProvisionPolicy::RequireExisting, ProvisionPolicy::CreateOrVerify] {
        let name = format!("OTHER_{}", policy as usize);
        let foreign = Config { name: name.clone(), subjects: vec!["other.>".into()], ..Config::default() };
        context.create_or_update_stream(foreign).await.unwrap();
        let error = refused(&bus(&server, log_stream().stream(&name).policy(policy)), &store).await;
        assert!(error.contains("subjects: is [\"other.>\"], should be [\"storied.events.>\"]"), "{error}");
        context.delete_stream(name).await.unwrap();
    }
}

#[tokio::test]
async fn missing_overlapping_and_foreign_streams_are_named() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let (mine, theirs) = (store(), store());
    let error = refused(&bus(&server, log_stream().policy(ProvisionPolicy::RequireExisting)), &mine).await;
    assert!(error.contains("no JetStream stream STORIED_EVENTS"), "{error}");

    fill(&bus(&server, log_stream()), &theirs).await;
    let error = refused(&bus(&server, log_stream()), &mine).await;
    assert!(error.contains(&theirs.info().id.to_string()) && error.contains("another store"), "{error}");
    let error = refused(&bus(&server, log_stream().stream("MINE")), &mine).await;
    assert!(error.contains("overlap with those of STORIED_EVENTS"), "{error}");

    // Also if only the messages show the store: an operator created the stream.
    let context = jetstream(&server).await;
    context.delete_stream("STORIED_EVENTS").await.unwrap();
    let config = Config {
        name: "STORIED_EVENTS".into(),
        subjects: vec!["storied.events.>".into()],
        ..Config::default()
    };
    context.create_stream(config).await.unwrap();
    let require = log_stream().policy(ProvisionPolicy::RequireExisting);
    write(&theirs, 0, 3).await;
    fill(&bus(&server, require.clone()), &theirs).await;
    let error = refused(&bus(&server, require), &mine).await;
    assert!(error.contains("another store"), "{error}");
}

#[tokio::test]
async fn a_server_without_jetstream_is_reported_and_core_works() {
    let server = NatsServer::start(support::NatsOptions::core()).await;
    let store = store();
    let error = refused(&bus(&server, log_stream()), &store).await;
    assert!(error.contains("start it with -js"), "{error}");
    publisher(&options(Kind::Core, &server).bus(), &store).await;
}

/// Acts as a nats-server of this version.
fn stand_in(version: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("nats://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            let info = format!(
                r#"INFO {{"server_id":"x","version":"{version}","headers":true,"max_payload":1048576}}"#
            );
            std::thread::spawn(move || {
                // PONG answers the PING of every CONNECT.
                let _ = connection.write_all(format!("{info}\r\nPONG\r\n").as_bytes());
                std::thread::sleep(Duration::from_secs(5));
            });
        }
    });
    url
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_are_too_old_are_refused() {
    for version in ["2.9.10", "1.4.1", "dev"] {
        let error = NatsBus::core(stand_in(version)).connect().await.unwrap_err();
        assert!(matches!(error, BusError::Incompatible { .. }), "{error:?}");
        assert!(
            error.to_string().contains(&format!("{version:?}; storied needs nats-server 2.10")),
            "{error}"
        );
    }
    NatsBus::core(stand_in("2.10.0-beta.3")).connect().await.unwrap();
    if let Some(binary) = too_old_nats_server() {
        let options = support::NatsOptions { binary: Some(binary), ..support::NatsOptions::core() };
        let server = NatsServer::start(options).await;
        for kind in NATS {
            let error = options_of(kind, &server).connect().await.unwrap_err();
            assert!(error.to_string().contains("2.9."), "{error}");
        }
    }
}

fn options_of(kind: Kind, server: &NatsServer) -> NatsBus {
    options(kind, server).bus()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_becomes_too_old_is_noticed() {
    let Some(binary) = too_old_nats_server() else { return };
    let mut server = NatsServer::start(support::NatsOptions::core()).await;
    let store = store();
    let recording = Recording::start(&store, options(Kind::Core, &server).bus(), blind()).await;
    eventually("publishing", || recording.node.publisher().state == PublisherState::Publishing).await;
    server.use_binary(Some(binary));
    server.restart().await;
    eventually("refused", || {
        matches!(recording.node.publisher().state, PublisherState::Retrying { error } if error.contains("\"2.9."))
    })
    .await;
    server.use_binary(None);
    server.restart().await;
    eventually("publishing again", || recording.node.publisher().state == PublisherState::Publishing).await;
    recording.node.stop(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_oldest_supported_server_works() {
    let options =
        support::NatsOptions { binary: Some(oldest_nats_server()), ..support::NatsOptions::jetstream() };
    let mut server = NatsServer::start(options).await;
    for kind in NATS {
        let store = store();
        write(&store, 0, 1_000).await;
        let recording = Recording::start(&store, options_of(kind, &server), blind()).await;
        write(&store, 0, 1_000).await;
        recording.reaches("2.10", &store).await;
        server.kill();
        write(&store, 0, 1_000).await;
        server.restart().await;
        recording.reaches("2.10 after a crash", &store).await;
        if kind == Kind::JetStream {
            let head = store.high_water_mark().await.unwrap();
            eventually("published", || recording.node.publisher().published == Some(head)).await;
            assert_eq!(positions_in_stream(&server.url()).await.0, positions(&store).await);
        }
        recording.node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_vanishes_under_an_idle_publisher_is_recreated() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let store = store();
    write(&store, 0, 700).await;
    let recording = Recording::start(&store, bus(&server, log_stream()), blind()).await;
    let head = store.high_water_mark().await.unwrap();
    eventually("published", || recording.node.publisher().published == Some(head)).await;
    let context = jetstream(&server).await;
    context.delete_stream("STORIED_EVENTS").await.unwrap();
    // Without appends, the heartbeat detects it.
    let mut found = Vec::new();
    for _ in 0..200 {
        pause(50).await;
        if context.get_stream("STORIED_EVENTS").await.is_ok() {
            found = positions_in_stream(&server.url()).await.0;
        }
        if found.len() == 700 {
            break;
        }
    }
    assert_eq!(found, positions(&store).await);
    recording.node.stop(PATIENCE).await.unwrap();
}

#[tokio::test]
async fn an_emptied_stream_continues_at_its_end() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let store = store();
    let bus = bus(&server, log_stream());
    write(&store, 0, 20).await;
    fill(&bus, &store).await;
    let stream = jetstream(&server).await.get_stream("STORIED_EVENTS").await.unwrap();
    stream.purge().await.unwrap();

    // With the exact end known.
    let known = |position, sequence| LogStreamEnd { position: Position::new(position), sequence };
    let (_, end) = resume(&bus, &store, known(20, 20)).await.unwrap();
    assert_eq!(end, known(20, 20));
    // With the end unknown, or from a previous stream: starts at the beginning, with higher
    // sequence numbers.
    for unknown in [LogStreamEnd::default(), known(40, 40)] {
        let (_, end) = resume(&bus, &store, unknown).await.unwrap();
        assert_eq!(end, known(0, 20));
    }
    // With an older end known: later messages are recognised, and not published again.
    write(&store, 0, 10).await;
    let (mut publisher, end) = resume(&bus, &store, known(15, 15)).await.unwrap();
    assert_eq!(end, known(15, 20));
    for batch in batches(&store, end.position, 100).await {
        assert_eq!(publisher.publish(batch).await.unwrap(), known(30, 30));
    }
    assert_eq!(positions_in_stream(&server.url()).await, ((21..=30).collect(), 30));

    // The same if only the end was deleted.
    stream.delete_message(30).await.unwrap();
    stream.delete_message(29).await.unwrap();
    let (mut publisher, end) = resume(&bus, &store, LogStreamEnd::default()).await.unwrap();
    assert_eq!(end, known(28, 30));
    write(&store, 0, 1).await;
    for batch in batches(&store, end.position, 100).await {
        assert_eq!(publisher.publish(batch).await.unwrap(), known(31, 31));
    }
}

#[tokio::test]
async fn a_second_publisher_is_refused_without_waiting() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let store = store();
    let bus = bus(&server, log_stream());
    write(&store, 0, 600).await;
    let (mut one, end) = resume(&bus, &store, LogStreamEnd::default()).await.unwrap();
    let (mut two, _) = resume(&bus, &store, LogStreamEnd::default()).await.unwrap();
    let batches = batches(&store, end.position, 300).await;
    one.publish(batches[0].clone()).await.unwrap();
    // The same batch again: older servers check the ids before the sequence.
    match two.publish(batches[0].clone()).await {
        Ok(end) => assert_eq!(end.sequence, 300),
        Err(error) => assert!(matches!(error, BusError::Fenced { .. }), "{error}"),
    }
    two.resume(LogStreamEnd::default()).await.unwrap();
    two.publish(batches[1].clone()).await.unwrap();
    // Other events with the same sequence numbers are refused.
    write(&store, 0, 300).await;
    let later = crate::bus::fixtures::batches(&store, Position::new(600), 300).await;
    let start = std::time::Instant::now();
    let Err(BusError::Fenced { reason }) = one.publish(later[0].clone()).await else { panic!("not refused") };
    assert!(reason.contains("does not end at message 300"), "{reason}");
    assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
    // The publisher has to find the end again, and may then continue.
    assert!(matches!(one.publish(later[0].clone()).await, Err(BusError::Unavailable { .. })));
    assert!(
        matches!(one.resume(LogStreamEnd::default()).await, Ok(Resume::After(end)) if end.sequence == 600)
    );
    one.publish(later[0].clone()).await.unwrap();
    assert_eq!(positions_in_stream(&server.url()).await.0, positions(&store).await);
}

/// The last sequence number may be of a recreated stream, with another message.
#[tokio::test]
async fn a_publisher_finds_the_end_again_after_a_disconnect() {
    let mut server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let store = store();
    write(&store, 0, 20).await;
    let later = bus(&server, log_stream().log_stream_after(Position::new(10)));
    let (mut one, end) = resume(&later, &store, LogStreamEnd::default()).await.unwrap();
    one.publish(batches(&store, end.position, 10).await.remove(0)).await.unwrap();
    server.kill();
    eventually("cut off", || matches!(later.state(), BusState::Disconnected { .. })).await;
    server.wipe();
    server.restart().await;
    eventually("back", || matches!(later.state(), BusState::Connected { .. })).await;
    let (mut two, end) = resume(&bus(&server, log_stream()), &store, LogStreamEnd::default()).await.unwrap();
    two.publish(batches(&store, end.position, 10).await.remove(0)).await.unwrap();
    write(&store, 0, 10).await;
    let more = batches(&store, Position::new(20), 10).await.remove(0);
    assert!(matches!(one.publish(more).await, Err(BusError::Unavailable { .. })));
    assert_eq!(positions_in_stream(&server.url()).await.0, positions(&store).await[..10]);
}

#[tokio::test]
async fn a_new_log_stream_may_begin_later() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let store = store();
    write(&store, 0, 20).await;
    fill(&bus(&server, log_stream().log_stream_after(Position::new(15))), &store).await;
    assert_eq!(positions_in_stream(&server.url()).await, ((16..=20).collect(), 5));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_stream_stops_the_publisher_and_no_append() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let context = jetstream(&server).await;
    let config = Config {
        name: "STORIED_EVENTS".into(),
        subjects: vec!["storied.events.>".into()],
        max_messages: 10,
        discard: async_nats::jetstream::stream::DiscardPolicy::New,
        ..Config::default()
    };
    context.create_stream(config.clone()).await.unwrap();
    let store = store();
    let feed = storied::FeedOptions::new().idle_poll(Duration::from_millis(50));
    let options = log_stream().policy(ProvisionPolicy::RequireExisting);
    let recording = Recording::start(&store, bus(&server, options), feed).await;
    write(&store, 0, 15).await;
    recording.reaches("full", &store).await;
    eventually("stuck", || {
        matches!(recording.node.publisher().state, PublisherState::Retrying { error } if error.contains("maximum messages"))
    })
    .await;
    context.update_stream(Config { max_messages: 100, ..config }).await.unwrap();
    let head = store.high_water_mark().await.unwrap();
    eventually("published", || recording.node.publisher().published == Some(head)).await;
    assert_eq!(positions_in_stream(&server.url()).await.0, positions(&store).await);
    recording.node.stop(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_restored_from_an_older_state_does_not_continue_the_log_stream() {
    let server = NatsServer::start(support::NatsOptions::jetstream()).await;
    let dir = tempfile::TempDir::new().unwrap();
    let (live, backup) = (dir.path().join("events.db"), dir.path().join("backup.db"));
    let open = |path| storied::SqliteStore::open(path);
    let store: Arc<dyn EventStore> = Arc::new(open(live).await.unwrap());
    write(&store, 0, 10).await;
    let sql = format!("VACUUM INTO '{}'", backup.display());
    let mut connection =
        <sqlx::SqliteConnection as sqlx::Connection>::connect(dir.path().join("events.db").to_str().unwrap())
            .await
            .unwrap();
    sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
    write(&store, 0, 10).await;
    fill(&bus(&server, log_stream()), &store).await;

    // A separate file, which an operator has adopted.
    open(backup.clone()).await.unwrap().adopt(storied::store::Adopt::Moved).await.unwrap();
    let restored: Arc<dyn EventStore> = Arc::new(open(backup).await.unwrap());
    assert_eq!(restored.info().id, store.info().id);
    let recording = Recording::start(&restored, bus(&server, log_stream()), blind()).await;
    eventually("stopped", || {
        matches!(recording.node.publisher().state, PublisherState::Retrying { error } if error.contains("restored"))
    })
    .await;
    // Also after the log has become longer than the log stream.
    write(&restored, 0, 23).await;
    eventually("stopped", || {
        matches!(recording.node.publisher().state, PublisherState::Retrying { error } if error.contains("the log has"))
    })
    .await;
    assert_eq!(positions_in_stream(&server.url()).await.0, positions(&store).await);
    assert_eq!(restored.publisher_checkpoint().await.unwrap(), PublisherCheckpoint::default());
    // Permanent: the stop does not wait until the deadline.
    let start = std::time::Instant::now();
    recording.node.stop(PATIENCE).await.unwrap();
    assert!(start.elapsed() < PATIENCE / 4, "{:?}", start.elapsed());
}
