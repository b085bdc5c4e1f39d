//! Migrating and reading: `migrate`, `status`, `log`, `stream`, `completions`.
//!
//! Also exit codes and redaction.

use std::process::Stdio;
use std::time::Duration;

use serde_json::json;
use storied::{Metadata, NewEvent, PostgresOptions};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::timeout;
use uuid::Uuid;

use crate::cli::program::*;
use crate::support::PostgresServer;

#[tokio::test]
async fn a_store_is_made_once_and_never_by_the_way() {
    for fixture in databases().await {
        // Only `migrate` creates anything.
        for args in [&["status"][..], &["log", "show"], &["stream", "show", "order/1"]] {
            let run = fixture.run(args).await.code(4);
            assert_eq!(run.out, "", "{args:?}");
        }
        if let Some(path) = fixture.url.strip_prefix("sqlite:") {
            assert!(!std::path::Path::new(path).exists());
        }
        fixture.run(&["migrate"]).await.code(0).shows(&["is migrated", "cbor payloads"]);
        fixture.run(&["migrate"]).await.code(0).shows(&["is up to date"]);
        let json = fixture.run(&["migrate", "--json"]).await.code(0).json();
        assert_eq!((&json["migrated"], &json["backend"]), (&json!(false), &json!(fixture.kind)));
        let indexing = fixture.run(&["migrate", "--index-by-name"]).await;
        if fixture.kind == "postgres" {
            indexing.code(0).shows(&["is migrated"]);
            fixture.run(&["migrate", "--index-by-name"]).await.code(0).shows(&["is up to date"]);
        } else {
            indexing.code(2).complains(&["PostgreSQL"]);
        }
        // The codec of an existing store stays.
        fixture.run(&["migrate", "--codec", "json"]).await.code(4).complains(&["cbor payloads"]);
        fixture.run(&["status"]).await.code(0).shows(&["up to position 0", "none holds a lease"]);
        fixture.run(&["log", "show"]).await.code(0);
    }
}

/// Checks that a foreign file stays unchanged.
#[tokio::test]
async fn a_foreign_database_is_not_changed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("theirs.db");
    {
        use sqlx::{ConnectOptions, Connection, Executor};
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&path).create_if_missing(true);
        let mut connection = options.connect().await.unwrap();
        connection.execute("CREATE TABLE theirs (x)").await.unwrap();
        connection.close().await.unwrap();
    }
    let before = std::fs::read(&path).unwrap();
    let url = format!("sqlite:{}", path.display());
    bare(&["status", "--database-url", &url]).await.code(4).complains(&["storied_migrations"]);
    let directory = format!("sqlite:{}", path.parent().unwrap().display());
    bare(&["status", "--database-url", &directory]).await.code(2).complains(&["is a directory; name a file"]);
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let fifo = dir.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let fifo = format!("sqlite:{}", fifo.display());
    bare(&["status", "--database-url", &fifo]).await.code(2).complains(&["is not a regular file"]);
}

/// Returns the first line of standard error of a command that waits.
async fn first_complaint(args: &[&str]) -> String {
    use tokio::io::{AsyncBufReadExt, BufReader};

    let mut child = program().args(args).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    // 1 s and a probe of 500 ms on an idle machine.
    let line = timeout(Duration::from_secs(10), lines.next_line()).await.expect("a notice").unwrap();
    child.kill().await.unwrap();
    line.unwrap()
}

#[tokio::test]
async fn a_wait_for_a_server_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let sqlite = format!("sqlite:{}", dir.path().join("events.db").display());
    bare(&["migrate", "--database-url", &sqlite]).await.code(0);
    // Accepts connections, and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent.local_addr().unwrap().to_string();
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = server.local_addr().unwrap().to_string();
    drop(server);
    let url = |address: &str| format!("postgres://storied:hidden@{address}/storied");
    let notice = |kind: &str, address: &str, reason: &str, limit: u8| {
        format!("waiting for {kind} at {address}: {reason}; giving up within {limit} s (--timeout)")
    };
    for (address, reason) in [(&closed, "connection refused"), (&silent, "no answer yet")] {
        let expected = notice("PostgreSQL", address, reason, 40);
        let url = url(address);
        for args in [
            &["status", "--database-url", &url][..],
            &["status", "--database-url", &sqlite, "--read-model-url", &url],
        ] {
            let args = [args, &["--timeout", "40"]].concat();
            assert_eq!(first_complaint(&args).await, expected);
        }
        bare(&["status", "--database-url", &url, "--timeout", "3"])
            .await
            .code(3)
            .complains(&[&notice("PostgreSQL", address, reason, 3), "\nerror: "]);
        // A program reads one document.
        let run = bare(&["status", "--database-url", &url, "--timeout", "2", "--json"]).await.code(3);
        let error: serde_json::Value = serde_json::from_str(&run.err).unwrap();
        assert_eq!(error["error"]["kind"], "unavailable");
    }
    let args = ["nats", "check", "--database-url", &sqlite, "--timeout", "20", "--nats-url", &silent];
    assert_eq!(first_complaint(&args).await, notice("NATS", &silent, "no answer yet", 40));
}

#[tokio::test]
async fn a_server_with_another_protocol_ends_the_wait() {
    use std::io::{Read, Write};

    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    std::thread::spawn(move || {
        for client in server.incoming() {
            let mut client = client.unwrap();
            let _ = client.read(&mut [0; 64]);
            let _ = client.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
    });
    let url = format!("postgres://storied@{address}/storied");
    let run = bare(&["status", "--database-url", &url, "--timeout", "60"]).await.code(4);
    assert!(!run.err.contains("waiting for"), "{}", run.err);
    run.complains(&["another protocol", "check host and port of the database URL"]);
}

#[tokio::test]
async fn the_log_is_shown_and_filtered() {
    for (fixture, _store) in filled().await {
        let all = fixture.run(&["log", "show"]).await.code(0);
        assert_eq!(all.out.lines().count(), 5);
        all.shows(&[
            "order/1 v2  order.placed  {\"by\":\"Zoë\",\"pence\":250}",
            "order/2 v2  order.cancelled  null",
        ]);
        fixture
            .run(&["log", "show", "--metadata"])
            .await
            .code(0)
            .shows(&["metadata {\"user\":{\"tenant\":\"acme\"}}"]);

        let positions = async |args: &[&str]| {
            let run = fixture.run(&[&["log", "show", "--json"], args].concat()).await.code(0);
            run.lines().iter().map(|event| event["position"].as_u64().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(positions(&[]).await, [1, 2, 3, 4, 5]);
        assert_eq!(positions(&["--from", "2", "--to", "4"]).await, [2, 3, 4]);
        assert_eq!(positions(&["--from", "4", "--to", "900"]).await, [4, 5]);
        assert_eq!(positions(&["--from", "9"]).await, [] as [u64; 0]);
        assert_eq!(positions(&["--limit", "2"]).await, [1, 2]);
        assert_eq!(positions(&["--limit", "0"]).await, [1, 2, 3, 4, 5]);
        assert_eq!(positions(&["--name", "order.cancelled"]).await, [4]);
        assert_eq!(positions(&["--stream", "order/1", "--stream", "order/a/b"]).await, [1, 2, 5]);
        assert_eq!(
            positions(&["--category", "order", "--name", "order.placed", "--stream", "order/2"]).await,
            [3]
        );
        assert_eq!(positions(&["--category", "invoice"]).await, [] as [u64; 0]);
        fixture
            .run(&["log", "show", "--limit", "2"])
            .await
            .code(0)
            .shows(&["the limit of 2 events", "--from 3"]);

        let event = &fixture.run(&["log", "show", "--json", "--to", "1"]).await.code(0).lines()[0];
        assert_eq!(event["payload"], json!({ "pence": 100, "by": "Zoë" }));
        assert_eq!(event["metadata"], json!({ "user": { "tenant": "acme" } }));
        assert_eq!(
            (&event["stream"], &event["version"], &event["name"]),
            (&json!("order/1"), &json!(1), &json!("order.placed"))
        );
        for wrong in [["--stream", "order"], ["--name", "a b"], ["--from", "x"]] {
            fixture.run(&[&["log", "show"], &wrong[..]].concat()).await.code(2);
        }
    }
}

/// What a command has caused: its own events, and those of its nested commands.
#[tokio::test]
async fn the_events_of_a_correlation_are_shown() {
    for (fixture, store) in filled().await {
        let command = Uuid::now_v7();
        let mut metadata = Metadata::default();
        metadata.correlation_id = Some(command);
        for (stream, nested) in [("7", false), ("8", true), ("9", true)] {
            let encoded = NewEvent::encode(&placed(1), store.info().codec, &metadata).unwrap();
            let command_id = if nested { Uuid::now_v7() } else { command };
            append_raw(&store, stream, vec![NewEvent { command_id, ..encoded }]).await;
            append(&store, stream, &[placed(2)]).await;
        }
        let id = command.to_string();
        let positions = async |args: &[&str]| {
            let show = ["log", "show", "--json", "--correlation", &id];
            let run = fixture.run(&[&show, args].concat()).await.code(0);
            run.lines().iter().map(|event| event["position"].as_u64().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(positions(&[]).await, [6, 8, 10]);
        assert_eq!(positions(&["--from", "7", "--to", "9"]).await, [8]);
        assert_eq!(positions(&["--limit", "2"]).await, [6, 8]);
        assert_eq!(positions(&["--stream", "order/9"]).await, [10]);
        let limited = fixture.run(&["log", "show", "--correlation", &id, "--limit", "2"]).await.code(0);
        limited.shows(&["the limit of 2 events", "--from 9"]);
        let unknown = Uuid::now_v7().to_string();
        let none = fixture.run(&["log", "show", "--correlation", &unknown]).await.code(0);
        none.complains(&["matches the filter"]);
        fixture.run(&["log", "show", "--correlation", "7"]).await.code(2);
    }
}

#[tokio::test]
async fn a_stream_is_shown_by_version() {
    for (fixture, _store) in filled().await {
        let run = fixture.run(&["stream", "show", "order/1"]).await.code(0);
        assert_eq!(run.out.lines().count(), 2);
        let versions =
            fixture.run(&["stream", "show", "order/1", "--from", "2", "--json"]).await.code(0).lines();
        assert_eq!(versions.iter().map(|event| event["version"].clone()).collect::<Vec<_>>(), [json!(2)]);
        fixture
            .run(&["stream", "show", "order/1", "--limit", "1"])
            .await
            .code(0)
            .shows(&["the stream continues: --from 2"]);
        fixture.run(&["stream", "show", "order/none"]).await.code(4).complains(&["no stream order/none"]);
        fixture.run(&["stream", "show", "order"]).await.code(2);
    }
}

#[tokio::test]
async fn undecodable_events_are_shown_and_reported() {
    for (fixture, store) in filled().await {
        let garbled = NewEvent::encode(&placed(1), store.info().codec, &Default::default()).unwrap();
        append_raw(&store, "3", vec![NewEvent { payload: vec![0xff, 0].into(), ..garbled }]).await;
        let run =
            fixture.run(&["log", "show", "--json"]).await.code(1).complains(&["1 of 6 events do not decode"]);
        assert_eq!(run.lines()[5]["payload"]["$bytes"], "ff00");
        assert!(run.err.starts_with("{\"error\":{\"kind\":\"problem\""), "{}", run.err);
        fixture.run(&["stream", "show", "order/3"]).await.code(1).shows(&["$undecodable"]);
        fixture.run(&["log", "show", "--to", "5"]).await.code(0);
    }
}

/// Checks that the tool finds the codec of the store.
#[tokio::test]
async fn a_store_with_json_payloads_is_read_as_well() {
    for fixture in databases().await {
        fixture.run(&["migrate", "--codec", "json"]).await.code(0).shows(&["json payloads"]);
        fixture.run(&["status", "--json"]).await.code(0).shows(&["\"codec\":\"json\""]);
    }
}

#[tokio::test]
async fn the_log_is_followed() {
    for (fixture, store) in filled().await {
        let mut child = fixture
            .command(&["log", "tail", "-n", "2", "--name", "order.placed", "--json", "--limit", "4"])
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut next = async || {
            let line = timeout(PATIENCE, lines.next_line()).await.expect("a line").unwrap().expect("a line");
            serde_json::from_str::<serde_json::Value>(&line).unwrap()["position"].as_u64().unwrap()
        };
        // The last two matching events, and then new ones of this process, which is another one for
        // the tool.
        assert_eq!([next().await, next().await], [3, 5]);
        append(&store, "1", &[OrderEvent::Cancelled, placed(2)]).await;
        assert_eq!(next().await, 7);
        append(&store, "9", &[placed(3)]).await;
        assert_eq!(next().await, 8);
        let status = timeout(PATIENCE, child.wait()).await.expect("it ends at its limit").unwrap();
        assert_eq!(status.code(), Some(0));
        let run = fixture.run(&["log", "tail", "-n", "3", "--limit", "3"]).await.code(0);
        assert_eq!(run.out.lines().count(), 3);
    }
}

/// `storied log show | head`.
#[tokio::test]
async fn a_closed_pipe_is_no_error() {
    for (fixture, store) in filled().await {
        for n in 0..20 {
            append(&store, "1", &vec![placed(n); 100]).await;
        }
        let mut child = fixture.command(&["log", "show", "--limit", "0"]).spawn().unwrap();
        drop(child.stdout.take());
        let output = timeout(PATIENCE, child.wait_with_output()).await.unwrap().unwrap();
        assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
    }
}

#[tokio::test]
async fn a_node_is_seen_in_the_status() {
    for (fixture, store) in filled().await {
        let node = uuid::Uuid::now_v7();
        store.acquire_lease("publisher", node, PATIENCE).await.unwrap().unwrap();
        fixture
            .run(&["status"])
            .await
            .code(0)
            .shows(&[&format!("{node} holds publisher"), "up to position 5"]);
        let json = fixture.run(&["status", "--json"]).await.code(0).json();
        assert_eq!(json["nodes"], json!([{ "node": node, "leases": ["publisher"] }]));
        assert_eq!((&json["head"], &json["store_id"]), (&json!(5), &json!(store.info().id)));
    }
}

#[tokio::test]
async fn the_command_line_is_explained() {
    bare(&["--help"]).await.code(0).shows(&["Exit codes:", "no live node"]);
    bare(&["--version"]).await.code(0).shows(&["storied 0."]);
    bare(&[]).await.code(2);
    bare(&["nonsense"]).await.code(2).complains(&["nonsense"]);
    bare(&["status"]).await.code(2).complains(&["DATABASE_URL"]);
    bare(&["status", "--database-url", "mysql://x"]).await.code(2).complains(&["postgres:// or sqlite:"]);
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        bare(&["completions", shell]).await.code(0).shows(&["storied", "migrate"]);
    }
    // bash accepts the script.
    let script = bare(&["completions", "bash"]).await.out;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("storied.bash");
    std::fs::write(&file, script).unwrap();
    let checked = std::process::Command::new("bash").arg("-n").arg(&file).stderr(Stdio::inherit()).status();
    assert!(checked.unwrap().success());
}

const SECRET: &str = "hunter2&hunter3";
const ENCODED: &str = "hunter2%26hunter3";

#[track_caller]
fn assert_silent(run: &Run) {
    for secret in [SECRET, ENCODED] {
        assert!(!run.out.contains(secret) && !run.err.contains(secret), "{}{}", run.out, run.err);
    }
}

#[tokio::test]
async fn an_unreachable_database_is_unavailable() {
    for json in [&[][..], &["--json"]] {
        let url = format!("postgres://shop:{ENCODED}@127.0.0.1:9/shop");
        let run = bare(&[&["status", "--timeout", "1", "--database-url", &url], json].concat()).await.code(3);
        assert_silent(&run);
        if !json.is_empty() {
            let error: serde_json::Value = serde_json::from_str(&run.err).unwrap();
            assert_eq!(error["error"]["kind"], "unavailable");
        }
    }
    // With any characters in the password.
    for (url, shown) in [
        ("postgres://shop:hunter1,hunter2'hunter3 x@127.0.0.1:9/shop", "postgres://***@127.0.0.1:9/shop: "),
        ("postgres:shop:hunter1,hunter2@127.0.0.1/shop?port=9", "postgres:***@127.0.0.1/shop?port=9: "),
    ] {
        let run = bare(&["status", "--timeout", "1", "--database-url", url]).await.complains(&[shown]);
        assert!(!run.err.contains("hunter") && run.code > 2, "{}", run.err);
    }
    bare(&["status", "--database-url", "sqlite:/nowhere/at/all.db"]).await.code(4).complains(&["/nowhere"]);
}

#[tokio::test]
async fn no_secret_is_printed() {
    let server = PostgresServer::start().await;
    let database = server.create_database().await;
    PostgresOptions::new().url(&database).connect().await.unwrap();
    {
        use sqlx::{Connection, Executor};
        let mut connection = sqlx::PgConnection::connect(&database).await.unwrap();
        connection.execute("CREATE ROLE shop LOGIN PASSWORD 'another'").await.unwrap();
        let rules = "host all shop 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\n";
        let path = server.dir().join("data/pg_hba.conf");
        std::fs::write(path, rules).unwrap();
        connection.execute("SELECT pg_reload_conf()").await.unwrap();
    }
    let url = database.replace("storied@", &format!("shop:{ENCODED}@"));
    // A reload takes some time.
    timeout(PATIENCE, async {
        while run(program().env("DATABASE_URL", &url).arg("status")).await.code != 4 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("the wrong password is refused");
    for args in [&["status"][..], &["migrate"], &["log", "show", "--json"], &["nonsense"], &["--help"]] {
        let run = run(program().env("DATABASE_URL", &url).args(args)).await;
        assert_silent(&run);
    }
    run(program().env("DATABASE_URL", &url).arg("status"))
        .await
        .code(4)
        .complains(&["check user name and password"]);
    let right = database.replace("storied@", "shop:another@");
    let refused = run(program().env("DATABASE_URL", &right).arg("status")).await.code(4);
    assert!(!refused.err.contains("another"), "{}", refused.err);
    {
        use sqlx::{Connection, Executor};
        let mut connection = sqlx::PgConnection::connect(&database).await.unwrap();
        connection.execute("ALTER ROLE shop SUPERUSER").await.unwrap();
    }
    let shown = run(program().env("DATABASE_URL", &right).arg("status"))
        .await
        .code(0)
        .shows(&["postgres://***@127.0.0.1"]);
    assert!(!shown.out.contains("another"), "{}", shown.out);
    // In an unexpected argument, or an invalid one.
    for args in
        [&["status", &url][..], &["--database-url", &format!("postgres://shop:{ENCODED}@[/shop"), "status"]]
    {
        assert_silent(&bare(args).await.code(2));
    }
}
