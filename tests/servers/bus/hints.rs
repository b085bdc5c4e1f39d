//! A commit of one node is published by another node at once, although it polls rarely.

use std::sync::Arc;
use std::time::Duration;

use storied::testing::Node;
use storied::{EventStore, PublisherState, SqliteStore};
use tokio::time::Instant;

use crate::bus::fixtures::*;
use crate::support::{self, NatsServer};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_on_another_node_is_published_long_before_the_next_poll() {
    for kind in NATS {
        let server = NatsServer::start(support::NatsOptions::jetstream()).await;
        let dir = tempfile::TempDir::new().unwrap();
        let long = Duration::from_secs(600);
        let start = async || {
            // Two handles on one file, as in two processes: neither receives the append signals of
            // the other.
            let store: Arc<dyn EventStore> =
                Arc::new(SqliteStore::open(dir.path().join("events.db")).await.unwrap());
            let looks = publishing().idle_poll(long).busy_poll(long).heartbeat(long);
            let bus = Arc::new(options(kind, &server).bus());
            (Node::start(store.clone(), bus, blind(), looks).await, store)
        };
        let (one, here) = start().await;
        eventually("one publishes", || one.publisher().state == PublisherState::Publishing).await;
        let (two, there) = start().await;
        eventually("two stands by", || two.publisher().state == PublisherState::Standby).await;
        let mut subscription = subscribe(&options(kind, &server).bus(), &here).await;
        let mut at = here.high_water_mark().await.unwrap();
        let mut waits = Vec::new();
        for n in 0..20 {
            let start = Instant::now();
            let head = write(&there, n, 1).await;
            collect(&mut subscription, at, head).await;
            waits.push(start.elapsed());
            at = head;
        }
        waits.sort_unstable();
        assert!(waits[10] < Duration::from_millis(500), "{kind:?}: {waits:?}");
        // Many commits at once cause few hints, and each is needed only once.
        let head = write(&there, 99, 300).await;
        collect(&mut subscription, at, head).await;
        one.stop(PATIENCE).await.unwrap();
        two.stop(PATIENCE).await.unwrap();
    }
}
