//! The tool on a terminal, on a full disk, and on a backup.

use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use serde_json::{Value, json};
use storied::store::{Checkpoint, CheckpointKey, ProgressWrite};
use storied::{EventStore, Metadata, NewEvent, Position, SqliteOptions, SqliteStore};
use tokio::process::Command;
use tokio::time::timeout;

use crate::cli::program::*;

#[tokio::test]
async fn ranges_end_at_their_limit() {
    for (fixture, store) in filled().await {
        let versions = async |args: &[&str]| {
            let run = fixture.run(&[&["stream", "show", "order/1", "--json"], args].concat()).await.code(0);
            run.lines().iter().map(|event| event["version"].as_u64().unwrap()).collect::<Vec<_>>()
        };
        append(&store, "1", &[placed(3), placed(4)]).await;
        assert_eq!(versions(&["--to", "2"]).await, [1, 2]);
        assert_eq!(versions(&["--from", "2", "--to", "3"]).await, [2, 3]);
        assert_eq!(versions(&["--to", "0"]).await, [] as [u64; 0]);
        assert_eq!(versions(&["--from", "3", "--to", "900"]).await, [3, 4]);
        fixture.run(&["stream", "show", "order/none", "--to", "3"]).await.code(4).complains(&["no stream"]);

        let tail = fixture.run(&["log", "tail", "--from", "2", "--limit", "3", "--json"]).await.code(0);
        let positions: Vec<_> =
            tail.lines().iter().map(|event| event["position"].as_u64().unwrap()).collect();
        assert_eq!(positions, [2, 3, 4]);
        fixture.run(&["log", "tail", "--from", "2", "-n", "3"]).await.code(2);
    }
}

#[tokio::test]
async fn an_empty_result_is_reported() {
    for (fixture, _store) in filled().await {
        let none = fixture.run(&["log", "show", "--category", "invoice"]).await.code(0);
        assert_eq!(none.out, "");
        none.complains(&["no event up to position 5 matches the filter"]);
        fixture.run(&["log", "show", "--from", "9"]).await.code(0).complains(&["no event in that part"]);
        fixture
            .run(&["stream", "show", "order/1", "--from", "9"])
            .await
            .code(0)
            .complains(&["order/1 has no event in this range of versions"]);
        // Programs get only JSON on standard output.
        let json = fixture.run(&["log", "show", "--json", "--name", "order.shipped"]).await.code(0);
        assert_eq!(json.out, "");
    }
}

#[tokio::test]
async fn a_full_disk_is_no_fault_of_the_database() {
    for (fixture, _store) in filled().await {
        for args in [&["log", "show"][..], &["status"], &["log", "show", "--json"], &["--help"]] {
            let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
            let child = fixture.command(args).stdout(Stdio::from(full)).spawn().unwrap();
            let run = Run::of(timeout(PATIENCE, child.wait_with_output()).await.unwrap().unwrap());
            run.code(6).complains(&["writing to standard output failed", "No space left on device"]);
        }
    }
}

/// Every exit code other than 0, as `docs/cli.md` has it: for programs, one JSON document on standard error.
#[tokio::test]
async fn an_error_is_json_for_programs() {
    let document = include_str!("../../../docs/cli.md");
    let nowhere = "postgres://shop@127.0.0.1:9/shop";
    let empty = databases().await;
    for (fixture, store) in filled().await {
        let garbled = NewEvent::encode(&placed(1), store.info().codec, &Metadata::default()).unwrap();
        append_raw(&store, "3", vec![NewEvent { payload: vec![0xff, 0].into(), ..garbled }]).await;
        // A projection that no node runs.
        let from = Checkpoint::default();
        let to = Checkpoint { position: Position::new(1), epoch: 1, ..from };
        let key = CheckpointKey::new("seen");
        store.write_progress(vec![ProgressWrite::Checkpoint { key, from, to }]).await.unwrap();
        let empty = empty.iter().find(|empty| empty.kind == fixture.kind).unwrap();
        let full = || Stdio::from(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
        let with = |args: &[&str]| fixture.command(args);
        let cases: [(i32, &str, &dyn Fn() -> Command); 6] = [
            (1, "problem", &|| with(&["log", "show"])),
            (2, "usage", &|| with(&["status", "--database-url", "mysql://x"])),
            (3, "unavailable", &|| with(&["status", "--timeout", "1", "--database-url", nowhere])),
            (4, "refused", &|| empty.command(&["status"])),
            (5, "pending", &|| with(&["projection", "reset", "seen", "--take-within", "0"])),
            (6, "output", &|| {
                let mut command = with(&["status"]);
                command.stdout(full());
                command
            }),
        ];
        for (code, kind, command) in cases {
            assert!(document.contains(&format!("\n| {code} | `{kind}` |")), "{kind}");
            let people = run(&mut command()).await.code(code);
            let programs = run(command().arg("--json")).await.code(code);
            let error: Value = serde_json::from_str(&programs.err)
                .unwrap_or_else(|error| panic!("{code}: {error}: {}", programs.err));
            let message = error["error"]["message"].as_str().unwrap_or_default();
            assert_eq!(error, json!({ "error": { "kind": kind, "message": message } }));
            assert!(
                !message.is_empty() && people.err.ends_with(&format!("error: {message}\n")),
                "{}",
                people.err
            );
        }
        // Only what clap cannot read is answered as text.
        for args in [&["status", "--nonsense", "--json"][..], &["stream", "show", "--json"]] {
            let run = fixture.run(args).await.code(2);
            assert!(
                serde_json::from_str::<Value>(&run.err).is_err() && run.err.contains("Usage:"),
                "{}",
                run.err
            );
        }
    }
}

#[tokio::test]
async fn foreign_text_cannot_control_the_terminal() {
    for fixture in databases().await {
        let store = fixture.open().await;
        let hidden = "a\u{202e}b\u{2028}c\u{200b}d\u{1b}[2Je\u{feff}";
        append(&store, "1", &[OrderEvent::Placed { pence: 1, by: hidden.into() }]).await;
        for args in [&["log", "show"][..], &["stream", "show", "order/1"]] {
            let run = fixture.run(args).await.code(0);
            assert!(
                !run.out.contains(['\u{202e}', '\u{2028}', '\u{200b}', '\u{1b}', '\u{feff}']),
                "{:?}",
                run.out
            );
            run.shows(&["\\u{202e}", "\\u{2028}", "\\u{200b}"]);
        }
        let json = fixture.run(&["log", "show", "--json"]).await.code(0);
        assert_eq!(json.lines()[0]["payload"]["by"], hidden);
    }
}

#[tokio::test]
async fn a_file_is_opened_as_it_is_written() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a%20b.db", "a b.db", "ä#1.db"] {
        let path = dir.path().join(name);
        let store = SqliteStore::open(&path).await.unwrap();
        for url in [format!("sqlite:{}", path.display()), format!("sqlite://{}?mode=rwc", path.display())] {
            bare(&["status", "--json", "--database-url", &url])
                .await
                .code(0)
                .shows(&[&store.info().id.to_string()]);
        }
    }
    let error = SqliteStore::open("sqlite:a.db").await.unwrap_err().to_string();
    assert!(error.contains("the path of a file"), "{error}");
    // SQLite itself reads this as a URI.
    let alike = tempfile::tempdir().unwrap();
    let migrate = ["migrate", "--database-url", "sqlite:file:a%20b.db"];
    run(program().args(migrate).current_dir(alike.path())).await.code(0);
    let files = std::fs::read_dir(alike.path()).unwrap().map(|file| file.unwrap().file_name());
    let files: Vec<_> = files.filter(|name| !name.to_string_lossy().contains(".db-")).collect();
    assert_eq!(files, ["file:a%20b.db"]);
    let missing = format!("sqlite:{}", dir.path().join("none.db").display());
    bare(&["status", "--database-url", &missing]).await.code(4).complains(&["no such file"]);
}

#[tokio::test]
async fn a_new_file_is_for_its_user_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("events.db");
    let store = SqliteStore::open(&path).await.unwrap();
    for suffix in ["", "-wal", "-shm"] {
        let file = dir.path().join(format!("events.db{suffix}"));
        let mode = std::fs::metadata(&file).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{}", file.display());
    }
    drop(store);
    // An existing file keeps its rights.
    let shared = dir.path().join("shared.db");
    std::fs::write(&shared, "").unwrap();
    std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o640)).unwrap();
    SqliteStore::open(&shared).await.unwrap();
    assert_eq!(std::fs::metadata(&shared).unwrap().permissions().mode() & 0o777, 0o640);
}

/// `VACUUM INTO`, the documented backup, leaves out the write-ahead log.
#[tokio::test]
async fn a_backup_is_read_as_it_is_and_restored_by_a_program() {
    let dir = tempfile::tempdir().unwrap();
    let (path, backup) = (dir.path().join("events.db"), dir.path().join("backup.db"));
    let store: std::sync::Arc<dyn EventStore> = std::sync::Arc::new(SqliteStore::open(&path).await.unwrap());
    fill(&store).await;
    {
        use sqlx::{ConnectOptions, Connection};
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&path);
        let mut connection = options.connect().await.unwrap();
        sqlx::query("VACUUM INTO ?").bind(backup.to_str().unwrap()).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
    }
    let before = std::fs::read(&backup).unwrap();
    let url = format!("sqlite:{}", backup.display());
    bare(&["verify", "--database-url", &url]).await.code(0);
    bare(&["log", "show", "--database-url", &url]).await.code(0).shows(&["order/2 v2"]);
    assert!(std::fs::read(&backup).unwrap() == before, "reading a backup does not change it");
    std::fs::set_permissions(&backup, std::fs::Permissions::from_mode(0o400)).unwrap();
    bare(&["status", "--database-url", &url]).await.code(0);
    std::fs::set_permissions(&backup, std::fs::Permissions::from_mode(0o600)).unwrap();
    // A program of the store restores its write-ahead log.
    let _restored = SqliteOptions::new(&backup).open().await.unwrap();
    assert!(dir.path().join("backup.db-wal").exists());
}
