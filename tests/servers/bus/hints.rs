//! A commit of one node is published by another node at once, although it does not poll.

use std::sync::Arc;
use std::time::Duration;

use storied::testing::Node;
use storied::{EventStore, MemoryStore, PublisherState};
use tokio::time::Instant;

use crate::bus::fixtures::*;
use crate::support::FaultyStore;
use crate::support::{self, NatsServer};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_on_another_node_is_published_long_before_the_next_poll() {
    for kind in NATS {
        let server = NatsServer::start(support::NatsOptions::jetstream()).await;
        let long = Duration::from_secs(600);
        // As in two processes: neither store announces the appends of the other.
        let log = MemoryStore::new();
        let start = async || {
            let store: Arc<dyn EventStore> = Arc::new(FaultyStore::apart(log.clone()));
            let bus = Arc::new(options(kind, &server).bus());
            (Node::start(store.clone(), Some(bus), blind(), publishing().heartbeat(long)).await, store)
        };
        let (one, here) = start().await;
        eventually("one publishes", || one.publisher().state == PublisherState::Publishing).await;
        let (two, there) = start().await;
        eventually("two stands by", || two.publisher().state == PublisherState::Standby).await;
        let mut subscription = subscribe(&options(kind, &server).bus(), &here).await;
        let mut waits = Vec::new();
        for n in 0..20 {
            let start = Instant::now();
            let head = write(&there, n, 1).await;
            wakes(&mut subscription, head).await;
            waits.push(start.elapsed());
        }
        waits.sort_unstable();
        assert!(waits[10] < Duration::from_millis(500), "{kind:?}: {waits:?}");
        // Many commits at once cause few hints, and each is needed only once.
        let head = write(&there, 99, 300).await;
        wakes(&mut subscription, head).await;
        one.stop(PATIENCE).await.unwrap();
        two.stop(PATIENCE).await.unwrap();
    }
}
