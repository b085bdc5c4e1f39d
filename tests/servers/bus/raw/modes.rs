//! The guarantee of each way to subscribe when the subscriber's process is killed.
//!
//! Covers current deliveries, events published while it is away, and events published after its
//! return.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use nix::unistd::getppid;
use storied::bus::ConsumerOptions;

use super::common::*;
use super::*;
use crate::support::{self, NatsServer};

/// The subscriber process of a test: writes down each event, then acknowledges it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "for the tests of modes"]
async fn subscriber_process() {
    let parent = getppid();
    let [url, number, file] =
        ["MODES_NATS", "MODES_WAY", "MODES_FILE"].map(|name| std::env::var(name).unwrap());
    let way = WAYS[number.parse::<usize>().unwrap()];
    let options = match way.kind() {
        Kind::Core => storied::NatsOptions::core(),
        _ => storied::NatsOptions::jetstream(log_stream()),
    };
    let bus = quick(options.url(url)).bus();
    let soon = |consumer: ConsumerOptions| consumer.ack_wait(Duration::from_secs(2)).max_ack_pending(20);
    let mut subscriber = listen(&bus, &["*"], way.options_with("x", soon).capacity(50)).await;
    let mut seen = OpenOptions::new().create(true).append(true).open(&file).unwrap();
    fs::write(format!("{file}-ready-{}", std::process::id()), "").unwrap();
    while getppid() == parent {
        let Ok(Some(next)) = timeout(Duration::from_millis(100), subscriber.next()).await else { continue };
        if let Received::Event(delivery) = next {
            writeln!(seen, "{}", delivery.event().position.get()).unwrap();
            // Slow, so that deliveries are in flight whenever it is killed.
            pause(2).await;
            let _ = delivery.ack().await;
        }
    }
}

struct Subscriber(Child);

impl Subscriber {
    async fn start(way: usize, server: &NatsServer, file: &Path) -> Self {
        let child = support::test_process(module_path!(), "subscriber_process")
            .env("MODES_NATS", server.url())
            .env("MODES_WAY", way.to_string())
            .env("MODES_FILE", file)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let ready = PathBuf::from(format!("{}-ready-{}", file.display(), child.id()));
        let this = Self(child);
        eventually("the subscription listens", || ready.exists()).await;
        this
    }
}

impl Drop for Subscriber {
    /// kill -9.
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Returns the number of deliveries per position.
fn seen(file: &Path) -> BTreeMap<u64, usize> {
    let mut seen = BTreeMap::new();
    for line in fs::read_to_string(file).unwrap_or_default().lines() {
        *seen.entry(line.parse().unwrap()).or_insert(0) += 1;
    }
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_mode_keeps_its_guarantee_for_a_killed_subscriber() {
    for (number, way) in WAYS.into_iter().enumerate() {
        let server = NatsServer::start(support::NatsOptions::jetstream()).await;
        let bus = options(way.kind(), &server).bus();
        let mut press = Press::new(&bus).await;
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("seen");
        let first = Subscriber::start(number, &server, &file).await;
        let before: Vec<_> = press.written(200).await.iter().map(|event| event.position.get()).collect();
        eventually("the handler is running", || seen(&file).len() >= 30).await;
        drop(first);
        let in_time = seen(&file);
        let away: Vec<_> = press.written(50).await.iter().map(|event| event.position.get()).collect();
        let second = Subscriber::start(number, &server, &file).await;
        let after: Vec<_> = press.written(50).await.iter().map(|event| event.position.get()).collect();
        eventually("what comes after", || {
            let seen = seen(&file);
            after.iter().all(|position| seen.contains_key(position))
        })
        .await;
        let has = |positions: &[u64]| {
            let seen = seen(&file);
            positions.iter().filter(|position| seen.contains_key(position)).count()
        };
        match way {
            // At most once: events are lost that it received without reading, or could not receive.
            Way::Core | Way::CoreQueue | Way::Ephemeral => {
                assert_eq!((has(&before), has(&away)), (in_time.len(), 0), "{way:?}");
                assert!(seen(&file).values().all(|times| *times == 1), "{way:?}");
            }
            // At least once: only events in flight at the kill may be redelivered. A shared
            // ephemeral consumer outlives its readers for a while, and has the guarantee of a
            // durable one for that time.
            Way::Durable | Way::Push | Way::DurableQueue | Way::PushQueue | Way::Queue => {
                eventually("all", || has(&before) + has(&away) == 250).await;
                let twice = seen(&file).values().filter(|times| **times > 1).count();
                assert!(twice <= 20, "{way:?}: {twice} came twice");
            }
        }
        drop(second);
    }
}
