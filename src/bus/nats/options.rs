use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use async_nats::{Client, ConnectOptions, Event, ServerAddr};

use super::connection::{Handler, NatsEvent, Watch};
use super::jetstream::JetStreamOptions;
use super::limits::{PAUSE, WAIT, within};
use super::subjects::{Names, Subjects};
use super::wire::percent_decoded;
use super::{Driver, NatsBus};
use crate::backoff::jitter;
use crate::bus::BusError;
use crate::event::{InvalidName, check_name};
use crate::telemetry::Metrics;

/// Where a server is looked for when nobody says anything else.
const DEFAULT_URL: &str = "nats://127.0.0.1:4222";

/// How a [`NatsBus`] connects and what its subjects are called. Ends in [`bus`](Self::bus).
///
/// ```
/// use storied::bus::{JetStreamOptions, NatsOptions};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let bus = NatsOptions::jetstream(JetStreamOptions::new().replicas(3))
///     .url("nats://nats-1:4222,nats://nats-2:4222")
///     .namespace("shop")?
///     .credentials_file("/etc/shop/nats.creds")
///     .bus();
/// # let _ = bus;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct NatsOptions {
    pub(super) driver: Driver,
    /// Before everything that the bus does on the wire: `{namespace}.events.…`.
    pub(crate) namespace: String,
    subjects: Subjects,
    url: Option<String>,
    /// The connection of somebody else, instead of one of our own.
    pub(super) client: Option<Client>,
    name: String,
    pub(super) inbox_prefix: String,
    login: Login,
    tls: Tls,
    reconnect_wait: Duration,
    ping_interval: Duration,
    pub(super) connection_timeout: Duration,
    pub(super) answer_timeout: Duration,
    subscription_capacity: usize,
    pub(super) handler: Handler,
    /// Where metrics go, if it was said.
    pub(super) metrics: Option<Metrics>,
}

/// Who we say that we are.
#[derive(Clone)]
enum Login {
    Nobody,
    User { name: String, password: String },
    Token(String),
    NKey(String),
    Credentials(PathBuf),
}

#[derive(Debug, Clone, Default)]
struct Tls {
    required: bool,
    /// Before the server's greeting.
    first: bool,
    roots: Vec<PathBuf>,
    /// Certificate and key.
    client: Option<(PathBuf, PathBuf)>,
}

impl NatsOptions {
    /// For a bus that keeps nothing: at most once on the wire, and what was lost is read from the store.
    #[must_use]
    pub fn core() -> Self {
        Self::new(Driver::Core)
    }

    /// For a bus that keeps an exact mirror of the log in a JetStream stream.
    #[must_use]
    pub fn jetstream(options: JetStreamOptions) -> Self {
        Self::new(Driver::JetStream(options))
    }

    fn new(driver: Driver) -> Self {
        Self {
            driver,
            namespace: "storied".into(),
            subjects: Subjects::new(),
            url: None,
            client: None,
            name: "storied".into(),
            inbox_prefix: "_INBOX".into(),
            login: Login::Nobody,
            tls: Tls::default(),
            reconnect_wait: Duration::from_secs(2),
            ping_interval: Duration::from_secs(5),
            connection_timeout: Duration::from_secs(2),
            answer_timeout: Duration::from_secs(5),
            subscription_capacity: 65_536,
            handler: Handler::default(),
            metrics: None,
        }
    }

    /// The server, or several separated by commas. By default what the environment variable `NATS_URL` says when the
    /// connection is made, and `nats://127.0.0.1:4222` if it says nothing. An empty text is as good as none. A login in it
    /// (`nats://user:password@host`, `nats://token@host`) is used unless another one is given. Of what a password may have in it,
    /// `@ , / ? # %` must be percent-escaped (`%2C` for a comma), and behind the first server one with a login begins with its scheme.
    #[must_use]
    pub fn url(mut self, url: impl Into<String>) -> Self {
        self.url = Some(url.into());
        self
    }

    /// What subjects begin with: `{namespace}.events.{event name}` and `{namespace}.head`. `storied` by default. Systems
    /// that share NATS servers need different ones.
    ///
    /// # Errors
    /// When it is more than dotted tokens of ASCII letters, digits, `_` and `-`.
    pub fn namespace(mut self, namespace: impl Into<String>) -> Result<Self, InvalidName> {
        self.namespace = namespace.into();
        check_name("namespace", &self.namespace)?;
        Ok(self)
    }

    /// How events' names become subjects. `{namespace}.events.{event name}` by default.
    #[must_use]
    pub fn subjects(mut self, subjects: Subjects) -> Self {
        self.subjects = subjects;
        self
    }

    /// Uses this connection, which stays the caller's: it is never closed by the bus, and what is said here about
    /// connecting does not concern it. It must have been made without `no_echo`.
    #[must_use]
    pub fn client(mut self, client: Client) -> Self {
        self.client = Some(client);
        self
    }

    /// What the server calls this connection in its monitoring. `storied` by default.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// First tokens of the subjects on which this connection receives answers. Default: `_INBOX`. A login that may subscribe
    /// to `_INBOX.>` reads the answers to every other login: give each login its own prefix and rights on that only.
    ///
    /// # Errors
    /// When it is more than dotted tokens of ASCII letters, digits, `_` and `-`.
    pub fn inbox_prefix(mut self, prefix: impl Into<String>) -> Result<Self, InvalidName> {
        self.inbox_prefix = prefix.into();
        check_name("inbox prefix", &self.inbox_prefix)?;
        Ok(self)
    }

    /// Logs in with a user's name and password. Of several ways to log in the last one said counts.
    #[must_use]
    pub fn user_and_password(mut self, name: impl Into<String>, password: impl Into<String>) -> Self {
        self.login = Login::User { name: name.into(), password: password.into() };
        self
    }

    /// Logs in with a token.
    #[must_use]
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.login = Login::Token(token.into());
        self
    }

    /// Logs in with an NKey, given by its seed (`SU…`).
    #[must_use]
    pub fn nkey(mut self, seed: impl Into<String>) -> Self {
        self.login = Login::NKey(seed.into());
        self
    }

    /// Logs in with the JWT and seed in a credentials file, which is read when the connection is made.
    #[must_use]
    pub fn credentials_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.login = Login::Credentials(path.into());
        self
    }

    /// Whether a connection without TLS is refused. By default that is so if certificates are named, with
    /// [`tls_first`](Self::tls_first), and for a `tls://` URL; else the server decides. False does not take that back.
    #[must_use]
    pub fn require_tls(mut self, required: bool) -> Self {
        self.tls.required = required;
        self
    }

    /// Begins TLS before the server's greeting, for servers with `handshake_first`. Not by default.
    #[must_use]
    pub fn tls_first(mut self) -> Self {
        self.tls.first = true;
        self
    }

    /// Trusts the certificates in this PEM file, in place of the system's, and requires TLS. Can be said several times.
    #[must_use]
    pub fn root_certificates(mut self, path: impl Into<PathBuf>) -> Self {
        self.tls.roots.push(path.into());
        self
    }

    /// Shows this certificate to the server (mutual TLS), and requires TLS: PEM files of certificate and key.
    #[must_use]
    pub fn client_certificate(mut self, certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.tls.client = Some((certificate.into(), key.into()));
        self
    }

    /// How long to wait between two attempts to come back to a server, give or take a fifth; the first follows at once,
    /// and there is no last one. 2 s by default, 1 ms to a day.
    #[must_use]
    pub fn reconnect_wait(mut self, wait: Duration) -> Self {
        self.reconnect_wait = wait;
        self
    }

    /// How often a silent server is asked whether it is still there; one that leaves two such questions open counts as
    /// lost. 5 s by default, 10 ms to a day. Every option of this type is checked when the runtime starts and when the bus
    /// connects: what is outside of its range is [`BusError::Incompatible`].
    #[must_use]
    pub fn ping_interval(mut self, every: Duration) -> Self {
        self.ping_interval = every;
        self
    }

    /// How long one attempt to connect to one server may take. 2 s by default, 10 ms to a day.
    #[must_use]
    pub fn connection_timeout(mut self, timeout: Duration) -> Self {
        self.connection_timeout = timeout;
        self
    }

    /// How long the server may take to answer anything: a confirmation of what was published, a question about a stream.
    /// 5 s by default, 10 ms to a day.
    #[must_use]
    pub fn answer_timeout(mut self, timeout: Duration) -> Self {
        self.answer_timeout = timeout;
        self
    }

    /// How many messages a subscription holds that nobody has read yet; what comes on top is lost, noticed, and read from
    /// the store. 65,536 by default, 1 to 16,777,216.
    #[must_use]
    pub fn subscription_capacity(mut self, messages: usize) -> Self {
        self.subscription_capacity = messages;
        self
    }

    /// Calls this with everything that happens to the connection, each once: it must not block. A borrowed connection only
    /// tells when it comes and goes. What counts without being told is [`NatsBus::watch_state`], and
    /// [`RuntimeStatus::bus`](crate::runtime::RuntimeStatus::bus).
    #[must_use]
    pub fn on_event(mut self, handler: impl Fn(NatsEvent) + Send + Sync + 'static) -> Self {
        self.handler = Handler::new(handler);
        self
    }

    /// Where the metrics of this connection go. By default where those of the runtime go that the bus is given to; without
    /// one, to the global meter provider. What was counted before there was a runtime stays where it went.
    #[cfg(feature = "otel")]
    #[must_use]
    pub fn telemetry(mut self, telemetry: &crate::Telemetry) -> Self {
        self.metrics = Some(Metrics::of(telemetry));
        self
    }

    /// The bus. It connects when it is first used.
    #[must_use]
    pub fn bus(self) -> NatsBus {
        NatsBus::new(self, "events")
    }

    /// What everything is called.
    pub(super) fn names(&self) -> Names {
        Names::new(&self.namespace, &self.subjects)
    }

    /// Refuses what no connection could work with.
    pub(crate) fn check(&self) -> Result<(), BusError> {
        within("NatsOptions::reconnect_wait", &self.reconnect_wait, &PAUSE)?;
        within("NatsOptions::ping_interval", &self.ping_interval, &WAIT)?;
        within("NatsOptions::connection_timeout", &self.connection_timeout, &WAIT)?;
        within("NatsOptions::answer_timeout", &self.answer_timeout, &WAIT)?;
        within("NatsOptions::subscription_capacity", &self.subscription_capacity, &(1..=1 << 24))?;
        if let Driver::JetStream(options) = &self.driver {
            options.check()?;
        }
        if self.client.is_none() {
            self.servers()?;
        }
        Ok(())
    }

    /// Where to connect to, as of now.
    pub(super) fn servers(&self) -> Result<Vec<ServerAddr>, BusError> {
        let said = |url: &String| !url.trim().is_empty();
        let url = self.url.clone().filter(said).or_else(|| std::env::var("NATS_URL").ok().filter(said));
        let url = url.unwrap_or_else(|| DEFAULT_URL.into());
        // Neither the text nor what the parser says of it: a URL may have a password in it.
        let unreadable = |reason: &str| BusError::Incompatible { reason: reason.into() };
        if !logins_are_plain(&url) {
            return Err(unreadable(
                "the URL of the NATS server cannot be told from the login in it; percent-escape what is special in a password \
                 (%2C for a comma, %2F for a slash), and of several servers begin each that has a login with its scheme",
            ));
        }
        let servers = url.split(',').map(|server| server.trim().parse());
        let servers: Vec<ServerAddr> = servers.collect::<Result<_, _>>().map_err(|_| {
            unreadable("the URL of the NATS server cannot be read; it should look like nats://host:4222")
        })?;
        if self.requires_tls(&servers) && servers.iter().any(|server| server.scheme() == "ws") {
            return Err(unreadable("TLS is required, and a ws:// URL goes without; use wss://"));
        }
        Ok(servers)
    }

    /// Whether a login may be sent over TLS only. Named certificates ask for it, and so does one URL for all servers: the
    /// others that a server names have no scheme.
    fn requires_tls(&self, servers: &[ServerAddr]) -> bool {
        let Tls { required, first, roots, client } = &self.tls;
        let asked = *required || *first || !roots.is_empty() || client.is_some();
        asked || servers.iter().any(|server| matches!(server.scheme(), "tls" | "wss"))
    }

    /// What async-nats needs to know. `tell` hears everything that happens to the connection, and must not block.
    pub(super) async fn connect_options(
        &self,
        servers: &[ServerAddr],
        watch: &Watch,
        tell: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<ConnectOptions, BusError> {
        let (wait, again) = (self.reconnect_wait, watch.clone());
        let mut options = ConnectOptions::new()
            .name(&self.name)
            .custom_inbox_prefix(&self.inbox_prefix)
            .ping_interval(self.ping_interval)
            .connection_timeout(self.connection_timeout)
            .request_timeout(Some(self.answer_timeout))
            .subscription_capacity(self.subscription_capacity)
            .max_reconnects(None)
            .reconnect_delay_callback(move |attempt| {
                // Asked before every attempt, the very first included.
                again.metrics.connecting(again.role);
                match attempt {
                    0 | 1 => Duration::ZERO,
                    _ => jitter(wait, 0.2),
                }
            })
            .event_callback(move |event| {
                tell(event);
                std::future::ready(())
            })
            .require_tls(self.requires_tls(servers));
        if self.tls.first {
            options = options.tls_first();
        }
        for roots in &self.tls.roots {
            options = options.add_root_certificates(roots.clone());
        }
        if let Some((certificate, key)) = &self.tls.client {
            options = options.add_client_certificate(certificate.clone(), key.clone());
        }
        Ok(match &self.login {
            Login::Nobody => url_login(options, servers),
            Login::User { name, password } => options.user_and_password(name.clone(), password.clone()),
            Login::Token(token) => options.token(token.clone()),
            Login::NKey(seed) => options.nkey(seed.clone()),
            Login::Credentials(path) => {
                options.credentials_file(path).await.map_err(|error| BusError::Incompatible {
                    reason: format!(
                        "the credentials file {} cannot be used: {}",
                        path.display(),
                        error.kind()
                    ),
                })?
            }
        })
    }
}

/// Whether every login in a list of servers stands where one belongs. A comma, slash or the like in a password makes its
/// first part look like a host, which would be connected to, and told in errors.
fn logins_are_plain(servers: &str) -> bool {
    servers.split(',').enumerate().all(|(index, server)| {
        let scheme = server.split_once("://");
        let rest = scheme.map_or(server, |(_, rest)| rest);
        let behind_host = rest.find(['/', '?', '#', '\\']).map_or("", |end| &rest[end..]);
        let begins_anew = index == 0 || scheme.is_some() || !server.contains('@');
        begins_anew && !behind_host.contains('@')
    })
}

/// Logs in with what a URL says (`user:password@` or `token@`), which async-nats itself takes no notice of.
fn url_login(options: ConnectOptions, servers: &[ServerAddr]) -> ConnectOptions {
    let Some((name, password)) =
        servers.iter().find_map(|server| Some((server.username()?, server.password())))
    else {
        return options;
    };
    let plain = |text: &str| percent_decoded(text).unwrap_or_else(|| text.to_owned());
    match password {
        Some(password) => options.user_and_password(plain(name), plain(password)),
        None => options.token(plain(name)),
    }
}

impl fmt::Debug for NatsOptions {
    /// Without anything secret: neither the URL, which may have a password in it, nor how we log in.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NatsOptions")
            .field("driver", &self.driver)
            .field("namespace", &self.namespace)
            .field("subjects", &self.subjects)
            .field("name", &self.name)
            .field("tls", &self.tls)
            .finish_non_exhaustive()
    }
}
