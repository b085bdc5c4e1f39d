//! Tests of the harness.
//!
//! Servers start, crash, recover durable data, freeze, and never outlive their test.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::{NatsOptions, NatsServer, Port, PostgresServer, processes_in, test_process};
use async_nats::jetstream;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use sqlx::{Connection, PgConnection};
use tokio::time::timeout;

const WHILE: Duration = Duration::from_millis(300);

async fn rows(url: &str) -> i64 {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::query_scalar("select count(*) from notes").fetch_one(&mut connection).await.unwrap()
}

async fn jetstream(server: &NatsServer) -> jetstream::Context {
    jetstream::new(async_nats::connect(server.url()).await.unwrap())
}

/// Creates a stream `notes` over `notes.>` with one message.
async fn note(server: &NatsServer) {
    let context = jetstream(server).await;
    let config = jetstream::stream::Config {
        name: "notes".into(),
        subjects: vec!["notes.>".into()],
        ..jetstream::stream::Config::default()
    };
    context.create_stream(config).await.unwrap();
    context.publish("notes.first", "kept".into()).await.unwrap().await.unwrap();
}

async fn messages(server: &NatsServer) -> u64 {
    jetstream(server).await.get_stream("notes").await.unwrap().cached_info().state.messages
}

#[tokio::test]
async fn postgres_keeps_what_was_committed() {
    let mut server = PostgresServer::start().await;
    let mut connection = PgConnection::connect(&server.url()).await.unwrap();
    sqlx::query("create table notes (note text)").execute(&mut connection).await.unwrap();
    for expected in 1..=4 {
        let mut connection = PgConnection::connect(&server.url()).await.unwrap();
        sqlx::query("insert into notes values ('kept')").execute(&mut connection).await.unwrap();
        match expected {
            1 => server.kill(),
            2 => server.stop_immediately().await,
            3 => server.stop().await,
            _ => {}
        }
        server.restart().await;
        assert_eq!(rows(&server.url()).await, expected);
    }
}

#[tokio::test]
async fn postgres_answers_nothing_while_paused() {
    let mut server = PostgresServer::start_with(&["max_connections=7"]).await;
    let mut connection = PgConnection::connect(&server.url()).await.unwrap();
    let setting: String =
        sqlx::query_scalar("show max_connections").fetch_one(&mut connection).await.unwrap();
    assert_eq!(setting, "7");

    server.pause();
    let mut answer = Box::pin(sqlx::query("select 1").execute(&mut connection));
    assert!(timeout(WHILE, &mut answer).await.is_err(), "an open connection");
    assert!(timeout(WHILE, PgConnection::connect(&server.url())).await.is_err(), "a new connection");
    server.resume();
    answer.await.unwrap();
    PgConnection::connect(&server.url()).await.unwrap();
}

#[tokio::test]
async fn postgres_databases_are_separate() {
    let shared = PostgresServer::shared().await;
    let (one, other) = (shared.create_database().await, shared.create_database().await);
    for url in [one, other] {
        let mut connection = PgConnection::connect(&url).await.unwrap();
        sqlx::query("create table notes (note text)").execute(&mut connection).await.unwrap();
        assert_eq!(rows(&url).await, 0);
    }
}

#[tokio::test]
async fn nats_core_carries_a_message() {
    let server =
        NatsServer::start(NatsOptions { config: vec!["max_payload: 99".into()], ..NatsOptions::core() })
            .await;
    let client = async_nats::connect(server.url()).await.unwrap();
    assert_eq!(client.server_info().max_payload, 99);
    assert!(!client.server_info().jetstream);
    let mut subscription = client.subscribe("hello").await.unwrap();
    client.publish("hello", "world".into()).await.unwrap();
    let message = futures_util::StreamExt::next(&mut subscription).await.unwrap();
    assert_eq!(message.payload, "world");
}

#[tokio::test]
async fn jetstream_keeps_what_was_acknowledged() {
    let mut server = NatsServer::start(NatsOptions::jetstream()).await;
    note(&server).await;
    server.kill();
    server.restart().await;
    assert_eq!(messages(&server).await, 1, "after kill -9");
    server.restart().await;
    assert_eq!(messages(&server).await, 1, "after an orderly stop");
    server.stop().await;
    server.wipe();
    server.restart().await;
    assert!(jetstream(&server).await.get_stream("notes").await.is_err(), "after a wipe");
}

#[tokio::test]
async fn nats_answers_nothing_while_paused() {
    let mut server = NatsServer::start(NatsOptions::jetstream()).await;
    note(&server).await;
    let context = jetstream(&server).await;
    server.pause();
    let mut answer = Box::pin(context.query_account());
    assert!(timeout(WHILE, &mut answer).await.is_err());
    server.resume();
    answer.await.unwrap();
    assert_eq!(messages(&server).await, 1);
}

#[test]
fn ports_are_claimed_once() {
    let ports: Vec<_> = (0..50).map(|_| Port::claim()).collect();
    let mut numbers: Vec<_> = ports.iter().map(Port::number).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), ports.len());
}

/// Starts both servers and connects to them, so that PostgreSQL has back ends.
async fn both() -> (PostgresServer, NatsServer, PgConnection) {
    let postgres = PostgresServer::start().await;
    let nats = NatsServer::start(NatsOptions::jetstream()).await;
    let connection = PgConnection::connect(&postgres.url()).await.unwrap();
    (postgres, nats, connection)
}

fn port(url: &str) -> u16 {
    let (_, rest) = url.rsplit_once(':').unwrap();
    rest.split('/').next().unwrap().parse().unwrap()
}

/// Checks that no process, directory or listener is left after `within`.
fn assert_gone(dir: &Path, port: u16, within: Duration) {
    let deadline = Instant::now() + within;
    loop {
        let rest = processes_in(dir);
        let free = TcpListener::bind(("127.0.0.1", port)).is_ok();
        if rest.is_empty() && !dir.exists() && free {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{} left: processes {rest:?}, port {port} free: {free}",
            dir.display()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[tokio::test]
async fn a_panicking_test_leaves_nothing() {
    let (tell, told) = std::sync::mpsc::channel();
    let body = tokio::spawn(async move {
        let (mut postgres, mut nats, _connection) = both().await;
        for (dir, url) in [(postgres.dir(), postgres.url()), (nats.dir(), nats.url())] {
            assert!(!processes_in(dir).is_empty());
            tell.send((dir.to_owned(), port(&url))).unwrap();
        }
        postgres.pause();
        nats.pause();
        panic!("on purpose");
    });
    assert!(body.await.unwrap_err().is_panic());
    let places: Vec<_> = told.iter().collect();
    assert_eq!(places.len(), 2);
    for (dir, port) in places {
        assert_gone(&dir, port, Duration::ZERO);
    }
}

/// Starts this program again and kills it, as Ctrl-C or the timeout of a test runner does.
fn kill_a_test_process(body: &str) {
    let mut program = test_process(module_path!(), body);
    program.stdout(Stdio::piped()).process_group(0);
    let mut victim = program.spawn().unwrap();
    let lines = BufReader::new(victim.stdout.take().unwrap()).lines().map(Result::unwrap);
    let places: Vec<(PathBuf, u16)> = lines
        .filter_map(|line| {
            let (dir, port) = line.strip_prefix("at ")?.rsplit_once(' ')?;
            Some((dir.into(), port.parse().unwrap()))
        })
        .take(2)
        .collect();
    assert_eq!(places.len(), 2);
    for (dir, _) in &places {
        assert!(!processes_in(dir).is_empty());
    }
    killpg(Pid::from_raw(victim.id().cast_signed()), Signal::SIGKILL).unwrap();
    victim.wait().unwrap();
    for (dir, port) in places {
        assert_gone(&dir, port, Duration::from_secs(10));
    }
}

async fn wait_to_be_killed(pause: bool) {
    let (mut postgres, mut nats, _connection) = both().await;
    if pause {
        postgres.pause();
        nats.pause();
    }
    println!("\nat {} {}", postgres.dir().display(), port(&postgres.url()));
    println!("at {} {}", nats.dir().display(), port(&nats.url()));
    tokio::time::sleep(Duration::from_secs(30)).await;
}

#[test]
fn a_killed_test_process_leaves_nothing() {
    kill_a_test_process("victim");
}

#[test]
fn a_killed_test_process_leaves_nothing_paused() {
    kill_a_test_process("paused_victim");
}

#[tokio::test]
#[ignore = "for a_killed_test_process_leaves_nothing"]
async fn victim() {
    wait_to_be_killed(false).await;
}

#[tokio::test]
#[ignore = "for a_killed_test_process_leaves_nothing_paused"]
async fn paused_victim() {
    wait_to_be_killed(true).await;
}
