//! Three servers: the log stream has three replicas, and its leader dies.

use std::time::Duration;

use storied::bus::{ConsumerOptions, JetStreamOptions, NatsOptions, SubscribeOptions};

use crate::bus::fixtures::*;
use crate::bus::raw::take;
use crate::support::{self, NatsServer, Port};

async fn cluster() -> Vec<NatsServer> {
    let ports: Vec<_> = (0..3).map(|_| Port::claim()).collect();
    let routes: Vec<_> = ports.iter().map(|port| format!("\"nats://127.0.0.1:{}\"", port.number())).collect();
    let servers = ports.iter().enumerate().map(|(n, port)| {
        let listen = format!("127.0.0.1:{}", port.number());
        let config = vec![
            format!("server_name: n{n}"),
            format!("cluster {{ name: three, listen: \"{listen}\", routes: [{}] }}", routes.join(", ")),
        ];
        // No server answers before two are up.
        NatsServer::start(support::NatsOptions { config, ..support::NatsOptions::jetstream() })
    });
    futures_util::future::join_all(servers).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_dies_while_it_is_published_to() {
    let mut servers = cluster().await;
    let urls: Vec<_> = servers.iter().map(NatsServer::url).collect();
    let jetstream = JetStreamOptions::new().replicas(3).max_bytes(64 << 20);
    let options = || {
        quick(NatsOptions::jetstream(jetstream.clone()).url(urls.join(",")))
            .answer_timeout(Duration::from_secs(5))
    };
    let store = store();
    write(&store, 0, 500).await;
    let one = Recording::start(&store, options().bus(), blind()).await;
    let two = Recording::start(&store, options().bus(), blind()).await;
    let bus = options().bus();
    let mut durable = {
        let give_up = tokio::time::Instant::now() + PATIENCE;
        let consumer = || {
            SubscribeOptions::new()
                .consumer(ConsumerOptions::durable("reader").ack_wait(Duration::from_secs(2)))
        };
        loop {
            match bus.subscribe(["note.written"], consumer()).await {
                Ok(subscription) => break subscription,
                Err(error) if tokio::time::Instant::now() < give_up => eprintln!("{error}"),
                Err(error) => panic!("{error}"),
            }
            pause(100).await;
        }
    };
    take(&mut durable, 100).await;
    let writer = Writer::start(&store, 1, 5, Duration::from_millis(5));
    pause(500).await;
    let client = bus.client().await.unwrap();
    let stream = async_nats::jetstream::new(client).get_stream("STORIED_EVENTS").await.unwrap();
    let leader = stream.cached_info().cluster.as_ref().unwrap().leader.clone().unwrap();
    let n: usize = leader.trim_start_matches('n').parse().unwrap();
    servers[n].kill();
    pause(1_000).await;
    let (appends, longest) = writer.done().await;
    assert!(appends > 50 && longest < Duration::from_secs(1), "{appends} {longest:?}");
    one.reaches("without the leader", &store).await;
    two.reaches("without the leader", &store).await;

    // The log stream is exact, and the durable reader has every event at least once.
    let log = log(&store).await;
    one.node.stop(PATIENCE).await.unwrap();
    two.node.stop(PATIENCE).await.unwrap();
    let mut publisher = publisher(&bus, &store).await;
    let end = publisher.resume(storied::bus::LogStreamEnd::default()).await.unwrap();
    let last = *log.last().unwrap();
    let storied::bus::Resume::After(end) = end else { panic!("{end:?}") };
    assert_eq!((end.position, end.sequence), (last, log.len() as u64));
    let mut seen: std::collections::BTreeSet<_> = log[..100].iter().copied().collect();
    while seen.len() < log.len() {
        if let Some(storied::bus::Received::Event(delivery)) = durable.next().await {
            // During a leader election the ack may be lost; the server then redelivers.
            if delivery.ack().await.is_ok() {
                seen.insert(delivery.event().position);
            }
        }
    }
}
