//! The one connection of a bus, and its state.

mod echo;
mod link;
mod server;
mod server_errors;
mod signals;
mod watcher;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::connection::State;
use async_nats::{Client, ConnectErrorKind, Event};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

pub(super) use self::echo::{Echo, PublishProof};
pub(super) use self::link::Link;
use self::server::{check_version, disconnected, session};
use self::signals::Signals;
use self::watcher::{Reported, Watcher};
use super::connection_metrics::Watch;
use super::errors::{silent, unavailable};
use super::events::{Handler, NatsEvent};
use super::options::NatsOptions;
use crate::bus::{BusError, BusState};
use crate::event::Position;
use crate::notice::with_notice;
use crate::supervised::Task;
use crate::telemetry::{Metrics, Timer};
use crate::time::FAR;

/// Time that async-nats may take to forward an error that the server sent before an answer.
/// The error arrives through another task.
const LAG: Duration = Duration::from_millis(10);

/// Time limit for the server's error about a refused message.
const SENTENCE: Duration = Duration::from_millis(500);

/// A connection to NATS, owned or borrowed.
pub(super) struct Connection {
    pub(super) client: Client,
    /// Whether the bus owns the connection and closes it.
    owned: bool,
    /// Addresses of the servers, as configured, without secrets.
    to: String,
    signals: Arc<Signals>,
    link: watch::Sender<Link>,
    answer_timeout: Duration,
    handler: Handler,
    watch: Watch,
    /// Session whose server version was checked.
    checked: AtomicU64,
    /// Position before the first event that the server refused to publish over Core.
    refused_after: Mutex<Option<Position>>,
    _watcher: Task,
}

impl Connection {
    /// Connects, with one attempt per server. `state` receives the later state changes.
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
                Arc::new(Signals::new(&options.inbox_prefix)),
                options,
                state,
                watch,
            );
        }
        let servers = options.servers()?;
        let to: Vec<_> =
            servers.iter().map(|server| format!("{}:{}", server.host(), server.port())).collect();
        let to = to.join(",");
        let signals = Arc::new(Signals::new(&options.inbox_prefix));
        let (collector, recorder) = (signals.clone(), watch.clone());
        let on_event = move |event| {
            if matches!(event, Event::ServerError(_)) {
                recorder.metrics.connection_failed(recorder.role, "server");
            } else if matches!(event, Event::ClientError(_)) {
                recorder.metrics.connection_failed(recorder.role, "client");
            }
            collector.record(event);
        };
        let connect = options.connect_options(&servers, &watch, on_event).await?;
        // A name may resolve to several addresses, and the resolution has no timeout of its own.
        let patience = options
            .connection_timeout
            .saturating_mul(2)
            .saturating_mul(u32::try_from(servers.len()).unwrap_or(u32::MAX));
        let connecting = timeout(patience.min(FAR), connect.connect(servers));
        let what = format!("connecting to NATS at {to}");
        let client = match with_notice(&what, patience, || None, connecting).await {
            Ok(Ok(client)) => client,
            Ok(Err(error)) => {
                return Err(match error.kind() {
                    ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
                        BusError::Incompatible {
                            reason: format!("the NATS server at {to} refuses the login: {error}"),
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
            reported: Reported::default(),
        };
        // After connecting, the caller must see the connected state.
        watcher.poll();
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
            refused_after: Mutex::default(),
            _watcher: Task::spawn(watcher.run()),
        })
    }

    pub(super) fn link(&self) -> watch::Receiver<Link> {
        self.link.subscribe()
    }

    /// Checks that the connection is up.
    /// While disconnected, async-nats would queue a message and send it after the reconnect.
    pub(super) fn check(&self) -> Result<(), BusError> {
        let Link { sessions, closed, .. } = *self.link.borrow();
        if closed {
            return Err(BusError::Closed);
        }
        if self.client.connection_state() != State::Connected {
            return Err(silent(disconnected(&self.to, self.signals.error())));
        }
        // Not for each message: reading the server info copies it.
        if self.checked.load(Ordering::Relaxed) != sessions {
            check_version(&self.client.server_info(), &self.to)?;
            self.checked.store(sessions, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The metrics of the connection.
    pub(super) fn metrics(&self) -> &Metrics {
        &self.watch.metrics
    }

    /// Time limit for an answer of the server.
    pub(super) fn answer_timeout(&self) -> Duration {
        self.answer_timeout
    }

    /// Number of the current session.
    pub(super) fn session(&self) -> u64 {
        self.link.borrow().sessions
    }

    /// Checks that the connection is up and in this session.
    pub(super) fn check_session(&self, session: u64) -> Result<(), BusError> {
        self.check()?;
        if self.session() != session {
            return Err(silent(format!("the connection to NATS at {} was lost and reestablished", self.to)));
        }
        Ok(())
    }

    /// Runs `work` while the connection lasts and the server refuses no inbox and none of
    /// `subjects`.
    ///
    /// `subjects` are patterns.
    pub(super) async fn while_permitted<T>(
        &self,
        what: &str,
        subjects: &[String],
        work: impl Future<Output = Result<T, BusError>>,
    ) -> Result<T, BusError> {
        self.check()?;
        let mut link = self.link();
        let session = link.borrow().sessions;
        let errors = &self.signals.server_errors;
        let since = errors.count();
        let requests = subjects.iter().any(|subject| subject.starts_with("$JS."));
        if let Some(sentence) = errors.no_answers().filter(|_| requests) {
            return Err(refused(what, &sentence));
        }
        let result = tokio::select! {
            biased;
            result = work => result,
            sentence = errors.refused(since, subjects) => Err(refused(what, &sentence)),
            _ = link.wait_for(|link| !link.up || link.closed || link.sessions != session) => {
                Err(silent(format!("{what}: the connection to NATS at {} was lost", self.to)))
            }
        };
        match result {
            Ok(done) => match errors.refusal(since, subjects) {
                Some(sentence) => Err(refused(what, &sentence)),
                None => Ok(done),
            },
            Err(error) => Err(self.explained(what, subjects, since, error)),
        }
    }

    /// Runs a request while the connection lasts, within the answer timeout.
    pub(super) async fn ask<T>(
        &self,
        what: &str,
        work: impl Future<Output = Result<T, BusError>>,
    ) -> Result<T, BusError> {
        self.ask_permitted(what, &[], work).await
    }

    /// As [`ask`](Self::ask), while the server refuses no inbox and none of `subjects` (patterns).
    pub(super) async fn ask_permitted<T>(
        &self,
        what: &str,
        subjects: &[String],
        work: impl Future<Output = Result<T, BusError>>,
    ) -> Result<T, BusError> {
        let (patience, since) = (self.answer_timeout, self.signals.server_errors.count());
        let done = timeout(patience, self.while_permitted(what, subjects, work)).await;
        done.unwrap_or_else(|_| {
            let reason = format!("{what}: NATS at {} did not answer within {patience:?}", self.to);
            Err(self.explained(what, subjects, since, silent(reason)))
        })
    }

    /// Adds the server's errors to `error`.
    /// The server refuses the inbox of requests once per session, before `since`.
    fn explained(&self, what: &str, subjects: &[String], since: u64, error: BusError) -> BusError {
        let errors = &self.signals.server_errors;
        match error {
            BusError::Unavailable { reason, source } => match errors.refusal(0, subjects) {
                Some(sentence) => refused(what, &sentence),
                None => match errors.after(since).last() {
                    Some(reported) => BusError::Unavailable {
                        reason: format!("{reason}; the server reported: {reported}"),
                        source,
                    },
                    None => BusError::Unavailable { reason, source },
                },
            },
            error => error,
        }
    }

    /// Returns the refusal of one of `subjects` after error number `since`, if there is one.
    ///
    /// Call it after an answer: it waits for the errors that the server sent before the answer.
    pub(super) async fn check_refusals(
        &self,
        what: &str,
        subjects: &[String],
        since: u64,
    ) -> Result<(), BusError> {
        match timeout(LAG, self.signals.server_errors.refused(since, subjects)).await {
            Ok(sentence) => Err(refused(what, &sentence)),
            Err(_) => Ok(()),
        }
    }

    /// Number of errors that the server has reported asynchronously.
    pub(super) fn errors(&self) -> u64 {
        self.signals.server_errors.count()
    }

    /// Waits until the server refuses one of `subjects` (patterns), after error number `since`.
    /// Cancel-safe.
    pub(super) async fn refused(&self, what: &str, since: u64, subjects: &[String]) -> BusError {
        refused(what, &self.signals.server_errors.refused(since, subjects).await)
    }

    /// Determines why a message to this subject did not return.
    pub(super) async fn not_carried(&self, what: &str, since: u64, subject: String) -> BusError {
        let subjects = [subject];
        match timeout(SENTENCE, self.signals.server_errors.refused(since, &subjects)).await {
            Ok(sentence) => refused(what, &sentence),
            Err(_) => BusError::Incompatible {
                reason: format!(
                    "{what}: the NATS server did not deliver a message to {}; grant this login \
                     publish and subscribe on it",
                    subjects[0]
                ),
            },
        }
    }

    /// Position before the first refused event, if no later event was published.
    pub(super) fn refused_after(&self) -> Option<Position> {
        *self.refused_after.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_refused_after(&self, position: Option<Position>) {
        *self.refused_after.lock().unwrap_or_else(PoisonError::into_inner) = position;
    }

    /// Closes the connection, and sends pending messages first, within `patience`.
    pub(super) async fn close(&self, patience: Duration) {
        let mut was_closed = false;
        self.link.send_modify(|link| {
            link.up = false;
            was_closed = std::mem::replace(&mut link.closed, true);
        });
        if !was_closed {
            self.handler.emit(NatsEvent::Closed);
        }
        if !self.owned {
            return;
        }
        let drained = async {
            // An error means that the connection is closed already.
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
            tracing::warn!(to = self.to, "aborting the connection to NATS: not drained within {patience:?}");
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("to", &self.to).field("link", &*self.link.borrow()).finish()
    }
}

/// Creates the error for a missing permission. An operator has to grant it.
fn refused(what: &str, sentence: &str) -> BusError {
    BusError::Incompatible {
        reason: format!("{what}: the NATS server refuses: {sentence}; grant this login the right"),
    }
}
