//! Timers: versions, due times, listing.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use futures_util::future::join_all;

use super::Database;
use super::fixture::Dice;
use crate::event::Version;
use crate::store::{DueTime, DueTimers, EventStore, NewTimer, StoreError, StoredTimer, TimerRef};

const NOW: DueTime = DueTime::After(Duration::ZERO);
const HOUR: Duration = Duration::from_secs(60 * 60);
const LATER: DueTime = DueTime::After(HOUR);

fn timer(instance: &str, name: &str, version: u64, due: DueTime) -> NewTimer {
    NewTimer { instance: instance.into(), name: name.into(), version: Version::new(version), due }
}

fn reference(instance: &str, name: &str, version: u64) -> TimerRef {
    TimerRef { instance: instance.into(), name: name.into(), version: Version::new(version) }
}

/// Returns a time in whole microseconds, this many seconds from 2020-01-01.
fn seconds(seconds: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_577_836_800 + seconds, 123_456_000).unwrap()
}

fn at(time: i64) -> DueTime {
    DueTime::At(seconds(time))
}

async fn put(store: &dyn EventStore, process: &str, timers: Vec<NewTimer>) {
    store.write_timers(process, timers, Vec::new()).await.unwrap();
}

async fn remove(store: &dyn EventStore, process: &str, timers: Vec<TimerRef>) {
    store.write_timers(process, Vec::new(), timers).await.unwrap();
}

/// Returns all timers of a process, in the order in which they are listed.
async fn all(store: &dyn EventStore, process: &str) -> Vec<StoredTimer> {
    store.timers(Some(process), None, StoredTimer::MAX_LIMIT).await.unwrap()
}

async fn due(store: &dyn EventStore, process: &str, limit: usize) -> DueTimers {
    store.due_timers(process, limit).await.unwrap()
}

/// Returns instance, name and version of each timer.
fn keys(timers: &[StoredTimer]) -> Vec<(&str, &str, u64)> {
    timers.iter().map(|timer| (&*timer.instance, &*timer.name, timer.version.get())).collect()
}

/// Checks that a timer comes back as it was put, on every connection.
///
/// The processes, the instances and the names are kept apart.
pub async fn timers_are_put_and_removed(database: Database) {
    let store = database.open().await;
    assert_eq!(due(&*store, "p", 10).await, DueTimers::default());
    assert!(store.timers(None, None, 10).await.unwrap().is_empty());
    store.write_timers("p", Vec::new(), Vec::new()).await.unwrap();
    put(&*store, "p", vec![timer("i", "a", 3, at(1)), timer("i", "b", 3, at(2)), timer("j", "a", 4, at(3))])
        .await;
    put(&*store, "q", vec![timer("i", "a", 5, at(4))]).await;
    let other = database.open().await;
    let expected = |process: &str, instance: &str, name: &str, version, due_at| StoredTimer {
        process: process.into(),
        instance: instance.into(),
        name: name.into(),
        version: Version::new(version),
        due_at: seconds(due_at),
    };
    let listed = other.timers(None, None, 10).await.unwrap();
    assert_eq!(listed[..2], [expected("p", "i", "a", 3, 1), expected("p", "i", "b", 3, 2)]);
    assert_eq!(listed[2..], [expected("p", "j", "a", 4, 3), expected("q", "i", "a", 5, 4)]);
    remove(&*other, "p", vec![reference("i", "a", 3), reference("i", "unknown", 9)]).await;
    assert_eq!(keys(&all(&*store, "p").await), [("i", "b", 3), ("j", "a", 4)]);
    assert_eq!(keys(&all(&*store, "q").await), [("i", "a", 5)]);
    remove(&*store, "p", vec![reference("i", "b", 9), reference("j", "a", 9)]).await;
    assert!(all(&*store, "p").await.is_empty());
    assert_eq!(due(&*store, "p", 10).await, DueTimers::default());
}

/// Checks that a timer replaces only a lower version, and that a removal spares a higher one.
///
/// So a repeated write has no effect.
pub async fn the_version_of_a_timer_decides(database: Database) {
    let store = database.open().await;
    put(&*store, "p", vec![timer("i", "a", 5, at(10))]).await;
    for version in [1, 4, 5] {
        put(&*store, "p", vec![timer("i", "a", version, at(20))]).await;
        let stored = all(&*store, "p").await;
        assert_eq!((keys(&stored), stored[0].due_at), (vec![("i", "a", 5)], seconds(10)));
    }
    put(&*store, "p", vec![timer("i", "a", 6, at(5))]).await;
    let stored = all(&*store, "p").await;
    assert_eq!((keys(&stored), stored[0].due_at), (vec![("i", "a", 6)], seconds(5)));
    remove(&*store, "p", vec![reference("i", "a", 5)]).await;
    assert_eq!(all(&*store, "p").await, stored);
    remove(&*store, "p", vec![reference("i", "a", 6)]).await;
    remove(&*store, "p", vec![reference("i", "a", 6)]).await;
    assert!(all(&*store, "p").await.is_empty());
    // A removed version leaves no trace.
    put(&*store, "p", vec![timer("i", "a", 1, LATER)]).await;
    let first = all(&*store, "p").await;
    put(&*store, "p", vec![timer("i", "a", 1, LATER)]).await;
    assert_eq!(all(&*store, "p").await, first, "a repeated put moves no due time");
}

/// Checks that a timer with an empty name is also replaced by one of the same version.
pub async fn an_instance_is_rescheduled(database: Database) {
    let store = database.open().await;
    for (version, time, expected) in [(2, 10, (2, 10)), (2, 20, (2, 20)), (1, 30, (2, 20)), (3, 5, (3, 5))] {
        put(&*store, "p", vec![timer("i", "", version, at(time))]).await;
        let stored = all(&*store, "p").await;
        assert_eq!((keys(&stored), stored[0].due_at), (vec![("i", "", expected.0)], seconds(expected.1)));
    }
    put(&*store, "p", vec![timer("i", "a", 9, at(1))]).await;
    remove(&*store, "p", vec![reference("i", "", 2)]).await;
    assert_eq!(keys(&all(&*store, "p").await), [("i", "a", 9), ("i", "", 3)]);
    remove(&*store, "p", vec![reference("i", "", 3)]).await;
    assert_eq!(keys(&all(&*store, "p").await), [("i", "a", 9)]);
}

/// Checks that a call removes first, and that the highest version of a timer wins within a call.
pub async fn a_call_may_name_a_timer_twice(database: Database) {
    let store = database.open().await;
    let many = vec![
        timer("i", "a", 2, at(2)),
        timer("i", "a", 4, at(4)),
        timer("i", "a", 3, at(3)),
        timer("i", "a", 4, at(5)),
        timer("i", "", 1, at(10)),
        timer("i", "", 1, at(11)),
    ];
    put(&*store, "p", many).await;
    let stored = all(&*store, "p").await;
    assert_eq!(keys(&stored), [("i", "a", 4), ("i", "", 1)]);
    assert_eq!([stored[0].due_at, stored[1].due_at], [seconds(4), seconds(11)]);
    // Removed and put again, in a lower version.
    let (lower, removed) = (vec![timer("i", "a", 1, at(1))], vec![reference("i", "a", 4)]);
    store.write_timers("p", lower, removed).await.unwrap();
    assert_eq!(keys(&all(&*store, "p").await), [("i", "a", 1), ("i", "", 1)]);
    // Not removed, so the lower version changes nothing.
    put(&*store, "p", vec![timer("i", "a", 9, at(1))]).await;
    let removed = vec![reference("i", "a", 3), reference("i", "a", 8), reference("i", "a", 4)];
    store.write_timers("p", vec![timer("i", "a", 7, at(2))], removed).await.unwrap();
    assert_eq!(keys(&all(&*store, "p").await), [("i", "a", 9), ("i", "", 1)]);
    let removed = vec![reference("i", "a", 3), reference("i", "a", 9), reference("i", "a", 4)];
    store.write_timers("p", vec![timer("i", "a", 7, at(2))], removed).await.unwrap();
    assert_eq!(keys(&all(&*store, "p").await), [("i", "a", 7), ("i", "", 1)]);
}

/// Checks that due timers come oldest first, with the time until the next one.
pub async fn due_timers_are_returned_oldest_first(database: Database) {
    let store = database.open().await;
    put(&*store, "q", vec![timer("i", "other", 1, at(0))]).await;
    put(&*store, "p", vec![timer("i", "pending", 1, LATER), timer("i", "last", 1, DueTime::After(2 * HOUR))])
        .await;
    let none = due(&*store, "p", 10).await;
    assert!(none.timers.is_empty());
    // Half of the time is slack for a slow machine.
    assert!(none.next_in.is_some_and(|wait| wait > HOUR / 2 && wait <= HOUR), "{none:?}");
    let timers =
        [("k", "", at(3)), ("j", "b", at(2)), ("j", "a", at(2)), ("i", "z", at(2)), ("i", "now", NOW)];
    put(&*store, "p", timers.map(|(instance, name, due)| timer(instance, name, 1, due)).into()).await;
    let found = due(&*store, "p", 10).await;
    let expected = [("i", "z", 1), ("j", "a", 1), ("j", "b", 1), ("k", "", 1), ("i", "now", 1)];
    assert_eq!(keys(&found.timers), expected);
    assert!(found.next_in.is_some_and(|wait| wait > HOUR / 2 && wait <= HOUR), "{found:?}");
    assert_eq!(found.timers, all(&*store, "p").await[..5]);
    for limit in 0..5 {
        let found = due(&*store, "p", limit).await;
        assert_eq!((keys(&found.timers), found.next_in), (expected[..limit].to_vec(), Some(Duration::ZERO)));
    }
    assert_eq!(due(&*store, "p", 5).await.timers.len(), 5);
    assert_eq!(due(&*store, "q", 1).await.next_in, None);
}

/// Checks that a timer is due after the time that `next_in` states, and not before.
pub async fn a_timer_becomes_due(database: Database) {
    let store = database.open().await;
    put(&*store, "p", vec![timer("i", "soon", 1, DueTime::After(Duration::from_millis(300)))]).await;
    let mut waits = 0;
    let found = loop {
        let found = due(&*store, "p", 10).await;
        let Some(wait) = found.next_in else { break found };
        assert!(found.timers.is_empty() && wait <= Duration::from_millis(300), "{found:?}");
        // The store's clock may differ a little from that of this process.
        waits += 1;
        assert!(waits < 100, "the timer is never due");
        tokio::time::sleep(wait).await;
    };
    assert_eq!(keys(&found.timers), [("i", "soon", 1)]);
    assert_eq!(due(&*store, "p", 10).await, found, "a timer stays until it is removed");
}

/// Checks that timers are listed in pages, by due time, process, instance and name.
pub async fn timers_are_listed_in_pages(database: Database) {
    let store = database.open().await;
    for process in ["b", "a", "c"] {
        let timers = [(2, "j", ""), (2, "i", "b"), (2, "i", "a"), (1, "k", "x"), (3, "i", "")];
        let timers = timers.into_iter().map(|(time, instance, name)| timer(instance, name, 1, at(time)));
        put(&*store, process, timers.collect()).await;
    }
    let everything = store.timers(None, None, 100).await.unwrap();
    assert_eq!(everything.len(), 15);
    let order = |timer: &StoredTimer| {
        (timer.due_at, timer.process.clone(), timer.instance.clone(), timer.name.clone())
    };
    assert!(everything.is_sorted_by(|a, b| order(a) < order(b)), "{everything:?}");
    for process in [None, Some("a"), Some("b"), Some("c"), Some("d")] {
        let expected: Vec<_> = everything
            .iter()
            .filter(|timer| process.is_none_or(|process| timer.process == process))
            .cloned()
            .collect();
        for limit in [1, 2, 4, 15, 100] {
            let mut listed: Vec<StoredTimer> = Vec::new();
            loop {
                let page = store.timers(process, listed.last(), limit).await.unwrap();
                let ended = page.len() < limit;
                listed.extend(page);
                if ended {
                    break;
                }
            }
            assert_eq!(listed, expected, "{process:?} {limit}");
        }
        // After a timer of any process, also after one that is gone.
        for after in &everything {
            let gone = StoredTimer { instance: format!("{}~", after.instance), ..after.clone() };
            for after in [after, &gone] {
                let page = store.timers(process, Some(after), 100).await.unwrap();
                let rest: Vec<_> =
                    expected.iter().filter(|timer| order(timer) > order(after)).cloned().collect();
                assert_eq!(page, rest, "{process:?} {after:?}");
            }
        }
    }
    assert!(store.timers(None, None, 0).await.unwrap().is_empty());
}

/// Checks that due times beyond every limit are stored as the nearest possible time.
pub async fn far_due_times_are_kept(database: Database) {
    let store = database.open().await;
    let days = |days: u64| DueTime::After(Duration::from_secs(days * 24 * 60 * 60));
    let time = |text: &str| DueTime::At(text.parse().unwrap());
    let before = Utc::now();
    let timers = [
        ("min", DueTime::At(DateTime::<Utc>::MIN_UTC)),
        ("year 0", time("0000-06-01T00:00:00Z")),
        ("1900", time("1900-01-01T00:00:00Z")),
        ("400 days", days(400)),
        ("300 years", days(300 * 365)),
        ("max wait", DueTime::After(Duration::MAX)),
        ("9999", time("9999-12-30T23:59:59.999999Z")),
        ("last day", time("9999-12-31T12:00:00Z")),
        ("year 10000", time("+10000-01-01T00:00:00Z")),
        ("262000", time("+262000-12-31T23:59:59Z")),
        ("max", DueTime::At(DateTime::<Utc>::MAX_UTC)),
    ];
    put(&*store, "p", timers.iter().map(|(name, due)| timer("i", name, 1, *due)).collect()).await;
    let stored = all(&*store, "p").await;
    let of = |name: &str| stored.iter().find(|timer| timer.name == name).unwrap().due_at;
    assert_eq!(stored.len(), timers.len());
    assert_eq!(of("min"), of("year 0"));
    assert_eq!(of("1900").to_rfc3339(), "1900-01-01T00:00:00+00:00");
    assert!(of("400 days") - before > TimeDelta::days(399) && of("400 days") - before < TimeDelta::days(401));
    assert!(of("max wait") > of("300 years") && of("max wait") - before > TimeDelta::days(900 * 365));
    assert_eq!(of("9999").to_rfc3339(), "9999-12-30T23:59:59.999999+00:00");
    assert!(["last day", "year 10000", "262000"].iter().all(|name| of(name) == of("max")));
    let found = due(&*store, "p", 10).await;
    assert_eq!(keys(&found.timers), [("i", "min", 1), ("i", "year 0", 1), ("i", "1900", 1)]);
    assert!(found.next_in.unwrap() > Duration::from_secs(399 * 24 * 60 * 60));
    remove(&*store, "p", vec![reference("i", "400 days", 1), reference("i", "300 years", 1)]).await;
    assert!(due(&*store, "p", 10).await.next_in.unwrap() > Duration::from_secs(900 * 365 * 24 * 60 * 60));
    // A cursor may be at any time.
    for (due_at, left) in [(DateTime::<Utc>::MIN_UTC, 9), (DateTime::<Utc>::MAX_UTC, 0)] {
        let after = StoredTimer { due_at, ..stored[0].clone() };
        for process in [None, Some("p")] {
            assert_eq!(store.timers(process, Some(&after), 100).await.unwrap().len(), left);
        }
    }
}

/// Checks that text which the id of a stream cannot be is refused, with everything in its call.
pub async fn invalid_timers_are_refused(database: Database) {
    let store = database.open().await;
    let invalid = |result: Result<(), StoreError>| {
        assert!(matches!(result, Err(StoreError::Invalid { .. })), "{result:?}")
    };
    let long = "x".repeat(401);
    put(&*store, "p", vec![timer("i", "kept", 1, NOW)]).await;
    for text in ["", "a\0", "a\n", "\u{85}", &long] {
        let good = || vec![timer("i", "new", 1, NOW)];
        let removed = || vec![reference("i", "kept", 1)];
        let with = |bad: NewTimer| good().into_iter().chain([bad]).collect::<Vec<_>>();
        invalid(store.write_timers(text, good(), removed()).await);
        invalid(store.write_timers("p", with(timer(text, "a", 1, NOW)), removed()).await);
        invalid(
            store.write_timers("p", good(), vec![reference("i", "kept", 1), reference(text, "", 1)]).await,
        );
        if !text.is_empty() {
            invalid(store.write_timers("p", with(timer("i", text, 1, NOW)), removed()).await);
            invalid(
                store
                    .write_timers("p", good(), vec![reference("i", "kept", 1), reference("i", text, 1)])
                    .await,
            );
        }
        invalid(store.due_timers(text, 1).await.map(drop));
        invalid(store.timers(Some(text), None, 1).await.map(drop));
    }
    let most = StoredTimer::MAX_LIMIT;
    for limit in [most + 1, usize::MAX] {
        invalid(store.due_timers("p", limit).await.map(drop));
        invalid(store.timers(None, None, limit).await.map(drop));
        invalid(store.timers(Some("p"), None, limit).await.map(drop));
    }
    assert_eq!(keys(&due(&*store, "p", most).await.timers), [("i", "kept", 1)]);
    assert_eq!(keys(&store.timers(None, None, most).await.unwrap()), [("i", "kept", 1)]);
}

/// Checks that similar and unusual texts are different timers, in the order of their bytes.
pub async fn timers_with_odd_names_are_kept_apart(database: Database) {
    let store = database.open().await;
    let long = "ü".repeat(200);
    let mut texts = [
        "a", "A", "a ", " a", "ä", "a\u{308}", "'", "\"", "\\", "%", "null", "1", "[1]", "Z", "😀", "ß",
        &long,
    ];
    texts.sort_unstable();
    let mut expected = Vec::new();
    for instance in texts {
        for name in [""].into_iter().chain(texts) {
            expected.push((instance, name, 1));
        }
    }
    let timers =
        || expected.iter().rev().map(|(instance, name, _)| timer(instance, name, 1, at(0))).collect();
    for process in texts {
        put(&*store, process, timers()).await;
        assert_eq!(keys(&all(&*store, process).await), expected, "{process}");
        assert_eq!(keys(&due(&*store, process, 1_000).await.timers), expected, "{process}");
    }
    let listed = store.timers(None, None, StoredTimer::MAX_LIMIT).await.unwrap();
    assert_eq!(listed.len(), expected.len() * texts.len());
    assert!(
        listed.is_sorted_by(|a, b| (&a.process, &a.instance, &a.name) < (&b.process, &b.instance, &b.name))
    );
    for (instance, name, _) in &expected {
        remove(&*store, "a", vec![reference(instance, name, 1)]).await;
    }
    assert!(all(&*store, "a").await.is_empty());
    assert_eq!(all(&*store, "A").await.len(), expected.len());
}

/// Checks that a call writes, replaces and removes ten thousand timers.
pub async fn many_timers_are_written_at_once(database: Database) {
    const MANY: usize = 10_000;
    let store = database.open().await;
    let timers = |version, due| {
        (0..MANY).map(|n| timer(&format!("instance-{n:05}"), "reminder", version, due)).collect::<Vec<_>>()
    };
    let references = |version| {
        (0..MANY).map(|n| reference(&format!("instance-{n:05}"), "reminder", version)).collect::<Vec<_>>()
    };
    put(&*store, "p", timers(1, LATER)).await;
    assert!(due(&*store, "p", MANY).await.timers.is_empty());
    put(&*store, "p", timers(2, NOW)).await;
    let found = due(&*store, "p", MANY).await;
    assert_eq!((found.timers.len(), found.next_in), (MANY, None));
    assert_eq!(all(&*store, "p").await.len(), MANY);
    store.write_timers("p", timers(1, LATER), references(2)).await.unwrap();
    assert!(all(&*store, "p").await.iter().all(|timer| timer.version == Version::new(1)));
    remove(&*store, "p", references(1)).await;
    assert_eq!(due(&*store, "p", MANY).await, DueTimers::default());
}

/// Checks that of concurrent writers of a timer the highest version wins.
pub async fn the_highest_of_many_rivals_wins(database: Database) {
    let stores = [database.open().await, database.open().await];
    for round in 0..20 {
        let instance = format!("i{round}");
        let rivals = (1..=8_u64).map(|version| {
            let (store, instance) = (stores[usize::from(version % 2 == 0)].clone(), instance.clone());
            let time = i64::try_from(version).unwrap();
            tokio::spawn(async move {
                put(&*store, "p", vec![timer(&instance, "a", version, at(time))]).await;
                remove(&*store, "p", vec![reference(&instance, "a", version - 1)]).await;
            })
        });
        for rival in join_all(rivals).await {
            rival.unwrap();
        }
        let stored = all(&*stores[0], "p").await;
        let of: Vec<_> = stored.iter().filter(|timer| timer.instance == instance).collect();
        assert_eq!(of.len(), 1, "{of:?}");
        assert_eq!((of[0].version.get(), of[0].due_at), (8, seconds(8)));
    }
}

/// Checks that calls with common timers, in any order, all succeed and each take effect as a whole.
pub async fn concurrent_writes_of_many_timers_succeed(database: Database) {
    const TIMERS: usize = 30;
    let stores = [database.open().await, database.open().await];
    let writers = (0..8_u64).map(|writer| {
        let store = stores[usize::from(writer % 2 == 0)].clone();
        tokio::spawn(async move {
            let mut dice = Dice::new();
            for turn in 0..10 {
                let version = 1 + turn * 8 + writer;
                let mut names: Vec<_> = (0..TIMERS).map(|n| format!("t{n:02}")).collect();
                for end in (1..TIMERS).rev() {
                    let other = usize::try_from(dice.below(end as u64 + 1)).unwrap();
                    names.swap(end, other);
                }
                let (removed, put) = names.split_at(TIMERS / 3);
                let removed = removed.iter().map(|name| reference("i", name, version)).collect();
                let put = put.iter().map(|name| timer("i", name, version, LATER)).collect();
                store.write_timers("p", put, removed).await.unwrap();
                // All of these timers have the version of one writer.
                let whole = ["x", "y", "z"].map(|name| timer("whole", name, version, LATER));
                store.write_timers("q", whole.into(), Vec::new()).await.unwrap();
                let seen = store.timers(Some("q"), None, 10).await.unwrap();
                assert!(
                    seen.len() == 3 && seen.iter().all(|timer| timer.version == seen[0].version),
                    "{seen:?}"
                );
            }
        })
    });
    for writer in join_all(writers).await {
        writer.unwrap();
    }
    let stored = all(&*stores[0], "q").await;
    assert!(stored.len() == 3 && stored.iter().all(|timer| timer.version.get() == 80), "{stored:?}");
}
