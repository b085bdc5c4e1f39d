//! Scheduled commands and recurring schedules, in memory and on SQLite.

use std::sync::atomic::Ordering;
use std::time::Duration;

use chrono::{TimeDelta, Utc};
use storied::command::HandlerOptions;
use storied::schedule::{
    Cancellation, Overlap, Recurrence, ScheduleChange, ScheduleError, ScheduleStatus, SchedulerState,
};
use storied::store::{ScheduledQuery, ScheduledState};
use storied::{ExpectedVersion, MemoryStore, NotExecutedKind, Runtime, SqliteStore};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::support::reminders::{Close, Closing, Invoice, InvoiceEvent, PANICS, reminder, reminders};
use crate::support::{eventually_async, eventually_some};

const SECOND: Duration = Duration::from_secs(1);

async fn start() -> Runtime {
    Runtime::builder().store(MemoryStore::new()).aggregate::<Invoice>().start().await.unwrap()
}

async fn texts(runtime: &Runtime) -> Vec<String> {
    reminders(&**runtime.store()).await.into_iter().map(|(_, text)| text).collect()
}

async fn ended(runtime: &Runtime, id: Uuid) {
    let gone = async || runtime.scheduled_command(id).status().await.unwrap().is_none();
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
    let status = runtime.scheduled_command(late.id).status().await.unwrap().unwrap();
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

/// Commands and schedules follow the clock of the store, which a test moves.
#[tokio::test]
async fn a_moved_clock_makes_commands_and_ticks_due() {
    const DAY: Duration = Duration::from_secs(86_400);
    let store = MemoryStore::new();
    let runtime = Runtime::builder().store(store.clone()).aggregate::<Invoice>().start().await.unwrap();
    let far = runtime.execute::<Invoice>("1", reminder("far")).after(400 * DAY).await.unwrap();
    let near = runtime.execute::<Invoice>("1", reminder("near")).after(DAY).await.unwrap();
    let nightly = Recurrence::cron("0 3 * * *", "Europe/Berlin").unwrap().catch_up(DAY);
    runtime.execute::<Invoice>("2", reminder("night")).repeat("nightly", nightly).await.unwrap();
    store.advance_clock(DAY);
    ended(&runtime, near.id).await;
    let created = async || schedule(&runtime, "nightly").await.created == 1;
    eventually_async("one night has passed", created).await;
    assert_eq!(runtime.scheduled_command(far.id).status().await.unwrap().unwrap(), far);
    store.advance_clock(399 * DAY);
    ended(&runtime, far.id).await;
    let last = async || schedule(&runtime, "nightly").await.created == 2;
    eventually_async("the last night has passed", last).await;
    let nightly = schedule(&runtime, "nightly").await;
    assert!((398..=399).contains(&nightly.missed), "{nightly:?}");
    assert_eq!(texts(&runtime).await.iter().filter(|text| *text != "night").count(), 2);
    runtime.shutdown().await.unwrap();
}

/// Events of a scheduled command carry its id and metadata.
#[tokio::test]
async fn events_carry_the_metadata_of_the_scheduled_command() {
    let runtime = start().await;
    let (id, correlation) = (Uuid::now_v7(), Uuid::new_v4());
    let command = runtime.execute::<Invoice>("1", reminder("now")).command_id(id).correlation_id(correlation);
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let command = command.causation_id(correlation).traceparent(trace);
    command.metadata("tenant", "7").after(Duration::ZERO).await.unwrap();
    ended(&runtime, id).await;
    let stream = storied::StreamId::new("invoice", "1").unwrap();
    let events = runtime.store().read_stream(&stream, storied::Version::NONE, 10).await.unwrap();
    let metadata = events[0].decode_metadata().unwrap();
    assert_eq!((events.len(), events[0].command_id), (1, id));
    assert_eq!((metadata.correlation_id, metadata.user["tenant"].as_str()), (Some(correlation), "7"));
    assert_eq!(metadata.causation_id, Some(correlation));
    // The span of the execution is a child.
    assert_eq!(metadata.traceparent.unwrap()[..36], trace[..36]);
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
        remind("a").expect_version(ExpectedVersion::NoStream).after(SECOND).await,
        runtime.execute::<Invoice>("2", reminder("a")).command_id(id).after(SECOND).await,
    ];
    for other in others {
        assert!(
            matches!(other, Err(ScheduleError::CommandIdReused { id: same, .. }) if same == id),
            "{other:?}"
        );
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
    let handle = runtime.scheduled_command(scheduled.id);
    assert_eq!(handle.cancel().await.unwrap(), Cancellation::Cancelled);
    assert_eq!(handle.cancel().await.unwrap(), Cancellation::Unknown);
    assert_eq!((handle.status().await.unwrap(), handle.retry().await.unwrap()), (None, false));
    let later = runtime.execute::<Invoice>("1", reminder("later")).after(SECOND).await.unwrap();
    ended(&runtime, later.id).await;
    assert_eq!(texts(&runtime).await, ["later"]);
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
            let status = runtime.scheduled_command(id).status().await.unwrap()?;
            (status.state == ScheduledState::Parked).then_some(status)
        };
        let parked = eventually_some("it is parked", parked).await;
        assert!(parked.reason.as_ref().unwrap().contains(reason), "{parked:?}");
    }
    ended(&runtime, fine.id).await;
    assert_eq!(runtime.status().await.scheduler.parked, 2);
    assert_eq!(PANICS.load(Ordering::Acquire), 3, "attempts");
    // Parked again.
    assert!(runtime.scheduled_command(rejected.id).retry().await.unwrap());
    eventually_async("it is parked again", async || runtime.status().await.scheduler.parked == 3).await;
    assert_eq!(runtime.scheduled_command(rejected.id).cancel().await.unwrap(), Cancellation::Cancelled);
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
    let large = |bytes| runtime.execute::<Invoice>("1", reminder(&"x".repeat(bytes)));
    assert!(matches!(large(70_000).repeat("x", every()).await, Err(ScheduleError::TooLarge { .. })));
    remind().repeat("x", every()).await.unwrap();
    // With room for the counters.
    assert!(matches!(large(65_200).repeat("x", every()).await, Err(ScheduleError::TooLarge { .. })));
    assert!(matches!(large(2 << 20).after(SECOND).await, Err(ScheduleError::Store(_))));
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
                let is_cancelled =
                    runtime.scheduled_command(id).cancel().await.unwrap() == Cancellation::Cancelled;
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
async fn scheduled_commands_survive_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let open = async |closing: &Closing| {
        let store = SqliteStore::open(directory.path().join("log.db")).await.unwrap();
        let builder = Runtime::builder().store(store).aggregate::<Invoice>();
        builder.handler(closing.clone()).start().await.unwrap()
    };
    let hangs = Closing::default();
    hangs.hold();
    let first = open(&hangs).await;
    let started = first.execute_handler::<Closing>(Close).after(Duration::ZERO).await.unwrap();
    eventually_async("a command has started", async || hangs.calls() == 1).await;
    let due = first.execute::<Invoice>("1", reminder("due")).after(SECOND / 2).await.unwrap();
    let far = first.execute::<Invoice>("1", reminder("far")).after(400 * 86_400 * SECOND).await.unwrap();
    let every = Recurrence::every(SECOND).unwrap();
    first.execute::<Invoice>("2", reminder("tick")).repeat("ticks", every).await.unwrap();
    // As a crash: its lease expires.
    drop(first);
    let closing = Closing::default();
    let second = open(&closing).await;
    ended(&second, started.id).await;
    assert_eq!(closing.calls(), 1, "it is sent again");
    ended(&second, due.id).await;
    assert_eq!(second.scheduled_command(far.id).status().await.unwrap().unwrap(), far);
    let ticked = async || schedule(&second, "ticks").await.created > 1;
    eventually_async("the schedule goes on", ticked).await;
    let dues = texts(&second).await.into_iter().filter(|text| text == "due").count();
    assert_eq!(dues, 1);
    second.shutdown().await.unwrap();
}

/// The node without the lease learns of due commands by reading the store.
#[tokio::test]
async fn every_node_schedules_commands() {
    let store = MemoryStore::new();
    let start =
        async || Runtime::builder().store(store.clone()).aggregate::<Invoice>().start().await.unwrap();
    let owner = start().await;
    let running = async || owner.status().await.scheduler.state == SchedulerState::Running;
    eventually_async("the first node has the lease", running).await;
    let other = start().await;
    let began = Instant::now();
    let id = other.execute::<Invoice>("1", reminder("due")).after(Duration::ZERO).await.unwrap().id;
    ended(&other, id).await;
    assert!(began.elapsed() < 3 * SECOND, "{:?}", began.elapsed());
    assert_eq!((owner.status().await.scheduler.executed, other.status().await.scheduler.executed), (1, 0));
    assert_eq!(other.status().await.scheduler.state, SchedulerState::Standby);
    // An orderly end hands over at once.
    owner.shutdown().await.unwrap();
    let id = other.execute::<Invoice>("1", reminder("next")).after(Duration::ZERO).await.unwrap().id;
    ended(&other, id).await;
    assert!(began.elapsed() < 6 * SECOND, "{:?}", began.elapsed());
    other.shutdown().await.unwrap();
}

/// A command whose target no node handles waits again. It delays neither others nor a shutdown.
#[tokio::test]
async fn a_command_without_a_target_is_postponed() {
    let (store, closing) = (MemoryStore::new(), Closing::default());
    let handling = async || {
        let builder = Runtime::builder().store(store.clone()).handler(closing.clone());
        builder.start().await.unwrap()
    };
    let first = handling().await;
    let close = async || first.execute_handler::<Closing>(Close).after(SECOND / 2).await.unwrap().id;
    let [waits, cancelled] = [close().await, close().await];
    first.shutdown().await.unwrap();
    let other = Runtime::builder().store(store.clone()).aggregate::<Invoice>().start().await.unwrap();
    let postponed = async || other.status().await.scheduler.postponed >= 2;
    eventually_async("both are postponed", postponed).await;
    let remind = other.execute::<Invoice>("1", reminder("meanwhile")).after(Duration::ZERO).await.unwrap();
    ended(&other, remind.id).await;
    let cancel =
        async || other.scheduled_command(cancelled).cancel().await.unwrap() == Cancellation::Cancelled;
    eventually_async("a command that waits again is cancelled", cancel).await;
    let stopping = Instant::now();
    other.shutdown().await.unwrap();
    assert!(stopping.elapsed() < 3 * SECOND, "{:?}", stopping.elapsed());
    let last = handling().await;
    ended(&last, waits).await;
    assert_eq!(closing.calls(), 1);
    last.shutdown().await.unwrap();
}

/// A target has 512 permits, so one that hangs holds up no other.
#[tokio::test]
async fn a_slow_target_delays_no_other() {
    let closing = Closing::default();
    closing.hold();
    let options = HandlerOptions::new().workers(1_000);
    let builder = Runtime::builder().store(MemoryStore::new()).aggregate::<Invoice>();
    let runtime = builder.handler_with(closing.clone(), options).start().await.unwrap();
    let close =
        (0..1_500).map(|_| async { runtime.execute_handler::<Closing>(Close).after(SECOND).await.unwrap() });
    futures_util::future::join_all(close).await;
    eventually_async("the target has all of its permits", async || closing.calls() == 512).await;
    let began = Instant::now();
    for _ in 0..3 {
        let id = runtime.execute::<Invoice>("1", reminder("due")).after(Duration::ZERO).await.unwrap().id;
        ended(&runtime, id).await;
    }
    // The first time, it takes 5 s to notice that the target is slow.
    assert!(began.elapsed() < 8 * SECOND, "{:?}", began.elapsed());
    assert_eq!(closing.calls(), 512);
    closing.release();
    let all = async || closing.calls() == 1_500 && runtime.status().await.scheduler.executed == 1_503;
    eventually_async("all commands have run once", all).await;
    runtime.shutdown().await.unwrap();
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
    assert_eq!((created.created, created.paused, created.overlap), (0, false, Overlap::Skip));
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
    assert_eq!(texts(&runtime).await.len() as u64, paused.created + 1);
    runtime.schedule("s").resume().await.unwrap();
    let resumed = schedule(&runtime, "s").await;
    assert_eq!((resumed.created, resumed.missed, resumed.skipped), (paused.created + 1, 0, 0));
    let going_on = async || schedule(&runtime, "s").await.created > resumed.created;
    eventually_async("it ticks again", going_on).await;
    assert_eq!(schedule(&runtime, "s").await.missed, 0, "no tick of the pause");

    // The newer command replaces the older one, and the counters go on.
    assert_eq!(remind("new").repeat("s", every(1)).await.unwrap(), ScheduleChange::Replaced);
    eventually_async("it ticks", async || texts(&runtime).await.last().is_some_and(|it| it == "new")).await;
    assert!(schedule(&runtime, "s").await.created > resumed.created);
    // A deployment resumes no paused schedule.
    runtime.schedule("s").pause().await.unwrap();
    assert_eq!(remind("newer").repeat("s", every(2)).await.unwrap(), ScheduleChange::Replaced);
    assert!(schedule(&runtime, "s").await.paused);
    runtime.schedule("s").resume().await.unwrap();
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
    // No tick of the future.
    assert_eq!(handle.backfill(Utc::now()..=Utc::now() + TimeDelta::days(9)).await.unwrap(), 0);
    let too_many = handle.backfill("2016-01-01T00:00:00Z".parse().unwrap()..=to).await;
    assert!(matches!(too_many, Err(ScheduleError::TooManyTicks { .. })));
    runtime.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_tick_during_an_earlier_one_is_skipped_or_runs_beside_it() {
    for (overlap, name) in [(Overlap::Skip, "skips"), (Overlap::Allow, "allows")] {
        let closing = Closing::default();
        closing.hold();
        let options = HandlerOptions::new().workers(8);
        let builder = Runtime::builder().store(MemoryStore::new()).handler_with(closing.clone(), options);
        let runtime = builder.start().await.unwrap();
        let every = Recurrence::every(SECOND).unwrap().overlap(overlap);
        runtime.execute_handler::<Closing>(Close).repeat(name, every).await.unwrap();
        let passed = async || {
            let status = schedule(&runtime, name).await;
            (status.created + status.skipped >= 3).then_some(status)
        };
        let status = eventually_some("three ticks have passed", passed).await;
        if overlap == Overlap::Skip {
            assert_eq!((status.created, closing.calls()), (1, 1));
        } else {
            assert_eq!(status.skipped, 0);
            let calls = async || closing.calls() >= 3;
            eventually_async("they run side by side", calls).await;
        }
        closing.release();
        let goes_on = async || schedule(&runtime, name).await.created > status.created;
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
    let refused = async || match copied.status().await.scheduler.state {
        SchedulerState::Incompatible { reason } => Some(reason),
        _ => None,
    };
    let reason = eventually_some("the scheduler does not run", refused).await;
    assert!(reason.contains("storied store adopt"), "{reason}");
    let status = copied.scheduled_command(due.id).status().await.unwrap().unwrap();
    assert_eq!(status.state, ScheduledState::Waiting);
    copied.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_shutdown_waits_for_commands_in_flight() {
    let closing = Closing::default();
    closing.hold();
    let store = MemoryStore::new();
    let builder = Runtime::builder().store(store.clone()).handler(closing.clone());
    let runtime = builder.start().await.unwrap();
    let id = runtime.execute_handler::<Closing>(Close).after(Duration::ZERO).await.unwrap().id;
    eventually_async("it runs", async || closing.calls() == 1).await;
    assert_eq!(runtime.scheduled_command(id).cancel().await.unwrap(), Cancellation::Started);
    let handle = runtime.scheduled_command(id);
    let stopping = tokio::spawn(runtime.shutdown());
    sleep(SECOND / 5).await;
    assert!(!stopping.is_finished(), "it waits for the command");
    closing.release();
    stopping.await.unwrap().unwrap();
    assert_eq!(handle.status().await.unwrap(), None);
}
