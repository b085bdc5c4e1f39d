//! Handlers: bounded concurrency, acknowledgement after success, and the outcome of failures.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use storied::bus::{ConsumerOptions, HandleError, HandleOptions, RetryPolicy, SubscribeOptions};
use tokio::time::Instant;

use super::common::*;
use super::*;

fn soon() -> RetryPolicy {
    RetryPolicy::new().initial_backoff(Duration::from_millis(20)).max_backoff(Duration::from_millis(100))
}

/// A wrong definition of `note.written`, as by another program.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
enum Misread {
    Written { n: String },
}

impl Event for Misread {
    const CATEGORY: &'static str = "note";
}

fn durable(options: ConsumerOptions) -> SubscribeOptions {
    SubscribeOptions::new().consumer(options)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrency_is_bounded_and_each_event_handled_once() {
    for way in WAYS {
        let (bus, _server) = way.start().await;
        let mut press = Press::new(&bus).await;
        let subscription = listen(&bus, &["note.written"], way.options("x")).await;
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let handling = subscription
            .for_each(HandleOptions::new().concurrency(5), {
                let (running, most, seen) = (running.clone(), most.clone(), seen.clone());
                move |delivery| {
                    let (running, most, seen) = (running.clone(), most.clone(), seen.clone());
                    async move {
                        most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        pause(2).await;
                        running.fetch_sub(1, Ordering::SeqCst);
                        seen.lock().unwrap().push(delivery.event().position);
                        Ok(())
                    }
                }
            })
            .unwrap();
        let printed = press.written(200).await;
        eventually("all handled", || seen.lock().unwrap().len() == 200).await;
        handling.stop(PATIENCE).await.unwrap();
        let mut seen = seen.lock().unwrap().clone();
        seen.sort_unstable();
        assert!(seen.iter().eq(printed.iter().map(|event| &event.position)), "{way:?}");
        assert_eq!(most.load(Ordering::SeqCst), 5, "{way:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_are_retried_and_rejected_events_become_dead_letters() {
    let (bus, server) = Way::Durable.start().await;
    let mut press = Press::new(&bus).await;
    let subscription = listen(&bus, &["note.written"], durable(ConsumerOptions::durable("shop"))).await;
    let attempts: Arc<Mutex<HashMap<u64, Vec<u64>>>> = Arc::default();
    let options = HandleOptions::new().retry(soon().max_attempts(4)).dead_letters();
    let handling = subscription
        .for_each(options, {
            let attempts = attempts.clone();
            move |delivery| {
                let attempts = attempts.clone();
                async move {
                    let Note::Written { n, .. } = delivery.decode()? else { return Ok(()) };
                    attempts.lock().unwrap().entry(n).or_default().push(delivery.attempt());
                    match n {
                        // Twice, then success.
                        1 if delivery.attempt() < 3 => Err(std::io::Error::other("not yet").into()),
                        // Always.
                        2 => panic!("on purpose"),
                        3 => Err(HandleError::reject("näver")),
                        4 => delivery.decode::<Misread>().map(drop).map_err(HandleError::from),
                        _ => Ok(()),
                    }
                }
            }
        })
        .unwrap();
    let mut errors = handling.errors();
    let printed = press.written(5).await;
    let mut outcomes = Vec::new();
    for _ in 0..8 {
        let SubscriptionError::Handler { position, outcome, .. } = error(&mut errors).await else { panic!() };
        outcomes.push((position, outcome));
    }
    let of = |n: usize| -> Vec<_> {
        outcomes.iter().filter(|(at, _)| *at == printed[n].position).map(|(_, outcome)| *outcome).collect()
    };
    let again = "retrying";
    assert_eq!(of(1), [again, again]);
    assert_eq!(of(2), [again, again, again, "given up as a dead letter"]);
    assert_eq!(of(3), ["given up as a dead letter"]);
    assert_eq!(of(4), ["given up as a dead letter"], "it would never decode");
    eventually("the last attempt", || attempts.lock().unwrap().get(&1).is_some_and(|all| all.len() == 3))
        .await;
    assert_eq!(attempts.lock().unwrap()[&2], [1, 2, 3, 4]);

    let jetstream = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let mut dead = jetstream.get_stream("STORIED_DEAD").await.unwrap();
    assert_eq!(dead.info().await.unwrap().state.messages, 3);
    let letter = dead.get_raw_message(1).await.unwrap();
    let header = |name: &str| letter.headers.get(name).unwrap().as_str().to_owned();
    assert_eq!(letter.subject.as_str(), "storied.dead.note.written");
    // The rejected event is first: the other was tried four times.
    assert_eq!(header("Storied-Dead-Event"), printed[3].id.to_string());
    assert_eq!(header("Storied-Dead-Attempts"), "1");
    assert_eq!(header("Storied-Dead-Reason"), "n?ver");
    assert_eq!(header("Storied-Dead-Consumer"), "shop:$noqueue:note_written");
    assert_eq!(header("Storied-Position"), printed[3].position.to_string());
    assert!(letter.payload.len() > 40);
    handling.stop(PATIENCE).await.unwrap();
    // Nothing remains to be delivered.
    let stream = jetstream.get_stream("STORIED_EVENTS").await.unwrap();
    let info = stream.consumer_info("shop:$noqueue:note_written").await.unwrap();
    assert_eq!((info.num_pending, info.num_ack_pending, info.ack_floor.stream_sequence), (0, 0, 5));
}

/// Characters, not bytes: a text of which each character has two or four of them is not cut earlier.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_reason_of_a_dead_letter_has_at_most_1000_characters() {
    let (bus, server) = Way::Durable.start().await;
    let mut press = Press::new(&bus).await;
    let reasons = [
        ("x".repeat(1_000), "x".repeat(1_000)),
        ("x".repeat(1_001), "x".repeat(1_000)),
        ("ä".repeat(1_000), "?".repeat(1_000)),
        ("ä".repeat(1_001), "?".repeat(1_000)),
        ("\u{1f980}".repeat(100_000), "?".repeat(1_000)),
        (format!("{}ä{}", "x".repeat(999), "y".repeat(9)), format!("{}?", "x".repeat(999))),
    ];
    let subscription = listen(&bus, &["note.written"], durable(ConsumerOptions::durable("shop"))).await;
    let said = reasons.clone().map(|(said, _)| said);
    let handling = subscription
        .for_each(HandleOptions::new().dead_letters(), move |delivery| {
            let said = said.clone();
            async move {
                let Note::Written { n, .. } = delivery.decode()? else { return Ok(()) };
                Err(HandleError::reject(said[usize::try_from(n).unwrap()].clone()))
            }
        })
        .unwrap();
    let mut errors = handling.errors();
    let printed = press.written(reasons.len() as u64).await;
    for _ in &reasons {
        let SubscriptionError::Handler { outcome, .. } = error(&mut errors).await else { panic!() };
        assert_eq!(outcome, "given up as a dead letter");
    }
    let jetstream = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let dead = jetstream.get_stream("STORIED_DEAD").await.unwrap();
    let mut found = HashMap::new();
    for sequence in 1..=reasons.len() as u64 {
        let letter = dead.get_raw_message(sequence).await.unwrap();
        let header = |name: &str| letter.headers.get(name).unwrap().as_str().to_owned();
        found.insert(header("Storied-Dead-Event"), header("Storied-Dead-Reason"));
    }
    for (event, (said, kept)) in printed.iter().zip(&reasons) {
        let start: String = said.chars().take(3).collect();
        assert_eq!(&found[&event.id.to_string()], kept, "{start}…, {} characters", said.chars().count());
    }
    handling.stop(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_slower_than_ack_wait_is_not_disturbed() {
    for way in [Way::Durable, Way::Push] {
        let (bus, _server) = way.start().await;
        let mut press = Press::new(&bus).await;
        let options = way.options_with("x", |consumer| consumer.ack_wait(Duration::from_millis(300)));
        let subscription = listen(&bus, &["note.written"], options).await;
        let handled = Arc::new(AtomicUsize::new(0));
        let handling = subscription
            .for_each(HandleOptions::new(), {
                let handled = handled.clone();
                move |_| {
                    let handled = handled.clone();
                    async move {
                        pause(700).await;
                        handled.fetch_add(1, Ordering::SeqCst);
                        Ok(())
                    }
                }
            })
            .unwrap();
        // The second and third event stay longer than that in the local buffer.
        press.written(3).await;
        eventually("handled", || handled.load(Ordering::SeqCst) == 3).await;
        pause(400).await;
        let stats = handling.stats();
        assert_eq!((stats.received, stats.redelivered, stats.errors), (3, 0, 0), "{way:?}");
        handling.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unread_deliveries_go_to_other_readers() {
    let (bus, _server) = Way::DurableQueue.start().await;
    let mut press = Press::new(&bus).await;
    let options =
        || Way::DurableQueue.options_with("x", |consumer| consumer.ack_wait(Duration::from_millis(300)));
    let deaf = listen(&bus, &["note.written"], options()).await;
    let printed = press.written(20).await;
    eventually("the stalled reader has them", || deaf.stats().received == 20).await;
    let mut other = listen(&bus, &["note.written"], options()).await;
    let mut taken = take(&mut other, 20).await;
    taken.sort_by_key(|event| event.position);
    same(&taken, &printed);
    assert!(matches!(error(&mut deaf.errors()).await, SubscriptionError::Stalled { events: 20 }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn manual_handlers_acknowledge_themselves_and_only_once() {
    let (bus, _server) = Way::Durable.start().await;
    let mut press = Press::new(&bus).await;
    for manual in [true, false] {
        let name = format!("manual-{manual}");
        let options = durable(ConsumerOptions::durable(name).ack_wait(Duration::from_millis(200)));
        let subscription = listen(&bus, &["note.written"], options).await;
        let options = HandleOptions::new();
        let options = if manual { options.manual() } else { options };
        let attempts = Arc::new(Mutex::new(Vec::new()));
        let handling = subscription
            .for_each(options, {
                let attempts = attempts.clone();
                move |delivery| {
                    let attempts = attempts.clone();
                    async move {
                        attempts.lock().unwrap().push(delivery.attempt());
                        match delivery.attempt() {
                            // Without an ack by the handler: automatic ack, or redelivery.
                            1 => {}
                            2 => delivery.nak().await?,
                            _ => delivery.ack().await?,
                        }
                        Ok(())
                    }
                }
            })
            .unwrap();
        if manual {
            press.written(1).await;
        }
        let expected: &[u64] = if manual { &[1, 2, 3] } else { &[1] };
        eventually("handled", || attempts.lock().unwrap().len() == expected.len()).await;
        pause(300).await;
        assert_eq!(*attempts.lock().unwrap(), expected);
        assert_eq!(handling.stats().errors, 0);
        handling.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_waits_for_handlers_within_its_limit() {
    let (bus, server) = Way::Durable.start().await;
    let mut press = Press::new(&bus).await;
    let options = || durable(ConsumerOptions::durable("x").ack_wait(Duration::from_millis(500)));
    let done = Arc::new(AtomicUsize::new(0));
    let started = Arc::new(AtomicUsize::new(0));
    let start = async |millis: u64| {
        let (done, started) = (done.clone(), started.clone());
        listen(&bus, &["note.written"], options())
            .await
            .for_each(HandleOptions::new(), move |_| {
                let (done, started) = (done.clone(), started.clone());
                async move {
                    started.fetch_add(1, Ordering::SeqCst);
                    pause(millis).await;
                    done.fetch_add(1, Ordering::SeqCst);
                    Ok(())
                }
            })
            .unwrap()
    };
    let handling = start(300).await;
    press.written(3).await;
    eventually("started", || started.load(Ordering::SeqCst) == 1).await;
    handling.stop(PATIENCE).await.unwrap();
    assert_eq!((started.load(Ordering::SeqCst), done.load(Ordering::SeqCst)), (1, 1));

    let handling = start(600_000).await;
    eventually("started", || started.load(Ordering::SeqCst) == 2).await;
    let begun = Instant::now();
    let error = handling.stop(Duration::from_millis(200)).await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(5) && error.reason.contains("still running"), "{error}");

    // Nothing is lost: aborted and returned deliveries are redelivered.
    let mut rest = listen(&bus, &["note.written"], options()).await;
    assert_eq!(take(&mut rest, 2).await.len(), 2);
    nothing(&mut rest, 50).await;
    drop(server);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn max_deliver_and_backoff_are_the_servers() {
    let (bus, server) = Way::Durable.start().await;
    let mut press = Press::new(&bus).await;
    let raw = async_nats::connect(server.url()).await.unwrap();
    let mut advisories = raw.subscribe("$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.>").await.unwrap();
    let waits = [100, 300].map(Duration::from_millis);
    let consumer = ConsumerOptions::durable("x").max_deliver(3).backoff(waits);
    let mut subscriber = listen(&bus, &["note.written"], durable(consumer)).await;
    press.written(1).await;
    let mut at = Vec::new();
    for attempt in 1..=3 {
        // Taken without an acknowledgement.
        assert_eq!(delivery(&mut subscriber).await.attempt(), attempt);
        at.push(Instant::now());
    }
    assert!(
        at[1] - at[0] >= Duration::from_millis(90) && at[2] - at[1] >= Duration::from_millis(290),
        "{at:?}"
    );
    nothing(&mut subscriber, 700).await;
    assert!(timeout(PATIENCE, advisories.next()).await.unwrap().is_some());
}
