//! Node and caller processes that tests kill and pause during a command.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use storied::command::{CommandBus, HandleError, Handler, HandlerContext, HandlerOptions};
use storied::store::ReadLog;
use storied::{EventStore, Position, Runtime, SqliteStore};
use uuid::Uuid;

use crate::command::cluster::*;
use crate::command::domain::{Add, Counter, WorkError};
use crate::support::{NatsServer, test_process};

/// A handler that adds to a counter through a command, and stops at a given point.
///
/// It continues when the test permits it. Files in a directory show its point.
pub struct Gated {
    directory: PathBuf,
    name: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pass {
    /// Stop point: `before` or `after` the addition to the counter. Any other value does not stop.
    pub stop: String,
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

/// The entry point of a node process, not a test. It runs until its standard input ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a process of other tests"]
async fn node_process() {
    let node = std::env::var(NODE).unwrap();
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

const CALLER: &str = "STORIED_TEST_CALLER";

/// The entry point of a caller process, not a test.
///
/// It waits for the file `ids`, sends a command for each id in it, and writes the answers to a
/// file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a process of other tests"]
async fn caller_process() {
    let caller = std::env::var(CALLER).unwrap();
    let [directory, url, name] = caller.lines().collect::<Vec<_>>()[..] else { panic!("{caller}") };
    let directory = PathBuf::from(directory);
    let store = SqliteStore::open(directory.join("db")).await.unwrap();
    let commands = CommandBus::nats(nats_commands(url, name));
    let runtime = Runtime::builder().store(store).commands(commands).start().await.unwrap();
    fs::write(directory.join(format!("{name}-ready")), "").unwrap();
    let ids = directory.join("ids");
    eventually("ids", || ids.exists()).await;
    let mut answers = String::new();
    for id in fs::read_to_string(ids).unwrap().lines() {
        let command = runtime.execute_handler::<Gated>(Pass { stop: "nowhere".into() });
        let answer = command.command_id(id.parse().unwrap()).await.unwrap();
        answers += &format!("{} {}\n", answer.reply, answer.duplicate);
    }
    fs::write(directory.join(format!("{name}-new")), answers).unwrap();
    fs::rename(directory.join(format!("{name}-new")), directory.join(format!("{name}-answers"))).unwrap();
    runtime.shutdown().await.unwrap();
}

/// A node in a separate process. Dropping it kills the process.
pub struct Node {
    process: Child,
    ready: PathBuf,
}

impl Node {
    pub fn spawn(setting: &Setting, name: &str) -> Self {
        Self::run(setting, name, "node_process", NODE)
    }

    /// A process that runs [`caller_process`].
    pub fn caller(setting: &Setting, name: &str) -> Self {
        Self::run(setting, name, "caller_process", CALLER)
    }

    fn run(setting: &Setting, name: &str, main: &str, variable: &str) -> Self {
        let ready = setting.file(&format!("{name}-ready"));
        // Remove the files of an earlier process of this name.
        let _ = fs::remove_file(&ready);
        let process = test_process(module_path!(), main)
            .env(variable, args(setting.directory.path(), &setting.server, name))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self { process, ready }
    }

    pub async fn ready(self) -> Self {
        eventually("ready", || self.ready.exists()).await;
        self
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id().cast_signed()), signal).unwrap();
    }

    /// Pauses the process, and returns when all its threads have stopped.
    ///
    /// This takes a while on a busy machine.
    pub async fn pause(&self) {
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

/// Starts a caller in this process, over the same store as the nodes.
pub struct Setting {
    directory: tempfile::TempDir,
    pub server: NatsServer,
    store: SqliteStore,
    pub caller: Runtime,
}

impl Setting {
    pub async fn new() -> Self {
        let (directory, server) = (tempfile::tempdir().unwrap(), server().await);
        let store = SqliteStore::open(directory.path().join("db")).await.unwrap();
        let builder = Runtime::builder().store(store.clone()).commands(nats(&server, "caller"));
        let caller = builder.start().await.unwrap();
        Self { directory, server, store, caller }
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub async fn exists(&self, name: &str) {
        eventually(name, || self.file(name).exists()).await;
    }

    pub fn open(&self) {
        fs::write(self.file("open"), "").unwrap();
    }

    pub async fn events(&self) -> usize {
        self.store.read_log(ReadLog::after(Position::START)).await.unwrap().events.len()
    }

    /// Runs a command with a fault on its node.
    ///
    /// The first node starts the command, the second node joins, then `fault` hits the first node.
    /// The function checks the result.
    pub async fn survives(self, stop: &str, fault: impl AsyncFn(&Self, &Node)) {
        let one = Node::spawn(&self, "one").ready().await;
        let id = Uuid::now_v7();
        let pass = Pass { stop: stop.into() };
        let command = self.caller.execute_handler::<Gated>(pass.clone()).command_id(id);
        let dispatched = command.timeout(PATIENCE).dispatch().await.unwrap();
        self.exists(&format!("one-{stop}")).await;
        let two = Node::spawn(&self, "two").ready().await;
        fault(&self, &one).await;
        self.open();
        assert_eq!(dispatched.await.unwrap().reply, 1, "stopped {stop}");
        assert_eq!(self.events().await, 1, "stopped {stop}");
        // A repetition with the same id gets the same answer.
        let again = self.caller.execute_handler::<Gated>(pass).command_id(id).await.unwrap();
        assert_eq!((again.reply, again.duplicate), (1, true));
        drop(two);
        self.caller.shutdown().await.unwrap();
    }
}
