//! Updates the state of a connection and reports changes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::Client;
use async_nats::connection::State;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::super::connection_metrics::Watch;
use super::super::events::{Handler, NatsEvent};
use super::link::Link;
use super::server::{check_version, disconnected, session};
use super::signals::Signals;
use crate::bus::BusState;

/// Poll interval of the connection state. Needed because async-nats drops events under load.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Minimum interval between two log lines about the server's errors.
const LOG_EVERY: Duration = Duration::from_secs(1);

/// A task that updates the link and the state of a connection.
pub(super) struct Watcher {
    pub(super) client: Client,
    pub(super) to: String,
    pub(super) signals: Arc<Signals>,
    pub(super) link: watch::Sender<Link>,
    pub(super) state: watch::Sender<BusState>,
    /// Identity of the last seen session.
    pub(super) session: (String, u64),
    pub(super) handler: Handler,
    pub(super) watch: Watch,
    pub(super) reported: Reported,
}

/// Values last reported to the user's handler.
#[derive(Default)]
pub(super) struct Reported {
    up: bool,
    ever: bool,
    overflows: u64,
    lame_ducks: u64,
    /// Number of the last reported server error, and the time of the report.
    server_errors: u64,
    reported_at: Option<Instant>,
    /// Number of server errors not logged yet, the last of them, and the time of the last log line.
    unlogged: u64,
    last_error: String,
    logged_at: Option<Instant>,
}

impl Watcher {
    pub(super) async fn run(mut self) {
        loop {
            self.poll();
            tokio::select! {
                () = self.signals.news.notified() => {}
                () = sleep(POLL_INTERVAL) => {}
            }
        }
    }

    pub(super) fn poll(&mut self) {
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
            Ok(()) => BusState::Connected {
                to: format!("nats-server {} at {}", info.version, self.to),
                last_error: self.signals.server_errors.last(),
            },
            Err(error) => BusState::Disconnected { reason: error.to_string() },
        };
        let shown = match &state {
            BusState::Connected { to, .. } => to.clone(),
            _ => self.to.clone(),
        };
        // The connection may have been lost and reestablished since the last poll.
        if self.reported.up && (!up || another) {
            self.handler.emit(NatsEvent::Disconnected { reason: lost() });
            self.watch.metrics.connection_lost(self.watch.role);
            self.reported.up = false;
        }
        if up && !self.reported.up {
            if std::mem::replace(&mut self.reported.ever, true) {
                self.watch.metrics.reconnected(self.watch.role);
            }
            self.handler.emit(NatsEvent::Connected { to: shown });
            self.reported.up = true;
        }
        if overflows > std::mem::replace(&mut self.reported.overflows, overflows) {
            self.handler.emit(NatsEvent::SlowConsumer { overflows });
        }
        self.report_server_errors();
        let lame_ducks = self.signals.lame_ducks.load(Ordering::Relaxed);
        if lame_ducks > std::mem::replace(&mut self.reported.lame_ducks, lame_ducks) {
            self.handler.emit(NatsEvent::LameDuck);
        }
        self.state.send_if_modified(|known| {
            let news = *known != state;
            if news && up != matches!(known, BusState::Connected { .. }) {
                tracing::info!(?state, "changed the state of the connection to NATS");
            }
            *known = state;
            news
        });
    }

    /// Reports the server's asynchronous errors: each text once per report, at a bounded rate.
    fn report_server_errors(&mut self) {
        let now = Instant::now();
        let due = |last: Option<Instant>, every| last.is_none_or(|last| now.duration_since(last) >= every);
        let (errors, count) = (&self.signals.server_errors, self.signals.server_errors.count());
        let Reported { server_errors, reported_at, unlogged, last_error, logged_at, .. } = &mut self.reported;
        if count > *server_errors && due(*reported_at, POLL_INTERVAL) {
            let sentences = errors.after(*server_errors);
            *unlogged += count - *server_errors;
            *server_errors = count;
            *reported_at = Some(now);
            if let Some(last) = sentences.last() {
                last_error.clone_from(last);
            }
            for error in BTreeSet::from_iter(sentences) {
                self.handler.emit(NatsEvent::ServerError { error });
            }
        }
        if *unlogged > 0 && due(*logged_at, LOG_EVERY) {
            tracing::warn!(
                to = self.to,
                error = last_error,
                errors = *unlogged,
                "received errors from the NATS server"
            );
            *unlogged = 0;
            *logged_at = Some(now);
        }
    }
}
