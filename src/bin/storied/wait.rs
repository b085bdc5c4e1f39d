//! Notices of a command that waits for a server.

use std::future::Future;
use std::io::ErrorKind;
use std::net::{TcpStream, ToSocketAddrs};
use std::pin::pin;
use std::str::FromStr;
use std::sync::OnceLock;
use std::time::Duration;

use async_nats::ServerAddr;
use sqlx::postgres::PgConnectOptions;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::input_file;
use crate::redact;
use crate::terminal;

/// Time without a result until the notice.
const QUIET: Duration = Duration::from_secs(1);

/// Time limit for finding out why there is no result.
const PROBE: Duration = Duration::from_millis(500);

/// Whether the output is JSON, for a program: it gets the result alone.
static JSON: OnceLock<bool> = OnceLock::new();

/// Chooses whether there are notices. Later calls have no effect.
pub(crate) fn set_json(json: bool) {
    let _ = JSON.set(json);
}

/// A server that a command connects to.
pub(crate) struct Server {
    kind: &'static str,
    host: String,
    port: u16,
}

impl Server {
    /// Returns the PostgreSQL server of a valid URL.
    pub(crate) fn postgres(url: &str) -> Option<Self> {
        // The command will refuse these files; here the driver would read them.
        if input_file::postgres_problem(url).is_some() {
            return None;
        }
        let options = PgConnectOptions::from_str(url).ok()?;
        let (host, port) = match options.get_socket() {
            // A directory has no address to probe.
            Some(socket) => (socket.display().to_string(), 0),
            None => (options.get_host().to_owned(), options.get_port()),
        };
        Some(Self { kind: "PostgreSQL", host, port })
    }

    /// Returns the first NATS server of a valid list.
    pub(crate) fn nats(urls: &str) -> Option<Self> {
        let server = ServerAddr::from_str(urls.split(',').next()?.trim()).ok()?;
        Some(Self { kind: "NATS", host: server.host().to_owned(), port: server.port() })
    }

    fn address(&self) -> String {
        let Self { host, port, .. } = self;
        match port {
            0 => host.clone(),
            _ if host.contains(':') && !host.starts_with('[') => format!("[{host}]:{port}"),
            _ => format!("{host}:{port}"),
        }
    }

    /// Connects once, and returns what the wait is for.
    async fn reason(&self) -> String {
        const SILENT: &str = "no answer yet";
        if self.port == 0 {
            return SILENT.into();
        }
        let (sender, receiver) = oneshot::channel();
        let (host, port) = (self.host.trim_matches(['[', ']']).to_owned(), self.port);
        // A thread of its own: the runtime would wait at its end for a name that does not resolve.
        std::thread::spawn(move || {
            let probed = (host, port).to_socket_addrs().map(|mut found| found.next());
            let reason = match probed {
                Ok(Some(address)) => match TcpStream::connect_timeout(&address, PROBE) {
                    Err(error) if error.kind() != ErrorKind::TimedOut => error.kind().to_string(),
                    _ => SILENT.into(),
                },
                Ok(None) => "the host name has no address".into(),
                Err(error) => format!("the host name does not resolve ({error})"),
            };
            // The command may have ended.
            let _ = sender.send(reason);
        });
        timeout(PROBE, receiver).await.ok().and_then(Result::ok).unwrap_or_else(|| SILENT.into())
    }
}

/// Runs `work`, and reports on standard error if it takes longer than a second, unless the output is
/// JSON.
///
/// `limit` is the time limit of `work`.
pub(crate) async fn with_notice<T>(
    server: Option<Server>,
    limit: Duration,
    work: impl Future<Output = T>,
) -> T {
    let Some(server) = server.filter(|_| !JSON.get().copied().unwrap_or(false)) else { return work.await };
    let mut work = pin!(work);
    if let Ok(done) = timeout(QUIET, &mut work).await {
        return done;
    }
    let reason = tokio::select! {
        done = &mut work => return done,
        reason = server.reason() => reason,
    };
    let text = redact::driver(&format!(
        "waiting for {} at {}: {reason}; giving up within {} s (--timeout)",
        server.kind,
        server.address(),
        limit.as_secs()
    ));
    terminal::print_error(&format!("{}\n", terminal::clean(&text)));
    work.await
}
