//! Scheduled commands: starting, ending, parking, listing.

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use uuid::Uuid;

use super::Database;
use crate::store::{
    DueCommands, DueTime, EventStore, NewScheduledCommand, ScheduledCommand, ScheduledEnd, ScheduledOutcome,
    ScheduledQuery, ScheduledState, StoreError,
};

pub(super) const NOW: DueTime = DueTime::After(Duration::ZERO);
const HOUR: Duration = Duration::from_secs(60 * 60);
pub(super) const LATER: DueTime = DueTime::After(HOUR);
const MOST: usize = ScheduledCommand::MAX_LIMIT;

/// Returns a command with this number as its id.
pub(super) fn command(number: u128, due: DueTime) -> NewScheduledCommand {
    let target = format!("order/{number}");
    let body = number.to_be_bytes().to_vec();
    NewScheduledCommand { id: Uuid::from_u128(number), target, body, due, schedule: None }
}

/// Returns the stored form of a command without a schedule.
fn stored(number: u128, due_at: DateTime<Utc>, state: ScheduledState) -> ScheduledCommand {
    let NewScheduledCommand { id, target, body, .. } = command(number, NOW);
    ScheduledCommand { id, target, body, due_at, schedule: None, state, reason: None }
}

/// Returns a time in whole microseconds, this many seconds from 2020-01-01.
pub(super) fn seconds(seconds: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_577_836_800 + seconds, 123_456_000).unwrap()
}

pub(super) fn at(time: i64) -> DueTime {
    DueTime::At(seconds(time))
}

pub(super) fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

/// Returns the numbers of commands.
pub(super) fn numbers(commands: &[ScheduledCommand]) -> Vec<u128> {
    commands.iter().map(|command| command.id.as_u128()).collect()
}

pub(super) async fn schedule(store: &dyn EventStore, commands: Vec<NewScheduledCommand>) {
    store.schedule_commands(commands).await.unwrap();
}

pub(super) async fn start(store: &dyn EventStore, limit: usize) -> DueCommands {
    let started = store.start_due_commands(limit).await.unwrap();
    assert!(started.commands.iter().all(|it| it.state == ScheduledState::Started), "{started:?}");
    started
}

pub(super) fn done(number: u128) -> ScheduledEnd {
    ScheduledEnd { id: id(number), outcome: ScheduledOutcome::Executed }
}

pub(super) fn parked(number: u128, reason: &str) -> ScheduledEnd {
    ScheduledEnd { id: id(number), outcome: ScheduledOutcome::Parked(reason.into()) }
}

/// Returns all commands, in the order in which they are listed.
pub(super) async fn all(store: &dyn EventStore) -> Vec<ScheduledCommand> {
    store.scheduled_commands(&ScheduledQuery::default(), None, MOST).await.unwrap()
}

/// Returns the states of all commands, by their numbers.
pub(super) async fn states(store: &dyn EventStore) -> HashMap<u128, ScheduledState> {
    all(store).await.iter().map(|command| (command.id.as_u128(), command.state)).collect()
}

/// Checks that a command is stored until its end, and seen by every connection.
pub async fn a_command_waits_starts_and_ends(database: Database) {
    let store = database.open().await;
    assert_eq!(start(&*store, 10).await, DueCommands::default());
    assert!(all(&*store).await.is_empty() && store.scheduled_command(id(1)).await.unwrap().is_none());
    assert!(store.schedule_commands(Vec::new()).await.unwrap().is_empty());
    store.end_commands(Vec::new(), None).await.unwrap();
    let tick = |number| NewScheduledCommand { schedule: Some("s".into()), ..command(number, LATER) };
    let new = vec![command(2, at(5)), command(1, at(6)), tick(3)];
    let answer = store.schedule_commands(new).await.unwrap();
    let other = database.open().await;
    assert_eq!(numbers(&answer), [2, 1, 3]);
    assert_eq!(answer[0], stored(2, seconds(5), ScheduledState::Waiting));
    assert_eq!((answer[2].schedule.as_deref(), answer[2].state), (Some("s"), ScheduledState::Waiting));
    assert_eq!(all(&*other).await, answer);
    assert_eq!(other.scheduled_command(id(3)).await.unwrap().as_ref(), Some(&answer[2]));
    let started = start(&*other, 10).await;
    let expected = |state| vec![stored(2, seconds(5), state), stored(1, seconds(6), state)];
    assert_eq!(started.commands, expected(ScheduledState::Started));
    assert!(started.next_in.is_some_and(|wait| wait > HOUR / 2 && wait <= HOUR), "{started:?}");
    assert_eq!(start(&*store, 10).await.commands, []);
    assert_eq!(all(&*store).await[..2], expected(ScheduledState::Started));
    store.end_commands(vec![done(1), done(2)], None).await.unwrap();
    store.end_commands(vec![done(1), done(2)], None).await.unwrap();
    assert_eq!(numbers(&all(&*other).await), [3]);
    assert!(other.scheduled_command(id(1)).await.unwrap().is_none());
    // An ended command leaves no trace.
    schedule(&*other, vec![command(1, NOW)]).await;
    assert_eq!(numbers(&start(&*store, 10).await.commands), [1]);
}

/// Checks that an id keeps its first command, in every state and within one call.
pub async fn an_existing_command_stays_unchanged(database: Database) {
    let store = database.open().await;
    let other = |number| NewScheduledCommand {
        target: "other".into(),
        body: b"other".to_vec(),
        schedule: Some("s".into()),
        ..command(number, at(99))
    };
    let twice = vec![command(1, at(1)), other(1), command(2, at(2)), command(1, LATER)];
    let answer = store.schedule_commands(twice).await.unwrap();
    assert_eq!(numbers(&answer), [1, 1, 2, 1]);
    let waiting = |number| stored(number, seconds(number as i64), ScheduledState::Waiting);
    assert!([0, 1, 3].iter().all(|&index| answer[index] == waiting(1)), "{answer:?}");
    assert_eq!(all(&*store).await, [waiting(1), waiting(2)]);
    assert_eq!(store.schedule_commands(vec![other(2), other(1)]).await.unwrap(), [waiting(2), waiting(1)]);
    start(&*store, 10).await;
    store.end_commands(vec![parked(1, "no")], None).await.unwrap();
    let before = all(&*store).await;
    assert_eq!(before[0].state, ScheduledState::Parked);
    let answer = store.schedule_commands(vec![other(3), other(2), other(1)]).await.unwrap();
    assert_eq!([&answer[2], &answer[1]], [&before[0], &before[1]]);
    assert_eq!(all(&*store).await, [&before[..], &answer[..1]].concat());
    assert_eq!(answer[0].target, "other");
}

/// Checks the order of due commands, the limit, and the time until the next one.
pub async fn due_commands_start_oldest_first(database: Database) {
    let store = database.open().await;
    schedule(&*store, vec![command(90, LATER), command(91, DueTime::After(2 * HOUR))]).await;
    let none = start(&*store, 10).await;
    assert!(none.commands.is_empty());
    // Half of the time is slack for a slow machine.
    assert!(none.next_in.is_some_and(|wait| wait > HOUR / 2 && wait <= HOUR), "{none:?}");
    let due = [(7, NOW), (4, at(3)), (3, at(2)), (1, at(2)), (2, at(2)), (5, at(1)), (6, at(4))];
    schedule(&*store, due.map(|(number, due)| command(number, due)).into()).await;
    assert_eq!(start(&*store, 0).await, DueCommands { commands: vec![], next_in: Some(Duration::ZERO) });
    let expected: [&[u128]; 3] = [&[5], &[1, 2], &[3, 4, 6, 7]];
    for numbers_expected in expected {
        let started = start(&*store, numbers_expected.len()).await;
        assert_eq!(numbers(&started.commands), numbers_expected);
        match numbers_expected.last() {
            Some(7) => assert!(started.next_in.is_some_and(|wait| wait > HOUR / 2), "{started:?}"),
            _ => assert_eq!(started.next_in, Some(Duration::ZERO)),
        }
    }
    store.cancel_command(id(90)).await.unwrap();
    assert!(start(&*store, 10).await.next_in.is_some_and(|wait| wait > HOUR), "the next one is the other");
    store.cancel_command(id(91)).await.unwrap();
    assert_eq!(start(&*store, 10).await, DueCommands::default());
}

/// Checks that a command is due after the time that `next_in` states, and not before.
pub async fn a_command_becomes_due(database: Database) {
    let store = database.open().await;
    schedule(&*store, vec![command(1, DueTime::After(Duration::from_millis(300)))]).await;
    let mut waits = 0;
    let found = loop {
        let found = start(&*store, 10).await;
        let Some(wait) = found.next_in else { break found };
        assert!(found.commands.is_empty() && wait <= Duration::from_millis(300), "{found:?}");
        // The store's clock may differ a little from that of this process.
        waits += 1;
        assert!(waits < 100, "the command is never due");
        tokio::time::sleep(wait).await;
    };
    assert_eq!(numbers(&found.commands), [1]);
}

/// Checks that a call stores, starts and ends ten thousand commands.
pub async fn many_commands_start_and_end_at_once(database: Database) {
    let store = database.open().await;
    let count = u128::try_from(MOST).unwrap();
    let new = (1..=count).rev().map(|number| command(number, at(number as i64))).collect();
    let answer = store.schedule_commands(new).await.unwrap();
    assert_eq!(numbers(&answer), (1..=count).rev().collect::<Vec<_>>());
    let started = start(&*store, MOST).await;
    assert_eq!(numbers(&started.commands), (1..=count).collect::<Vec<_>>());
    assert_eq!(started.next_in, None);
    let ends = (1..=count).map(|number| if number % 2 == 0 { done(number) } else { parked(number, "odd") });
    store.end_commands(ends.collect(), None).await.unwrap();
    let left = all(&*store).await;
    assert_eq!(numbers(&left), (1..=count).step_by(2).collect::<Vec<_>>());
    assert!(left.iter().all(|it| it.state == ScheduledState::Parked && it.reason.as_deref() == Some("odd")));
}

/// Checks that the size of the bodies bounds a start and a page, and that a body comes back.
pub async fn large_commands_start_in_small_batches(database: Database) {
    const LARGE: usize = ScheduledCommand::MAX_BODY;
    let a_page = ScheduledCommand::PAGE_BODIES / LARGE;
    let store = database.open().await;
    let large = |number: u128| {
        let body = vec![number as u8; LARGE];
        NewScheduledCommand { body, ..command(number, at(number as i64)) }
    };
    let count = a_page + 4;
    for number in 1..=count as u128 {
        schedule(&*store, vec![large(number)]).await;
    }
    schedule(&*store, vec![NewScheduledCommand { body: Vec::new(), ..command(100, at(100)) }]).await;
    let mut listed: Vec<ScheduledCommand> = Vec::new();
    loop {
        let page = store.scheduled_commands(&ScheduledQuery::default(), listed.last(), MOST).await.unwrap();
        if page.is_empty() {
            break;
        }
        assert!(page.len() <= a_page, "{}", page.len());
        listed.extend(page);
    }
    assert_eq!(listed.len(), count + 1);
    let first = start(&*store, MOST).await;
    assert_eq!((first.commands.len(), first.next_in), (a_page, Some(Duration::ZERO)));
    assert!(first.commands.iter().all(|it| it.body == vec![it.id.as_u128() as u8; LARGE]));
    let rest = start(&*store, MOST).await;
    assert_eq!((rest.commands.len(), rest.next_in), (5, None));
    assert!(rest.commands[4].body.is_empty());
}

/// Checks that a retry makes a parked command due, and changes no other one.
pub async fn a_parked_command_is_retried(database: Database) {
    let store = database.open().await;
    schedule(&*store, vec![command(1, at(1)), command(2, at(2)), command(3, LATER)]).await;
    start(&*store, 10).await;
    let long = format!("a\0{}", "ü".repeat(4_000));
    store.end_commands(vec![parked(1, &long), parked(1, "later"), done(1)], None).await.unwrap();
    let before = store.scheduled_command(id(1)).await.unwrap().unwrap();
    let reason = before.reason.clone().unwrap();
    assert_eq!((before.state, before.due_at), (ScheduledState::Parked, seconds(1)));
    assert!(reason.starts_with("a\u{fffd}ü") && (3_900..=4_000).contains(&reason.len()), "{}", reason.len());
    assert_eq!(start(&*store, 10).await.commands, [], "a parked command waits for an operator");
    // Other states stay as they are.
    for number in [2, 3] {
        let unchanged = store.scheduled_command(id(number)).await.unwrap();
        assert_eq!(store.retry_command(id(number)).await.unwrap(), unchanged);
        assert_eq!(store.scheduled_command(id(number)).await.unwrap(), unchanged);
    }
    assert_eq!(store.retry_command(id(9)).await.unwrap(), None);
    let asked = Utc::now();
    assert_eq!(store.retry_command(id(1)).await.unwrap().as_ref(), Some(&before));
    let waiting = store.scheduled_command(id(1)).await.unwrap().unwrap();
    assert_eq!((waiting.state, &waiting.reason), (ScheduledState::Waiting, &None));
    // The store's clock may differ a little from that of this process.
    assert!((waiting.due_at - asked).abs() < TimeDelta::minutes(1), "{} {asked}", waiting.due_at);
    assert_eq!(store.retry_command(id(1)).await.unwrap(), Some(waiting));
    assert_eq!(numbers(&start(&*store, 10).await.commands), [1]);
    store.end_commands(vec![parked(1, "")], None).await.unwrap();
    assert_eq!(store.scheduled_command(id(1)).await.unwrap().unwrap().reason.as_deref(), Some(""));
}

/// Checks that waiting and parked commands are deleted, and that a started one stays.
pub async fn a_command_is_cancelled_unless_it_is_started(database: Database) {
    let store = database.open().await;
    schedule(&*store, vec![command(1, at(1)), command(2, at(2)), command(3, LATER)]).await;
    start(&*store, 10).await;
    store.end_commands(vec![parked(1, "no")], None).await.unwrap();
    for (number, state, stays) in [
        (1, ScheduledState::Parked, false),
        (2, ScheduledState::Started, true),
        (3, ScheduledState::Waiting, false),
    ] {
        let before = store.scheduled_command(id(number)).await.unwrap();
        assert_eq!(before.as_ref().unwrap().state, state);
        assert_eq!(store.cancel_command(id(number)).await.unwrap(), before);
        assert_eq!(store.scheduled_command(id(number)).await.unwrap(), before.filter(|_| stays));
    }
    for number in [1, 3, 9] {
        assert_eq!(store.cancel_command(id(number)).await.unwrap(), None);
    }
    assert_eq!(start(&*store, 10).await, DueCommands::default());
    store.end_commands(vec![done(2)], None).await.unwrap();
    assert!(all(&*store).await.is_empty());
}

/// Checks that an end changes no waiting command, that the first end counts, and that an executed
/// command is deleted although it is parked.
pub async fn ends_of_other_commands_are_ignored(database: Database) {
    let store = database.open().await;
    let new = vec![command(1, at(1)), command(2, at(2)), command(3, at(3)), command(4, LATER)];
    schedule(&*store, new).await;
    start(&*store, 3).await;
    store.end_commands(vec![parked(1, "first")], None).await.unwrap();
    let ends = vec![
        done(4),
        parked(9, "unknown"),
        parked(1, "second"),
        done(2),
        parked(3, "third"),
        parked(2, "late"),
    ];
    store.end_commands(ends, None).await.unwrap();
    store.end_commands(vec![parked(1, "again"), parked(4, "waiting"), done(9)], None).await.unwrap();
    let left = all(&*store).await;
    assert_eq!(numbers(&left), [1, 3, 4]);
    let reasons: Vec<_> = left.iter().map(|command| command.reason.as_deref()).collect();
    assert_eq!(reasons, [Some("first"), Some("third"), None]);
    assert_eq!(left[2].state, ScheduledState::Waiting);
    store.end_commands(vec![done(1)], None).await.unwrap();
    assert_eq!(numbers(&all(&*store).await), [3, 4]);
}

/// Checks that commands are listed in pages, by due time and id, for every query.
pub async fn commands_are_listed_in_pages(database: Database) {
    let store = database.open().await;
    let names = [None, Some("a"), Some("b")];
    let new = (1..=24_u128).map(|number| NewScheduledCommand {
        schedule: names[number as usize % 3].map(Into::into),
        ..command(number, at((number as i64 * 7) % 5))
    });
    schedule(&*store, new.collect()).await;
    let started = numbers(&start(&*store, 16).await.commands);
    store
        .end_commands(started.iter().step_by(2).map(|number| parked(*number, "no")).collect(), None)
        .await
        .unwrap();
    let everything = all(&*store).await;
    let order = |command: &ScheduledCommand| (command.due_at, command.id);
    assert!(everything.len() == 24 && everything.is_sorted_by(|a, b| order(a) < order(b)), "{everything:?}");
    let states = ScheduledState::ALL.map(Some).into_iter().chain([None]);
    for (state, schedule) in states.flat_map(|state| [None, Some("a"), Some("c")].map(|name| (state, name))) {
        let query = ScheduledQuery { state, schedule: schedule.map(Into::into) };
        let selected = |it: &&ScheduledCommand| {
            state.is_none_or(|state| it.state == state)
                && schedule.is_none_or(|name| it.schedule.as_deref() == Some(name))
        };
        let expected: Vec<_> = everything.iter().filter(selected).cloned().collect();
        assert_eq!(expected.is_empty(), schedule == Some("c"));
        for limit in [1, 4, 24, 100] {
            let mut listed: Vec<ScheduledCommand> = Vec::new();
            loop {
                let page = store.scheduled_commands(&query, listed.last(), limit).await.unwrap();
                if page.is_empty() {
                    break;
                }
                assert!(page.len() <= limit);
                listed.extend(page);
            }
            assert_eq!(listed, expected, "{query:?} {limit}");
        }
        // After any command, also after one that is gone.
        for after in &everything {
            let gone =
                ScheduledCommand { due_at: after.due_at + TimeDelta::microseconds(1), ..after.clone() };
            for after in [after, &gone] {
                let page = store.scheduled_commands(&query, Some(after), 100).await.unwrap();
                let rest: Vec<_> = expected.iter().filter(|it| order(it) > order(after)).cloned().collect();
                assert_eq!(page, rest, "{query:?} {after:?}");
            }
        }
        assert!(store.scheduled_commands(&query, None, 0).await.unwrap().is_empty());
    }
}

/// Checks that due times beyond every limit are stored as the nearest possible time.
pub async fn far_due_commands_are_kept(database: Database) {
    let store = database.open().await;
    let time = |text: &str| DueTime::At(text.parse().unwrap());
    let far = [
        DueTime::At(DateTime::<Utc>::MIN_UTC),
        time("0000-06-01T00:00:00Z"),
        time("1900-01-01T00:00:00Z"),
        DueTime::After(Duration::from_secs(400 * 24 * 60 * 60)),
        DueTime::After(Duration::MAX),
        time("9999-12-30T23:59:59.999999Z"),
        time("+10000-01-01T00:00:00Z"),
        DueTime::At(DateTime::<Utc>::MAX_UTC),
    ];
    let new = (1..).zip(far).map(|(number, due)| command(number, due)).collect();
    let answer = store.schedule_commands(new).await.unwrap();
    assert_eq!(all(&*store).await, answer);
    assert_eq!(answer[0].due_at, answer[1].due_at);
    assert_eq!(answer[2].due_at.to_rfc3339(), "1900-01-01T00:00:00+00:00");
    assert!(answer[4].due_at > answer[3].due_at + TimeDelta::days(900 * 365), "{answer:?}");
    assert_eq!(answer[5].due_at.to_rfc3339(), "9999-12-30T23:59:59.999999+00:00");
    assert_eq!(answer[6].due_at, answer[7].due_at);
    let started = start(&*store, 10).await;
    assert_eq!(numbers(&started.commands), [1, 2, 3]);
    assert!(started.next_in.unwrap() > Duration::from_secs(399 * 24 * 60 * 60), "{started:?}");
    for number in 4..=7 {
        store.cancel_command(id(number)).await.unwrap().unwrap();
    }
    assert!(start(&*store, 10).await.next_in.unwrap() > Duration::from_secs(7_000 * 365 * 24 * 60 * 60));
    // A cursor may be at any time.
    for (due_at, left) in [(DateTime::<Utc>::MIN_UTC, 4), (DateTime::<Utc>::MAX_UTC, 0)] {
        let after = ScheduledCommand { due_at, ..answer[0].clone() };
        let page = store.scheduled_commands(&ScheduledQuery::default(), Some(&after), 10).await.unwrap();
        assert_eq!(page.len(), left);
    }
}

pub(super) fn invalid<T: std::fmt::Debug>(result: Result<T, StoreError>) {
    assert!(matches!(result, Err(StoreError::Invalid { .. })), "{result:?}");
}

/// Checks that invalid commands are refused, with everything in their call.
pub async fn invalid_commands_are_refused(database: Database) {
    let store = database.open().await;
    let with = |bad: NewScheduledCommand| vec![command(1, NOW), bad];
    let long = "x".repeat(1_001);
    for text in ["", "a\0", "a\n", "\u{85}", &long] {
        invalid(
            store
                .schedule_commands(with(NewScheduledCommand { target: text.into(), ..command(2, NOW) }))
                .await,
        );
        let tick = NewScheduledCommand { schedule: Some(text.into()), ..command(2, NOW) };
        invalid(store.schedule_commands(with(tick)).await);
        let query = ScheduledQuery { schedule: Some(text.into()), ..ScheduledQuery::default() };
        invalid(store.scheduled_commands(&query, None, 1).await);
    }
    let sized = |number, size| NewScheduledCommand { body: vec![0; size], ..command(number, NOW) };
    invalid(store.schedule_commands(with(sized(2, ScheduledCommand::MAX_BODY + 1))).await);
    let most = ScheduledCommand::MAX_BODIES / ScheduledCommand::MAX_BODY;
    let many = (1..=most as u128).map(|number| sized(number, ScheduledCommand::MAX_BODY));
    invalid(store.schedule_commands(many.chain([command(99, NOW)]).collect()).await);
    invalid(store.schedule_commands((0..=MOST as u128).map(|number| command(number, NOW)).collect()).await);
    invalid(store.end_commands((0..=MOST as u128).map(done).collect(), None).await);
    for limit in [MOST + 1, usize::MAX] {
        invalid(store.start_due_commands(limit).await);
        invalid(store.scheduled_commands(&ScheduledQuery::default(), None, limit).await);
    }
    assert!(all(&*store).await.is_empty());
    // The longest possible ones, and an id of zeros.
    let longest = NewScheduledCommand {
        target: "ü".repeat(500),
        schedule: Some("ü".repeat(200)),
        ..sized(0, ScheduledCommand::MAX_BODY)
    };
    let answer = store.schedule_commands(vec![longest.clone()]).await.unwrap();
    assert!(answer[0].target == longest.target && answer[0].schedule == longest.schedule);
    assert_eq!(start(&*store, MOST).await.commands.len(), 1);
    assert!(all(&*store).await[0].body == longest.body);
}
