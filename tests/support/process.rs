//! A server process over one directory, and the locations of the programs.

use std::env;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};

use super::workdir::Workdir;

/// Maximum time of a start or a stop, on a machine that compiles at the same time.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Process {
    workdir: Workdir,
    child: Option<Child>,
}

impl Process {
    pub(super) fn new(workdir: Workdir) -> Self {
        Self { workdir, child: None }
    }

    pub(super) fn path(&self) -> &Path {
        self.workdir.path()
    }

    /// Starts `command` in the directory and polls `ready`.
    ///
    /// Panics with the log if it does not start.
    pub(super) async fn launch<F>(&mut self, command: &mut Command, ready: impl Fn() -> F)
    where
        F: Future<Output = bool>,
    {
        assert!(self.child.is_none(), "it is running already");
        let log = File::options().create(true).append(true).open(self.log_path()).expect("a log file");
        command
            .current_dir(self.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log"))
            .stderr(log);
        // The guard handles Ctrl-C: PostgreSQL would answer it with a slow, orderly shutdown.
        let child = command.process_group(0).spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let child = self.child.insert(child);
        let deadline = Instant::now() + PATIENCE;
        let problem = loop {
            if let Some(status) = child.try_wait().expect("the child's status") {
                break format!("ended: {status}");
            }
            match tokio::time::timeout(Duration::from_secs(2), ready()).await {
                Ok(true) => return,
                _ if Instant::now() > deadline => break format!("was not ready within {PATIENCE:?}"),
                _ => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        panic!("{command:?} {problem}; its log:\n{}", self.log());
    }

    /// Returns whether it was started and not ended by the test.
    pub(super) fn is_running(&self) -> bool {
        self.child.is_some()
    }

    /// Kills all its processes with SIGKILL.
    pub(super) fn kill(&mut self) {
        self.workdir.kill();
        if let Some(mut child) = self.child.take() {
            child.wait().expect("the killed child's status");
        }
    }

    /// Sends `signal` to the main process and waits for the end of all processes.
    pub(super) async fn end(&mut self, signal: Signal) {
        let child = self.child.as_mut().expect("it is not running");
        kill(Pid::from_raw(child.id().cast_signed()), signal).expect("a process to signal");
        let deadline = Instant::now() + PATIENCE;
        while child.try_wait().expect("the child's status").is_none() {
            assert!(Instant::now() < deadline, "{signal} did not end it; its log:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.kill();
    }

    /// Sends `signal` to the main process, which keeps running.
    pub(super) fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("it is not running");
        kill(Pid::from_raw(child.id().cast_signed()), signal).expect("a process to signal");
    }

    pub(super) fn pause(&self) {
        self.workdir.pause();
    }

    pub(super) fn resume(&self) {
        self.workdir.resume();
    }

    fn log_path(&self) -> PathBuf {
        self.path().join("log")
    }

    /// Returns the log since the first start.
    pub(super) fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_else(|error| format!("(no log: {error})"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The guard of the directory ends the rest. Nothing may panic here, because a panic may
        // have led here.
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs `command` as `user`, if any.
pub(super) fn run_as<'a>(command: &'a mut Command, user: Option<&User>) -> &'a mut Command {
    match user {
        Some(user) => command.uid(user.uid.as_raw()).gid(user.gid.as_raw()),
        None => command,
    }
}

/// Returns the first of `candidates` that is a file.
pub(super) fn find(what: &str, candidates: impl IntoIterator<Item = PathBuf>) -> PathBuf {
    candidates.into_iter().find(|path| path.is_file()).unwrap_or_else(|| {
        panic!("{what} not found: run scripts/test, or eval \"$(scripts/servers)\" before cargo test")
    })
}

/// Returns `name` in each directory of PATH.
pub(super) fn on_path(name: &str) -> Vec<PathBuf> {
    env::split_paths(&env::var_os("PATH").unwrap_or_default()).map(|directory| directory.join(name)).collect()
}
