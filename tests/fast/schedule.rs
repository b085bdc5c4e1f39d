//! Scheduled commands and recurring schedules, in memory and on SQLite.

use std::sync::atomic::Ordering;
use std::time::Duration;

use chrono::{TimeDelta, Utc};
use storied::command::HandlerOptions;
use storied::schedule::{
    Cancellation, Overlap, Recurrence, ScheduleChange, ScheduleError, ScheduleStatus, SchedulerState,
};
use storied::store::{ScheduledQuery, ScheduledState};
use storied::{MemoryStore, NotExecutedKind, Runtime, SqliteStore};
use tokio::time::sleep;
use uuid::Uuid;

use crate::support::reminders::{Close, Closing, Invoice, InvoiceEvent, reminder, reminders};
use crate::support::{eventually_async, eventually_some};

const SECOND: Duration = Duration::from_secs(1);

async fn start() -> Runtime {
    Runtime::builder().store(MemoryStore::new()).aggregate::<Invoice>().start().await.unwrap()
}

async fn texts(runtime: &Runtime) -> Vec<String> {
    reminders(&**runtime.store()).await.into_iter().map(|(_, text)| text).collect()
}

async fn ended(runtime: &Runtime, id: Uuid) {
    let gone = async || runtime.scheduled(id).status().await.unwrap().is_none();
    eventually_async("the command has ended", gone).await;
}

#[tokio::test]
async fn a_command_runs_when_it_is_due() {
    let runtime = start().await;
    let before = Utc::now();
    let late = runtime.execute::<Invoice>("1", reminder("late")).after(2 * SECOND).await.unwrap();
    let soon = runtime.execute::<Invoice>("1", reminder("soon")).after(SECOND / 2).await.unwrap();
    let past = runtime.execute::<Invoice>("1", reminder("past"));
    let past = past.at(before - TimeDelta::days(1)).await.unwrap();
    assert!(late.due_at >= before + 2 * SECOND && late.due_at <= Utc::now() + 2 * SECOND);
    let status = runtime.scheduled(late.id).status().await.unwrap().unwrap();
    assert_eq!((status.target.as_str(), status.state), ("invoice/1", ScheduledState::Waiting));
    assert_eq!((status.due_at, status.schedule, status.reason), (late.due_at, None, None));
    ended(&runtime, past.id).await;
    ended(&runtime, soon.id).await;
    assert_eq!(texts(&runtime).await, ["past", "soon"]);
    ended(&runtime, late.id).await;
    assert!(Utc::now() >= late.due_at, "not before its time");
    assert_eq!(texts(&runtime).await, ["past", "soon", "late"]);
    let scheduler = runtime.status().await.scheduler;
    assert_eq!((scheduler.state, scheduler.executed, scheduler.started), (SchedulerState::Running, 3, 0));
    runtime.shutdown().await.unwrap();
}

/// Events of a scheduled command carry its id and metadata.
#[tokio::test]
async fn events_carry_the_metadata_of_the_scheduled_command() {
    let runtime = start().await;
    let (id, correlation) = (Uuid::now_v7(), Uuid::new_v4());
    let command = runtime.execute::<Invoice>("1", reminder("now")).command_id(id).correlation_id(correlation);
    command.metadata("tenant", "7").after(Duration::ZERO).await.unwrap();
    ended(&runtime, id).await;
    let stream = storied::StreamId::new("invoice", "1").unwrap();
    let events = runtime.store().read_stream(&stream, storied::Version::NONE, 10).await.unwrap();
    let metadata = events[0].decode_metadata().unwrap();
    assert_eq!((events.len(), events[0].command_id), (1, id));
    assert_eq!((metadata.correlation_id, metadata.user["tenant"].as_str()), (Some(correlation), "7"));
    runtime.shutdown().await.unwrap();
}

#[tokio::test]
async fn an_id_is_scheduled_once() {
    let runtime = start().await;
    let id = Uuid::now_v7();
    let remind = |text: &str| runtime.execute::<Invoice>("1", reminder(text)).command_id(id);
    let first = remind("a").after(SECOND).await.unwrap();
    let retried = remind("a").metadata("attempt", "2").after(SECOND).await.unwrap();
    assert_eq!(first, retried);
    let others = [
        remind("b").after(SECOND).await,
        remind("a").after(2 * SECOND).await,
        remind("a").at(first.due_at).await,
        runtime.execute::<Invoice>("2", reminder("a")).command_id(id).after(SECOND).await,
    ];
    for other in others {
        assert!(matches!(other, Err(ScheduleError::SameId { id: same, .. }) if same == id), "{other:?}");
    }
    ended(&runtime, id).await;
    // A repetition after the execution has no second effect.
    remind("a").after(Duration::ZERO).await.unwrap();
    ended(&runtime, id).await;
    assert_eq!(texts(&runtime).await, ["a"]);
    runtime.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_waiting_command_can_be_cancelled() {
    let runtime = start().await;
    let scheduled = runtime.execute::<Invoice>("1", reminder("never")).after(SECOND).await.unwrap();
    let handle = runtime.scheduled(scheduled.id);
    assert_eq!(handle.cancel().await.unwrap(), Cancellation::Cancelled);
    assert_eq!(handle.cancel().await.unwrap(), Cancellation::Unknown);
    assert_eq!((handle.status().await.unwrap(), handle.retry().await.unwrap()), (None, false));
    sleep(SECOND + SECOND / 2).await;
    assert!(texts(&runtime).await.is_empty());
    runtime.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_rejected_or_failing_command_is_parked_until_a_retry() {
    let runtime = start().await;
    runtime.execute::<Invoice>("paid", InvoiceEvent::Paid {}).await.unwrap();
    let rejected = runtime.execute::<Invoice>("paid", reminder("late")).after(Duration::ZERO).await.unwrap();
    let panics = runtime.execute::<Invoice>("1", reminder("panic")).after(Duration::ZERO).await.unwrap();
    let fine = runtime.execute::<Invoice>("1", reminder("fine")).after(Duration::ZERO).await.unwrap();
    for (id, reason) in [(rejected.id, "the invoice is paid"), (panics.id, "as commanded")] {
        let parked = async || {
            let status = runtime.scheduled(id).status().await.unwrap()?;
            (status.state == ScheduledState::Parked).then_some(status)
        };
        let parked = eventually_some("it is parked", parked).await;
        assert!(parked.reason.as_ref().unwrap().contains(reason), "{parked:?}");
    }
    ended(&runtime, fine.id).await;
    assert_eq!(runtime.status().await.scheduler.parked, 2);
    // Parked again.
    assert!(runtime.scheduled(rejected.id).retry().await.unwrap());
    eventually_async("it is parked again", async || runtime.status().await.scheduler.parked == 3).await;
    assert_eq!(runtime.scheduled(rejected.id).cancel().await.unwrap(), Cancellation::Cancelled);
    assert_eq!(texts(&runtime).await, ["fine"]);
    runtime.shutdown().await.unwrap();
}

#[tokio::test]
async fn bad_input_is_refused_at_the_call() {
    let runtime = start().await;
    let empty = runtime.execute::<Invoice>("", reminder("x")).after(SECOND).await;
    assert!(
        matches!(&empty, Err(ScheduleError::NotExecutable { kind: NotExecutedKind::InvalidId { .. }, .. })),
        "{empty:?}"
    );
    let unknown = runtime.execute_handler::<Closing>(Close).after(SECOND).await;
    assert!(
        matches!(&unknown, Err(ScheduleError::NotExecutable { kind: NotExecutedKind::NoHandler { .. }, .. })),
        "{unknown:?}"
    );
    let every = || Recurrence::every(SECOND).unwrap();
    let remind = || runtime.execute::<Invoice>("1", reminder("x"));
    for name in ["", "a\nb"] {
        assert!(matches!(remind().repeat(name, every()).await, Err(ScheduleError::Store(_))), "{name:?}");
    }
    let late = every().catch_up(Duration::MAX);
    assert!(matches!(remind().repeat("x", late).await, Err(ScheduleError::Invalid(_))));
    let unknown = runtime.schedule("unknown");
    assert!(matches!(unknown.pause().await, Err(ScheduleError::UnknownSchedule { .. })));
    assert!(matches!(unknown.trigger().await, Err(ScheduleError::UnknownSchedule { .. })));
    assert_eq!((unknown.status().await.unwrap(), unknown.remove().await.unwrap()), (None, false));
    runtime.shutdown().await.unwrap();
}

/// A command runs, or it is cancelled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelling_races_with_the_execution() {
    const LANES: usize = 4;
    const RACES: usize = 400;
    let runtime = start().await;
    let lanes = (0..LANES).map(|lane| {
        let runtime = runtime.clone();
        async move {
            let (mut cancelled, mut wait) = (Vec::new(), Duration::from_millis(10));
            for race in (lane..RACES).step_by(LANES) {
                let remind = runtime.execute::<Invoice>(race, reminder("due"));
                let id = remind.after(Duration::from_millis(10)).await.unwrap().id;
                sleep(wait).await;
                let is_cancelled = runtime.scheduled(id).cancel().await.unwrap() == Cancellation::Cancelled;
                // The next race is closer, however fast the machine is.
                wait = match is_cancelled {
                    true => wait + Duration::from_micros(700),
                    false => wait.saturating_sub(Duration::from_micros(900)),
                };
                if !is_cancelled {
                    ended(&runtime, id).await;
                }
                cancelled.push((race, is_cancelled));
            }
            cancelled
        }
    });
    let cancelled: Vec<_> = futures_util::future::join_all(lanes).await.into_iter().flatten().collect();
    let reminded = reminders(&**runtime.store()).await;
    for (race, cancelled) in &cancelled {
        let reminded = reminded.iter().filter(|(id, _)| *id == race.to_string()).count();
        assert_eq!(reminded, usize::from(!cancelled), "{race}");
    }
    let count = cancelled.iter().filter(|(_, cancelled)| *cancelled).count();
    assert!(count > 0 && count < RACES, "{count} cancelled");
    runtime.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_scheduled_survives_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let open = async || {
        let store = SqliteStore::open(directory.path().join("log.db")).await.unwrap();
        Runtime::builder().store(store).aggregate::<Invoice>().start().await.unwrap()
    };
    let first = open().await;
    let due = first.execute::<Invoice>("1", reminder("due")).after(SECOND / 2).await.unwrap();
    let far = first.execute::<Invoice>("1", reminder("far")).after(400 * 86_400 * SECOND).await.unwrap();
    let every = Recurrence::every(SECOND).unwrap();
    first.execute::<Invoice>("2", reminder("tick")).repeat("ticks", every).await.unwrap();
    // As a crash: its lease expires.
    drop(first);
    sleep(SECOND).await;
    let second = open().await;
    ended(&second, due.id).await;
    assert_eq!(second.scheduled(far.id).status().await.unwrap().unwrap().due_at, far.due_at);
    let ticked = async || second.schedule("ticks").status().await.unwrap().unwrap().executed > 1;
    eventually_async("the schedule goes on", ticked).await;
    let dues = texts(&second).await.into_iter().filter(|text| text == "due").count();
    assert_eq!(dues, 1);
    second.shutdown().await.unwrap();
}

async fn schedule(runtime: &Runtime, name: &str) -> ScheduleStatus {
    runtime.schedule(name).status().await.unwrap().unwrap()
}

#[tokio::test]
async fn a_schedule_ticks_until_its_end() {
    let runtime = start().await;
    let remind = |text: &str| runtime.execute::<Invoice>("1", reminder(text));
    let every = |seconds| Recurrence::every(seconds * SECOND).unwrap();
    assert_eq!(remind("tick").repeat("s", every(1)).await.unwrap(), ScheduleChange::Created);
    assert_eq!(remind("tick").repeat("s", every(1)).await.unwrap(), ScheduleChange::Unchanged);
    let created = schedule(&runtime, "s").await;
    assert_eq!((created.timing.as_str(), created.target.as_str()), ("every 1s", "invoice/1"));
    assert_eq!((created.executed, created.paused, created.overlap), (0, false, Overlap::Skip));
    eventually_async("it ticks", async || texts(&runtime).await.len() >= 2).await;

    // No tick during a pause, and none is made up for.
    runtime.schedule("s").pause().await.unwrap();
    sleep(SECOND / 5).await;
    let paused = schedule(&runtime, "s").await;
    assert_eq!((paused.paused, paused.next_at), (true, None));
    sleep(SECOND + SECOND / 2).await;
    assert_eq!(schedule(&runtime, "s").await, paused);
    let id = runtime.schedule("s").trigger().await.unwrap();
    ended(&runtime, id).await;
    assert_eq!(texts(&runtime).await.len() as u64, paused.executed + 1);
    runtime.schedule("s").resume().await.unwrap();
    let resumed = schedule(&runtime, "s").await;
    assert_eq!((resumed.executed, resumed.missed, resumed.skipped), (paused.executed + 1, 0, 0));
    let going_on = async || schedule(&runtime, "s").await.executed > resumed.executed;
    eventually_async("it ticks again", going_on).await;

    // The newer command replaces the older one, and the counters go on.
    assert_eq!(remind("new").repeat("s", every(1)).await.unwrap(), ScheduleChange::Replaced);
    eventually_async("it ticks", async || texts(&runtime).await.last().is_some_and(|it| it == "new")).await;
    assert!(schedule(&runtime, "s").await.executed > resumed.executed);
    assert!(runtime.schedule("s").remove().await.unwrap());
    let count = texts(&runtime).await.len();
    sleep(SECOND + SECOND / 2).await;
    assert_eq!(texts(&runtime).await.len(), count);
    assert_eq!(runtime.schedule("s").status().await.unwrap(), None);
    runtime.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_backfill_repeats_no_tick() {
    let runtime = start().await;
    let day = Recurrence::cron("0 3 * * *", "Europe/Berlin").unwrap();
    runtime.execute::<Invoice>("1", reminder("night")).repeat("nightly", day).await.unwrap();
    let handle = runtime.schedule("nightly");
    let from = "2026-03-27T00:00:00Z".parse().unwrap();
    let to = "2026-03-31T00:00:00Z".parse().unwrap();
    for _ in 0..2 {
        assert_eq!(handle.backfill(from..=to).await.unwrap(), 4);
        let none = async || {
            let query = ScheduledQuery::default();
            runtime.store().scheduled_commands(&query, None, 10).await.unwrap().is_empty()
        };
        eventually_async("all have run", none).await;
        assert_eq!(texts(&runtime).await.len(), 4);
    }
    let too_many = handle.backfill("2016-01-01T00:00:00Z".parse().unwrap()..=to).await;
    assert!(matches!(too_many, Err(ScheduleError::TooManyTicks { .. })));
    runtime.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_tick_during_an_earlier_one_is_skipped_or_runs_beside_it() {
    for (overlap, name) in [(Overlap::Skip, "skips"), (Overlap::Allow, "allows")] {
        let closing = Closing::default();
        closing.held.store(true, Ordering::Release);
        let options = HandlerOptions::new().workers(8);
        let builder = Runtime::builder().store(MemoryStore::new()).handler_with(closing.clone(), options);
        let runtime = builder.start().await.unwrap();
        let every = Recurrence::every(SECOND).unwrap().overlap(overlap);
        runtime.execute_handler::<Closing>(Close).repeat(name, every).await.unwrap();
        let passed = async || {
            let status = schedule(&runtime, name).await;
            (status.executed + status.skipped >= 3).then_some(status)
        };
        let status = eventually_some("three ticks have passed", passed).await;
        if overlap == Overlap::Skip {
            assert_eq!((status.executed, closing.calls.load(Ordering::Acquire)), (1, 1));
        } else {
            assert_eq!(status.skipped, 0);
            let calls = async || closing.calls.load(Ordering::Acquire) >= 3;
            eventually_async("they run side by side", calls).await;
        }
        closing.held.store(false, Ordering::Release);
        closing.release.notify_waiters();
        let goes_on = async || schedule(&runtime, name).await.executed > status.executed;
        eventually_async("it goes on", goes_on).await;
        runtime.shutdown().await.unwrap();
    }
}

/// A copy of the store would execute the commands of the original.
#[tokio::test]
async fn a_copied_store_starts_no_command() {
    let directory = tempfile::tempdir().unwrap();
    let [file, copy] = ["log.db", "copy.db"].map(|name| directory.path().join(name));
    let start = async |file: &std::path::Path| {
        let store = SqliteStore::open(file).await.unwrap();
        Runtime::builder().store(store).aggregate::<Invoice>().start().await.unwrap()
    };
    let original = start(&file).await;
    let due = original.execute::<Invoice>("1", reminder("due")).after(SECOND).await.unwrap();
    original.shutdown().await.unwrap();
    for end in ["", "-wal"] {
        let name = |name: &str| directory.path().join(format!("{name}.db{end}"));
        // Without a log of writes, everything is in the file.
        let copied = std::fs::copy(name("log"), name("copy"));
        assert!(copied.is_ok() || end == "-wal", "{copied:?}");
    }
    let copied = start(&copy).await;
    sleep(2 * SECOND).await;
    let scheduler = copied.status().await.scheduler;
    let SchedulerState::Incompatible { reason } = &scheduler.state else { panic!("{scheduler:?}") };
    assert!(reason.contains("storied store adopt"), "{reason}");
    assert_eq!((texts(&copied).await.len(), scheduler.executed), (0, 0));
    assert!(copied.scheduled(due.id).status().await.unwrap().is_some());
    copied.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_shutdown_waits_for_commands_in_flight() {
    let closing = Closing::default();
    closing.held.store(true, Ordering::Release);
    let store = MemoryStore::new();
    let builder = Runtime::builder().store(store.clone()).handler(closing.clone());
    let runtime = builder.start().await.unwrap();
    let id = runtime.execute_handler::<Closing>(Close).after(Duration::ZERO).await.unwrap().id;
    eventually_async("it runs", async || closing.calls.load(Ordering::Acquire) == 1).await;
    assert_eq!(runtime.scheduled(id).cancel().await.unwrap(), Cancellation::Started);
    let handle = runtime.scheduled(id);
    let stopping = tokio::spawn(runtime.shutdown());
    sleep(SECOND / 5).await;
    closing.release.notify_waiters();
    stopping.await.unwrap().unwrap();
    assert_eq!(handle.status().await.unwrap(), None);
}
