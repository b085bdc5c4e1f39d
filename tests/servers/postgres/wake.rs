//! The time until other processes see an append.

use std::time::{Duration, Instant};

use storied::{EventStore, ExpectedVersion, PostgresOptions, PostgresStore};

use crate::postgres::tools::{append, events, stream};
use crate::support::PostgresServer;

/// Mean time of `rounds` from an append until another process, which was idle for long, knows of
/// it.
async fn wake_up(writer: &PostgresStore, reader: &PostgresStore, rounds: u32) -> Duration {
    let mut appended = reader.appended();
    let mut sum = Duration::ZERO;
    for round in 0..rounds {
        // Not in step with the polling.
        tokio::time::sleep(Duration::from_millis(250 + u64::from(round) * 7)).await;
        appended.mark_unchanged();
        let done = append(writer, &stream("a"), ExpectedVersion::Any, events(1)).await.unwrap();
        let since = Instant::now();
        tokio::time::timeout(Duration::from_secs(5), appended.wait_for(|head| *head >= done.positions[0]))
            .await
            .expect("a wake-up")
            .unwrap();
        sum += since.elapsed();
    }
    sum / rounds
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_processes_are_noticed() {
    let url = PostgresServer::shared().await.create_database().await;
    let (writer, reader) =
        (PostgresStore::connect(&url).await.unwrap(), PostgresStore::connect(&url).await.unwrap());
    let polled = wake_up(&writer, &reader, 10).await;
    let hinting = || PostgresOptions::new().url(&*url).notify(true).connect();
    let (writer, reader) = (hinting().await.unwrap(), hinting().await.unwrap());
    let hinted = wake_up(&writer, &reader, 10).await;
    println!("noticed after {polled:?} by polling, after {hinted:?} by hints");
    assert!(polled < Duration::from_millis(500), "{polled:?}");
    assert!(hinted < Duration::from_millis(40), "{hinted:?}, as by polling");

    let pooled = PostgresOptions::new().url(&*url).notify(true).transaction_pooler(true);
    assert!(pooled.connect().await.unwrap_err().to_string().contains("remove one of the two"));
}
