//! `verify`, `nats check`, `publisher status`, against a damaged log and a damaged log stream.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream;
use serde_json::json;
use sqlx::sqlite::{SqliteConnection, SqlitePool};
use sqlx::{Connection, PgConnection};
use storied::bus::{ConsumerOptions, SubscribeOptions};
use storied::projection::{ApplyError, FollowMode, SqliteReadModel};
use storied::testing::Node;
use storied::{
    EventStore, FeedOptions, NatsBus, Projection, ProjectionOptions, PublisherOptions, RecordedEvent,
};

use crate::cli::program::*;
use crate::support::{NatsOptions, NatsServer};

#[tokio::test]
async fn a_sound_log_verifies() {
    for (fixture, _store) in filled().await {
        fixture
            .run(&["verify"])
            .await
            .code(0)
            .shows(&["5 events of 3 streams were read, up to position 5", "no problem was found"]);
        let json = fixture.run(&["verify", "--json"]).await.code(0).json();
        assert_eq!(
            json,
            json!({ "ok": true, "head": 5, "events": 5, "streams": 3, "log_stream": null, "problems": [], "problem_count": 0 })
        );
    }
    // An empty log is sound, too.
    for fixture in databases().await {
        fixture.run(&["migrate"]).await.code(0);
        fixture.run(&["verify"]).await.code(0);
    }
}

/// Checks that the exit code reports problems even if the output is closed or read in part.
#[tokio::test]
async fn problems_with_closed_output_set_the_exit_code() {
    for (fixture, store) in filled().await {
        append(&store, "3", &std::array::from_fn::<_, 300, _>(|_| placed(1))).await;
        drop(store);
        let garbage = if fixture.kind == "sqlite" { "x'ff00'" } else { "'\\xff00'" };
        fixture.tamper(&format!("UPDATE {{events}} SET payload = {garbage}")).await;
        for args in [&["verify"][..], &["verify", "--json"]] {
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            run(fixture.command(args).stdout(writer)).await.code(1).complains(&["305 problems found"]);
        }
    }
}

#[tokio::test]
async fn tampering_with_the_log_is_found() {
    let garbage = |kind| if kind == "sqlite" { "x'ff00'" } else { "'\\xff00'" };
    for (sql, said) in [
        ("DELETE FROM {events} WHERE position = 1", "position 2: version 2 of order/1 follows version 0"),
        (
            "UPDATE {events} SET version = 7 WHERE position = 4",
            "position 4: version 7 of order/2 follows version 1",
        ),
        (
            "UPDATE {events} SET payload = {garbage} WHERE position = 3",
            "position 3: the payload of order.placed in order/2 does not decode",
        ),
        ("UPDATE {events} SET metadata = {garbage} WHERE position = 5", "position 5: "),
        ("UPDATE {events} SET name = 12345 WHERE position = 4", "reading the log after position 3 failed"),
    ] {
        for (fixture, store) in filled().await {
            drop(store);
            // SQLite stores the number of a name; this one is of none.
            let sql = if fixture.kind == "sqlite" { sql.replace("'a b'", "999") } else { sql.to_owned() };
            fixture.tamper(&sql.replace("{garbage}", garbage(fixture.kind))).await;
            fixture.run(&["verify"]).await.code(1).shows(&["PROBLEM", said]).complains(&["1 problem found"]);
            let json = fixture.run(&["verify", "--json"]).await.code(1).json();
            assert_eq!((&json["ok"], &json["problem_count"]), (&json!(false), &json!(1)));
            assert!(json["problems"][0].as_str().unwrap().contains(said), "{json}");
        }
    }
}

/// Publishes everything, and ends.
async fn publish(store: &Arc<dyn EventStore>, server: &NatsServer) {
    let bus = Arc::new(NatsBus::jetstream(server.url()));
    let node = Node::start(store.clone(), Some(bus), FeedOptions::new(), PublisherOptions::new()).await;
    let head = store.high_water_mark().await.unwrap();
    eventually("everything is published", async || node.publisher().published == Some(head)).await;
    node.stop(PATIENCE).await.unwrap();
}

async fn context(server: &NatsServer) -> jetstream::Context {
    jetstream::new(async_nats::connect(server.url()).await.unwrap())
}

#[tokio::test]
async fn an_equal_log_stream_verifies() {
    for (fixture, store) in filled().await {
        let server = NatsServer::start(NatsOptions::jetstream()).await;
        let url = server.url();
        let verify = ["verify", "--log-stream", "--log-stream-within", "1", "--nats-url", &url];
        fixture.run(&verify).await.code(4).complains(&["there is no JetStream stream STORIED_EVENTS"]);
        fixture.run(&["publisher", "status"]).await.code(0).shows(&["no node has published"]);

        publish(&store, &server).await;
        fixture
            .run(&verify)
            .await
            .code(0)
            .shows(&["5 events were compared with the log stream; the log stream keeps all of them"]);
        fixture
            .run(&["publisher", "status"])
            .await
            .code(0)
            .shows(&["no live node, published up to 5 of 5, 0 behind", "message 5"]);
        let json = fixture.run(&["publisher", "status", "--json"]).await.code(0).json();
        assert_eq!(
            json["publisher"],
            json!({ "owner": null, "published": 5, "sequence": 5, "head": 5, "lag": 0 })
        );
        fixture.run(&["status"]).await.code(0).shows(&["publisher  no live node, published up to 5 of 5"]);

        // The log stream may reach the end of the log during the comparison, within its time limit.
        append(&store, "1", &[placed(3)]).await;
        fixture
            .run(&verify)
            .await
            .code(1)
            .shows(&["log stream: ends at position 5, 1 events before the log's 6"]);
        let patient = ["verify", "--log-stream", "--log-stream-within", "60", "--nats-url", &url, "--json"];
        let (run, ()) = tokio::join!(fixture.run(&patient), publish(&store, &server));
        assert_eq!(
            run.code(0).json()["log_stream"],
            json!({ "compared": 6, "first": 1, "last": 6, "not_kept": 0, "behind": 0 })
        );

        // Events removed by its limits are no problem, even if no event is left.
        let stream = context(&server).await.get_stream("STORIED_EVENTS").await.unwrap();
        stream.purge().sequence(4).await.unwrap();
        fixture
            .run(&verify)
            .await
            .code(0)
            .shows(&["the log stream begins at position 4, 3 events later than the log"]);
        stream.purge().await.unwrap();
        fixture.run(&verify).await.code(0).shows(&["the log stream keeps none of them"]);
    }
}

#[tokio::test]
async fn a_log_stream_that_differs_is_found() {
    for (fixture, store) in filled().await {
        let server = NatsServer::start(NatsOptions::jetstream()).await;
        publish(&store, &server).await;
        let url = server.url();
        let verify = ["verify", "--log-stream", "--log-stream-within", "0", "--nats-url", &url];
        let context = context(&server).await;
        let stream = context.get_stream("STORIED_EVENTS").await.unwrap();

        // A foreign message after the last one, and a deleted message in between.
        context.publish("storied.events.order.placed", "not ours".into()).await.unwrap().await.unwrap();
        fixture
            .run(&verify)
            .await
            .code(1)
            .shows(&["log stream: message 6 is not of this log: missing header "]);
        // A message of the log stream, published again.
        let genuine = stream.get_raw_message(2).await.unwrap();
        let mut headers = genuine.headers.clone();
        headers.insert("Nats-Expected-Last-Sequence", "6");
        headers.insert("Nats-Msg-Id", uuid::Uuid::now_v7().to_string());
        headers.insert("Nats-Expected-Last-Msg-Id", "");
        let replayed = context.publish_with_headers(genuine.subject, headers, genuine.payload).await;
        replayed.unwrap().await.unwrap();
        fixture.run(&verify).await.code(1).shows(&["log stream: message 7 has position 2 again"]);
        stream.delete_message(7).await.unwrap();
        stream.delete_message(6).await.unwrap();
        stream.delete_message(3).await.unwrap();
        fixture
            .run(&verify)
            .await
            .code(1)
            .shows(&["log stream: message 3 was deleted", "log stream: the event at position 3 is missing"]);

        // The log changes afterwards: another payload, and fewer events.
        let null = if fixture.kind == "sqlite" { "x'f6'" } else { "'\\xf6'" };
        fixture.tamper(&format!("UPDATE {{events}} SET payload = {null} WHERE position = 2")).await;
        fixture
            .run(&verify)
            .await
            .code(1)
            .shows(&["log stream: message 2 differs from the event at position 2: payload"]);
        fixture.tamper("DELETE FROM {events} WHERE position = 4").await;
        fixture
            .run(&verify)
            .await
            .code(1)
            .shows(&["log stream: has an event at position 4, where the log has none"]);
        fixture.tamper("DELETE FROM {events} WHERE position = 5").await;
        fixture
            .run(&verify)
            .await
            .code(1)
            .shows(&["log stream: continues at position 4, but the log ends at 3"]);
    }
}

/// Checks that the log stream of another store has nothing of this log.
#[tokio::test]
async fn a_log_stream_of_another_store_is_found() {
    let server = NatsServer::start(NatsOptions::jetstream()).await;
    let both = filled().await;
    publish(&both[0].1, &server).await;
    let other = &both[1].0;
    let url = server.url();
    let run =
        other.run(&["verify", "--log-stream", "--log-stream-within", "0", "--nats-url", &url]).await.code(1);
    run.shows(&["log stream: message 1 is not of this log: belongs to the store"]);
    other
        .run(&["nats", "check", "--nats-url", &url])
        .await
        .code(1)
        .shows(&["DIFFERENT  metadata storied.store_id"]);
}

struct Nothing;

impl Projection for Nothing {
    const NAME: &'static str = "nothing";
    type Event = OrderEvent;
    type Transaction = SqliteConnection;

    async fn apply(
        &mut self,
        _: OrderEvent,
        _: &RecordedEvent,
        _: &mut SqliteConnection,
    ) -> Result<(), ApplyError> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_and_consumers_are_compared_and_not_changed() {
    let (fixture, store) = filled().await.remove(0);
    let server = NatsServer::start(NatsOptions::jetstream()).await;
    let url = server.url();
    let check = ["nats", "check", "--nats-url", &url];
    fixture
        .run(&check)
        .await
        .code(1)
        .shows(&["STORIED_EVENTS: MISSING", "STORIED_DEAD: missing, and not needed yet"]);
    let context = context(&server).await;
    assert!(context.get_stream("STORIED_EVENTS").await.is_err(), "looking made it");

    // The objects that the code creates match its options, consumers included.
    let bus = NatsBus::jetstream(&url);
    let node =
        Node::start(store.clone(), Some(Arc::new(bus.clone())), FeedOptions::new(), PublisherOptions::new())
            .await;
    let dir = tempfile::tempdir().unwrap();
    let path = format!("sqlite:{}?mode=rwc", dir.path().join("read.db").display());
    let model = SqliteReadModel::new(SqlitePool::connect(&path).await.unwrap());
    let handle = node.projection(Nothing, model, ProjectionOptions::new().follow(FollowMode::Durable)).await;
    handle.wait_until_caught_up(PATIENCE).await.unwrap();
    let options = SubscribeOptions::new().consumer(ConsumerOptions::durable("shipping"));
    let subscription = bus.subscribe(["order.*"], options).await.unwrap();
    let follower = "projection=2Fnothing";
    let stream = context.get_stream("STORIED_EVENTS").await.unwrap();
    eventually("the projection has its consumer", async || stream.consumer_info(follower).await.is_ok())
        .await;
    fixture.run(&check).await.code(0).shows(&[
        "ok         retention Limits",
        "ok         ack_wait 30s",
        &format!("consumer {follower} of a projection"),
        "shipping:$noqueue:order_=2A of a program",
    ]);
    let json = fixture.run(&[&check[..], &["--json"]].concat()).await.code(0).json();
    assert_eq!((&json["ok"], json["consumers"].as_array().unwrap().len()), (&json!(true), 2));
    fixture
        .run(&[&check[..], &["--replicas", "3"]].concat())
        .await
        .code(1)
        .shows(&["DIFFERENT  num_replicas: is 1, should be 3"]);
    fixture.run(&[&check[..], &["--replicas", "3", "--essential"]].concat()).await.code(0);
    fixture
        .run(&[&check[..], &["--namespace", "shop"]].concat())
        .await
        .code(1)
        .shows(&["SHOP_EVENTS: MISSING"]);
    drop(subscription);
    node.stop(PATIENCE).await.unwrap();

    // A changed option is reported, and stays as it is.
    let mut config = stream.cached_info().config.clone();
    config.max_age = Duration::from_secs(3_600);
    context.update_stream(&config).await.unwrap();
    let mut consumer = stream.consumer_info(follower).await.unwrap().config;
    consumer.max_ack_pending = 5;
    stream.create_consumer(consumer).await.unwrap();
    for _ in 0..2 {
        fixture
            .run(&check)
            .await
            .code(1)
            .shows(&[
                "DIFFERENT  max_age: is 3600s, should be 604800s",
                "DIFFERENT  max_ack_pending: is 5, should be 1024",
            ])
            .complains(&["2 differences"]);
    }
    let json = fixture.run(&[&check[..], &["--json", "--max-age", "3600"]].concat()).await.code(1).json();
    assert_eq!(json["ok"], json!(false));
}

/// Everything that a database has beside what PostgreSQL itself has, or of a file its content and its neighbours.
async fn content(url: &str) -> Vec<String> {
    let Some(path) = url.strip_prefix("sqlite:") else {
        let all = "SELECT 'schema ' || nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND oid >= 16384
             UNION ALL SELECT 'relation ' || oid::regclass FROM pg_class WHERE oid >= 16384
             UNION ALL SELECT 'function ' || oid::regprocedure FROM pg_proc WHERE oid >= 16384 ORDER BY 1";
        let mut connection = PgConnection::connect(url).await.unwrap();
        return sqlx::query_scalar(all).fetch_all(&mut connection).await.unwrap();
    };
    let files = std::fs::read_dir(std::path::Path::new(path).parent().unwrap()).unwrap();
    let file = |file: std::io::Result<std::fs::DirEntry>| {
        let path = file.unwrap().path();
        format!("{} {:?}", path.display(), std::fs::read(&path).unwrap())
    };
    let mut files: Vec<_> = files.map(file).collect();
    files.sort_unstable();
    files
}

#[tokio::test]
async fn no_command_but_migrate_creates_anything() {
    let server = NatsServer::start(NatsOptions::jetstream()).await;
    let url = server.url();
    let nats = context(&server).await;
    let has_nothing = async |what: &[&str]| {
        let account = nats.query_account().await.unwrap();
        assert_eq!((account.streams, account.consumers), (0, 0), "{what:?}");
    };
    let commands = [
        &["status"][..],
        &["log", "show"],
        &["log", "tail", "--limit", "1"],
        &["stream", "show", "order/1"],
        &["projection", "list"],
        &["projection", "pause", "seen", "--force"],
        &["projection", "resume", "seen", "--force"],
        &["projection", "reset", "seen", "--take-within", "0"],
        &["projection", "rebuild", "seen", "--take-within", "0"],
        &["projection", "cancel-rebuild", "seen", "--take-within", "0"],
        &["projection", "withdraw", "seen"],
        &["parked", "list"],
        &["parked", "show", "seen", "1"],
        &["parked", "retry", "seen", "1", "--take-within", "0"],
        &["parked", "discard", "seen", "1"],
        &["parked", "withdraw", "seen", "1"],
        &["publisher", "status"],
        &["store", "adopt", "--moved"],
        &["store", "adopt", "--copy", "--force"],
        &["verify"],
        &["verify", "--log-stream", "--log-stream-within", "0", "--nats-url", &url],
        &["nats", "check", "--nats-url", &url],
    ];
    // A file that is not there, one that is empty, and an empty database.
    let (missing, mut empty) = (databases().await.remove(0), databases().await);
    std::fs::write(empty[0].url.strip_prefix("sqlite:").unwrap(), "").unwrap();
    empty.push(missing);
    for fixture in &empty {
        let before = content(&fixture.url).await;
        for command in commands {
            let run = fixture.run(command).await.code(4);
            assert_eq!(run.out, "", "{command:?}");
            assert_eq!(content(&fixture.url).await, before, "{command:?} on {}", fixture.url);
        }
    }
    has_nothing(&["anything"]).await;

    // A store without anything in it, whose read models are to be elsewhere.
    let stores = databases().await;
    for fixture in &stores {
        fixture.run(&["migrate"]).await.code(0);
    }
    for (fixture, elsewhere) in stores.iter().cycle().zip(&empty) {
        let before = content(&elsewhere.url).await;
        for command in commands {
            if ["status", "projection", "parked"].contains(&command[0]) {
                let model = ["--read-model-url", elsewhere.url.as_str()];
                fixture.run(&[command, &model[..]].concat()).await.code(4);
                assert_eq!(content(&elsewhere.url).await, before, "{command:?} on {}", elsewhere.url);
            } else if command.contains(&url.as_str()) {
                let run = fixture.run(command).await;
                assert!(matches!(run.code, 1 | 4), "{command:?}: {} {}", run.code, run.err);
                has_nothing(command).await;
            }
        }
    }
    // It is the one that does.
    for fixture in &empty {
        let before = content(&fixture.url).await;
        fixture.run(&["migrate"]).await.code(0);
        assert_ne!(content(&fixture.url).await, before);
    }
}

#[tokio::test]
async fn unreachable_or_refusing_nats_is_reported_without_secrets() {
    let (fixture, store) = filled().await.remove(0);
    let node = Node::start(store, None, FeedOptions::new(), PublisherOptions::new()).await;
    node.stop(PATIENCE).await.unwrap();
    let silent = |run: &Run| {
        assert!(!run.out.contains("hunter2") && !run.err.contains("hunter2"), "{}{}", run.out, run.err)
    };
    for command in [&["nats", "check"][..], &["verify", "--log-stream"]] {
        for url in ["nats://u:hunter2@127.0.0.1:9", "nats://hunter2@127.0.0.1:9"] {
            silent(&fixture.run(&[command, &["--timeout", "1", "--nats-url", url]].concat()).await.code(3));
        }
    }
    let config = vec!["authorization { user: shop, password: another }".to_owned()];
    let server = NatsServer::start(NatsOptions { config, ..NatsOptions::jetstream() }).await;
    let url = server.url();
    let check = async |variables: &[(&str, &str)]| {
        let mut command = fixture.command(&["nats", "check", "--nats-url", &url]);
        command.envs(variables.iter().copied());
        run(&mut command).await
    };
    silent(
        &check(&[("NATS_USER", "shop"), ("NATS_PASSWORD", "hunter2")])
            .await
            .code(4)
            .complains(&["refuses the login"]),
    );
    silent(&check(&[("NATS_TOKEN", "hunter2")]).await.code(4));
    silent(&check(&[("NATS_NKEY", "hunter2")]).await);
    silent(&check(&[("NATS_USER", "shop")]).await.code(2));
    check(&[("NATS_USER", "shop"), ("NATS_PASSWORD", "another")]).await.code(1).shows(&["MISSING"]);
    // Without JetStream there is nothing to compare.
    let core = NatsServer::start(NatsOptions::core()).await;
    fixture
        .run(&["nats", "check", "--nats-url", &core.url()])
        .await
        .code(4)
        .complains(&["JetStream is not enabled"]);
}

/// The tool checks the files before any connection, and opens none that has no end.
#[tokio::test]
async fn files_of_options_are_regular_and_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).display().to_string();
    let (fifo, large) = (file("fifo"), file("large"));
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    std::fs::write(&large, vec![b'x'; (1 << 20) + 1]).unwrap();
    let files = [
        (fifo.as_str(), "is not a regular file"),
        ("/dev/null", "is not a regular file"),
        (&large, "has 1048577 bytes (limit 1048576)"),
        ("/no/such/file", "does not exist"),
    ];
    let nowhere = "postgres://storied@127.0.0.1:9/storied";
    for (path, problem) in files {
        for option in ["--nats-creds", "--nats-ca", "--nats-key"] {
            for command in [&["nats", "check"][..], &["verify", "--log-stream"]] {
                let args = [command, &["--database-url", nowhere, option, path]].concat();
                bare(&args).await.code(2).complains(&[&format!("{option}: {path} {problem}")]);
            }
        }
        let args =
            ["nats", "check", "--database-url", nowhere, "--nats-cert", path, "--nats-key", "Cargo.toml"];
        bare(&args).await.code(2).complains(&[&format!("--nats-cert: {path} {problem}")]);
        // The driver of PostgreSQL reads its files itself.
        for key in ["sslrootcert", "sslcert", "sslkey"] {
            let url = format!("{nowhere}?{key}={path}");
            bare(&["status", "--database-url", &url])
                .await
                .code(2)
                .complains(&[&format!("{key}: {path} {problem}")]);
        }
    }
    let sqlite = file("events.db");
    let sqlite = format!("sqlite:{sqlite}");
    bare(&["migrate", "--database-url", &sqlite]).await.code(0);
    let read_model = format!("{nowhere}?sslrootcert={fifo}");
    for (database, read_model) in [(nowhere, nowhere), (sqlite.as_str(), read_model.as_str())] {
        let mut command = program();
        command.args(["status", "--database-url", database, "--read-model-url", read_model]);
        run(command.env("PGPASSFILE", &fifo)).await.code(2).complains(&["is not a regular file"]);
    }
}

/// Every number has a range, which the help states.
#[tokio::test]
async fn numbers_are_in_their_range_or_refused() {
    let most = u64::MAX.to_string();
    for (command, option, range) in [
        (&["nats", "check"][..], "--replicas", "1 to 5"),
        (&["nats", "check"], "--max-age", "up to 3153600000"),
        (&["nats", "check"], "--max-bytes", "up to 2^63-1"),
        (&["nats", "check"], "--duplicate-window", "1 to 3153600000"),
        (&["nats", "check"], "--subject-partitions", "1 to 65535"),
        (&["nats", "check"], "--timeout", "1 to 86400"),
        (&["verify"], "--log-stream-within", "0 to 86400"),
        (&["projection", "reset", "seen"], "--take-within", "0 to 86400"),
        (&["log", "tail"], "--last", "up to 100000"),
    ] {
        bare(&[command, &["--database-url", "sqlite:none.db", option, &most]].concat())
            .await
            .code(2)
            .complains(&[option, &most]);
        let help = bare(&[command, &["--help"]].concat()).await.code(0);
        let line = help.out.lines().find(|line| line.contains(option)).unwrap_or_default();
        let line = format!("{line} {}", help.out.split(line).nth(1).unwrap_or_default());
        assert!(line.split("--").nth(1).unwrap_or_default().contains(range), "{option}: {}", help.out);
    }
}
