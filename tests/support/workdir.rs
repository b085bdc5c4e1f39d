//! A server's directory, and the guard that ends what runs in it.
//!
//! The guard is a small shell process that waits for the end of its standard input, which the kernel brings about when the test
//! process closes it or dies. It then kills every process whose working directory lies in the directory and removes it. That
//! finds PostgreSQL's back ends, too, which are no members of the postmaster's process group, outlive it when they are stopped,
//! and have no parent to be found by when it is dead. (A parent-death signal would miss them, and would kill a server as soon
//! as the *thread* ends that started it, which is a test's.)

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};

/// $1 is the directory. All are stopped before any is killed: a postmaster that sees a back end die begins to start over.
/// PostgreSQL's shared memory segment (the last word of line 7 of its pid file) survives a SIGKILL and would be left to fill the
/// system's table.
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
    /// Makes a directory for `user`, or for ourselves.
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

    /// Kills whatever runs here and returns when nothing does.
    pub(super) fn kill(&self) {
        self.pause(); // as the guard does
        self.signal_until(Signal::SIGKILL, |_| false);
    }

    /// Stops whatever runs here and returns when it stands still.
    pub(super) fn pause(&self) {
        self.signal_until(Signal::SIGSTOP, |pid| state(pid).is_none_or(|state| state == 'T'));
    }

    /// Lets what was stopped go on.
    pub(super) fn resume(&self) {
        self.signal_until(Signal::SIGCONT, |pid| state(pid) != Some('T'));
    }

    /// Signals every process that is not `done`, and those born meanwhile, until none is left.
    fn signal_until(&self, signal: Signal, done: impl Fn(Pid) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let rest: Vec<_> = processes_in(&self.path).into_iter().filter(|pid| !done(*pid)).collect();
            if rest.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "{signal} had no effect on {rest:?}");
            for pid in rest {
                let _ = kill(pid, signal); // it may be gone by now
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

/// The processes whose working directory is `path` or below it, or was before it was removed.
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

/// The letter of its state, as in ps; none when it is gone.
fn state(pid: Pid) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.trim_start().chars().next()
}

/// The temporary directory, or another one if `user` cannot get there (root's own may be closed to others).
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
