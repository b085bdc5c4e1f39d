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

/// The kind of nats-server.
#[derive(Debug, Clone, Default)]
pub struct NatsOptions {
    /// Enables JetStream, with its store in the directory of the server.
    pub jetstream: bool,
    /// Lines of the configuration file.
    pub config: Vec<String>,
    /// Program of another version, instead of that of `scripts/servers`.
    pub binary: Option<PathBuf>,
}

impl NatsOptions {
    /// Core NATS only.
    pub fn core() -> Self {
        Self::default()
    }

    /// Core NATS and JetStream.
    pub fn jetstream() -> Self {
        Self { jetstream: true, ..Self::default() }
    }
}

/// A private nats-server, which ends with this value.
#[derive(Debug)]
pub struct NatsServer {
    process: Process,
    port: Port,
    options: NatsOptions,
}

impl NatsServer {
    /// Starts a server and returns when it answers.
    pub async fn start(options: NatsOptions) -> Self {
        let mut server = Self { process: Process::new(Workdir::create(None)), port: Port::claim(), options };
        server.launch().await;
        server
    }

    /// Returns the address, also while the server is down.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port.number())
    }

    /// Returns the directory.
    pub fn dir(&self) -> &Path {
        self.process.path()
    }

    /// Returns the log.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Kills it with SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Ends it with SIGTERM, as an operator does.
    pub async fn stop(&mut self) {
        self.process.end(Signal::SIGTERM).await;
    }

    /// Sends another signal; SIGUSR2 starts lame-duck mode.
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

    /// Restarts it on the same port over the same store.
    pub async fn restart(&mut self) {
        if self.process.is_running() {
            self.stop().await;
        }
        self.launch().await;
    }

    /// Uses another program from the next start on; `None` for the default.
    pub fn use_binary(&mut self, binary: Option<PathBuf>) {
        self.options.binary = binary;
    }

    /// Deletes the JetStream store; the server must be down.
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
            // Its answer needs a certificate.
            let address = ("127.0.0.1", self.port.number());
            let listens = || async move { tokio::net::TcpStream::connect(address).await.is_ok() };
            return self.process.launch(&mut command, listens).await;
        }
        self.process.launch(&mut command, || answers(url.clone(), jetstream)).await;
    }
}

async fn answers(url: String, jetstream: bool) -> bool {
    // The client does not report refused connections that it retries: one attempt, and the caller
    // polls.
    let options =
        async_nats::ConnectOptions::new().max_reconnects(1).connection_timeout(Duration::from_secs(1));
    let client = match options.connect(url).await {
        Ok(client) => client,
        // The server needs a login that only the test has.
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

/// Returns the oldest supported nats-server.
pub fn oldest_nats_server() -> PathBuf {
    find("nats-server 2.10", cached("STORIED_NATS_SERVER_2_10", "nats-server-2.10.26"))
}

/// Returns an unsupported old version, if installed.
pub fn too_old_nats_server() -> Option<PathBuf> {
    cached("STORIED_NATS_SERVER_2_9", "nats-server-2.9").find(|path| path.is_file())
}

/// Returns the location that `scripts/servers` uses.
fn cached(variable: &str, name: &str) -> impl Iterator<Item = PathBuf> {
    let cache =
        env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| Some(env::home_dir()?.join(".cache")));
    let file = cache.map(|cache| cache.join("storied").join(name));
    env::var_os(variable).map(PathBuf::from).into_iter().chain(file)
}
