//! Node processes and NATS are killed and paused during a command.
//!
//! The tests cover hazards 22 to 27 of the table in docs/dev/hazards.md.

use std::fs;
use std::time::Duration;

use futures_util::StreamExt;
use nix::sys::signal::Signal;
use storied::command::CommandBusStatus;
use storied::{ExecuteError, NotExecutedKind, Runtime};
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::command::cluster::*;
use crate::command::domain::{Add, AddUpTo, Counter, Look};
use crate::command::processes::{Gated, Node, Pass, Setting};

fn pass(stop: &str) -> Pass {
    Pass { stop: stop.into() }
}

/// Retries this command after an outage until a node executes it.
async fn add_soon(caller: &Runtime, id: &str, n: u64) -> u64 {
    let give_up = Instant::now() + PATIENCE;
    loop {
        match caller.execute::<Counter>(id, Add(n)).await {
            Ok(receipt) => return receipt.reply,
            Err(error) => assert!(error.is_transient() && Instant::now() < give_up, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_killed_before_it_accepts() {
    let setting = Setting::new().await;
    let one = Node::spawn(&setting, "one").ready().await;
    let two = Node::spawn(&setting, "two");
    // Both know the first node by its heartbeats, so it gets the command, and cannot accept it.
    one.pause().await;
    let command = setting.caller.execute_handler::<Gated>(pass("nowhere")).timeout(PATIENCE);
    let answer = tokio::spawn(async move { command.assign_timeout(Duration::ZERO).await });
    tokio::time::sleep(BEAT / 2).await;
    drop(one);
    let two = two.ready().await;
    assert_eq!(answer.await.unwrap().unwrap().reply, 1);
    assert_eq!(setting.events().await, 1);
    drop(two);
    setting.caller.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_killed_after_it_accepted() {
    Setting::new().await.survives("before", async |_, one| one.signal(Signal::SIGKILL)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_killed_between_commit_and_answer() {
    Setting::new().await.survives("after", async |_, one| one.signal(Signal::SIGKILL)).await;
}

/// The other node executes the command; the resumed node finds it executed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_paused_in_the_middle_changes_nothing_when_it_wakes() {
    for stop in ["before", "after"] {
        let pause = async |setting: &Setting, one: &Node| {
            one.pause().await;
            setting.open();
            setting.exists("two-ended").await;
            one.signal(Signal::SIGCONT);
            setting.exists("one-ended").await;
        };
        Setting::new().await.survives(stop, pause).await;
    }
}

/// A rejection is not certain while another node has the command and may decide otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rejection_is_unknown_while_another_node_may_have_the_command() {
    for (no, said) in [(AddUpTo { add: 1, limit: 1 }, "the total is 1"), (Look, "no events")] {
        let setting = Setting::new().await;
        let one = Node::spawn(&setting, "one").ready().await;
        setting.caller.execute::<Counter>("a", Add(1)).await.unwrap();
        one.pause().await;
        let raw = async_nats::connect(setting.server.url()).await.unwrap();
        let mut commands = raw.subscribe("storied.commands.node.*").await.unwrap();
        raw.flush().await.unwrap();
        let command = setting.caller.execute::<Counter>("a", no.clone()).timeout(PATIENCE);
        let answer = tokio::spawn(async move { command.assign_timeout(Duration::ZERO).await });
        // The second node joins only after the command was sent to the first.
        timeout(PATIENCE, commands.next()).await.unwrap().unwrap();
        let two = Node::spawn(&setting, "two").ready().await;
        let error = answer.await.unwrap().unwrap_err();
        let ExecuteError::OutcomeUnknown { reason, .. } = &error else { panic!("{error}") };
        assert!(reason.contains("one stopped replying") && reason.contains(said), "{reason}");
        // Without another node, the rejection is certain.
        drop(one);
        match setting.caller.execute::<Counter>("a", no).await {
            Ok(receipt) => assert_eq!((receipt.reply, said), (1, "no events")),
            Err(error) => assert!(error.rejection().is_some(), "{error}"),
        }
        drop(two);
        setting.caller.shutdown().await.unwrap();
    }
}

/// A command that NATS delivers after its deadline is dropped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_comes_late_is_never_executed() {
    let setting = Setting::new().await;
    let one = Node::spawn(&setting, "one").ready().await;
    setting.caller.execute::<Counter>("a", Add(1)).await.unwrap();
    one.pause().await;
    let id = Uuid::now_v7();
    let started = Instant::now();
    let late = setting.caller.execute::<Counter>("a", Add(1)).command_id(id);
    let error = late.timeout(Duration::from_millis(400)).await.unwrap_err();
    assert!(matches!(error, ExecuteError::OutcomeUnknown { command_id, .. } if command_id == id), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    one.signal(Signal::SIGCONT);
    let give_up = Instant::now() + PATIENCE;
    let reply = loop {
        match setting.caller.execute::<Counter>("a", Add(10)).await {
            Ok(receipt) => break receipt.reply,
            Err(error) => assert!(Instant::now() < give_up, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(reply, 11, "the late one has not happened");
    // The id is unused: the command takes effect now for the first time.
    let receipt = setting.caller.execute::<Counter>("a", Add(1)).command_id(id).await.unwrap();
    assert_eq!((receipt.reply, receipt.duplicate), (12, false));
    drop(one);
    setting.caller.shutdown().await.unwrap();
}

/// Hazard 24, with a paused node: a command that could not be sent never takes effect later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_24_without_nats_a_command_fails_at_once_and_never_happens() {
    let mut setting = Setting::new().await;
    let one = Node::spawn(&setting, "one").ready().await;
    setting.caller.execute::<Counter>("a", Add(1)).await.unwrap();
    setting.server.kill();
    let away =
        async || matches!(setting.caller.status().await.commands, CommandBusStatus::Disconnected { .. });
    while !away().await {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    one.pause().await;
    for _ in 0..20 {
        let started = Instant::now();
        let error = setting.caller.execute::<Counter>("b", Add(1)).await.unwrap_err();
        assert!(
            matches!(error, ExecuteError::NotExecuted { kind: NotExecutedKind::Unavailable { .. }, .. }),
            "{error}"
        );
        assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
    }
    setting.server.restart().await;
    one.signal(Signal::SIGCONT);
    assert_eq!(add_soon(&setting.caller, "b", 1).await, 1, "none of those that failed has happened");
    assert_eq!(setting.events().await, 2);
    drop(one);
    setting.caller.shutdown().await.unwrap();
}

/// Hazard 25: the answer is lost with the server; the caller retries and gets the recorded answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_25_a_lost_answer_is_requested_again() {
    for stop in ["before", "after"] {
        let mut setting = Setting::new().await;
        let one = Node::spawn(&setting, "one").ready().await;
        let command = setting.caller.execute_handler::<Gated>(pass(stop)).timeout(PATIENCE);
        let dispatched = command.dispatch().await.unwrap();
        setting.exists(&format!("one-{stop}")).await;
        setting.server.kill();
        // The handler ends while no connection can carry its answer.
        setting.open();
        setting.exists("one-ended").await;
        setting.server.restart().await;
        assert_eq!(dispatched.await.unwrap().reply, 1, "{stop}");
        assert_eq!(setting.events().await, 1, "{stop}");
        drop(one);
        setting.caller.shutdown().await.unwrap();
    }
}

/// Hazard 26: two processes send commands with the same ids concurrently, and two execute them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_26_one_id_from_two_processes_is_one_command() {
    let setting = Setting::new().await;
    let nodes = ["one", "two"].map(|name| Node::spawn(&setting, name));
    let callers = ["left", "right"].map(|name| Node::caller(&setting, name));
    for node in ["one", "two", "left", "right"] {
        setting.exists(&format!("{node}-ready")).await;
    }
    let ids: Vec<_> = (0..30).map(|_| Uuid::now_v7()).collect();
    let lines: Vec<_> = ids.iter().map(Uuid::to_string).collect();
    fs::write(setting.file("ids-new"), lines.join("\n")).unwrap();
    fs::rename(setting.file("ids-new"), setting.file("ids")).unwrap();
    let mut answers = Vec::new();
    for name in ["left-answers", "right-answers"] {
        setting.exists(name).await;
        answers.push(fs::read_to_string(setting.file(name)).unwrap());
    }
    let (left, right): (Vec<_>, Vec<_>) = (answers[0].lines().collect(), answers[1].lines().collect());
    assert_eq!((left.len(), right.len()), (30, 30));
    for (left, right) in left.into_iter().zip(right) {
        let [(reply, duplicate), (other, repeated)] = [left, right].map(|line| line.split_once(' ').unwrap());
        assert_eq!(reply, other, "one answer");
        assert!(duplicate != repeated, "one of them was first");
    }
    assert_eq!(setting.events().await, 30);
    let another = setting.caller.execute_handler::<Gated>(pass("elsewhere")).command_id(ids[0]).await;
    assert!(
        matches!(
            another,
            Err(ExecuteError::NotExecuted { kind: NotExecutedKind::CommandIdReused { .. }, .. })
        ),
        "{another:?}"
    );
    drop((nodes, callers));
    setting.caller.shutdown().await.unwrap();
}

/// Hazard 27: a node that is restarted under its name is a new incarnation.
///
/// The command is sent to it again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hazard_27_a_restarted_node_is_a_new_incarnation() {
    let setting = Setting::new().await;
    for round in 1..=3 {
        let node = Node::spawn(&setting, "one").ready().await;
        assert_eq!(add_soon(&setting.caller, "b", 1).await, round);
        node.signal(Signal::SIGKILL);
    }
    // This node is only paused, during a command.
    let old = Node::spawn(&setting, "one").ready().await;
    let dispatched =
        setting.caller.execute_handler::<Gated>(pass("before")).timeout(PATIENCE).dispatch().await.unwrap();
    setting.exists("one-before").await;
    old.pause().await;
    fs::remove_file(setting.file("one-before")).unwrap();
    let new = Node::spawn(&setting, "one").ready().await;
    setting.exists("one-before").await;
    setting.open();
    assert_eq!(dispatched.await.unwrap().reply, 1);
    setting.exists("one-ended").await;
    fs::remove_file(setting.file("one-ended")).unwrap();
    // It resumes and finishes its command. No caller receives the answer.
    old.signal(Signal::SIGCONT);
    setting.exists("one-ended").await;
    assert_eq!(setting.events().await, 4);
    let nodes = vec!["one".to_owned()];
    assert_eq!(
        setting.caller.status().await.commands,
        CommandBusStatus::Connected { nodes, last_error: None }
    );
    // The node with the later start counts. Without the other node, commands continue at once.
    drop(old);
    let started = Instant::now();
    assert_eq!(setting.caller.execute::<Counter>("b", Add(1)).await.unwrap().reply, 4);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    drop(new);
    setting.caller.shutdown().await.unwrap();
}
