//! Concurrency: with any timing, the log is sound and followers see exactly its content.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use uuid::Uuid;

use super::Database;
use super::fixture::{
    Dice, append_to, assert_sound, event, events, ids, name, recorded_ids, stream, whole_log,
};
use crate::event::{RecordedEvent, Version};
use crate::store::{
    Append, AppendError, Checkpoint, CheckpointKey, EventStore, ExpectedVersion, Filter, ProgressWrite,
    ReadLog, StreamAppend,
};

/// Runs 16 concurrent appenders on one stream, each expecting the version that it read.
///
/// In each round one append succeeds, and the others receive a conflict. No version is lost or
/// duplicated.
pub async fn rivals_on_one_stream_leave_no_gap(database: Database) {
    const RIVALS: usize = 16;
    const EACH: usize = 5;
    let stores = [database.open().await, database.open().await];
    let rivals: Vec<_> = (0..RIVALS)
        .map(|rival| {
            let store = stores[rival % 2].clone();
            tokio::spawn(async move {
                let mut done = 0;
                let mut expected = Version::NONE;
                while done < EACH {
                    let form = ExpectedVersion::Exact(expected);
                    match append_to(&*store, &stream("hot"), form, events(1)).await {
                        Ok(appended) => {
                            assert_eq!(appended.versions, [expected.next()]);
                            expected = expected.next();
                            done += 1;
                        }
                        Err(AppendError::Conflict(conflict)) => {
                            assert_eq!((conflict.stream, conflict.expected), (stream("hot"), form));
                            let actual = conflict.actual.unwrap();
                            assert!(actual > expected);
                            expected = actual;
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
            })
        })
        .collect();
    for rival in rivals {
        rival.await.unwrap();
    }
    let log = whole_log(&*stores[0]).await;
    assert_sound(&log);
    assert_eq!(log.len(), RIVALS * EACH);
}

/// I1: runs random writers and followers over two openings.
///
/// Followers have pages of 3, 7 and 100 events, and a filter.
///
/// Followers restart from their checkpoint at random. In the end each has seen the content of the
/// log, in its order, once.
pub async fn followers_see_exactly_the_log(database: Database) {
    let mut writers = Vec::new();
    for writer in 0..8 {
        writers.push(tokio::spawn(write(database.open().await, writer)));
    }
    let done = Arc::new(AtomicBool::new(false));
    let rare = Filter::all().with_names([name("order.rare")]);
    let mut followers = Vec::new();
    for (follower, (limit, filter)) in
        [(3, Filter::all()), (7, Filter::all()), (100, Filter::all()), (5, rare)].into_iter().enumerate()
    {
        let store = database.open().await;
        let done = done.clone();
        followers.push((
            filter.clone(),
            tokio::spawn(follow(store, format!("follower-{follower}"), limit, filter, done)),
        ));
    }
    let mut acknowledged = HashSet::new();
    for writer in writers {
        acknowledged.extend(writer.await.unwrap());
    }
    done.store(true, Ordering::SeqCst);

    let store = database.open().await;
    let log = whole_log(&*store).await;
    assert_sound(&log);
    let written: HashSet<Uuid> = log.iter().map(|event| event.id).collect();
    assert_eq!(written, acknowledged, "the log holds the acknowledged events");
    for (filter, follower) in followers {
        let wanted: Vec<_> = log.iter().filter(|event| filter.matches(event)).collect();
        let seen = follower.await.unwrap();
        let seen: Vec<_> = seen.iter().map(|event| (event.position, event.id)).collect();
        let wanted: Vec<_> = wanted.iter().map(|event| (event.position, event.id)).collect();
        assert_eq!(seen, wanted);
    }
}

/// Appends batches of all kinds, some of them rejected; returns the ids of the acknowledged events.
async fn write(store: Arc<dyn EventStore>, writer: u64) -> Vec<Uuid> {
    let mut dice = Dice::new();
    let mut acknowledged = Vec::new();
    for _ in 0..100 {
        dice.pause(Duration::from_millis(3)).await;
        let mut batch = Vec::new();
        let mut used = HashSet::new();
        for n in 0..=dice.below(3) {
            let mut streams = Vec::new();
            for shared in 0..=dice.below(2) {
                let to = if shared == 0 { format!("own-{writer}-{n}") } else { dice.below(4).to_string() };
                let to = stream(to);
                if !used.insert(to.clone()) {
                    continue; // A batch has a stream at most once.
                }
                let expected =
                    if dice.below(5) == 0 { ExpectedVersion::NoStream } else { ExpectedVersion::Any };
                let count = 1 + dice.below(3);
                let kind = if dice.below(6) == 0 { "order.rare" } else { "order.placed" };
                let events = (0..count).map(|_| event(kind)).collect();
                streams.push(StreamAppend { stream: to, expected, events });
            }
            batch.push(Append::all(streams));
        }
        let sent: Vec<Vec<Uuid>> = batch
            .iter()
            .map(|append| append.streams.iter().flat_map(|part| ids(&part.events)).collect())
            .collect();
        for (answer, sent) in store.append(batch).await.into_iter().zip(sent) {
            match answer {
                Ok(_) => acknowledged.extend(sent),
                Err(AppendError::Conflict(_)) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }
    acknowledged
}

/// Follows the log until it is complete and no writer runs.
///
/// A simulated crash resets the seen events to the checkpoint, as in a read model that commits with
/// it.
async fn follow(
    store: Arc<dyn EventStore>,
    name: String,
    limit: usize,
    filter: Filter,
    done: Arc<AtomicBool>,
) -> Vec<RecordedEvent> {
    let mut dice = Dice::new();
    let mut seen: Vec<RecordedEvent> = Vec::new();
    let mut checkpoint = Checkpoint::default();
    let key = CheckpointKey::new(name);
    loop {
        let finished = done.load(Ordering::SeqCst);
        let page = store
            .read_log(ReadLog::after(checkpoint.position).filter(filter.clone()).limit(limit))
            .await
            .unwrap();
        assert!(page.scanned_to <= page.head.max(checkpoint.position));
        seen.extend(page.events.iter().cloned());
        if dice.below(10) == 0 {
            checkpoint = store.checkpoint(&key).await.unwrap();
            seen.retain(|event| event.position <= checkpoint.position);
            continue;
        }
        let to = Checkpoint { position: page.scanned_to, ..checkpoint };
        if to != checkpoint {
            let write = ProgressWrite::Checkpoint { key: key.clone(), from: checkpoint, to };
            store.write_progress(vec![write]).await.unwrap();
            checkpoint = to;
        }
        if !page.has_more() {
            if finished {
                return seen;
            }
            // No pause at the end of the log, where a reader meets the commits of the writers.
            dice.pause(Duration::from_micros(200)).await;
        }
    }
}

/// Drops append futures at any moment.
///
/// Each append is applied completely or not at all, and the store stays usable.
pub async fn cancelled_appends_do_no_harm(database: Database) {
    let store = database.open().await;
    let mut dice = Dice::new();
    let mut acknowledged = Vec::new();
    let mut attempted: Vec<Vec<Uuid>> = Vec::new();
    for round in 0..150 {
        let new = events(3);
        let sent = ids(&new);
        let append = Append::all(vec![
            StreamAppend { stream: stream("a"), expected: ExpectedVersion::Any, events: new[..2].to_vec() },
            StreamAppend {
                stream: stream(round % 7),
                expected: ExpectedVersion::Any,
                events: new[2..].to_vec(),
            },
        ]);
        let answer = {
            let mut append = store.append(vec![append]);
            match dice.below(3) {
                // Dropped after a few polls …
                0 => {
                    let polls = dice.below(6);
                    let mut polled = 0;
                    std::future::poll_fn(|context| {
                        polled += 1;
                        if polled > polls {
                            return std::task::Poll::Ready(None);
                        }
                        context.waker().wake_by_ref();
                        append.as_mut().poll(context).map(Some)
                    })
                    .await
                }
                // … or after a while.
                _ => tokio::time::timeout(Duration::from_micros(dice.below(3_000)), append).await.ok(),
            }
        };
        if let Some(answers) = answer {
            answers.into_iter().for_each(|answer| _ = answer.unwrap());
            acknowledged.extend(sent.iter().copied());
        }
        attempted.push(sent);
    }
    // The store is still usable.
    for _ in 0..5 {
        append_to(&*store, &stream("a"), ExpectedVersion::Any, events(1)).await.unwrap();
    }
    let log = whole_log(&*store).await;
    assert_sound(&log);
    let found: HashSet<Uuid> = recorded_ids(&log).into_iter().collect();
    assert!(acknowledged.iter().all(|id| found.contains(id)), "acknowledged events are in the log");
    for sent in attempted {
        let there = sent.iter().filter(|id| found.contains(id)).count();
        assert!(there == 0 || there == sent.len(), "half an append");
    }
}
