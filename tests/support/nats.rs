//! A private nats-server.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::ports::Port;
use super::process::{Process, find, on_path};
use super::workdir::Workdir;

/// What kind of nats-server to start.
#[derive(Debug, Clone, Default)]
pub struct NatsOptions {
    /// Whether it has JetStream, with its store in the server's directory.
    pub jetstream: bool,
    /// Lines of its configuration file.
    pub config: Vec<String>,
    /// The program, when it is not to be the one that `scripts/servers` found: another version.
    pub binary: Option<PathBuf>,
}

impl NatsOptions {
    /// Core NATS alone.
    pub fn core() -> Self {
        Self::default()
    }

    /// With JetStream.
    pub fn jetstream() -> Self {
        Self { jetstream: true, ..Self::default() }
    }
}

/// A nats-server of the test's own, which goes with this value.
#[derive(Debug)]
pub struct NatsServer {
    process: Process,
    port: Port,
    options: NatsOptions,
}

impl NatsServer {
    /// Starts one and returns when it answers.
    pub async fn start(options: NatsOptions) -> Self {
        let mut server = Self { process: Process::new(Workdir::create(None)), port: Port::claim(), options };
        server.launch().await;
        server
    }

    /// Where it listens, also while it is down.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port.number())
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        self.process.path()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// kill -9.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Ends it as an operator would (SIGTERM).
    pub async fn stop(&mut self) {
        self.process.end(Signal::SIGTERM).await;
    }

    /// Sends it another signal: SIGUSR2 makes it a lame duck.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Freezes it (SIGSTOP): connections stay open and nothing answers.
    pub fn pause(&mut self) {
        self.process.pause();
    }

    /// Ends a [`pause`](Self::pause).
    pub fn resume(&mut self) {
        self.process.resume();
    }

    /// Stops it if it runs, and starts it on the same port over the same store.
    pub async fn restart(&mut self) {
        if self.process.is_running() {
            self.stop().await;
        }
        self.launch().await;
    }

    /// Uses another program from the next start on; `None` for the usual one.
    pub fn use_binary(&mut self, binary: Option<PathBuf>) {
        self.options.binary = binary;
    }

    /// Removes what JetStream has stored; the server must be down.
    pub fn wipe(&mut self) {
        assert!(!self.process.is_running(), "wiping the store of a running server");
        fs::remove_dir_all(self.store()).expect("a store to wipe");
    }

    fn store(&self) -> PathBuf {
        self.dir().join("store")
    }

    async fn launch(&mut self) {
        let mut command = Command::new(self.options.binary.clone().unwrap_or_else(nats_server));
        command.args(["-a", "127.0.0.1", "-p", &self.port.number().to_string()]);
        if !self.options.config.is_empty() {
            let config = self.dir().join("nats.conf");
            fs::write(&config, self.options.config.join("\n")).expect("a configuration file");
            command.arg("-c").arg(config);
        }
        if self.options.jetstream {
            command.arg("-js").arg("-sd").arg(self.store());
        }
        let (url, jetstream) = (self.url(), self.options.jetstream);
        if self.options.config.iter().any(|line| line.starts_with("tls")) {
            // What it answers is for those who have certificates.
            let address = ("127.0.0.1", self.port.number());
            let listens = || async move { tokio::net::TcpStream::connect(address).await.is_ok() };
            return self.process.launch(&mut command, listens).await;
        }
        self.process.launch(&mut command, || answers(url.clone(), jetstream)).await;
    }
}

async fn answers(url: String, jetstream: bool) -> bool {
    // The client says nothing of a connection refused that it tries again: one attempt, and the caller polls.
    let options =
        async_nats::ConnectOptions::new().max_reconnects(1).connection_timeout(Duration::from_secs(1));
    let client = match options.connect(url).await {
        Ok(client) => client,
        // It wants a login that is the test's business.
        Err(error) => {
            use async_nats::ConnectErrorKind::{Authentication, AuthorizationViolation};
            return matches!(error.kind(), Authentication | AuthorizationViolation);
        }
    };
    if jetstream {
        async_nats::jetstream::new(client).query_account().await.is_ok()
    } else {
        client.flush().await.is_ok()
    }
}

fn nats_server() -> PathBuf {
    find("nats-server", cached("STORIED_NATS_SERVER", "nats-server").chain(on_path("nats-server")))
}

/// The oldest nats-server that storied works with.
pub fn oldest_nats_server() -> PathBuf {
    find("nats-server 2.10", cached("STORIED_NATS_SERVER_2_10", "nats-server-2.10.26"))
}

/// One that is too old, where there is one.
pub fn too_old_nats_server() -> Option<PathBuf> {
    cached("STORIED_NATS_SERVER_2_9", "nats-server-2.9").find(|path| path.is_file())
}

/// Where `scripts/servers` may have put it.
fn cached(variable: &str, name: &str) -> impl Iterator<Item = PathBuf> {
    let cache =
        env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| Some(env::home_dir()?.join(".cache")));
    let file = cache.map(|cache| cache.join("storied").join(name));
    env::var_os(variable).map(PathBuf::from).into_iter().chain(file)
}
