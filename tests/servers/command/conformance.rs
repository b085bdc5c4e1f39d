//! The guarantees of commands: each behaviour runs in one process and over NATS.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use storied::command::{CommandBus, Handler, HandlerOptions};
use storied::event::EncodeError;
use storied::projection::InMemory;
use storied::store::ExpectedVersion;
use storied::{AnyEvent, ExecuteError, NotExecutedKind, Projection, RecordedEvent, Version};
use tokio::time::Instant;
use uuid::{NoContext, Timestamp, Uuid};

use crate::command::cluster::*;
use crate::command::domain::{Add, AddUpTo, Counter, CounterCommand, CounterError, Work, WorkError, Worker};

macro_rules! suite {
    ($($behaviour:ident),+ $(,)?) => {
        mod in_process {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $behaviour() {
                super::$behaviour(crate::command::cluster::Kind::Local).await;
            })+
        }
        mod over_nats {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $behaviour() {
                super::$behaviour(crate::command::cluster::Kind::Nats).await;
            })+
        }
    };
}

suite! {
    a_dispatch_returns_when_the_command_is_accepted,
    typed_refusals_arrive_with_their_details,
    a_report_has_the_duration,
    a_command_past_its_deadline_is_never_executed,
    without_a_timeout_a_caller_waits_without_limit,
    every_command_is_executed_once,
    a_filtered_command_goes_to_another_node,
    workers_bound_what_runs_at_a_time,
    commands_with_a_key_run_one_at_a_time_in_order,
    hooks_run_around_commands,
    nested_commands_do_not_wait_for_their_parent,
    nested_commands_carry_their_cause,
    a_command_id_takes_effect_once,
    the_same_id_at_once_is_one_command,
    the_same_id_with_another_content_is_refused,
    a_rejection_is_recorded,
    a_failed_attempt_leaves_no_record,
    an_id_from_the_future_is_refused,
    a_handler_may_work_for_longer_than_its_callers_wait,
    dropped_callers_hold_no_permit,
    a_repeated_queued_command_is_not_dropped,
    an_attempt_ends_at_the_handlers_time_limit,
    a_panic_affects_only_its_command,
    a_panic_around_a_handler_affects_only_its_command,
    a_missing_handler_is_reported_at_once,
    a_full_handler_reports_overload,
    events_carry_the_metadata_of_their_command,
    an_expected_version_is_checked_where_the_aggregate_is,
    a_caller_can_wait_for_a_projection,
    metadata_is_limited,
    accepted_commands_finish_before_a_node_ends,
}

fn note(n: u64) -> Work {
    Work::Note { n, wait: false }
}

async fn a_dispatch_returns_when_the_command_is_accepted(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    let dispatched =
        cluster.caller.execute_handler::<Worker>(Work::Note { n: 7, wait: true }).dispatch().await.unwrap();
    eventually("begun", || cluster.shared.begun() == 1).await;
    assert!(cluster.seen().is_empty());
    cluster.open();
    assert_eq!(dispatched.await.unwrap().reply, 7);
    assert_eq!(cluster.seen(), [7]);
    let counter = cluster.caller.execute::<Counter>("a", Add(3)).dispatch().await.unwrap();
    assert_eq!(counter.await.unwrap().reply, 3);
    cluster.stop().await;
}

async fn typed_refusals_arrive_with_their_details(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    cluster.caller.execute::<Counter>("a", Add(5)).await.unwrap();
    let error = cluster.caller.execute::<Counter>("a", AddUpTo { add: 2, limit: 6 }).await.unwrap_err();
    assert_eq!(error.rejection(), Some(&CounterError::TooMuch { total: 5, limit: 6 }));
    assert_eq!(error.to_string(), "the total is 5 and may be 6");
    let refuse = Work::Refuse { code: 42, text: "näh".into() };
    let error = cluster.caller.execute_handler::<Worker>(refuse).await.unwrap_err();
    assert_eq!(error.rejection(), Some(&WorkError::Refused { code: 42, text: "näh".into() }));
    let panicked = cluster.caller.execute::<Counter>("a", CounterCommand::Panic).await.unwrap_err();
    assert!(
        matches!(&panicked, ExecuteError::NotExecuted { kind: NotExecutedKind::Panicked { message, .. }, .. } if message == "as requested"),
        "{panicked}"
    );
    let bad = cluster.caller.execute::<Counter>("", Add(1)).await.unwrap_err();
    assert!(
        matches!(bad, ExecuteError::NotExecuted { kind: NotExecutedKind::InvalidId { .. }, .. }),
        "{bad}"
    );
    cluster.stop().await;
}

async fn a_report_has_the_duration(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    let work = Work::Note { n: 1, wait: true };
    let dispatched = cluster.caller.execute_handler::<Worker>(work).dispatch().await.unwrap();
    let (id, held) = (dispatched.command_id(), Duration::from_millis(50));
    eventually("begun", || cluster.shared.begun() == 1).await;
    tokio::time::sleep(held).await;
    cluster.open();
    let report = dispatched.report().await;
    assert_eq!((report.command_id, report.result.unwrap().reply), (id, 1));
    assert!(report.runtime >= held && report.runtime < PATIENCE, "{:?}", report.runtime);
    cluster.stop().await;
}

/// A queued command that passes its deadline is never executed, although it was accepted.
async fn a_command_past_its_deadline_is_never_executed(kind: Kind) {
    let cluster = Setup::new(kind).options(HandlerOptions::new()).start().await;
    let key = || "k".to_owned();
    let first = Work::Keyed { key: key(), n: 1, wait: true };
    let first = cluster.caller.execute_handler::<Worker>(first).dispatch().await.unwrap();
    eventually("begun", || cluster.shared.begun() == 1).await;
    let late = Work::Keyed { key: key(), n: 2, wait: false };
    let id = Uuid::now_v7();
    let late =
        cluster.caller.execute_handler::<Worker>(late).command_id(id).timeout(Duration::from_millis(150));
    let error = late.await.unwrap_err();
    assert!(matches!(error, ExecuteError::OutcomeUnknown { command_id, .. } if command_id == id), "{error}");
    cluster.open();
    first.await.unwrap();
    let last = Work::Keyed { key: key(), n: 3, wait: false };
    cluster.caller.execute_handler::<Worker>(last).await.unwrap();
    assert_eq!(cluster.seen(), [1, 3]);
    // The id is free for another attempt, whose answer shows the outcome.
    let again = Work::Keyed { key: key(), n: 2, wait: false };
    let again = cluster.caller.execute_handler::<Worker>(again).command_id(id).await.unwrap();
    assert!(!again.duplicate);
    cluster.stop().await;
}

async fn without_a_timeout_a_caller_waits_without_limit(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    let work = cluster.caller.execute_handler::<Worker>(Work::Note { n: 1, wait: true });
    let work = work.timeout(Duration::ZERO).assign_timeout(Duration::ZERO).dispatch().await.unwrap();
    // Longer than the permitted silence.
    tokio::time::sleep(BEAT * 6).await;
    cluster.open();
    assert_eq!(work.await.unwrap().reply, 1);
    assert_eq!(cluster.shared.begun(), 1);
    let receipt = cluster.caller.execute::<Counter>("a", Add(1)).timeout(Duration::ZERO).await.unwrap();
    assert_eq!(receipt.reply, 1);
    cluster.stop().await;
}

async fn every_command_is_executed_once(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    let all = (0..100).map(|n| {
        let caller = cluster.caller.clone();
        tokio::spawn(async move {
            caller.execute_handler::<Worker>(note(n)).await.unwrap();
            caller.execute::<Counter>(n % 7, Add(1)).await.unwrap();
        })
    });
    for one in all.collect::<Vec<_>>() {
        one.await.unwrap();
    }
    let mut seen = cluster.seen();
    seen.sort_unstable();
    assert_eq!(seen, (0..100).collect::<Vec<_>>());
    assert_eq!(cluster.events().await.len(), 100);
    cluster.stop().await;
}

/// Over NATS, one node filters out all commands of an aggregate; the other node executes them.
///
/// If no node accepts a command, its caller gets an error.
async fn a_filtered_command_goes_to_another_node(kind: Kind) {
    let bus = |bus: storied::command::CommandBus, number| {
        bus.filter(move |info| info.key != Some("filtered") && (number == 0 || info.name != "counter"))
    };
    let cluster = Setup::new(kind).bus(bus).start().await;
    for id in 0..20 {
        cluster.caller.execute::<Counter>(id, Add(1)).await.unwrap();
    }
    let started = Instant::now();
    let error = cluster.caller.execute::<Counter>("filtered", Add(1)).await.unwrap_err();
    assert!(
        matches!(&error, ExecuteError::NotExecuted { kind: NotExecutedKind::NotAccepted { reason }, .. } if reason.contains("filter")),
        "{error}"
    );
    assert!(started.elapsed() < Duration::from_secs(4));
    assert_eq!(cluster.events().await.len(), 20);
    cluster.stop().await;
}

async fn workers_bound_what_runs_at_a_time(kind: Kind) {
    for workers in [1, 8] {
        let cluster = Setup::new(kind).options(HandlerOptions::new().workers(workers)).start().await;
        let nodes = cluster.workers.len().max(1);
        let mut all = Vec::new();
        for n in 0..40 {
            let work = cluster.caller.execute_handler::<Worker>(Work::Note { n, wait: true });
            all.push(work.dispatch().await.unwrap());
        }
        eventually("all at work", || cluster.shared.begun() == (nodes * workers) as u64).await;
        cluster.open();
        for one in all {
            one.await.unwrap();
        }
        assert_eq!(cluster.shared.most.load(Ordering::SeqCst), nodes * workers);
        if nodes * workers == 1 {
            assert_eq!(cluster.seen(), (0..40).collect::<Vec<_>>(), "one after the other, in order");
        }
        cluster.stop().await;
    }
}

async fn commands_with_a_key_run_one_at_a_time_in_order(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    let mut all = Vec::new();
    for n in 0..30 {
        let work = Work::Keyed { key: "k".into(), n, wait: n == 0 };
        all.push(cluster.caller.execute_handler::<Worker>(work).dispatch().await.unwrap());
    }
    eventually("begun", || cluster.shared.begun() == 1).await;
    // A command with another key does not wait.
    let other = Work::Keyed { key: "other".into(), n: 100, wait: false };
    cluster.caller.execute_handler::<Worker>(other).await.unwrap();
    assert_eq!((cluster.shared.begun(), cluster.seen()), (2, vec![100]));
    cluster.open();
    for one in all {
        one.await.unwrap();
    }
    assert_eq!(cluster.seen()[1..], (0..30).collect::<Vec<_>>());
    cluster.stop().await;
}

async fn hooks_run_around_commands(kind: Kind) {
    let log: Arc<Mutex<Vec<String>>> = Arc::default();
    let hooked = {
        let log = log.clone();
        move |bus: storied::command::CommandBus, _| {
            let [before, all, after] = [log.clone(), log.clone(), log.clone()];
            let forbidden = |info: &storied::command::CommandInfo<'_>| match info.key {
                Some("forbidden") => Err("not this one".to_owned()),
                _ => Ok(()),
            };
            bus.before("counter", forbidden)
                .before_all(move |info| {
                    all.lock().unwrap().push(format!("all {}", info.name));
                    Ok(())
                })
                .before(Worker::NAME, move |info| {
                    before.lock().unwrap().push(format!("before {}", info.metadata.user["who"]));
                    Ok(())
                })
                .after_all(move |info, end| {
                    assert!(end.runtime < PATIENCE);
                    let mut log = after.lock().unwrap();
                    log.push(format!("after {} {}", info.name, end.error.as_deref().unwrap_or("ok")));
                })
        }
    };
    let cluster = Setup::new(kind).bus(hooked).start().await;
    let error = cluster.caller.execute::<Counter>("forbidden", Add(1)).await.unwrap_err();
    assert!(
        matches!(&error, ExecuteError::NotExecuted { kind: NotExecutedKind::NotAccepted { reason }, .. } if reason == "not this one"),
        "{error}"
    );
    assert!(cluster.events().await.is_empty());
    cluster.caller.execute_handler::<Worker>(note(1)).metadata("who", "me").await.unwrap();
    let _ = cluster.caller.execute::<Counter>("a", AddUpTo { add: 1, limit: 0 }).await.unwrap_err();
    eventually("after", || log.lock().unwrap().len() >= 5).await;
    let wanted = [
        "all test.work",
        "before me",
        "after test.work ok",
        "all counter",
        "after counter the total is 0 and may be 0",
    ];
    assert_eq!(*log.lock().unwrap(), wanted);
    cluster.stop().await;
}

/// The nesting on one handler is deeper than its number of workers.
async fn nested_commands_do_not_wait_for_their_parent(kind: Kind) {
    let cluster = Setup::new(kind).options(HandlerOptions::new().workers(1)).start().await;
    let all = (0..4).map(|_| {
        let caller = cluster.caller.clone();
        tokio::spawn(async move { caller.execute_handler::<Worker>(Work::Nest(6)).await.unwrap().reply })
    });
    for one in all.collect::<Vec<_>>() {
        assert_eq!(one.await.unwrap(), 6);
    }
    cluster.stop().await;
}

async fn nested_commands_carry_their_cause(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    let count = Work::Count { id: "a".into(), add: 2, limit: 10, wait: false };
    let (id, request) = (Uuid::now_v7(), Uuid::now_v7());
    let work = cluster.caller.execute_handler::<Worker>(count.clone()).command_id(id).correlation_id(request);
    assert_eq!(work.traceparent("00-aa-bb-01").metadata("who", "me").await.unwrap().reply, 2);
    let own = Uuid::now_v7();
    cluster.caller.execute_handler::<Worker>(count).command_id(own).await.unwrap();
    let events = cluster.events().await;
    let first = events[0].decode_metadata().unwrap();
    assert_eq!((first.causation_id, first.correlation_id), (Some(id), Some(request)));
    assert_eq!((first.traceparent.as_deref(), &*first.user["who"]), (Some("00-aa-bb-01"), "me"));
    assert!(events[0].command_id != id && events[0].command_id != events[1].command_id);
    let second = events[1].decode_metadata().unwrap();
    assert_eq!((second.causation_id, second.correlation_id), (Some(own), Some(own)));
    cluster.stop().await;
}

async fn a_command_id_takes_effect_once(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    let (id, other) = (Uuid::now_v7(), Uuid::now_v7());
    let first = cluster.caller.execute_handler::<Worker>(note(5)).command_id(id).await.unwrap();
    assert_eq!((first.reply, first.duplicate), (5, false));
    let again = cluster.caller.execute_handler::<Worker>(note(5)).command_id(id).await.unwrap();
    assert_eq!((again.reply, again.duplicate), (5, true));
    assert_eq!(cluster.shared.begun(), 1);
    let first = cluster.caller.execute::<Counter>("a", Add(1)).command_id(other).await.unwrap();
    cluster.caller.execute::<Counter>("a", Add(1)).await.unwrap();
    let again = cluster.caller.execute::<Counter>("a", Add(1)).command_id(other).await.unwrap();
    assert_eq!((again.reply, again.version, again.duplicate), (1, first.version, true));
    assert_eq!((again.position, again.events), (first.position, 1));
    cluster.stop().await;
}

async fn the_same_id_at_once_is_one_command(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    let id = Uuid::now_v7();
    let mut all = Vec::new();
    for _ in 0..8 {
        let work = cluster.caller.execute_handler::<Worker>(Work::Note { n: 3, wait: true });
        all.push(work.command_id(id).dispatch().await.unwrap());
    }
    cluster.open();
    let mut first = 0;
    for one in all {
        let handled = one.await.unwrap();
        assert_eq!(handled.reply, 3);
        first += u32::from(!handled.duplicate);
    }
    assert_eq!((first, cluster.shared.begun()), (1, 1));
    cluster.stop().await;
}

async fn the_same_id_with_another_content_is_refused(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    let id = Uuid::now_v7();
    cluster.caller.execute_handler::<Worker>(note(1)).command_id(id).await.unwrap();
    let error = cluster.caller.execute_handler::<Worker>(note(2)).command_id(id).await.unwrap_err();
    assert!(
        matches!(error, ExecuteError::NotExecuted { kind: NotExecutedKind::CommandIdReused { command_id }, .. } if command_id == id),
        "{error}"
    );
    // Also while the first command is in flight.
    let id = Uuid::now_v7();
    let waiting = cluster.caller.execute_handler::<Worker>(Work::Note { n: 1, wait: true }).command_id(id);
    let waiting = waiting.dispatch().await.unwrap();
    let error =
        cluster.caller.execute_handler::<Worker>(Work::Note { n: 2, wait: true }).command_id(id).await;
    assert!(
        matches!(error, Err(ExecuteError::NotExecuted { kind: NotExecutedKind::CommandIdReused { .. }, .. })),
        "{error:?}"
    );
    cluster.open();
    waiting.await.unwrap();
    assert_eq!(cluster.seen(), [1, 1]);
    // An aggregate finds the id in its stream.
    let id = Uuid::now_v7();
    let add = |n, from: &str| cluster.caller.execute::<Counter>(from, Add(n)).command_id(id);
    assert_eq!(add(1, "a").await.unwrap().reply, 1);
    let error = add(2, "a").await.unwrap_err();
    assert!(
        matches!(error, ExecuteError::NotExecuted { kind: NotExecutedKind::CommandIdReused { command_id }, .. } if command_id == id),
        "{error}"
    );
    assert_eq!(add(1, "a").await.unwrap().reply, 1);
    // For another aggregate it is another command.
    assert_eq!(add(2, "b").await.unwrap().reply, 2);
    cluster.stop().await;
}

async fn a_rejection_is_recorded(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    let id = Uuid::now_v7();
    cluster.caller.execute::<Counter>("a", Add(5)).await.unwrap();
    let count = |limit| Work::Count { id: "a".into(), add: 1, limit, wait: false };
    for _ in 0..2 {
        let error = cluster.caller.execute_handler::<Worker>(count(5)).command_id(id).await.unwrap_err();
        assert_eq!(error.rejection(), Some(&WorkError::Limit { limit: 5 }));
    }
    assert_eq!(cluster.shared.begun(), 1);
    cluster.stop().await;
}

/// After a failed attempt, the next attempt sends the same commands.
async fn a_failed_attempt_leaves_no_record(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    cluster.shared.failures.store(2, Ordering::SeqCst);
    let id = Uuid::now_v7();
    let count = Work::Count { id: "a".into(), add: 1, limit: 9, wait: false };
    for _ in 0..2 {
        let error = cluster.caller.execute_handler::<Worker>(count.clone()).command_id(id).await.unwrap_err();
        assert!(
            matches!(error, ExecuteError::OutcomeUnknown { command_id, .. } if command_id == id),
            "{error}"
        );
    }
    let handled = cluster.caller.execute_handler::<Worker>(count).command_id(id).await.unwrap();
    assert_eq!((handled.reply, handled.duplicate, cluster.shared.begun()), (1, false, 3));
    assert_eq!(cluster.events().await.len(), 1);
    cluster.stop().await;
}

async fn a_panic_affects_only_its_command(kind: Kind) {
    let cluster = Setup::new(kind).options(HandlerOptions::new()).start().await;
    for _ in 0..3 {
        let error = cluster.caller.execute_handler::<Worker>(Work::Panic).await.unwrap_err();
        assert!(
            matches!(&error, ExecuteError::OutcomeUnknown { reason, .. } if reason.contains("as requested")),
            "{error}"
        );
        cluster.caller.execute_handler::<Worker>(note(1)).await.unwrap();
    }
    cluster.stop().await;
}

struct Elsewhere;

impl Handler for Elsewhere {
    const NAME: &'static str = "test.elsewhere";
    type Command = ();
    type Reply = ();
    type Error = WorkError;

    async fn handle(
        &self,
        (): &(),
        _: &storied::command::HandlerContext,
    ) -> Result<(), storied::command::HandleError<WorkError>> {
        Ok(())
    }
}

async fn a_missing_handler_is_reported_at_once(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    let started = Instant::now();
    let error = cluster.caller.execute_handler::<Elsewhere>(()).await.unwrap_err();
    assert!(
        matches!(
            error,
            ExecuteError::NotExecuted { kind: NotExecutedKind::NoHandler { name: "test.elsewhere", .. }, .. }
        ),
        "{error}"
    );
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    assert_eq!(error.is_transient(), kind == Kind::Nats, "other nodes may come");
    cluster.stop().await;
}

/// Hooks are user code too.
async fn a_panic_around_a_handler_affects_only_its_command(kind: Kind) {
    let panics = Arc::new(AtomicBool::new(true));
    let hook = panics.clone();
    let hooked = move |bus: CommandBus, _| {
        let hook = hook.clone();
        bus.before(Worker::NAME, move |_| {
            assert!(!hook.load(Ordering::SeqCst), "on purpose");
            Ok(())
        })
    };
    let options = HandlerOptions::new().max_in_flight(1);
    let cluster = Setup::new(kind).options(options).bus(hooked).start().await;
    for n in 0..3 {
        let error = cluster.caller.execute_handler::<Worker>(note(n)).await.unwrap_err();
        let ExecuteError::NotExecuted { kind: NotExecutedKind::NotAccepted { reason }, .. } = &error else {
            panic!("{error}")
        };
        assert!(reason.contains("on purpose"), "{reason}");
    }
    panics.store(false, Ordering::SeqCst);
    cluster.caller.execute_handler::<Worker>(note(9)).await.unwrap();
    assert_eq!(cluster.seen(), [9]);
    cluster.stop().await;
}

async fn a_full_handler_reports_overload(kind: Kind) {
    let options = HandlerOptions::new().max_in_flight(2).admission_timeout(Duration::from_millis(20));
    let cluster = Setup::new(kind).options(options).start().await;
    let places = 2 * cluster.workers.len().max(1);
    let mut all = Vec::new();
    // Over NATS, a command to a full node goes to the other node.
    for n in 0..places as u64 {
        let work = cluster.caller.execute_handler::<Worker>(Work::Note { n, wait: true });
        all.push(work.dispatch().await.unwrap());
    }
    let error = cluster.caller.execute_handler::<Worker>(note(9)).await.unwrap_err();
    assert!(
        matches!(error, ExecuteError::NotExecuted { kind: NotExecutedKind::Overloaded { limit: 2, .. }, .. }),
        "{error}"
    );
    assert!(error.is_transient());
    cluster.open();
    for one in all {
        one.await.unwrap();
    }
    cluster.caller.execute_handler::<Worker>(note(9)).await.unwrap();
    cluster.stop().await;
}

async fn events_carry_the_metadata_of_their_command(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    let (id, request, cause) = (Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7());
    let command = cluster.caller.execute::<Counter>("a", Add(1)).command_id(id).correlation_id(request);
    let command = command.causation_id(cause).traceparent("00-cc-dd-01").metadata("tenant", "acme");
    assert_eq!(command.await.unwrap().command_id, id);
    let event = cluster.events().await.remove(0);
    let metadata = event.decode_metadata().unwrap();
    assert_eq!((event.command_id, metadata.correlation_id), (id, Some(request)));
    assert_eq!((metadata.causation_id, &*metadata.user["tenant"]), (Some(cause), "acme"));
    assert_eq!(metadata.traceparent.as_deref(), Some("00-cc-dd-01"));
    cluster.stop().await;
}

async fn an_expected_version_is_checked_where_the_aggregate_is(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    let add = |expected| cluster.caller.execute::<Counter>("a", Add(1)).expect_version(expected);
    add(ExpectedVersion::NoStream).await.unwrap();
    let error = add(ExpectedVersion::NoStream).await.unwrap_err();
    let ExecuteError::NotExecuted {
        kind: NotExecutedKind::ExpectedVersion { stream, expected, actual }, ..
    } = &error
    else {
        panic!("{error}")
    };
    assert_eq!((stream.id(), *expected, actual.get()), ("a", ExpectedVersion::NoStream, 1));
    add(ExpectedVersion::Exact(Version::new(1))).await.unwrap();
    add(ExpectedVersion::StreamExists).await.unwrap();
    cluster.stop().await;
}

/// A projection that applies no event until its gate opens.
struct Slow(tokio::sync::watch::Receiver<bool>);

impl Projection for Slow {
    const NAME: &'static str = "slow";
    type Event = AnyEvent;
    type Transaction = ();

    async fn apply(
        &mut self,
        _: AnyEvent,
        _: &RecordedEvent,
        (): &mut (),
    ) -> Result<(), storied::projection::ApplyError> {
        let _ = self.0.wait_for(|open| *open).await;
        Ok(())
    }

    async fn reset(&mut self, (): &mut ()) -> Result<(), storied::projection::ApplyError> {
        Ok(())
    }
}

async fn a_caller_can_wait_for_a_projection(kind: Kind) {
    let open = tokio::sync::watch::Sender::new(false);
    let receiver = open.subscribe();
    let with = move |builder: storied::runtime::Builder| {
        builder
            .projection(Slow(receiver.clone()), InMemory::new())
            .feed(storied::FeedOptions::new().idle_poll(Duration::from_millis(20)))
    };
    let cluster = Setup::new(kind).caller(with).start().await;
    let command = cluster.caller.execute::<Counter>("a", Add(1)).wait_for("slow");
    let followed = command.within(Duration::from_millis(100)).await.unwrap();
    assert_eq!(followed.receipt.reply, 1);
    let late = followed.applied.unwrap_err();
    assert_eq!(late.position, followed.receipt.position);
    // Without a timeout for the command there is none for the projection.
    let command = cluster.caller.execute::<Counter>("a", Add(1)).timeout(Duration::ZERO).wait_for("slow");
    let waiting = tokio::spawn(command.into_future());
    while cluster.events().await.len() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished(), "it waits");
    open.send_replace(true);
    assert_eq!(waiting.await.unwrap().unwrap().applied, Ok(()));
    let followed = cluster.caller.execute::<Counter>("a", Add(1)).wait_for("slow").await.unwrap();
    assert_eq!((followed.receipt.reply, followed.applied), (3, Ok(())));
    // F36: an unknown projection name is an error before any execution.
    let before = cluster.events().await.len();
    let refused = cluster.caller.execute::<Counter>("a", Add(1)).wait_for("fast").await.unwrap_err();
    assert!(
        matches!(&refused, ExecuteError::NotExecuted { kind: NotExecutedKind::UnknownProjection { name, known }, .. } if name == "fast" && *known == ["slow"])
    );
    assert_eq!(refused.to_string(), "there is no projection \"fast\"; this node runs slow");
    assert_eq!(cluster.events().await.len(), before, "nothing was executed");
    cluster.stop().await;
}

/// F54: every event carries the metadata, so its size is limited.
///
/// The limit is the same for aggregates and handlers, on this node and on others.
async fn metadata_is_limited(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    let large = "x".repeat(storied::Metadata::MAX_BYTES);
    let add = cluster.caller.execute::<Counter>("a", Add(1)).metadata("note", large.clone());
    let error = add.await.unwrap_err();
    assert!(
        matches!(
            error,
            ExecuteError::NotExecuted {
                kind: NotExecutedKind::Encode(EncodeError::MetadataTooLarge { .. }),
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("\"note\" is the largest part"), "{error}");
    let work = Work::Note { n: 1, wait: false };
    let error = cluster.caller.execute_handler::<Worker>(work).metadata("note", large).await.unwrap_err();
    assert!(
        matches!(
            error,
            ExecuteError::NotExecuted {
                kind: NotExecutedKind::Encode(EncodeError::MetadataTooLarge { .. }),
                ..
            }
        ),
        "{error}"
    );
    assert_eq!((cluster.events().await.len(), cluster.shared.begun()), (0, 0), "nothing was executed");
    // Metadata just below the limit is accepted and arrives.
    let fits = "x".repeat(storied::Metadata::MAX_BYTES - 1024);
    cluster.caller.execute::<Counter>("a", Add(1)).metadata("note", fits.clone()).await.unwrap();
    let events = cluster.events().await;
    assert_eq!(events[0].decode_metadata().unwrap().user["note"], fits);
    cluster.stop().await;
}

/// The accepted handler's nested commands still run, while the node refuses all other commands.
async fn accepted_commands_finish_before_a_node_ends(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    let work = Work::CountLater { id: "a".into(), add: 2 };
    let dispatched = cluster.caller.execute_handler::<Worker>(work).dispatch().await.unwrap();
    eventually("begun", || cluster.shared.begun() == 1).await;
    let all = if kind == Kind::Local { vec![cluster.caller.clone()] } else { cluster.workers.clone() };
    let ending: Vec<_> = all.iter().map(|node| tokio::spawn(node.clone().shutdown())).collect();
    for node in &all {
        while !matches!(
            node.execute::<Counter>("b", Add(1)).await,
            Err(ExecuteError::NotExecuted { kind: NotExecutedKind::ShuttingDown, .. })
        ) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    cluster.open();
    assert_eq!(dispatched.await.unwrap().reply, 2);
    for ended in ending {
        ended.await.unwrap().unwrap();
    }
}

/// Returns a UUIDv7 whose time is the given number of seconds from now.
fn v7(seconds: i64) -> Uuid {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    Uuid::new_v7(Timestamp::from_unix(NoContext, now.checked_add_signed(seconds).unwrap(), 0))
}

/// Such an id would look newer than every later command. An old time in an id is valid.
async fn an_id_from_the_future_is_refused(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    let add = |id| cluster.caller.execute::<Counter>("a", Add(1)).command_id(id);
    for ahead in [90, 1_000_000_000] {
        let id = v7(ahead);
        let errors = [
            add(id).await.map(|_| ()).unwrap_err().to_string(),
            cluster.caller.execute_handler::<Worker>(note(1)).command_id(id).await.unwrap_err().to_string(),
        ];
        for error in errors {
            assert!(error.contains("more than 1 minute ahead"), "{error}");
        }
        let error = add(id).await.unwrap_err();
        let ExecuteError::NotExecuted { kind: NotExecutedKind::IdAhead { command_id, claimed, now }, .. } =
            error
        else {
            panic!("{error}")
        };
        assert_eq!(command_id, id);
        let (ahead, passed) = ((claimed - now).num_seconds(), chrono::Utc::now() - now);
        assert!(claimed.timestamp_millis() / 1_000 == id.get_timestamp().unwrap().to_unix().0 as i64);
        assert!(ahead >= 60 && passed.num_seconds() < 60, "{ahead} {passed}");
    }
    assert!(cluster.events().await.is_empty() && cluster.seen().is_empty());
    for (count, seconds) in (1..).zip([30, -90, -1_600_000_000]) {
        assert_eq!(add(v7(seconds)).await.unwrap().reply, count);
    }
    cluster.stop().await;
}

/// The attempt continues after the timeout of its callers, and a repetition joins it.
async fn a_handler_may_work_for_longer_than_its_callers_wait(kind: Kind) {
    let cluster = Setup::new(kind).start().await;
    let id = Uuid::now_v7();
    let work = || {
        let work = Work::CountLater { id: "a".into(), add: 5 };
        cluster.caller.execute_handler::<Worker>(work).command_id(id)
    };
    for attempt in 0..6 {
        let error = work().timeout(Duration::from_millis(150)).await.unwrap_err();
        assert!(matches!(error, ExecuteError::OutcomeUnknown { .. }), "{error}");
        if kind == Kind::Local {
            assert!(error.to_string().contains("no answer within 150ms"), "{error}");
        }
        if attempt == 0 {
            eventually("it has begun", || cluster.shared.begun() == 1).await;
        }
    }
    let joined = work().timeout(PATIENCE).dispatch().await.unwrap();
    cluster.open();
    assert_eq!(joined.await.unwrap().reply, 5);
    assert_eq!(work().timeout(PATIENCE).await.unwrap().reply, 5);
    assert_eq!((cluster.shared.begun(), cluster.events().await.len()), (1, 1));
    cluster.stop().await;
}

async fn dropped_callers_hold_no_permit(kind: Kind) {
    let options = HandlerOptions::new().workers(16).max_in_flight(2);
    let cluster = Setup::new(kind).options(options).start().await;
    let id = Uuid::now_v7();
    for _ in 0..10 {
        let work = cluster.caller.execute_handler::<Worker>(Work::Note { n: 1, wait: true }).command_id(id);
        let error = work.timeout(Duration::from_millis(60)).await.unwrap_err();
        assert!(
            !matches!(error, ExecuteError::NotExecuted { kind: NotExecutedKind::Overloaded { .. }, .. }),
            "{error}"
        );
    }
    eventually("it has begun", || cluster.shared.begun() == 1).await;
    for n in 2..6 {
        assert_eq!(
            cluster.caller.execute_handler::<Worker>(note(n)).timeout(PATIENCE).await.unwrap().reply,
            n
        );
    }
    cluster.open();
    let work = cluster.caller.execute_handler::<Worker>(Work::Note { n: 1, wait: true }).command_id(id);
    assert_eq!(work.timeout(PATIENCE).await.unwrap().reply, 1);
    assert_eq!(cluster.shared.begun(), 5);
    cluster.stop().await;
}

/// The first caller stops waiting before a worker is free; the second caller still waits.
async fn a_repeated_queued_command_is_not_dropped(kind: Kind) {
    let cluster = Setup::new(kind).options(HandlerOptions::new().workers(1)).start().await;
    let keyed = |n, wait| Work::Keyed { key: "k".into(), n, wait };
    let first =
        cluster.caller.execute_handler::<Worker>(keyed(1, true)).timeout(PATIENCE).dispatch().await.unwrap();
    eventually("it has begun", || cluster.shared.begun() == 1).await;
    let id = Uuid::now_v7();
    let second = || cluster.caller.execute_handler::<Worker>(keyed(2, false)).command_id(id);
    let waiting = second().timeout(Duration::from_millis(100)).dispatch().await.unwrap();
    let joined = second().timeout(PATIENCE).dispatch().await.unwrap();
    assert!(matches!(waiting.await, Err(ExecuteError::OutcomeUnknown { .. })));
    cluster.open();
    assert_eq!((first.await.unwrap().reply, joined.await.unwrap().reply), (1, 2));
    assert_eq!(cluster.seen(), [1, 2]);
    cluster.stop().await;
}

async fn an_attempt_ends_at_the_handlers_time_limit(kind: Kind) {
    let options = HandlerOptions::new().workers(1).time_limit(Duration::from_millis(100));
    let cluster = Setup::new(kind).options(options).start().await;
    let id = Uuid::now_v7();
    let work = || {
        cluster
            .caller
            .execute_handler::<Worker>(Work::Note { n: 1, wait: true })
            .command_id(id)
            .timeout(PATIENCE)
    };
    let error = work().await.unwrap_err();
    assert!(matches!(error, ExecuteError::OutcomeUnknown { .. }), "{error}");
    assert!(error.to_string().contains("100ms") && error.to_string().contains("time_limit"), "{error}");
    assert_eq!(cluster.shared.running.load(Ordering::SeqCst), 0, "its future is dropped");
    // Its worker is free again, and the command can be retried.
    cluster.open();
    assert_eq!(work().await.unwrap().reply, 1);
    assert_eq!((cluster.shared.begun(), cluster.seen()), (2, vec![1]));
    cluster.stop().await;
}
