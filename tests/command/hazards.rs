//! Node processes that are killed and paused in the middle of a command (hazards 22 and 23 of the research).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use storied::command::{CommandBus, HandleError, Handler, HandlerContext, HandlerOptions};
use storied::store::ReadLog;
use storied::{EventStore, ExecuteError, Position, Runtime, SqliteStore};
use tokio::time::Instant;
use uuid::Uuid;

use crate::domain::{Add, AddUpTo, Counter, WorkError};
use crate::harness::NatsServer;
use crate::support::*;

/// Adds to a counter through a command, and stands still where it is told to until it may go on. Where it is can be seen in
/// the files of a directory.
struct Gated {
    directory: PathBuf,
    name: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Pass {
    /// `before` or `after` the counter has been added to; anything else is nowhere.
    stop: String,
}

impl Gated {
    async fn stop_at(&self, here: &str, pass: &Pass) {
        if pass.stop == here {
            self.mark(here);
            while !self.directory.join("open").exists() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
    }

    fn mark(&self, what: &str) {
        fs::write(self.directory.join(format!("{}-{what}", self.name)), "").unwrap();
    }
}

impl Handler for Gated {
    const NAME: &'static str = "test.gated";
    type Command = Pass;
    type Reply = u64;
    type Error = WorkError;

    async fn handle(&self, pass: &Pass, context: &HandlerContext) -> Result<u64, HandleError<WorkError>> {
        self.stop_at("before", pass).await;
        let added = context.execute::<Counter>("a", Add(1)).await;
        self.stop_at("after", pass).await;
        self.mark("ended");
        Ok(added?.reply)
    }
}

const NODE: &str = "STORIED_TEST_NODE";

fn args(directory: &Path, server: &NatsServer, name: &str) -> String {
    format!("{}\n{}\n{name}", directory.display(), server.url())
}

/// Not a test: what the processes that the tests start run, until their standard input ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_process() {
    let Ok(node) = std::env::var(NODE) else { return };
    let [directory, url, name] = node.lines().collect::<Vec<_>>()[..] else { panic!("{node}") };
    let directory = PathBuf::from(directory);
    let gated = Gated { directory: directory.clone(), name: name.into() };
    let runtime = Runtime::builder()
        .store(SqliteStore::open(directory.join("db")).await.unwrap())
        .commands(CommandBus::nats(nats_commands(url, name)))
        .aggregate::<Counter>()
        .handler_with(gated, HandlerOptions::new().workers(8))
        .start()
        .await
        .unwrap();
    fs::write(directory.join(format!("{name}-ready")), "").unwrap();
    let ended = || std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    tokio::task::spawn_blocking(ended).await.unwrap().unwrap();
    runtime.shutdown().await.unwrap();
}

/// A node in a process of its own. Killed when it is dropped.
struct Node {
    process: Child,
    ready: PathBuf,
}

impl Node {
    fn spawn(bank: &Setting, name: &str) -> Self {
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "hazards::node_process", "--nocapture"])
            .env(NODE, args(bank.directory.path(), &bank.server, name))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self { process, ready: bank.file(&format!("{name}-ready")) }
    }

    async fn ready(self) -> Self {
        eventually("ready", || self.ready.exists()).await;
        self
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id().cast_signed()), signal).unwrap();
    }

    /// Stops it, and returns when none of its threads runs any more: on a busy machine that takes a while.
    async fn pause(&self) {
        self.signal(Signal::SIGSTOP);
        let threads = format!("/proc/{}/task", self.process.id());
        let stands = |thread: fs::DirEntry| {
            let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            stat.rsplit(')').next().is_none_or(|rest| rest.trim_start().starts_with('T'))
        };
        eventually("stopped", || fs::read_dir(&threads).unwrap().filter_map(Result::ok).all(stands)).await;
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A dispatcher in this process, over the same store as the nodes.
struct Setting {
    directory: tempfile::TempDir,
    server: NatsServer,
    store: SqliteStore,
    caller: Runtime,
}

impl Setting {
    async fn new() -> Self {
        let (directory, server) = (tempfile::tempdir().unwrap(), server().await);
        let store = SqliteStore::open(directory.path().join("db")).await.unwrap();
        let builder = Runtime::builder().store(store.clone()).commands(nats(&server, "caller"));
        let caller = builder.start().await.unwrap();
        Self { directory, server, store, caller }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    async fn exists(&self, name: &str) {
        eventually(name, || self.file(name).exists()).await;
    }

    fn open(&self) {
        fs::write(self.file("open"), "").unwrap();
    }

    async fn events(&self) -> usize {
        self.store.read_log(ReadLog::after(Position::START)).await.unwrap().events.len()
    }

    /// Lets the first node begin a command, the second join, `fault` happen to the first, and looks at what came of it.
    async fn survives(self, stop: &str, fault: impl AsyncFn(&Self, &Node)) {
        let one = Node::spawn(&self, "one").ready().await;
        let id = Uuid::now_v7();
        let pass = Pass { stop: stop.into() };
        let command = self.caller.command::<Gated>(pass.clone()).command_id(id);
        let dispatched = command.timeout(PATIENCE).dispatch().await.unwrap();
        self.exists(&format!("one-{stop}")).await;
        let two = Node::spawn(&self, "two").ready().await;
        fault(&self, &one).await;
        self.open();
        assert_eq!(dispatched.await.unwrap().reply, 1, "stopped {stop}");
        assert_eq!(self.events().await, 1, "stopped {stop}");
        // Whoever asks again, by the id, gets the same.
        let again = self.caller.command::<Gated>(pass).command_id(id).await.unwrap();
        assert_eq!((again.reply, again.duplicate), (1, true));
        drop(two);
        self.caller.shutdown().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_killed_before_it_accepts() {
    let setting = Setting::new().await;
    let one = Node::spawn(&setting, "one").ready().await;
    let two = Node::spawn(&setting, "two");
    // Both know the first by its beats, so it gets the command, and cannot take it.
    one.pause().await;
    let command = setting.caller.command::<Gated>(Pass { stop: "nowhere".into() }).timeout(PATIENCE);
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

/// The other node does it; the one that wakes up finds it done.
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

/// A refusal of one node is no answer while another one has the command, too, and may yet decide otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_is_not_certain_while_another_node_may_have_the_command() {
    let setting = Setting::new().await;
    let one = Node::spawn(&setting, "one").ready().await;
    setting.caller.execute::<Counter>("a", Add(1)).await.unwrap();
    let two = Node::spawn(&setting, "two");
    one.pause().await;
    let command = setting.caller.execute::<Counter>("a", AddUpTo { add: 1, limit: 1 });
    let answer = tokio::spawn(async move { command.assign_timeout(Duration::ZERO).await });
    let two = two.ready().await;
    let error = answer.await.unwrap().unwrap_err();
    let ExecuteError::OutcomeUnknown { reason, .. } = &error else { panic!("{error}") };
    assert!(reason.contains("one fell silent") && reason.contains("the total is 1"), "{reason}");
    // With nobody else to have it, it is.
    drop(one);
    let command = setting.caller.execute::<Counter>("a", AddUpTo { add: 1, limit: 1 });
    let error = command.await.unwrap_err();
    assert!(error.rejection().is_some(), "{error}");
    drop(two);
    setting.caller.shutdown().await.unwrap();
}

/// What NATS delivers after the deadline is dropped.
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
    // And its id still says so: it takes effect now, for the first time.
    let receipt = setting.caller.execute::<Counter>("a", Add(1)).command_id(id).await.unwrap();
    assert_eq!((receipt.reply, receipt.duplicate), (12, false));
    drop(one);
    setting.caller.shutdown().await.unwrap();
}
