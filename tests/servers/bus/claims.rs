//! Messages of another program in the log stream: they neither move its end nor stop the publisher.

use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::stream::Stream;
use storied::bus::{NatsBus, NatsOptions};
use storied::store::PublisherCheckpoint;
use storied::testing::Node;
use storied::{
    EventStore, FeedOptions, MemoryStore, Position, PublisherOptions, PublisherState, RecordedEvent,
    SqliteStore,
};
use tokio::time::timeout;
use uuid::Uuid;

use crate::bus::fixtures::*;
use crate::support::FaultyStore;
use crate::support::{self, NatsServer};

const HOUR: Duration = Duration::from_secs(3_600);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A published message, sent again.
    Replayed,
    /// A real message with another position.
    Renumbered,
    /// An event of the log before its turn.
    Ahead,
    /// The position of an event of the log, with an id that the log does not have.
    MadeUpId,
    /// A message of another store.
    OtherStore,
    /// 300 messages of all kinds.
    Many,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    Publishing,
    Stopped,
}

struct Scene {
    server: NatsServer,
    store: Arc<dyn EventStore>,
    window: Duration,
    /// Sequence numbers of the forged messages.
    forged: Vec<u64>,
}

impl Scene {
    async fn start(window: Duration) -> Self {
        let server = NatsServer::start(support::NatsOptions::jetstream()).await;
        Self { server, store: store(), window, forged: Vec::new() }
    }

    async fn node(&self) -> Recording {
        self.node_of(&self.store).await
    }

    async fn node_of(&self, store: &Arc<dyn EventStore>) -> Recording {
        Recording::start(store, self.bus(), FeedOptions::new()).await
    }

    fn bus(&self) -> NatsBus {
        let bus = NatsOptions::jetstream(log_stream().duplicate_window(self.window)).url(self.server.url());
        quick(bus).bus()
    }

    async fn stream(&self) -> Stream {
        let context = async_nats::jetstream::new(async_nats::connect(self.server.url()).await.unwrap());
        context.get_stream("STORIED_EVENTS").await.unwrap()
    }

    async fn published(&self, node: &Recording) {
        let head = self.store.high_water_mark().await.unwrap();
        let done = async {
            while node.node.publisher().published != Some(head) {
                pause(5).await;
            }
        };
        if timeout(PATIENCE / 3, done).await.is_err() {
            panic!("not published up to {head}: {:?}", node.node.publisher());
        }
    }

    /// Publishes a copy of the first message with other headers.
    async fn forge(&mut self, headers: &[(&'static str, String)]) {
        let context = async_nats::jetstream::new(async_nats::connect(self.server.url()).await.unwrap());
        let genuine = self.stream().await.get_raw_message(1).await.unwrap();
        let mut forged = HeaderMap::new();
        for (name, values) in genuine.headers.iter() {
            if !name.to_string().starts_with("Nats-Expected-") {
                forged.insert(name.clone(), values[0].clone());
            }
        }
        for (name, value) in headers {
            forged.insert(*name, value.clone());
        }
        let sent = context.publish_with_headers(genuine.subject.clone(), forged, genuine.payload).await;
        let ack = sent.unwrap().await.unwrap();
        assert!(!ack.duplicate);
        self.forged.push(ack.sequence);
    }

    async fn forge_kind(&mut self, kind: Kind, later: &[(u64, Uuid)]) {
        let at = |position: u64| {
            vec![("Storied-Position", position.to_string()), ("Storied-Previous", (position - 1).to_string())]
        };
        let id = |id: Uuid| vec![("Nats-Msg-Id", id.to_string())];
        match kind {
            Kind::Replayed => {
                // Until the server's deduplication window has passed.
                pause(3 * self.window.as_millis() as u64).await;
                self.forge(&[]).await;
            }
            Kind::Renumbered => {
                pause(3 * self.window.as_millis() as u64).await;
                self.forge(&at(later[2].0)).await;
            }
            Kind::Ahead => self.forge(&[at(later[4].0), id(later[4].1)].concat()).await,
            Kind::MadeUpId => {
                self.forge(&[at(3), id(Uuid::now_v7())].concat()).await;
                self.forge(&[at(later[3].0), id(Uuid::now_v7())].concat()).await;
                self.forge(&[at(later[0].0 - 1), id(Uuid::now_v7())].concat()).await;
            }
            Kind::OtherStore => {
                let store = vec![("Storied-Store", Uuid::now_v7().to_string())];
                self.forge(&[store, id(Uuid::now_v7())].concat()).await;
            }
            Kind::Many => {
                for n in 0..300 {
                    let other = [vec![("Storied-Store", Uuid::now_v7().to_string())], at(1 + n)].concat();
                    let wrong = vec![("Storied-Position", "-1".to_owned())];
                    let headers = [at(1 + n % 20), other, wrong, at(1 << 60)];
                    self.forge(&[headers[n as usize % 4].clone(), id(Uuid::now_v7())].concat()).await;
                }
            }
        }
    }

    /// Checks that the messages of the publisher are the log: each event once, in order.
    async fn is_the_log(&self) {
        self.is_the_log_without(&[]).await;
    }

    async fn is_the_log_without(&self, deleted: &[u64]) {
        let mut stream = self.stream().await;
        let last = stream.info().await.unwrap().state.last_sequence;
        let mut found = Vec::new();
        for sequence in (1..=last).filter(|sequence| !self.forged.contains(sequence)) {
            let Ok(message) = stream.get_raw_message(sequence).await else { continue };
            let header = |name: &str| message.headers.get(name).unwrap().as_str().to_owned();
            let id = header("Nats-Msg-Id");
            let id: Uuid = id.split('@').next().unwrap().parse().unwrap();
            found.push((header("Storied-Position").parse::<u64>().unwrap(), id));
        }
        let log = events(&self.store, Position::START).await;
        let log = log.iter().map(|event| (event.position.get(), event.id));
        let log: Vec<_> = log.filter(|(position, _)| !deleted.contains(position)).collect();
        let same = found.iter().zip(&log).take_while(|(found, log)| found == log).count();
        let (found, log) = (&found[same..], &log[same..]);
        let (first, wanted) = (found.first(), log.first());
        assert!(found.is_empty() && log.is_empty(), "after {same}: {first:?} instead of {wanted:?}");
    }
}

async fn scene(kind: Kind, when: When) {
    let mut scene = Scene::start(Duration::from_millis(100)).await;
    write(&scene.store, 0, 20).await;
    let node = scene.node().await;
    scene.published(&node).await;
    let mut running = Some(node);
    if when == When::Stopped {
        stop(running.take()).await;
    }
    let later: Vec<_> = (0..8).map(|n| note(&scene.store, n, 40)).collect();
    let ids: Vec<_> = later.iter().zip(21..).map(|(event, position)| (position, event.id)).collect();
    scene.forge_kind(kind, &ids).await;
    append(&scene.store, 1, later).await;
    for _ in 0..3 {
        let node = match running.take() {
            Some(node) => node,
            None => scene.node().await,
        };
        scene.published(&node).await;
        scene.is_the_log().await;
        write(&scene.store, 0, 3).await;
        scene.published(&node).await;
        stop(Some(node)).await;
    }
    scene.is_the_log().await;
}

async fn stop(node: Option<Recording>) {
    if let Some(node) = node {
        node.node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_while_publishing() {
    scene(Kind::Replayed, When::Publishing).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_while_stopped() {
    scene(Kind::Replayed, When::Stopped).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renumbered_message_while_publishing() {
    scene(Kind::Renumbered, When::Publishing).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renumbered_message_while_stopped() {
    scene(Kind::Renumbered, When::Stopped).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_ahead_while_publishing() {
    scene(Kind::Ahead, When::Publishing).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_ahead_while_stopped() {
    scene(Kind::Ahead, When::Stopped).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_made_up_id_while_publishing() {
    scene(Kind::MadeUpId, When::Publishing).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_made_up_id_while_stopped() {
    scene(Kind::MadeUpId, When::Stopped).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_store_while_publishing() {
    scene(Kind::OtherStore, When::Publishing).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_store_while_stopped() {
    scene(Kind::OtherStore, When::Stopped).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_while_publishing() {
    scene(Kind::Many, When::Publishing).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_while_stopped() {
    scene(Kind::Many, When::Stopped).await;
}

/// As after a crash: the log stream is ahead of the checkpoint, and some messages are deleted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_after_the_checkpoint_are_found() {
    // Position of the checkpoint, deleted messages, and kinds of foreign messages.
    let cases: [(u64, &[u64], &[Kind]); 4] = [
        (5, &[], &[Kind::Replayed, Kind::MadeUpId]),
        (15, &[16, 17, 18], &[]),
        (15, &[15, 19, 20], &[]),
        // Without a checkpoint.
        (0, &[], &[Kind::Replayed, Kind::OtherStore, Kind::MadeUpId]),
    ];
    for (at, deleted, kinds) in cases {
        let window = if deleted.is_empty() { Duration::from_millis(100) } else { Duration::from_secs(120) };
        let mut scene = Scene::start(window).await;
        write(&scene.store, 0, 20).await;
        let node = scene.node().await;
        scene.published(&node).await;
        node.node.stop(PATIENCE).await.unwrap();
        let later: Vec<_> = (21..29).map(|position| (position, Uuid::now_v7())).collect();
        for kind in kinds {
            scene.forge_kind(*kind, &later).await;
        }
        for sequence in deleted {
            scene.stream().await.delete_message(*sequence).await.unwrap();
        }
        let saved = scene.store.publisher_checkpoint().await.unwrap();
        assert_eq!((saved.position.get(), saved.sequence), (20, 20));
        let crashed = PublisherCheckpoint { position: Position::new(at), sequence: at, ..saved };
        assert!(scene.store.save_publisher_checkpoint(saved, crashed).await.unwrap());
        let node = scene.node().await;
        write(&scene.store, 0, 3).await;
        scene.published(&node).await;
        node.node.stop(PATIENCE).await.unwrap();
        scene.is_the_log_without(deleted).await;
    }
}

/// An exact imitation of the next event: the publisher knows that it did not publish it, also
/// before its first event.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_imitation_of_the_next_event() {
    for before in [0, 5] {
        let mut scene = Scene::start(Duration::from_millis(100)).await;
        if before > 0 {
            write(&scene.store, 0, before).await;
        }
        let node = scene.node().await;
        scene.published(&node).await;
        let headers = imitation(&scene, before + 1);
        scene.forge_or_make(&headers).await;
        eventually("fenced", || node.node.publisher().last_error.is_some()).await;
        write(&scene.store, 0, 3).await;
        scene.published(&node).await;
        scene.is_the_log().await;
        node.node.stop(PATIENCE).await.unwrap();
    }
}

/// Another publisher of the same log was first, and published more than one page.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_publisher_before_the_first_event() {
    let mut scene = Scene::start(Duration::from_millis(100)).await;
    let log = MemoryStore::new();
    // Announces only its own appends.
    scene.store = Arc::new(FaultyStore::apart(log.clone()));
    let publishing = PublisherOptions::new().heartbeat(HOUR);
    let node = Node::start(scene.store.clone(), Some(Arc::new(scene.bus())), blind(), publishing).await;
    eventually("publishing", || node.publisher().state == PublisherState::Publishing).await;
    let (other, bus) = (Arc::new(log) as Arc<dyn EventStore>, scene.bus());
    let mut publisher = publisher(&bus, &other).await;
    write(&other, 0, 300).await;
    for batch in batches(&other, Position::START, 300).await {
        publisher.publish(batch).await.unwrap();
    }
    pause(200).await;
    write(&scene.store, 0, 3).await;
    eventually("published", || node.publisher().published == Some(Position::new(303))).await;
    assert!(node.publisher().last_error.is_some_and(|error| error.contains("does not end at message 0")));
    scene.is_the_log().await;
    node.stop(PATIENCE).await.unwrap();
}

/// The number of the checkpoint belongs to a later event of a recreated stream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_of_a_stream_that_was_recreated() {
    let scene = Scene::start(Duration::from_millis(100)).await;
    write(&scene.store, 0, 20).await;
    let node = scene.node().await;
    scene.published(&node).await;
    node.node.stop(PATIENCE).await.unwrap();
    let saved = scene.store.publisher_checkpoint().await.unwrap();
    let old = PublisherCheckpoint { position: Position::new(5), sequence: 10, ..saved };
    assert!(scene.store.save_publisher_checkpoint(saved, old).await.unwrap());
    pause(200).await;
    write(&scene.store, 0, 3).await;
    let node = scene.node().await;
    scene.published(&node).await;
    scene.is_the_log().await;
    node.node.stop(PATIENCE).await.unwrap();
}

fn imitation(scene: &Scene, position: u64) -> Vec<(&'static str, String)> {
    vec![
        ("Storied-Wire", "1".to_owned()),
        ("Storied-Store", scene.store.info().id.to_string()),
        ("Storied-Position", position.to_string()),
        ("Storied-Previous", (position - 1).to_string()),
        ("Nats-Msg-Id", Uuid::now_v7().to_string()),
    ]
}

impl Scene {
    /// Publishes a message with only these headers.
    async fn forge_or_make(&mut self, headers: &[(&'static str, String)]) {
        let context = async_nats::jetstream::new(async_nats::connect(self.server.url()).await.unwrap());
        let mut forged = HeaderMap::new();
        for (name, value) in headers {
            forged.insert(*name, value.clone());
        }
        let sent = context.publish_with_headers("storied.events.note.torn", forged, "x".into()).await;
        self.forged.push(sent.unwrap().await.unwrap().sequence);
    }
}

/// After a restart, the imitation looks like an event that the log has lost.
/// Deleting the message suffices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_imitation_while_stopped_can_be_deleted() {
    let mut scene = Scene::start(Duration::from_millis(100)).await;
    write(&scene.store, 0, 5).await;
    let node = scene.node().await;
    scene.published(&node).await;
    node.node.stop(PATIENCE).await.unwrap();
    let headers = imitation(&scene, 6);
    scene.forge_or_make(&headers).await;
    write(&scene.store, 0, 3).await;
    let node = scene.node().await;
    eventually("stopped", || {
        matches!(node.node.publisher().state, PublisherState::Retrying { error }
            if error.contains("the log has") && error.contains("the messages from 6 on were forged"))
    })
    .await;
    scene.stream().await.delete_message(6).await.unwrap();
    scene.published(&node).await;
    scene.is_the_log().await;
    node.node.stop(PATIENCE).await.unwrap();
}

/// The backup has a valid checkpoint of the publisher.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_store_with_a_checkpoint_does_not_continue_the_log_stream() {
    let mut scene = Scene::start(Duration::from_secs(120)).await;
    let dir = tempfile::TempDir::new().unwrap();
    let (live, backup) = (dir.path().join("events.db"), dir.path().join("backup.db"));
    scene.store = Arc::new(SqliteStore::open(&live).await.unwrap());
    write(&scene.store, 0, 10).await;
    let node = scene.node().await;
    scene.published(&node).await;
    node.node.stop(PATIENCE).await.unwrap();
    let sql = format!("VACUUM INTO '{}'", backup.display());
    let mut connection =
        <sqlx::SqliteConnection as sqlx::Connection>::connect(live.to_str().unwrap()).await.unwrap();
    sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
    let node = scene.node().await;
    write(&scene.store, 0, 10).await;
    scene.published(&node).await;
    node.node.stop(PATIENCE).await.unwrap();

    SqliteStore::open(&backup).await.unwrap().adopt(storied::store::Adopt::Moved).await.unwrap();
    let restored: Arc<dyn EventStore> = Arc::new(SqliteStore::open(&backup).await.unwrap());
    assert_eq!(restored.publisher_checkpoint().await.unwrap().sequence, 10);
    let node = scene.node_of(&restored).await;
    let says = async |text: &str| {
        eventually(text, || {
            matches!(node.node.publisher().state, PublisherState::Retrying { error } if error.contains(text))
        })
        .await;
    };
    says("but the log at 10").await;
    write(&restored, 0, 23).await;
    says("but the log has").await;
    node.node.stop(PATIENCE).await.unwrap();
    scene.is_the_log().await;
}

/// A9: the server takes the second event for a duplicate of the first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_with_one_id_are_all_published() {
    let mut scene = Scene::start(Duration::from_secs(120)).await;
    let node = scene.node().await;
    write(&scene.store, 0, 3).await;
    scene.published(&node).await;
    // In one batch, in another batch, and a third time.
    let mut events: Vec<_> = (0..400).map(|n| note(&scene.store, n, 40)).collect();
    events[7].id = events[2].id;
    events[8].id = events[2].id;
    events[390].id = events[3].id;
    let id = events[5].id;
    append(&scene.store, 1, events).await;
    scene.published(&node).await;
    let mut event = note(&scene.store, 0, 40);
    event.id = id;
    append(&scene.store, 2, vec![event]).await;
    scene.published(&node).await;
    scene.is_the_log().await;
    // Another program has used the id of a later event.
    let later: Vec<_> = (0..5).map(|n| note(&scene.store, n, 40)).collect();
    scene.forge(&[("Nats-Msg-Id", later[2].id.to_string())]).await;
    append(&scene.store, 3, later).await;
    scene.published(&node).await;
    scene.is_the_log().await;
    node.node.stop(PATIENCE).await.unwrap();
    let node = scene.node().await;
    let last = write(&scene.store, 4, 1).await;
    scene.published(&node).await;
    scene.is_the_log().await;
    // Readers get the event's own id.
    let bus = quick(NatsOptions::jetstream(log_stream()).url(scene.server.url())).bus();
    let mut reader = bus.read_log_stream(scene.store.info().id).await.unwrap();
    let mut read: Vec<RecordedEvent> = Vec::new();
    while let Some(item) = reader.next().await.unwrap() {
        if let storied::bus::LogStreamItem::Event { sequence, event, .. } = item
            && !scene.forged.contains(&sequence)
        {
            read.push(*event);
        }
    }
    same(&read, &events_of(&scene).await);
    assert_eq!(read.last().unwrap().position, last);
    node.node.stop(PATIENCE).await.unwrap();
}

async fn events_of(scene: &Scene) -> Vec<RecordedEvent> {
    events(&scene.store, Position::START).await
}
