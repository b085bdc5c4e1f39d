//! Appends with a boundary under concurrent callers.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use uuid::Uuid;

use super::Database;
use super::fixture::{Dice, append_one, assert_sound, ids, stream, whole_log};
use super::queries::{found, named, put, tagged};
use crate::event::{NewEvent, Position, RecordedEvent};
use crate::store::{Append, AppendError, EventStore, ExpectedVersion, Query, StreamAppend};

const SEATS: usize = 10;
const RIVALS: usize = 32;

/// Checks that one of 50 concurrent callers gets a unique value, and that the others learn of it.
pub async fn one_of_many_rivals_gets_a_unique_value(database: Database) {
    let stores = [database.open().await, database.open().await];
    for round in 0..4 {
        let rivals = (0..50).map(|rival| {
            let store = stores[rival % 2].clone();
            tokio::spawn(async move {
                let event = tagged("order.placed", &format!("name:n{round}"));
                let append =
                    Append::one(stream(format!("{round}-{rival}")), ExpectedVersion::NoStream, vec![event]);
                let unique = Query::tagged("name", format!("n{round}")).exists();
                append_one(&*store, append.unless(unique)).await
            })
        });
        let (mut winners, mut reported) = (Vec::new(), Vec::new());
        for answer in join_all(rivals).await {
            match answer.unwrap() {
                Ok(appended) => winners.extend(appended.positions),
                Err(AppendError::Exists { position }) => reported.push(position),
                Err(error) => panic!("{error:?}"),
            }
        }
        assert_eq!((winners.len(), reported.len()), (1, 49), "round {round}");
        assert!(reported.iter().all(|position| *position == winners[0]), "{winners:?} {reported:?}");
        assert_eq!(found(&*stores[0], Query::tagged("name", format!("n{round}"))).await, winners);
    }
    assert_eq!(whole_log(&*stores[1]).await.len(), 4);
}

fn seats() -> Query {
    named("placed").tag("show", "s1")
}

fn seat() -> NewEvent {
    tagged("order.placed", "show:s1")
}

/// A stored decision: its position, and the events that it was made on.
struct Decision {
    position: Position,
    known: Vec<Position>,
}

/// Reads, decides and appends until the caller has a seat or none is left.
async fn take_seat(store: Arc<dyn EventStore>, rival: usize) -> Option<Decision> {
    let mut dice = Dice::new();
    loop {
        let (taken, boundary) = store.read(seats()).await.unwrap();
        if taken.len() >= SEATS {
            return None;
        }
        let known: Vec<Position> = taken.iter().map(|event| event.position).collect();
        dice.pause(Duration::from_millis(1)).await;
        let append = Append::one(stream(format!("rival-{rival}")), ExpectedVersion::NoStream, vec![seat()]);
        match append_one(&*store, append.unless(boundary)).await {
            Ok(appended) => return Some(Decision { position: appended.positions[0], known }),
            Err(AppendError::Changed { position }) => {
                assert!(!known.contains(&position), "the decision knows {position}");
            }
            Err(error) => panic!("{error:?}"),
        }
    }
}

/// Runs the rivals; returns the stored decisions.
async fn take_seats(stores: &[Arc<dyn EventStore>; 2]) -> Vec<Decision> {
    let rivals = (0..RIVALS).map(|rival| tokio::spawn(take_seat(stores[rival % 2].clone(), rival)));
    join_all(rivals).await.into_iter().filter_map(|decision| decision.unwrap()).collect()
}

/// Checks that each decision was made on all seats that precede it in the log.
async fn assert_decided_on_the_truth(store: &dyn EventStore, decisions: &[Decision]) -> Vec<Position> {
    let taken = found(store, seats()).await;
    for Decision { position, known } in decisions {
        let before: Vec<Position> = taken.iter().copied().filter(|other| other < position).collect();
        assert_eq!(*known, before, "the decision at {position}");
        assert!(before.len() < SEATS, "the decision at {position} had no seat");
    }
    taken
}

/// Checks that 32 concurrent callers take exactly the last 10 seats.
pub async fn rivals_take_exactly_the_last_seats(database: Database) {
    let stores = [database.open().await, database.open().await];
    let decisions = take_seats(&stores).await;
    assert_eq!(decisions.len(), SEATS);
    let taken = assert_decided_on_the_truth(&*stores[0], &decisions).await;
    let mut positions: Vec<Position> = decisions.iter().map(|decision| decision.position).collect();
    positions.sort_unstable();
    assert_eq!(taken, positions);
    assert_sound(&whole_log(&*stores[1]).await);
}

/// Checks that no decision overlooks a seat that a plain append takes at the same time.
pub async fn plain_appends_race_with_decisions(database: Database) {
    const PLAIN: usize = 6;
    let stores = [database.open().await, database.open().await];
    let plain = stores.clone().map(|store| {
        tokio::spawn(async move {
            let (mut dice, mut positions) = (Dice::new(), Vec::new());
            for _ in 0..PLAIN / 2 {
                dice.pause(Duration::from_millis(8)).await;
                positions.push(put(&*store, format!("plain-{}", dice.below(3)), seat()).await);
                // Neither this tag nor this name takes a seat.
                put(&*store, "other", tagged("order.placed", "show:s2")).await;
                put(&*store, "other", tagged("order.paid", "show:s1")).await;
            }
            positions
        })
    });
    let decisions = take_seats(&stores).await;
    let mut expected: Vec<Position> = decisions.iter().map(|decision| decision.position).collect();
    for positions in plain {
        expected.extend(positions.await.unwrap());
    }
    expected.sort_unstable();
    let taken = assert_decided_on_the_truth(&*stores[0], &decisions).await;
    assert_eq!(taken, expected);
    // A plain append may take a seat that does not exist. A decision does not.
    assert!(decisions.len() <= SEATS && taken.len() >= SEATS, "{} of {}", decisions.len(), taken.len());
    assert_sound(&whole_log(&*stores[1]).await);
}

/// What a writer has sent, and what became of it.
#[derive(Default)]
struct Sent {
    events: Vec<NewEvent>,
    stored: HashSet<Uuid>,
    /// Stored decisions, with their queries.
    decisions: Vec<(Query, Decision)>,
    /// Refused decisions: query, known events, and the event that was reported.
    refused: Vec<(Query, Vec<Position>, Position)>,
}

fn any_event(dice: &mut Dice) -> NewEvent {
    let name = ["order.placed", "order.paid"][dice.below(2) as usize];
    let tags = match dice.below(6) {
        0 => String::new(),
        1 => format!("a:{} a:{}", dice.below(3), dice.below(3)),
        2 => format!("b:{}", dice.below(2)),
        _ => format!("a:{} b:{}", dice.below(3), dice.below(2)),
    };
    tagged(name, &tags)
}

fn any_query(dice: &mut Dice) -> Query {
    Query::any((0..=dice.below(2)).map(|_| {
        let item = match dice.below(3) {
            0 => named(["placed", "paid"][dice.below(2) as usize]).tag("a", dice.below(3)),
            1 => Query::tagged("b", dice.below(2)),
            _ => Query::tagged("a", dice.below(3)),
        };
        if dice.below(2) == 0 { item.tag("b", dice.below(2)) } else { item }
    }))
}

/// Appends batches of a decision and plain appends, in any order.
async fn write(store: Arc<dyn EventStore>, writer: usize) -> Sent {
    let (mut dice, mut sent) = (Dice::new(), Sent::default());
    for round in 0..50 {
        let query = any_query(&mut dice);
        let (events, boundary) = store.read(query.clone()).await.unwrap();
        assert!(events.is_sorted_by(|a, b| a.position < b.position), "{query:?}");
        let known: Vec<Position> = events.iter().map(|event| event.position).collect();
        dice.pause(Duration::from_millis(2)).await;
        let mut part = |id: String| StreamAppend {
            stream: stream(id),
            expected: ExpectedVersion::Any,
            events: (0..=dice.below(2)).map(|_| any_event(&mut dice)).collect(),
        };
        let parts = vec![part(format!("own-{writer}")), part(format!("new-{writer}-{round}"))];
        let mut batch = vec![Append::all(parts).unless(boundary)];
        for n in 0..dice.below(3) {
            let one = StreamAppend {
                stream: stream(format!("plain-{writer}-{n}")),
                expected: ExpectedVersion::Any,
                events: vec![any_event(&mut dice)],
            };
            batch.insert(dice.below(batch.len() as u64 + 1) as usize, Append::all(vec![one]));
        }
        let appends: Vec<(bool, Vec<NewEvent>)> = batch
            .iter()
            .map(|append| {
                (
                    append.unless.is_some(),
                    append.streams.iter().flat_map(|part| part.events.clone()).collect(),
                )
            })
            .collect();
        for (answer, (is_decision, events)) in store.append(batch).await.into_iter().zip(appends) {
            match answer {
                Ok(appended) => {
                    sent.stored.extend(ids(&events));
                    if is_decision {
                        let decision = Decision { position: appended.positions[0], known: known.clone() };
                        sent.decisions.push((query.clone(), decision));
                    }
                }
                Err(AppendError::Changed { position }) if is_decision => {
                    sent.refused.push((query.clone(), known.clone(), position));
                }
                Err(error) => panic!("{error:?}"),
            }
            sent.events.extend(events);
        }
    }
    sent
}

/// I13: runs random writers over two openings, and replays the log.
///
/// Each stored decision was made on all matching events that precede it; each refused one did not
/// know the event that was reported.
pub async fn decisions_are_made_on_all_matching_events(database: Database) {
    let stores = [database.open().await, database.open().await];
    let writers = (0..6).map(|writer| tokio::spawn(write(stores[writer % 2].clone(), writer)));
    let writers: Vec<Sent> = join_all(writers).await.into_iter().map(Result::unwrap).collect();
    let log = whole_log(&*stores[0]).await;
    assert_sound(&log);
    let stored: HashSet<Uuid> = log.iter().map(|event| event.id).collect();
    let acknowledged: HashSet<Uuid> = writers.iter().flat_map(|sent| &sent.stored).copied().collect();
    assert_eq!(stored, acknowledged);
    let sent: HashMap<Uuid, &NewEvent> =
        writers.iter().flat_map(|sent| &sent.events).map(|event| (event.id, event)).collect();
    let matching = |query: &Query| -> Vec<Position> {
        let matches = |event: &&RecordedEvent| query.matches(&event.name, &sent[&event.id].tags);
        log.iter().filter(matches).map(|event| event.position).collect()
    };
    let mut decisions = 0;
    for (query, Decision { position, known }) in writers.iter().flat_map(|sent| &sent.decisions) {
        let before: Vec<Position> = matching(query).into_iter().filter(|other| other < position).collect();
        assert_eq!(*known, before, "the decision at {position} on {query:?}");
        decisions += 1;
    }
    for (query, known, position) in writers.iter().flat_map(|sent| &sent.refused) {
        assert!(matching(query).contains(position) && !known.contains(position), "{position} {query:?}");
    }
    assert!(decisions > 0, "no decision was stored");
    for a in 0..3 {
        for query in [Query::tagged("a", a), named("paid").tag("a", a).tag("b", 1)] {
            assert_eq!(found(&*stores[1], query.clone()).await, matching(&query), "{query:?}");
        }
    }
}
