//! Appends with a boundary.

use std::fmt;

use super::Database;
use super::fixture::{append_one, append_to, conflict, event, events, fill, stream, version, whole_log};
use super::queries::{course, found, named, put, tagged};
use crate::event::{NewEvent, Position, Tags, Version};
use crate::store::{
    Append, AppendError, Appended, Boundary, EventStore, ExpectedVersion, Query, StreamAppend,
};

async fn boundary(store: &dyn EventStore, query: Query) -> Boundary {
    store.read(query).await.unwrap().1
}

/// Returns an append of an event of course `c1` to a new stream.
fn decision(id: impl fmt::Display, boundary: Boundary) -> Append {
    let event = tagged("order.placed", "course:c1");
    Append::one(stream(id), ExpectedVersion::NoStream, vec![event]).unless(boundary)
}

fn changed(answer: Result<Appended, AppendError>) -> Position {
    match answer {
        Err(AppendError::Changed { position }) => position,
        other => panic!("expected a change, got {other:?}"),
    }
}

fn exists(answer: Result<Appended, AppendError>) -> Position {
    match answer {
        Err(AppendError::Exists { position }) => position,
        other => panic!("expected an existing event, got {other:?}"),
    }
}

/// Checks that an append with a boundary is stored until a matching event comes, by any append.
pub async fn a_boundary_holds_until_a_matching_event(database: Database) {
    let (store, other) = (database.open().await, database.open().await);
    let read = async || boundary(&*store, course("c1")).await;
    put(&*other, "old", tagged("order.placed", "course:c1")).await;
    let before = read().await;
    let first = append_one(&*store, decision("d1", before.clone())).await.unwrap().positions[0];
    for handle in [&store, &other] {
        let again = append_one(&**handle, decision("d2", before.clone())).await;
        assert_eq!(changed(again), first, "the event of another append with a boundary");
    }
    append_one(&*other, decision("d2", read().await)).await.unwrap();

    let before = read().await;
    let plain = put(&*other, "plain", tagged("order.paid", "student:s1 course:c1")).await;
    put(&*other, "plain", tagged("order.paid", "course:c1")).await;
    assert_eq!(changed(append_one(&*store, decision("d3", before)).await), plain, "the first event");
    append_one(&*store, decision("d3", read().await)).await.unwrap();

    let before = read().await;
    let new = ["", "course:c1", "course:c1"].map(|tags| tagged("order.placed", tags)).to_vec();
    let expected = ExpectedVersion::Exact(Version::new(2));
    let aggregate = append_to(&*other, &stream("plain"), expected, new).await.unwrap().positions;
    assert_eq!(changed(append_one(&*store, decision("d4", before)).await), aggregate[1]);
    append_one(&*store, decision("d4", read().await)).await.unwrap();
}

/// Checks that a value is unique without a read, whatever kind of append has it.
pub async fn an_existing_event_is_reported(database: Database) {
    let (store, other) = (database.open().await, database.open().await);
    let with_name = |id: &str, name: &str| {
        let event = NewEvent { tags: Tags::new().tag("name", name), ..event("order.placed") };
        let condition = Query::tagged("name", name).exists();
        Append::one(stream(id), ExpectedVersion::NoStream, vec![event]).unless(condition)
    };
    let ada = append_one(&*store, with_name("1", "ada")).await.unwrap().positions[0];
    assert_eq!(exists(append_one(&*other, with_name("2", "ada")).await), ada);
    append_one(&*other, with_name("2", "bob")).await.unwrap();
    let eve = put(&*store, "plain", tagged("order.paid", "name:eve")).await;
    put(&*store, "plain", tagged("order.paid", "name:eve")).await;
    assert_eq!(exists(append_one(&*other, with_name("3", "eve")).await), eve, "the first event");
    assert_eq!(version(&*store, &stream("3")).await, Version::NONE);
}

/// Checks that a refused append leaves no event and no tag.
pub async fn refused_decisions_leave_no_trace(database: Database) {
    let store = database.open().await;
    let stale = boundary(&*store, course("c1")).await;
    let taken = put(&*store, "a", tagged("order.placed", "course:c1")).await;
    for n in 0..10 {
        for (condition, is_read) in [(stale.clone(), true), (course("c1").exists(), false)] {
            let new = vec![tagged("order.placed", "trace:t course:c1"), event("order.paid")];
            let append = Append::one(stream(n), ExpectedVersion::NoStream, new).unless(condition);
            let answer = append_one(&*store, append).await;
            assert_eq!(if is_read { changed(answer) } else { exists(answer) }, taken);
        }
        assert_eq!(version(&*store, &stream(n)).await, Version::NONE);
    }
    assert!(found(&*store, Query::tagged("trace", "t")).await.is_empty());
    assert_eq!(found(&*store, course("c1")).await, [taken]);
    assert_eq!(whole_log(&*store).await.len(), 1);
    assert_eq!(store.high_water_mark().await.unwrap(), taken);
    // The stream and the tag are free.
    let fresh = boundary(&*store, course("c1")).await;
    let append = Append::one(stream(0), ExpectedVersion::NoStream, vec![tagged("order.placed", "trace:t")]);
    let appended = append_one(&*store, append.unless(fresh)).await.unwrap();
    assert_eq!(found(&*store, Query::tagged("trace", "t")).await, appended.positions);
}

/// Checks that events with other tags or names cross no boundary, however many there are.
pub async fn other_tags_and_names_never_conflict(database: Database) {
    let (store, other) = (database.open().await, database.open().await);
    put(&*store, "a", tagged("order.placed", "course:c1 student:s1")).await;
    let both = boundary(&*store, course("c1").tag("student", "s1")).await;
    let placed = boundary(&*store, named("placed").tag("course", "c1")).await;
    let nothing = Query::any([course("c1").tag("student", "s9"), named("paid").tag("course", "c7")]).exists();
    let foreign = ["course:c1", "student:s1", "course:c10 student:s1", "kurs:c1 student:s1", ""];
    for n in 0..20 {
        let new = foreign.map(|tags| tagged("order.paid", tags)).to_vec();
        append_to(&*other, &stream(n % 3), ExpectedVersion::Any, new).await.unwrap();
    }
    for (n, condition) in [both.clone(), placed.clone(), nothing].into_iter().enumerate() {
        let append = Append::one(stream(format!("d{n}")), ExpectedVersion::NoStream, events(1));
        append_one(&*store, append.unless(condition)).await.unwrap();
    }
    // One that matches both.
    let position = put(&*other, "a", tagged("order.placed", "student:s1 course:c1 term:t")).await;
    for condition in [both, placed] {
        assert_eq!(changed(append_one(&*store, decision("last", condition)).await), position);
    }
}

/// Checks that an append is checked against the earlier appends of its batch, and fails alone.
pub async fn a_batch_is_checked_in_its_order(database: Database) {
    let store = database.open().await;
    fill(&*store, &stream("old"), 2).await;
    let before = boundary(&*store, course("c1")).await;
    let one = |id: &str, tags: &str| {
        Append::one(stream(id), ExpectedVersion::NoStream, vec![tagged("order.placed", tags)])
    };
    let batch = vec![
        one("a", ""),
        decision("b", before.clone()),
        decision("c", before.clone()),
        one("d", "course:c2"),
        one("e", "course:c3").unless(course("c2").exists()),
        one("old", "course:c4"),
        one("f", "course:c5").unless(Query::any([course("c3"), course("c4")]).exists()),
        one("g", ""),
    ];
    let mut answers = store.append(batch).await.into_iter();
    let mut next = || answers.next().unwrap();
    next().unwrap();
    let b = next().unwrap().positions[0];
    assert_eq!(changed(next()), b);
    let d = next().unwrap().positions[0];
    assert_eq!(exists(next()), d);
    assert_eq!(conflict(next()).stream, stream("old"));
    let f = next().unwrap().positions[0];
    next().unwrap();
    let all = Query::any((1..=5).map(|n| course(&format!("c{n}"))));
    let mut expected = vec![b, d, f];
    expected.sort_unstable();
    assert_eq!(found(&*store, all).await, expected);
    for (id, stored) in [("a", 1), ("b", 1), ("c", 0), ("d", 1), ("e", 0), ("old", 2), ("f", 1), ("g", 1)] {
        assert_eq!(version(&*store, &stream(id)).await, Version::new(stored), "{id}");
    }
}

/// Checks that two reads return equal boundaries if nothing changed, and that both hold.
pub async fn equal_reads_have_equal_boundaries(database: Database) {
    let store = database.open().await;
    for n in 0..5 {
        put(&*store, n, tagged("order.placed", "course:c1")).await;
    }
    store.high_water_mark().await.unwrap();
    let (first, second) = (boundary(&*store, course("c1")).await, boundary(&*store, course("c1")).await);
    assert_eq!(first, second);
    let foreign = (0..100).map(|n| {
        let event = tagged("order.placed", "course:c2");
        Append::one(stream(format!("foreign-{n}")), ExpectedVersion::Any, vec![event])
    });
    for answer in store.append(foreign.collect()).await {
        answer.unwrap();
    }
    let position = append_one(&*store, decision("a", first)).await.unwrap().positions[0];
    assert_eq!(changed(append_one(&*store, decision("b", second)).await), position);
}

/// Checks that an append with an expected version and a boundary needs both.
pub async fn versions_and_boundaries_are_both_checked(database: Database) {
    let store = database.open().await;
    let stale = boundary(&*store, course("c1")).await;
    let taken = put(&*store, "a", tagged("order.placed", "course:c1")).await;
    let (wrong, right) = (ExpectedVersion::NoStream, ExpectedVersion::Exact(Version::new(1)));
    let append = async |expected, condition: &Boundary| {
        let append = Append::one(stream("a"), expected, vec![tagged("order.paid", "course:c1")]);
        append_one(&*store, append.unless(condition.clone())).await
    };
    let fresh = boundary(&*store, course("c1")).await;
    match append(wrong, &stale).await {
        Err(AppendError::Conflict(conflict)) => assert_eq!(conflict.actual, Some(Version::new(1))),
        answer => assert_eq!(changed(answer), taken),
    }
    assert_eq!(conflict(append(wrong, &fresh).await).actual, Some(Version::new(1)));
    assert_eq!(changed(append(right, &stale).await), taken);
    assert_eq!(found(&*store, course("c1")).await, [taken]);
    assert_eq!(version(&*store, &stream("a")).await, Version::new(1));
    assert_eq!(append(right, &fresh).await.unwrap().versions, [Version::new(2)]);
}

/// Checks that an append to several streams is atomic with its boundary.
pub async fn several_streams_share_a_boundary(database: Database) {
    let store = database.open().await;
    fill(&*store, &stream("b"), 1).await;
    let append = |condition: &Boundary| {
        let part = |id: &str, expected, tags: [&str; 2]| StreamAppend {
            stream: stream(id),
            expected,
            events: tags.map(|tags| tagged("order.placed", tags)).to_vec(),
        };
        let parts = vec![
            part("a", ExpectedVersion::NoStream, ["course:c1", ""]),
            part("b", ExpectedVersion::Exact(Version::new(1)), ["", "course:c1"]),
            part("c", ExpectedVersion::Any, ["course:c2", "course:c1"]),
        ];
        Append::all(parts).unless(condition.clone())
    };
    let stale = boundary(&*store, course("c1")).await;
    let taken = put(&*store, "other", tagged("order.placed", "course:c1")).await;
    assert_eq!(changed(append_one(&*store, append(&stale)).await), taken);
    for (id, stored) in [("a", 0), ("b", 1), ("c", 0)] {
        assert_eq!(version(&*store, &stream(id)).await, Version::new(stored), "{id}");
    }
    assert_eq!(found(&*store, course("c1")).await, [taken]);
    let fresh = boundary(&*store, course("c1")).await;
    let positions = append_one(&*store, append(&fresh)).await.unwrap().positions;
    assert_eq!(found(&*store, course("c1")).await, [taken, positions[0], positions[3], positions[5]]);
    assert_eq!(found(&*store, course("c2")).await, [positions[4]]);
    assert_eq!(changed(append_one(&*store, decision("d", fresh)).await), positions[0]);
}
