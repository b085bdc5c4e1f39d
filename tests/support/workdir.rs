//! The directory of a server, and the guard that ends the processes in it.
//!
//! The guard is a small shell process that waits for the end of its standard input. The kernel
//! closes the input when the test process closes it or dies. The guard then kills every process
//! with a working directory in the directory, and removes it. This includes the back ends of
//! PostgreSQL: they are in other process groups than the postmaster, survive it while they are
//! stopped, and have no parent after its death. (A parent-death signal would miss them, and would
//! kill a server when the *thread* that started it ends, which is that of a test.)

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};

/// The script of the guard; $1 is the directory.
///
/// It stops all processes before it kills any, because a postmaster restarts when a back end dies.
/// The shared memory segment of PostgreSQL (the last word of line 7 of its pid file) survives a
/// SIGKILL, and would fill the table of the system.
const GUARD: &str = r#"
cat >/dev/null
while found=$(find /proc -maxdepth 2 -path '/proc/[0-9]*/cwd' -lname "$1*" -printf '%h\n' 2>/dev/null); [ -n "$found" ]; do
    for signal in STOP KILL; do
        for process in $found; do kill -$signal "${process#/proc/}" 2>/dev/null; done
    done
    sleep 0.01
done
segment=$(sed -n '7s/.* //p' "$1/data/postmaster.pid" 2>/dev/null) && [ -n "$segment" ] && ipcrm -m "$segment"
rm -rf -- "$1"
"#;

#[derive(Debug)]
pub(super) struct Workdir {
    path: PathBuf,
    guard: Child,
}

impl Workdir {
    /// Creates a directory for `user`, or for the current user.
    pub(super) fn create(user: Option<&User>) -> Self {
        let path =
            tempfile::Builder::new().prefix("storied-").tempdir_in(parent(user)).expect("a directory").keep();
        let path = path.canonicalize().expect("the directory just made");
        if let Some(user) = user {
            std::os::unix::fs::chown(&path, Some(user.uid.as_raw()), Some(user.gid.as_raw())).expect("chown");
        }
        let guard = Command::new("sh")
            .args(["-c", GUARD, "guard"])
            .arg(&path)
            .current_dir("/")
            .process_group(0) // a signal to the test's process group (Ctrl-C, a runner's timeout) must not hit the guard
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the guard");
        Self { path, guard }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Kills all processes and returns when none is left.
    pub(super) fn kill(&self) {
        self.pause(); // as the guard does
        self.signal_until(Signal::SIGKILL, |_| false);
    }

    /// Stops all processes and returns when all are stopped.
    pub(super) fn pause(&self) {
        self.signal_until(Signal::SIGSTOP, |pid| state(pid).is_none_or(|state| state == 'T'));
    }

    /// Continues the stopped processes.
    pub(super) fn resume(&self) {
        self.signal_until(Signal::SIGCONT, |pid| state(pid) != Some('T'));
    }

    /// Signals every process that is not `done`, new ones included, until none is left.
    fn signal_until(&self, signal: Signal, done: impl Fn(Pid) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let rest: Vec<_> = processes_in(&self.path).into_iter().filter(|pid| !done(*pid)).collect();
            if rest.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "{signal} had no effect on {rest:?}");
            for pid in rest {
                let _ = kill(pid, signal); // it may have ended
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Workdir {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

/// Returns the processes whose working directory is, or was before its removal, `path` or below it.
pub fn processes_in(path: &Path) -> Vec<Pid> {
    let prefix = path.as_os_str().as_encoded_bytes();
    let entries = fs::read_dir("/proc").expect("/proc").filter_map(Result::ok);
    entries
        .filter(|entry| {
            fs::read_link(entry.path().join("cwd"))
                .is_ok_and(|cwd| cwd.as_os_str().as_encoded_bytes().starts_with(prefix))
        })
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(Pid::from_raw))
        .collect()
}

/// Returns the state letter of ps; none if the process has ended.
fn state(pid: Pid) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.trim_start().chars().next()
}

/// Returns a temporary directory that `user` can enter. That of root may be private.
fn parent(user: Option<&User>) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let open = |path: &Path| -> io::Result<bool> {
        let mut closed = false;
        for ancestor in path.canonicalize()?.ancestors() {
            closed |= fs::metadata(ancestor)?.permissions().mode() & 0o001 == 0;
        }
        Ok(!closed)
    };
    let mut candidates = [std::env::temp_dir(), "/tmp".into(), "/var/tmp".into()].into_iter();
    candidates
        .find(|path| user.is_none() || open(path).unwrap_or(false))
        .expect("a temporary directory that PostgreSQL's user can enter")
}
