use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use async_nats::{Client, ConnectOptions, Event, ServerAddr};

use super::connection_metrics::Watch;
use super::events::{Handler, NatsEvent};
use super::jetstream::JetStreamOptions;
use super::limits::{PAUSE, WAIT, within};
use super::login::{Login, check_file, logins_are_plain};
use super::subjects::{Names, Subjects};
use crate::backoff::jitter;
use crate::bus::BusError;
use crate::event::{InvalidName, check_name};
use crate::telemetry::Metrics;

/// Default server, if neither the option nor the environment names one.
const DEFAULT_URL: &str = "nats://127.0.0.1:4222";

/// Options of the connection and the subjects of a [`NatsBus`](crate::bus::NatsBus). Ends in
/// [`bus`](Self::bus).
///
/// ```
/// use storied::bus::{JetStreamOptions, NatsOptions};
///
/// let bus = NatsOptions::jetstream(JetStreamOptions::new().replicas(3))
///     .url("nats://nats-1:4222,nats://nats-2:4222")
///     .namespace("shop")
///     .credentials_file("/etc/shop/nats.creds")
///     .bus();
/// # let _ = bus;
/// ```
#[derive(Clone)]
pub struct NatsOptions {
    pub(super) driver: Driver,
    /// Prefix of every subject of the bus: `{namespace}.events.…`.
    pub(crate) namespace: String,
    subjects: Subjects,
    url: Option<String>,
    /// Borrowed connection, in place of an own connection.
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
    /// Destination of metrics, if it was set.
    pub(super) metrics: Option<Metrics>,
}

/// The NATS driver.
#[derive(Debug, Clone)]
pub(super) enum Driver {
    Core,
    JetStream(JetStreamOptions),
}

#[derive(Debug, Clone, Default)]
struct Tls {
    required: bool,
    /// Whether TLS starts before the server's greeting.
    first: bool,
    roots: Vec<PathBuf>,
    /// Certificate and key of the client.
    client: Option<(PathBuf, PathBuf)>,
}

impl NatsOptions {
    /// Creates options for a bus that keeps nothing.
    ///
    /// Delivery on the wire is at most once. Followers read lost events from the store.
    #[must_use]
    pub fn core() -> Self {
        Self::new(Driver::Core)
    }

    /// Creates options for a bus that keeps an exact copy of the log in a JetStream stream.
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
            login: Login::None,
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

    /// Sets the server, or several servers separated by commas.
    ///
    /// Default: the environment variable `NATS_URL` at the time of the connect, then
    /// `nats://127.0.0.1:4222`. An empty text counts as not set. A login in the URL
    /// (`nats://user:password@host`, `nats://token@host`) applies unless another login is set. In a
    /// password, `@ , / ? # %` must be percent-escaped (`%2C` for a comma). After the first server,
    /// a server with a login must start with its scheme.
    #[must_use]
    pub fn url(mut self, url: impl Into<String>) -> Self {
        self.url = Some(url.into());
        self
    }

    /// Sets the prefix of all subjects: `{namespace}.events.{event name}` and `{namespace}.head`.
    ///
    /// Systems that share NATS servers need different namespaces. Default: `storied`. Range: dotted
    /// tokens of ASCII letters, digits, `_` and `-`.
    #[must_use]
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// Sets the mapping from event names to subjects. Default: `{namespace}.events.{event name}`.
    #[must_use]
    pub fn subjects(mut self, subjects: Subjects) -> Self {
        self.subjects = subjects;
        self
    }

    /// Uses a borrowed connection.
    ///
    /// The bus never closes it, and the connection settings here do not apply to it. It must have
    /// been made without `no_echo`.
    #[must_use]
    pub fn client(mut self, client: Client) -> Self {
        self.client = Some(client);
        self
    }

    /// Sets the name of the connection in the server's monitoring. Default: `storied`.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Sets the first tokens of the subjects that receive answers. Default: `_INBOX`.
    ///
    /// A login that may subscribe to `_INBOX.>` can read the answers to every other login. Give
    /// each login its own prefix, and permissions on that prefix only. Range: dotted tokens of ASCII
    /// letters, digits, `_` and `-`.
    #[must_use]
    pub fn inbox_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.inbox_prefix = prefix.into();
        self
    }

    /// Logs in with a user name and a password. The last login method set applies.
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

    /// Logs in with the JWT and seed in a credentials file, read at the time of the connect.
    ///
    /// This file and those of certificates and keys must be regular files of at most 1 MiB. The bus
    /// checks that when it connects; another file is [`BusError::Incompatible`].
    #[must_use]
    pub fn credentials_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.login = Login::Credentials(path.into());
        self
    }

    /// Requires TLS.
    ///
    /// Default: required if certificates are set, with [`tls_first`](Self::tls_first), and for a
    /// `tls://` URL; otherwise the server decides. `false` does not override these cases.
    #[must_use]
    pub fn require_tls(mut self, required: bool) -> Self {
        self.tls.required = required;
        self
    }

    /// Starts TLS before the server's greeting, for servers with `handshake_first`. Default: off.
    #[must_use]
    pub fn tls_first(mut self) -> Self {
        self.tls.first = true;
        self
    }

    /// Trusts the certificates in this PEM file in place of the system's, and requires TLS.
    /// May be called several times.
    #[must_use]
    pub fn root_certificates(mut self, path: impl Into<PathBuf>) -> Self {
        self.tls.roots.push(path.into());
        self
    }

    /// Sets the client certificate and key (PEM files, mutual TLS), and requires TLS.
    #[must_use]
    pub fn client_certificate(mut self, certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.tls.client = Some((certificate.into(), key.into()));
        self
    }

    /// Sets the wait between two reconnect attempts, with a jitter of 20 %.
    ///
    /// The first attempt follows at once, and the number of attempts is unlimited. Default: 2 s.
    /// Range: 1 ms to 1 day.
    #[must_use]
    pub fn reconnect_wait(mut self, wait: Duration) -> Self {
        self.reconnect_wait = wait;
        self
    }

    /// Sets the interval of pings to a silent server.
    /// After two unanswered pings, the server is lost.
    ///
    /// Default: 5 s. Range: 10 ms to 1 day. The runtime checks every option of this type at its
    /// start, and the bus checks it when it connects. A value outside its range is
    /// [`BusError::Incompatible`].
    #[must_use]
    pub fn ping_interval(mut self, every: Duration) -> Self {
        self.ping_interval = every;
        self
    }

    /// Sets the timeout of one attempt to connect to one server.
    /// Default: 2 s. Range: 10 ms to 1 day.
    #[must_use]
    pub fn connection_timeout(mut self, timeout: Duration) -> Self {
        self.connection_timeout = timeout;
        self
    }

    /// Sets the timeout of every answer of the server, such as a publish confirmation.
    ///
    /// Default: 5 s. Range: 10 ms to 1 day.
    #[must_use]
    pub fn answer_timeout(mut self, timeout: Duration) -> Self {
        self.answer_timeout = timeout;
        self
    }

    /// Sets the buffer size of a subscription, in messages.
    ///
    /// Messages above it are lost, detected, and read from the store. Default: 65,536. Range: 1 to
    /// 16,777,216.
    #[must_use]
    pub fn subscription_capacity(mut self, messages: usize) -> Self {
        self.subscription_capacity = messages;
        self
    }

    /// Sets a handler that receives each event of the connection once. It must not block.
    ///
    /// A borrowed connection only reports connects and disconnects.
    /// [`NatsBus::watch_state`](crate::bus::NatsBus::watch_state) and
    /// [`RuntimeStatus::bus`](crate::runtime::RuntimeStatus::bus) show the state without a handler.
    #[must_use]
    pub fn on_event(mut self, handler: impl Fn(NatsEvent) + Send + Sync + 'static) -> Self {
        self.handler = Handler::new(handler);
        self
    }

    /// Sets the destination of the metrics of this connection.
    ///
    /// Default: the telemetry of the runtime that uses the bus, or the global meter provider
    /// without a runtime. Metrics recorded before the runtime starts stay at the global provider.
    #[cfg(feature = "otel")]
    #[must_use]
    pub fn telemetry(mut self, telemetry: &crate::Telemetry) -> Self {
        self.metrics = Some(Metrics::of(telemetry));
        self
    }

    /// The subject names of the bus.
    pub(super) fn names(&self) -> Names {
        Names::new(&self.namespace, &self.subjects)
    }

    /// Refuses options that no connection could work with.
    pub(crate) fn check(&self) -> Result<(), BusError> {
        let invalid = |error: InvalidName| BusError::Incompatible { reason: error.to_string() };
        check_name("NatsOptions::namespace", &self.namespace).map_err(invalid)?;
        check_name("NatsOptions::inbox_prefix", &self.inbox_prefix).map_err(invalid)?;
        self.subjects.check()?;
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

    /// The servers to connect to at this time.
    pub(super) fn servers(&self) -> Result<Vec<ServerAddr>, BusError> {
        let is_set = |url: &String| !url.trim().is_empty();
        let url = self.url.clone().filter(is_set).or_else(|| std::env::var("NATS_URL").ok().filter(is_set));
        let url = url.unwrap_or_else(|| DEFAULT_URL.into());
        // The error includes neither the text nor the parser's error: a URL may have a password in
        // it.
        let unreadable = |reason: &str| BusError::Incompatible { reason: reason.into() };
        if !logins_are_plain(&url) {
            return Err(unreadable(
                "ambiguous login in the URL of the NATS server; percent-escape special characters \
                 of a password (%2C for a comma, %2F for a slash), and start every server with a \
                 login with its scheme",
            ));
        }
        let servers = url.split(',').map(|server| server.trim().parse());
        let servers: Vec<ServerAddr> = servers
            .collect::<Result<_, _>>()
            .map_err(|_| unreadable("invalid URL of the NATS server; use the form nats://host:4222"))?;
        if self.requires_tls(&servers) && servers.iter().any(|server| server.scheme() == "ws") {
            return Err(unreadable("TLS is required, but a ws:// URL has none; use wss://"));
        }
        Ok(servers)
    }

    /// Whether a login may be sent over TLS only.
    /// Certificates require TLS. A TLS URL requires it for all servers: the servers that a server
    /// names have no scheme.
    fn requires_tls(&self, servers: &[ServerAddr]) -> bool {
        let Tls { required, first, roots, client } = &self.tls;
        let asked = *required || *first || !roots.is_empty() || client.is_some();
        asked || servers.iter().any(|server| matches!(server.scheme(), "tls" | "wss"))
    }

    /// The options for async-nats.
    /// `on_event` receives every event of the connection, and must not block.
    pub(super) async fn connect_options(
        &self,
        servers: &[ServerAddr],
        watch: &Watch,
        on_event: impl Fn(Event) + Send + Sync + 'static,
    ) -> Result<ConnectOptions, BusError> {
        let (wait, recorder) = (self.reconnect_wait, watch.clone());
        let mut options = ConnectOptions::new()
            .name(&self.name)
            .custom_inbox_prefix(&self.inbox_prefix)
            .ping_interval(self.ping_interval)
            .connection_timeout(self.connection_timeout)
            .request_timeout(Some(self.answer_timeout))
            .subscription_capacity(self.subscription_capacity)
            .max_reconnects(None)
            .reconnect_delay_callback(move |attempt| {
                // Called before every attempt, including the first.
                recorder.metrics.connecting(recorder.role);
                match attempt {
                    0 | 1 => Duration::ZERO,
                    _ => jitter(wait, 0.2),
                }
            })
            .event_callback(move |event| {
                on_event(event);
                std::future::ready(())
            })
            .require_tls(self.requires_tls(servers));
        if self.tls.first {
            options = options.tls_first();
        }
        // async-nats reads these files itself, without a limit.
        for roots in &self.tls.roots {
            check_file("NatsOptions::root_certificates", roots)?;
            options = options.add_root_certificates(roots.clone());
        }
        if let Some((certificate, key)) = &self.tls.client {
            check_file("NatsOptions::client_certificate", certificate)?;
            check_file("NatsOptions::client_certificate", key)?;
            options = options.add_client_certificate(certificate.clone(), key.clone());
        }
        self.login.add_to(options, servers).await
    }
}

impl fmt::Debug for NatsOptions {
    /// Omits secrets: the URL, which may have a password in it, and the login.
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
