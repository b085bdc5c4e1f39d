//! Recurring schedules: revisions, ticks, removal.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use super::Database;
use super::scheduled_commands::{
    LATER, NOW, all, at, command, done, id, invalid, numbers, parked, schedule, seconds, states,
};
use crate::store::{
    DueTime, EventStore, NewScheduledCommand, ScheduledCommand, ScheduledQuery, ScheduledState,
    StoredSchedule,
};

/// Returns a revision of a schedule; its definition is its name and revision.
pub(super) fn revision(name: &str, revision: u64, next_at: Option<DateTime<Utc>>) -> StoredSchedule {
    let definition = format!("{name} {revision}").into_bytes();
    StoredSchedule { name: name.into(), definition, revision, next_at }
}

/// Returns a tick of a schedule.
pub(super) fn tick(number: u128, name: &str, due: DueTime) -> NewScheduledCommand {
    NewScheduledCommand { schedule: Some(name.into()), ..command(number, due) }
}

async fn write(store: &dyn EventStore, schedule: StoredSchedule) -> bool {
    store.write_schedule(schedule, Vec::new()).await.unwrap()
}

fn names(schedules: &[StoredSchedule]) -> Vec<&str> {
    schedules.iter().map(|schedule| &*schedule.name).collect()
}

/// Checks that a schedule comes back as it was written, and that only the next revision is written.
pub async fn a_schedule_is_written_in_revisions(database: Database) {
    let (store, other) = (database.open().await, database.open().await);
    assert_eq!(store.schedule("s").await.unwrap(), None);
    for (number, next_at) in [(1, Some(seconds(1))), (2, None), (3, Some(seconds(-5)))] {
        assert!(write(&*store, revision("s", number, next_at)).await);
        let stored = other.schedule("s").await.unwrap();
        assert_eq!(stored, Some(revision("s", number, next_at)));
        for wrong in [1, number, number + 2, number + 100, i64::MAX as u64] {
            assert!(!write(&*other, revision("s", wrong, None)).await, "{wrong}");
        }
        assert_eq!(other.schedule("s").await.unwrap(), stored);
    }
    assert!(!write(&*store, revision("t", 2, None)).await && store.schedule("t").await.unwrap().is_none());
    for wrong in [0, 1, 2, 4, u64::MAX] {
        assert!(!store.remove_schedule("s", wrong).await.unwrap(), "{wrong}");
    }
    assert!(!store.remove_schedule("t", 3).await.unwrap());
    assert!(store.remove_schedule("s", 3).await.unwrap());
    assert!(!store.remove_schedule("s", 3).await.unwrap());
    assert_eq!(other.schedule("s").await.unwrap(), None);
    assert!(!write(&*store, revision("s", 4, None)).await, "a removed schedule starts from 1");
    assert!(write(&*store, revision("s", 1, None)).await);
    // Times and definitions at their limits.
    let far = [DateTime::<Utc>::MIN_UTC, DateTime::<Utc>::MAX_UTC];
    for (name, next_at) in ["min", "max"].into_iter().zip(far) {
        let definition = vec![0xff; StoredSchedule::MAX_DEFINITION];
        let wide = StoredSchedule { definition, ..revision(name, 1, Some(next_at)) };
        assert!(write(&*store, wide.clone()).await);
        let stored = store.schedule(name).await.unwrap().unwrap();
        assert_eq!(stored.definition, wide.definition);
    }
    let empty = StoredSchedule { definition: Vec::new(), ..revision("empty", 1, None) };
    assert!(write(&*store, empty.clone()).await);
    assert_eq!(store.schedule("empty").await.unwrap(), Some(empty));
    let due = store.due_schedules(10).await.unwrap();
    assert_eq!(names(&due.schedules), ["min"]);
    assert!(due.next_in.unwrap() > Duration::from_secs(7_000 * 365 * 24 * 60 * 60), "{due:?}");
}

/// Checks that a refused revision stores none of its commands.
pub async fn a_wrong_revision_writes_nothing(database: Database) {
    let store = database.open().await;
    assert!(!store.write_schedule(revision("s", 2, None), vec![tick(1, "s", NOW)]).await.unwrap());
    assert!(all(&*store).await.is_empty());
    assert!(store.write_schedule(revision("s", 1, None), vec![tick(2, "s", LATER)]).await.unwrap());
    for wrong in [1, 3] {
        let refused = store.write_schedule(revision("s", wrong, None), vec![tick(3, "s", NOW)]).await;
        assert!(!refused.unwrap());
    }
    assert_eq!(numbers(&all(&*store).await), [2]);
    assert_eq!(store.schedule("s").await.unwrap(), Some(revision("s", 1, None)));
}

/// Checks that a write stores the ticks, once, and leaves existing commands unchanged.
pub async fn ticks_are_stored_with_their_schedule(database: Database) {
    let store = database.open().await;
    schedule(&*store, vec![command(1, at(1))]).await;
    let ticks = vec![tick(3, "s", at(3)), tick(1, "s", LATER), tick(2, "s", at(2)), tick(3, "s", LATER)];
    assert!(store.write_schedule(revision("s", 1, Some(seconds(9))), ticks).await.unwrap());
    let stored = all(&*store).await;
    assert_eq!(numbers(&stored), [1, 2, 3]);
    let of: Vec<_> = stored.iter().map(|command| command.schedule.as_deref()).collect();
    assert_eq!(of, [None, Some("s"), Some("s")]);
    assert_eq!(stored[2].due_at, seconds(3));
    let query = ScheduledQuery { schedule: Some("s".into()), ..ScheduledQuery::default() };
    assert_eq!(store.scheduled_commands(&query, None, 10).await.unwrap(), stored[1..]);
    let started = store.start_due_commands(10).await.unwrap().commands;
    assert_eq!(numbers(&started), [1, 2, 3]);
    assert_eq!(started[1].schedule.as_deref(), Some("s"));
}

/// Checks that a removal deletes the waiting commands of the schedule, and no others.
pub async fn a_removal_spares_started_and_parked_commands(database: Database) {
    let store = database.open().await;
    for name in ["s", "t"] {
        assert!(write(&*store, revision(name, 1, Some(seconds(1)))).await);
    }
    let due = (1..=4).map(|number| tick(number, "s", at(number as i64)));
    let later = [tick(5, "s", LATER), tick(6, "t", LATER), command(7, LATER), tick(8, "S", LATER)];
    schedule(&*store, due.chain(later).collect()).await;
    assert_eq!(numbers(&store.start_due_commands(3).await.unwrap().commands), [1, 2, 3]);
    store.end_commands(vec![done(1), parked(2, "no")], None).await.unwrap();
    let before = all(&*store).await;
    assert!(!store.remove_schedule("s", 2).await.unwrap());
    assert_eq!(all(&*store).await, before);
    assert!(store.remove_schedule("s", 1).await.unwrap());
    let left: Vec<ScheduledCommand> =
        before.into_iter().filter(|it| ![id(4), id(5)].contains(&it.id)).collect();
    assert_eq!(all(&*store).await, left);
    let states = states(&*store).await;
    assert_eq!((states[&2], states[&3]), (ScheduledState::Parked, ScheduledState::Started));
    assert_eq!(names(&store.schedules(None, 10).await.unwrap()), ["t"]);
    let next = store.start_due_commands(10).await.unwrap();
    assert!(next.commands.is_empty() && next.next_in.is_some_and(|wait| !wait.is_zero()), "{next:?}");
    // A command of a removed schedule ends like every other one.
    store.end_commands(vec![done(3)], None).await.unwrap();
    assert!(store.cancel_command(id(2)).await.unwrap().is_some());
}

/// Checks that schedules with a due tick come oldest first, with the clock and the next tick.
pub async fn due_schedules_are_returned_oldest_first(database: Database) {
    const HOUR: Duration = Duration::from_secs(60 * 60);
    let store = database.open().await;
    let none = store.due_schedules(10).await.unwrap();
    assert!(none.schedules.is_empty() && none.next_in.is_none());
    // The store's clock may differ a little from that of this process.
    assert!((none.now - Utc::now()).abs() < TimeDelta::minutes(1), "{none:?}");
    let later = Utc::now() + HOUR;
    let written = [
        ("later", Some(later)),
        ("last", Some(later + HOUR)),
        ("paused", None),
        ("c", Some(seconds(2))),
        ("b", Some(seconds(2))),
        ("d", Some(seconds(1))),
        ("a", Some(seconds(3))),
    ];
    for (name, next_at) in written {
        assert!(write(&*store, revision(name, 1, next_at)).await);
    }
    let expected = ["d", "b", "c", "a"];
    let due = store.due_schedules(10).await.unwrap();
    assert_eq!(names(&due.schedules), expected);
    assert_eq!(due.schedules[3], revision("a", 1, Some(seconds(3))));
    assert!(due.next_in.is_some_and(|wait| wait > HOUR / 2 && wait <= HOUR + HOUR / 60), "{due:?}");
    for limit in 0..4 {
        let due = store.due_schedules(limit).await.unwrap();
        assert_eq!((names(&due.schedules), due.next_in), (expected[..limit].to_vec(), Some(Duration::ZERO)));
    }
    assert_eq!(store.due_schedules(4).await.unwrap().schedules.len(), 4);
    for name in ["a", "b", "c", "d"] {
        assert!(write(&*store, revision(name, 2, None)).await);
    }
    for name in ["later", "last"] {
        let due = store.due_schedules(10).await.unwrap();
        assert!(due.schedules.is_empty() && due.next_in.is_some_and(|wait| wait > HOUR / 2), "{due:?}");
        assert!(store.remove_schedule(name, 1).await.unwrap());
    }
    assert_eq!(store.due_schedules(10).await.unwrap().next_in, None);
}

/// Checks that schedules are listed in pages, by name.
pub async fn schedules_are_listed_by_name(database: Database) {
    let store = database.open().await;
    assert!(store.schedules(None, 10).await.unwrap().is_empty());
    let mut expected: Vec<String> = (0..23).map(|number| format!("n{}", number * 7 % 23)).collect();
    for name in &expected {
        assert!(write(&*store, revision(name, 1, None)).await);
    }
    expected.sort_unstable();
    for limit in [1, 5, 23, StoredSchedule::MAX_LIMIT] {
        let mut listed: Vec<StoredSchedule> = Vec::new();
        loop {
            let after = listed.last().map(|schedule| schedule.name.clone());
            let page = store.schedules(after.as_deref(), limit).await.unwrap();
            let ended = page.len() < limit;
            listed.extend(page);
            if ended {
                break;
            }
        }
        assert_eq!(names(&listed), expected, "{limit}");
    }
    assert_eq!(names(&store.schedules(Some("n1~"), 1).await.unwrap()), ["n2"]);
    assert!(store.schedules(Some("z"), 10).await.unwrap().is_empty());
    assert!(store.schedules(None, 0).await.unwrap().is_empty());
}

/// Checks that similar and unusual names are different schedules, in the order of their bytes.
pub async fn schedules_with_odd_names_are_kept_apart(database: Database) {
    let store = database.open().await;
    let long = "ü".repeat(200);
    let mut texts = [
        "a", "A", "a ", " a", "ä", "a\u{308}", "'", "\"", "\\", "%", "null", "1", "[1]", "Z", "😀", "ß",
        &long,
    ];
    texts.sort_unstable();
    for (number, name) in (1..).zip(texts) {
        let ticks = vec![NewScheduledCommand { target: name.into(), ..tick(number, name, at(0)) }];
        assert!(store.write_schedule(revision(name, 1, Some(seconds(0))), ticks).await.unwrap());
    }
    assert_eq!(names(&store.schedules(None, 100).await.unwrap()), texts);
    assert_eq!(names(&store.due_schedules(100).await.unwrap().schedules), texts);
    for (number, name) in (1..).zip(texts) {
        let query = ScheduledQuery { schedule: Some(name.into()), ..ScheduledQuery::default() };
        let found = store.scheduled_commands(&query, None, 10).await.unwrap();
        assert_eq!((numbers(&found), &*found[0].target), (vec![number], name));
    }
    assert!(store.remove_schedule("a", 1).await.unwrap());
    assert_eq!(store.schedules(None, 100).await.unwrap().len(), texts.len() - 1);
    assert_eq!(all(&*store).await.len(), texts.len() - 1);
}

/// Checks that invalid schedules are refused.
pub async fn invalid_schedules_are_refused(database: Database) {
    let store = database.open().await;
    let long = "x".repeat(401);
    for text in ["", "a\0", "a\n", "\u{85}", &long] {
        invalid(store.write_schedule(revision(text, 1, None), Vec::new()).await);
        invalid(store.remove_schedule(text, 1).await);
        invalid(store.schedule(text).await);
        invalid(store.schedules(Some(text), 1).await);
        let bad = NewScheduledCommand { target: text.replace(&long, &long.repeat(3)), ..command(1, NOW) };
        invalid(store.write_schedule(revision("s", 1, None), vec![command(2, NOW), bad]).await);
    }
    let large = vec![0; StoredSchedule::MAX_DEFINITION + 1];
    let large = StoredSchedule { definition: large, ..revision("s", 1, None) };
    invalid(store.write_schedule(large, Vec::new()).await);
    for number in [0, i64::MAX as u64 + 1, u64::MAX] {
        invalid(store.write_schedule(revision("s", number, None), Vec::new()).await);
    }
    let many = (0..=ScheduledCommand::MAX_LIMIT as u128).map(|number| command(number, NOW)).collect();
    invalid(store.write_schedule(revision("s", 1, None), many).await);
    for limit in [StoredSchedule::MAX_LIMIT + 1, usize::MAX] {
        invalid(store.schedules(None, limit).await);
        invalid(store.due_schedules(limit).await);
    }
    assert!(store.schedules(None, 10).await.unwrap().is_empty() && all(&*store).await.is_empty());
}
