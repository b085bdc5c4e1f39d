//! A private PostgreSQL.

use std::cmp::Reverse;
use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::Signal;
use nix::unistd::User;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tokio::sync::OnceCell;

use super::ports::Port;
use super::process::{Process, find, on_path, run_as};
use super::workdir::Workdir;

/// A private PostgreSQL server, which ends with this value.
///
/// Durable as in production: fsync stays on.
#[derive(Debug)]
pub struct PostgresServer {
    process: Process,
    port: Port,
    settings: Vec<String>,
}

impl PostgresServer {
    /// Starts a server and returns when it answers.
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts a server with settings, each as `name=value`.
    pub async fn start_with(settings: &[&str]) -> Self {
        let workdir = Workdir::create(unprivileged().as_ref());
        copy(&template(), &workdir.path().join("data"));
        let settings = settings.iter().map(ToString::to_string).collect();
        let mut server = Self { process: Process::new(workdir), port: Port::claim(), settings };
        server.launch().await;
        server
    }

    /// Starts a streaming standby.
    ///
    /// It reaches this server at a local `port`: its own, or that of a proxy.
    pub async fn start_standby(&self, port: u16) -> Self {
        let user = unprivileged();
        let workdir = Workdir::create(user.as_ref());
        let mut backup = program("pg_basebackup");
        backup.args([
            "-h",
            "127.0.0.1",
            "-U",
            "storied",
            "-c",
            "fast",
            "-X",
            "stream",
            "--no-sync",
            "-R",
            "-p",
        ]);
        backup.arg(self.port.number().to_string()).arg("-D").arg(workdir.path().join("data"));
        run(run_as(backup.current_dir(workdir.path()), user.as_ref()));
        let mut settings = self.settings.clone();
        settings.push(format!("primary_conninfo=host=127.0.0.1 port={port} user=storied"));
        settings.push("wal_retrieve_retry_interval=50ms".into());
        let mut standby = Self { process: Process::new(workdir), port: Port::claim(), settings };
        standby.launch().await;
        standby
    }

    /// Promotes a standby, and returns when it is a primary.
    pub async fn promote(&self) {
        let mut connection = PgConnection::connect(&self.url()).await.expect("a connection");
        connection.execute("select pg_promote(true, 60)").await.expect("a promotion");
    }

    /// Returns the URL of the same database on this server, for a `url` of another server.
    pub fn url_like(&self, url: &str) -> String {
        self.url_of(url.rsplit('/').next().expect("a database"))
    }

    /// Returns the server that all tests of this process share, each in its own database.
    ///
    /// It cannot be stopped.
    pub async fn shared() -> &'static Self {
        static SHARED: OnceCell<PostgresServer> = OnceCell::const_new();
        // Concurrent tests have one or more pools each. With PostgreSQL's default of 100 they would
        // wait for each other.
        SHARED.get_or_init(|| Self::start_with(&["max_connections=500"])).await
    }

    /// Creates an empty database and returns its URL.
    pub async fn create_database(&self) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let mut connection = PgConnection::connect(&self.url()).await.expect("a connection");
        connection.execute(AssertSqlSafe(format!("create database {name}"))).await.expect("a new database");
        self.url_of(&name)
    }

    /// Returns the URL of its default database, also while the server is down.
    pub fn url(&self) -> String {
        self.url_of("postgres")
    }

    fn url_of(&self, database: &str) -> String {
        format!("postgres://storied@127.0.0.1:{}/{database}", self.port.number())
    }

    /// Returns the port, also while the server is down.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// Returns the directory.
    pub fn dir(&self) -> &Path {
        self.process.path()
    }

    /// Returns the log.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Kills the postmaster and all back ends with SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Ends it without a checkpoint (SIGQUIT, `pg_ctl stop -m immediate`). The next start recovers.
    pub async fn stop_immediately(&mut self) {
        self.process.end(Signal::SIGQUIT).await;
    }

    /// Ends it as an operator does (SIGINT, `pg_ctl stop -m fast`).
    pub async fn stop(&mut self) {
        self.process.end(Signal::SIGINT).await;
    }

    /// Freezes the postmaster and all back ends (SIGSTOP).
    ///
    /// Connections stay open and nothing answers.
    pub fn pause(&mut self) {
        self.process.pause();
    }

    /// Ends a [`pause`](Self::pause).
    pub fn resume(&mut self) {
        self.process.resume();
    }

    /// Restarts it on the same port over the same data.
    pub async fn restart(&mut self) {
        if self.process.is_running() {
            self.stop().await;
        }
        self.launch().await;
    }

    async fn launch(&mut self) {
        let mut command = program("postgres");
        command.arg("-D").arg(self.dir().join("data")).args(["-p", &self.port.number().to_string()]);
        // No socket: the length limit of its path breaks in a deep temporary directory.
        for setting in ["listen_addresses=127.0.0.1", "unix_socket_directories="] {
            command.args(["-c", setting]);
        }
        for setting in &self.settings {
            command.args(["-c", setting]);
        }
        let url = self.url();
        let command = run_as(&mut command, unprivileged().as_ref());
        self.process.launch(command, || answers(url.clone())).await;
    }
}

async fn answers(url: String) -> bool {
    let Ok(mut connection) = PgConnection::connect(&url).await else { return false };
    connection.execute("select 1").await.is_ok()
}

/// Returns an unprivileged user if this process is root, because PostgreSQL refuses to run as root.
pub(super) fn unprivileged() -> Option<User> {
    let named = |name| User::from_name(name).ok().flatten();
    nix::unistd::geteuid()
        .is_root()
        .then(|| named("postgres").or_else(|| named("nobody")).expect("an unprivileged user"))
}

fn program(name: &str) -> Command {
    let mut debian: Vec<_> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .collect();
    debian.sort_unstable_by_key(|version| Reverse(*version));
    let candidates = env::var_os("STORIED_PG_BIN").map(|bin| PathBuf::from(bin).join(name)).into_iter();
    let candidates = candidates
        .chain(debian.into_iter().map(|version| format!("/usr/lib/postgresql/{version}/bin/{name}").into()));
    Command::new(find("PostgreSQL", candidates.chain(on_path(name))))
}

/// Returns a data directory of initdb.
///
/// It is created once, because initdb takes longer than the rest of a start.
fn template() -> PathBuf {
    let user = unprivileged();
    let version = program("postgres").arg("--version").output().expect("PostgreSQL's version").stdout;
    let version = String::from_utf8_lossy(&version).split_whitespace().nth(2).expect("a version").to_owned();
    let owner = user.as_ref().map_or_else(nix::unistd::geteuid, |user| user.uid);
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR"));
    fs::create_dir_all(cache).expect("cargo's directory for the files of tests");
    let name = |what| cache.join(format!("postgres-{version}-{owner}{what}"));
    let template = name("");

    let lock = File::create(name(".lock")).expect("a lock file");
    lock.lock().expect("the lock");
    if !template.exists() {
        // Created elsewhere: PostgreSQL's user may be unable to enter the cache, and no test may
        // see a partial template.
        let workdir = Workdir::create(user.as_ref());
        let data = workdir.path().join("data");
        let mut initdb = program("initdb");
        initdb.args([
            "--username=storied",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
            "--pgdata",
        ]);
        run(run_as(initdb.arg(&data).current_dir(workdir.path()), user.as_ref()));
        let partial = name(".partial");
        let _ = fs::remove_dir_all(&partial);
        copy(&data, &partial);
        fs::rename(partial, &template).expect("the finished template");
    }
    template
}

fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").args(["-a", "--reflink=auto"]).arg(from).arg(to));
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}
