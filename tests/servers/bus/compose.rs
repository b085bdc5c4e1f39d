//! The nats service of compose.yaml without Docker.
//!
//! Runs the command and the health check of the file with the nats-server of this machine.

use std::time::Duration;

use crate::bus::fixtures::*;
use crate::support::{self, NatsServer};

/// Returns the lines of one service.
fn service(name: &str) -> String {
    let compose = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/compose.yaml")).unwrap();
    let lines = compose.lines().skip_while(|line| *line != format!("  {name}:")).skip(1);
    lines.take_while(|line| line.starts_with("    ")).map(|line| format!("{line}\n")).collect()
}

/// Returns the bracketed, quoted list after `key:`.
fn list(service: &str, key: &str) -> Vec<String> {
    let line = service.lines().find(|line| line.trim_start().starts_with(&format!("{key}: [")));
    let line = line.unwrap_or_else(|| panic!("no {key} in\n{service}"));
    let items = line.split_once('[').unwrap().1.rsplit_once(']').unwrap().0;
    items.split(',').map(|item| item.trim().trim_matches('"').to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_nats_service_is_healthy_and_keeps_a_log_stream() {
    let nats = service("nats");
    let monitoring = support::Port::claim();
    let port = monitoring.number();
    // The container sets the address and the storage directory. The test keeps everything else.
    let mut command = list(&nats, "command").into_iter();
    let mut config = Vec::new();
    while let Some(flag) = command.next() {
        match flag.as_str() {
            "-js" => {}
            "-sd" => assert_eq!(command.next().as_deref(), Some("/data")),
            "-m" => {
                assert_eq!(command.next().as_deref(), Some("8222"));
                config.push(format!("http: \"127.0.0.1:{port}\""));
            }
            other => panic!("a flag that this test does not know: {other}"),
        }
    }
    assert!(nats.contains("nats:/data") && nats.contains("127.0.0.1:4222:4222"), "{nats}");
    let mut server =
        NatsServer::start(support::NatsOptions { config, ..support::NatsOptions::jetstream() }).await;

    let check = list(&nats, "test").pop().unwrap();
    let path = check.strip_prefix("http://127.0.0.1:8222").expect("the monitoring port").to_owned();
    assert!(crate::bus::nats_md::monitored(port, &path).await.contains("\"ok\""));
    let store = store();
    let recording = Recording::start(&store, options(Kind::JetStream, &server).bus(), blind()).await;
    let head = write(&store, 0, 10).await;
    eventually("published", || recording.node.publisher().published == Some(head)).await;
    recording.node.stop(PATIENCE).await.unwrap();

    // A hanging server is not healthy.
    server.pause();
    let asked = tokio::time::timeout(Duration::from_millis(500), crate::bus::nats_md::monitored(port, &path));
    assert!(asked.await.is_err());
    server.resume();
    server.stop().await;
}

/// The tested version is the published one.
#[test]
fn compose_and_tests_use_one_nats_version() {
    let scripts = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/servers")).unwrap();
    let tested = scripts.lines().find_map(|line| line.strip_prefix("nats_version=")).unwrap();
    let image = service("nats");
    let image = image.lines().find_map(|line| line.trim().strip_prefix("image: nats:")).unwrap();
    assert_eq!(image.split('-').next(), Some(tested), "{image}");
}
