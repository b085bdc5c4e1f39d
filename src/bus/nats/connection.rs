//! The one connection that carries everything, and what is known about it.

mod signals;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::connection::State;
use async_nats::{Client, ConnectErrorKind, Event, ServerInfo, Subscriber};
use futures_util::StreamExt;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

pub(super) use self::signals::Handler;
pub use self::signals::NatsEvent;
use self::signals::Signals;
use super::options::NatsOptions;
use super::recorder::Recorder;
use crate::bus::{BusError, BusState};
use crate::supervised::Task;
use crate::telemetry::{Metrics, Timer};

/// The oldest server that does what we ask of it; older ones ignore in silence what they do not know.
const OLDEST_SERVER: (u64, u64) = (2, 10);

/// How often the connection is looked at, beside being told of its events: async-nats drops events that come too fast.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What a connection has been through. Whoever reads from it compares with what it saw last: another session or more
/// overflows, and something may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) up: bool,
    /// How often it was (re-)established.
    pub(super) sessions: u64,
    /// How often a subscription's buffer was full.
    pub(super) overflows: u64,
    /// Its owner has shut it down.
    pub(super) closed: bool,
}

/// Who is told of a connection's life, and as what.
#[derive(Debug, Clone)]
pub(super) struct Watch {
    pub(super) role: &'static str,
    pub(super) metrics: Recorder,
}

/// A connection to NATS, ours or borrowed.
pub(super) struct Connection {
    pub(super) client: Client,
    /// Whether it is ours to close.
    owned: bool,
    /// The server, as it was given to us, without secrets.
    to: String,
    signals: Arc<Signals>,
    link: watch::Sender<Link>,
    answer_timeout: Duration,
    handler: Handler,
    watch: Watch,
    /// The session whose server is known to be new enough.
    checked: AtomicU64,
    _watcher: Task,
}

impl Connection {
    /// Connects, in one attempt for each server. `state` is told how it goes on.
    pub(super) async fn open(
        options: &NatsOptions,
        state: &watch::Sender<BusState>,
        watch: Watch,
    ) -> Result<Self, BusError> {
        let timer = Timer::start();
        let opened = Self::make(options, state, watch.clone()).await;
        watch.metrics.connected(watch.role, timer, opened.as_ref().err().map(BusError::kind));
        opened
    }

    async fn make(
        options: &NatsOptions,
        state: &watch::Sender<BusState>,
        watch: Watch,
    ) -> Result<Self, BusError> {
        if let Some(client) = &options.client {
            return Self::over(
                client.clone(),
                false,
                "a borrowed connection".into(),
                Arc::default(),
                options,
                state,
                watch,
            );
        }
        let servers = options.servers()?;
        let to: Vec<_> =
            servers.iter().map(|server| format!("{}:{}", server.host(), server.port())).collect();
        let to = to.join(",");
        let signals = Arc::new(Signals::default());
        let (teller, told) = (signals.clone(), watch.clone());
        let tell = move |event| {
            if matches!(event, Event::ServerError(_)) {
                told.metrics.connection_failed(told.role, "server");
            } else if matches!(event, Event::ClientError(_)) {
                told.metrics.connection_failed(told.role, "client");
            }
            teller.tell(event);
        };
        let connect = options.connect_options(&servers, &watch, tell).await?;
        // A name may stand for several addresses, and looking it up has no limit of its own.
        let patience = options.connection_timeout * 2 * u32::try_from(servers.len()).unwrap_or(u32::MAX);
        let client = match timeout(patience, connect.connect(servers)).await {
            Ok(Ok(client)) => client,
            Ok(Err(error)) => {
                return Err(match error.kind() {
                    ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
                        BusError::Incompatible {
                            reason: format!("the NATS server at {to} refuses to let us in: {error}"),
                        }
                    }
                    _ => unavailable(format!("no connection to NATS at {to}"), error),
                });
            }
            Err(_) => return Err(silent(format!("no connection to NATS at {to} within {patience:?}"))),
        };
        Self::over(client, true, to, signals, options, state, watch)
    }

    fn over(
        client: Client,
        owned: bool,
        to: String,
        signals: Arc<Signals>,
        options: &NatsOptions,
        state: &watch::Sender<BusState>,
        watch: Watch,
    ) -> Result<Self, BusError> {
        let up = client.connection_state() == State::Connected;
        if up {
            check_version(&client.server_info(), &to)?;
        }
        let link = watch::Sender::new(Link { up, sessions: 1, overflows: 0, closed: false });
        let mut watcher = Watcher {
            client: client.clone(),
            to: to.clone(),
            signals: signals.clone(),
            link: link.clone(),
            state: state.clone(),
            session: session(&client.server_info()),
            handler: options.handler.clone(),
            watch: watch.clone(),
            told: Told::default(),
        };
        // Whoever has connected finds the state to say so.
        watcher.look();
        Ok(Self {
            client,
            owned,
            to,
            signals,
            link,
            answer_timeout: options.answer_timeout,
            handler: options.handler.clone(),
            watch,
            checked: AtomicU64::new(0),
            _watcher: Task::spawn(watcher.run()),
        })
    }

    pub(super) fn link(&self) -> watch::Receiver<Link> {
        self.link.subscribe()
    }

    /// Whether it is worth handing anything to async-nats now: while it is not connected it would keep what it is given,
    /// and send it whenever it comes back.
    pub(super) fn check(&self) -> Result<(), BusError> {
        let Link { sessions, closed, .. } = *self.link.borrow();
        if closed {
            return Err(BusError::Closed);
        }
        if self.client.connection_state() != State::Connected {
            return Err(silent(disconnected(&self.to, self.signals.error())));
        }
        // Not for each message: what the server says of itself has to be copied for it.
        if self.checked.load(Ordering::Relaxed) != sessions {
            check_version(&self.client.server_info(), &self.to)?;
            self.checked.store(sessions, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Where what happens over it is counted.
    pub(super) fn metrics(&self) -> &Metrics {
        &self.watch.metrics
    }

    /// How long the server may take to answer.
    pub(super) fn answer_timeout(&self) -> Duration {
        self.answer_timeout
    }

    /// Which session of the connection this is.
    pub(super) fn session(&self) -> u64 {
        self.link.borrow().sessions
    }

    /// Whether it is still that session, and up.
    pub(super) fn check_session(&self, session: u64) -> Result<(), BusError> {
        self.check()?;
        if self.session() != session {
            return Err(silent(format!("the connection to NATS at {} was lost and is back", self.to)));
        }
        Ok(())
    }

    /// Does something for as long as the connection lasts.
    pub(super) async fn while_up<T>(
        &self,
        what: &str,
        work: impl Future<Output = Result<T, BusError>>,
    ) -> Result<T, BusError> {
        self.check()?;
        let mut link = self.link();
        let session = link.borrow().sessions;
        tokio::select! {
            biased;
            result = work => result,
            _ = link.wait_for(|link| !link.up || link.closed || link.sessions != session) => {
                Err(silent(format!("{what}: the connection to NATS at {} was lost", self.to)))
            }
        }
    }

    /// Does something that the server answers: for as long as the connection lasts and an answer may take.
    pub(super) async fn ask<T>(
        &self,
        what: &str,
        work: impl Future<Output = Result<T, BusError>>,
    ) -> Result<T, BusError> {
        let patience = self.answer_timeout;
        timeout(patience, self.while_up(what, work)).await.unwrap_or_else(|_| {
            Err(silent(format!("{what}: NATS at {} did not answer within {patience:?}", self.to)))
        })
    }

    /// Ends it: what was given to it goes out first, if that is possible within `patience`.
    pub(super) async fn close(&self, patience: Duration) {
        let mut was_closed = false;
        self.link.send_modify(|link| {
            link.up = false;
            was_closed = std::mem::replace(&mut link.closed, true);
        });
        if !was_closed {
            self.handler.tell(NatsEvent::Closed);
        }
        if !self.owned {
            return;
        }
        let drained = async {
            // An error says that it is gone already.
            if self.client.drain().await.is_ok() {
                while !self.signals.closed.load(Ordering::Relaxed) {
                    sleep(Duration::from_millis(5)).await;
                }
            }
        };
        let (timer, Watch { role, metrics }) = (Timer::start(), &self.watch);
        let late =
            self.client.connection_state() == State::Connected && timeout(patience, drained).await.is_err();
        metrics.closed(role, timer, late.then_some("timeout"));
        if late {
            tracing::warn!(to = self.to, "the connection to NATS did not end in order within {patience:?}");
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("to", &self.to).field("link", &*self.link.borrow()).finish()
    }
}

/// Keeps the link and the state up to date.
struct Watcher {
    client: Client,
    to: String,
    signals: Arc<Signals>,
    link: watch::Sender<Link>,
    state: watch::Sender<BusState>,
    /// The one that was seen last.
    session: (String, u64),
    handler: Handler,
    watch: Watch,
    told: Told,
}

/// What the user's handler knows.
#[derive(Default)]
struct Told {
    up: bool,
    ever: bool,
    overflows: u64,
    lame_ducks: u64,
}

impl Watcher {
    async fn run(mut self) {
        loop {
            self.look();
            tokio::select! {
                () = self.signals.news.notified() => {}
                () = sleep(LOOK_EVERY) => {}
            }
        }
    }

    fn look(&mut self) {
        if self.link.borrow().closed {
            return;
        }
        let up = self.client.connection_state() == State::Connected;
        let info = self.client.server_info();
        let session = session(&info);
        let another = up && session != self.session;
        if another {
            self.session = session;
        }
        let overflows = self.signals.overflows.load(Ordering::Relaxed);
        self.link.send_if_modified(|link| {
            let now = Link { up, sessions: link.sessions + u64::from(another), overflows, ..*link };
            std::mem::replace(link, now) != now
        });
        let lost = || disconnected(&self.to, self.signals.error());
        let state = match check_version(&info, &self.to) {
            _ if !up => BusState::Disconnected { reason: lost() },
            Ok(()) => BusState::Connected { to: format!("nats-server {} at {}", info.version, self.to) },
            Err(error) => BusState::Disconnected { reason: error.to_string() },
        };
        let shown = match &state {
            BusState::Connected { to } => to.clone(),
            _ => self.to.clone(),
        };
        // It may have been away and back since the last look.
        if self.told.up && (!up || another) {
            self.handler.tell(NatsEvent::Disconnected { reason: lost() });
            self.watch.metrics.connection_lost(self.watch.role);
            self.told.up = false;
        }
        if up && !self.told.up {
            if std::mem::replace(&mut self.told.ever, true) {
                self.watch.metrics.reconnected(self.watch.role);
            }
            self.handler.tell(NatsEvent::Connected { to: shown });
            self.told.up = true;
        }
        if overflows > std::mem::replace(&mut self.told.overflows, overflows) {
            self.handler.tell(NatsEvent::SlowConsumer { overflows });
        }
        let lame_ducks = self.signals.lame_ducks.load(Ordering::Relaxed);
        if lame_ducks > std::mem::replace(&mut self.told.lame_ducks, lame_ducks) {
            self.handler.tell(NatsEvent::LameDuck);
        }
        self.state.send_if_modified(|known| {
            let news = *known != state;
            if news && up != matches!(known, BusState::Connected { .. }) {
                tracing::info!(?state, "the connection to NATS");
            }
            *known = state;
            news
        });
    }
}

/// What tells one session from the next.
fn session(info: &ServerInfo) -> (String, u64) {
    (info.server_id.clone(), info.client_id)
}

/// Refuses a server that does not know what we rely on. Again after every reconnect: it may be another one.
fn check_version(info: &ServerInfo, to: &str) -> Result<(), BusError> {
    let mut numbers = info.version.split(['.', '-']).map_while(|number| number.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) if (major, minor) >= OLDEST_SERVER && info.headers => Ok(()),
        _ => Err(BusError::Incompatible {
            reason: format!(
                "the NATS server at {to} has version {:?}{}; storied needs nats-server 2.10 or newer",
                info.version,
                if info.headers { "" } else { " and no headers" },
            ),
        }),
    }
}

fn disconnected(to: &str, error: Option<String>) -> String {
    match error {
        Some(error) => format!("not connected to NATS at {to} ({error}); it is being tried"),
        None => format!("not connected to NATS at {to}; it is being tried"),
    }
}

/// Something that may work later, without an error of the driver behind it.
pub(super) fn silent(reason: String) -> BusError {
    BusError::Unavailable { reason, source: None }
}

/// Something that may work later, because of `source`.
pub(super) fn unavailable(what: String, source: impl std::error::Error + Send + Sync + 'static) -> BusError {
    BusError::Unavailable { reason: format!("{what}: {source}"), source: Some(Arc::new(source)) }
}

/// A question to ourselves, through the server: when its answer is here, the server has everything that we sent before.
/// Neither publishing nor flushing says so much: both only hand over to the socket.
pub(super) struct Echo {
    inbox: String,
    answers: Subscriber,
    asked: u64,
}

impl Echo {
    pub(super) async fn new(client: &Client) -> Result<Self, BusError> {
        let inbox = client.new_inbox();
        let answers = client.subscribe(inbox.clone()).await;
        let answers = answers.map_err(|error| unavailable("subscribing to an inbox".into(), error))?;
        Ok(Self { inbox, answers, asked: 0 })
    }

    /// Waits for the answer, without a limit: within [`Connection::ask`].
    pub(super) async fn round_trip(&mut self, client: &Client) -> Result<(), BusError> {
        self.asked += 1;
        let question = self.asked.to_string();
        client
            .publish(self.inbox.clone(), question.clone().into())
            .await
            .map_err(|error| unavailable("publishing to an inbox".into(), error))?;
        while let Some(answer) = self.answers.next().await {
            // Those to earlier questions that nobody waited for come first.
            if answer.payload == question {
                return Ok(());
            }
        }
        Err(silent("the connection to NATS was closed".into()))
    }
}
