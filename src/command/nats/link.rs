//! The node's own part of the conversation: connect, listen, say who we are, hear who the others are.

use std::sync::Arc;
use std::time::Duration;

use async_nats::{Client, Message, StatusCode, Subscriber};
use futures_util::StreamExt;
use tokio::time::{Instant, sleep, sleep_until};

use super::Shared;
use super::calls::Heard;
use super::presence::{BYTES, Presence};
use super::serve::serve;
use crate::backoff::Backoff;
use crate::bus::{BusError, Line, OpenLine};
use crate::codec::{from_cbor, to_cbor};
use crate::command::wire::{FORMAT, Kind, Reply, Sent};
use crate::rate_limit::LogLimit;
use crate::supervised::Task;

/// How long after a connect the others have answered as a rule.
const GREETING: Duration = Duration::from_millis(250);

/// Whoever asks who is there is answered at once, but not more often than this.
const ANSWER: Duration = Duration::from_millis(20);

/// The connection, as whoever sends a command needs to know it.
#[derive(Debug, Clone)]
pub(super) enum Link {
    Down {
        reason: String,
    },
    Up {
        line: OpenLine,
        /// What the subjects of replies begin with.
        inbox: Arc<str>,
        /// The how-manieth connection: replies may have been lost with the one before.
        session: u64,
        /// What is known of the others.
        others: Others,
    },
}

/// What is known of the other nodes since there is a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Others {
    /// They were asked who they are.
    Asked,
    /// They have had the time to answer, if they are as quick as usual.
    Greeted,
    /// Whoever was not heard by now is not there.
    Known,
}

impl Link {
    /// Whether it is worth giving commands to others.
    pub(super) fn is_settled(&self) -> bool {
        matches!(self, Link::Up { others: Others::Greeted | Others::Known, .. })
    }

    /// The session, if there is one.
    pub(super) fn session(&self) -> Option<u64> {
        match self {
            Link::Up { session, .. } => Some(*session),
            Link::Down { .. } => None,
        }
    }
}

/// What a node listens to, for as long as it lives: async-nats subscribes again after an outage.
struct Ears {
    presence: Subscriber,
    _commands: Task,
    _replies: Task,
    inbox: Arc<str>,
}

/// Keeps the node in touch with the others, until its connection is closed.
pub(super) async fn run(shared: Arc<Shared>, line: Arc<Line>) {
    let down = |error: BusError| _ = shared.link.send_replace(Link::Down { reason: error.to_string() });
    // Everybody is back before the others give up looking for them.
    let longest = (shared.beat * 2).min(Duration::from_secs(2));
    let mut backoff = Backoff::new(longest.min(Duration::from_millis(100)), longest);
    let mut outage = false;
    let (line, mut ears, mut since) = loop {
        let opened = async {
            let line = line.open().await?;
            let since = line.errors();
            let ears = listen(&shared, &line).await?;
            Ok((line, ears, since))
        };
        match opened.await {
            Ok(open) => break open,
            Err(BusError::Closed) => return,
            Err(error) => down(error),
        }
        outage = true;
        sleep(backoff.next()).await;
    };
    loop {
        let mut watch = line.watch();
        let state = watch.until(|state| state.up || state.closed).await;
        if state.closed {
            return;
        }
        let own = [shared.subjects.presence(), shared.subjects.node(shared.incarnation)];
        match line.confirm("joining the other nodes", since, &own).await {
            Ok(()) => backoff.succeeded(),
            Err(error) => {
                let refused = matches!(error, BusError::Incompatible { .. });
                down(error);
                sleep(backoff.next()).await;
                if refused {
                    // The server has forgotten a subscription that it refused, also if it would accept it now.
                    since = line.errors();
                    match listen(&shared, &line).await {
                        Ok(subscribed) => ears = subscribed,
                        Err(error) => down(error),
                    }
                }
                continue;
            }
        }
        shared.table.listening();
        let up = |others| {
            let (line, inbox, session) = (line.clone(), ears.inbox.clone(), state.session);
            shared.link.send_replace(Link::Up { line, inbox, session, others })
        };
        up(Others::Asked);
        announce(&shared, line.client(), true).await;
        let connected = Instant::now();
        // At a start the others are there, or are not; behind an outage they come back one by one.
        let known = if outage { shared.silence() } else { shared.beat * 3 / 2 }.max(GREETING * 2);
        outage = true;
        let mut next = Some((connected + GREETING, Others::Greeted));
        let mut beats = tokio::time::interval(shared.beat);
        beats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        beats.reset();
        let mut malformed = LogLimit::each_minute();
        // Beside the beats: many who ask must not put them off.
        let mut answer_at = None;
        let mut draining = shared.draining.subscribe();
        loop {
            tokio::select! {
                now = watch.until(|now| now != state) => {
                    // Whatever else has changed, this session is over.
                    let _ = now;
                    break;
                }
                message = ears.presence.next() => match message {
                    Some(message) => if heard(&shared, &message, &mut malformed) {
                        answer_at.get_or_insert_with(|| Instant::now() + ANSWER.min(shared.beat));
                    },
                    None => return,
                },
                () = sleep_until(answer_at.unwrap_or(connected)), if answer_at.is_some() => {
                    answer_at = None;
                    announce(&shared, line.client(), false).await;
                }
                _ = draining.changed() => announce(&shared, line.client(), false).await,
                _ = beats.tick() => {
                    announce(&shared, line.client(), false).await;
                    shared.table.sweep(shared.silence());
                }
                () = sleep_until(next.map_or(connected, |(at, _)| at)), if next.is_some() => {
                    if let Some((_, others)) = next {
                        up(others);
                        let known = (connected + known, Others::Known);
                        next = (others == Others::Greeted).then_some(known);
                    }
                }
            }
        }
        // Errors of a session end with it.
        since = 0;
        let reason = "the connection to NATS was lost; it is being tried".into();
        shared.link.send_replace(Link::Down { reason });
    }
}

async fn listen(shared: &Arc<Shared>, line: &OpenLine) -> Result<Ears, BusError> {
    let client = line.client();
    let subscribe = async |subject: String| {
        let subscribed = client.subscribe(subject.clone()).await;
        subscribed.map_err(|error| BusError::Unavailable {
            reason: format!("subscribing to {subject}: {error}"),
            source: Some(Arc::new(error)),
        })
    };
    let presence = subscribe(shared.subjects.presence()).await?;
    let commands = subscribe(shared.subjects.node(shared.incarnation)).await?;
    let inbox: Arc<str> = client.new_inbox().into();
    let replies = subscribe(format!("{inbox}.*")).await?;
    Ok(Ears {
        presence,
        _commands: Task::spawn(serve(shared.clone(), line.clone(), commands)),
        _replies: Task::spawn(hear(shared.clone(), replies)),
        inbox,
    })
}

/// Says who we are. A beat that is lost is made up for by the next.
async fn announce(shared: &Shared, client: &Client, ask: bool) {
    let Some(commands) = shared.commands.upgrade() else { return };
    let names = |kind| commands.registry().names(kind).map(str::to_owned).collect();
    let presence = Presence {
        format: FORMAT,
        node: shared.name.clone(),
        incarnation: shared.incarnation,
        store: shared.store,
        aggregates: names(Kind::Aggregate),
        handlers: names(Kind::Handler),
        draining: *shared.draining.borrow(),
        ask,
        clock: Some(shared.clock()),
    };
    let sent = match to_cbor(&presence) {
        Ok(frame) if frame.len() > BYTES || !presence.fits() => Err(format!(
            "{} aggregates and handlers, {} bytes (limit {BYTES} bytes); use fewer or shorter names",
            presence.aggregates.len() + presence.handlers.len(),
            frame.len()
        )),
        Ok(frame) => {
            client.publish(shared.subjects.presence(), frame.into()).await.map_err(|e| e.to_string())
        }
        Err(error) => Err(error.to_string()),
    };
    if let Err(error) = sent {
        tracing::warn!(error, "the other nodes cannot be told that this one is here");
    }
}

/// Hears who somebody is; whether they want to know who we are.
fn heard(shared: &Shared, message: &Message, malformed: &mut LogLimit) -> bool {
    let bytes = message.payload.len();
    let decoded = match bytes <= BYTES {
        true => from_cbor::<Presence>(&message.payload).map_err(|error| error.to_string()),
        false => Err(format!("{bytes} bytes (limit {BYTES})")),
    };
    match decoded {
        Ok(presence) if !presence.fits() => false,
        Ok(presence) if presence.incarnation == shared.incarnation => false,
        // Another store's aggregates are other aggregates.
        Ok(presence) if presence.store != shared.store || presence.format != FORMAT => false,
        Ok(presence) => {
            let ask = presence.ask;
            if let Some(clock) = presence.clock {
                let period = u64::try_from(shared.beat.as_millis()).unwrap_or(u64::MAX).saturating_mul(10);
                shared.clocks.observe(Sent { node: presence.incarnation, clock }, shared.clock(), period);
            }
            shared.table.heard(presence);
            ask
        }
        Err(error) => {
            if let Some(so_far) = malformed.count() {
                tracing::warn!(subject = %message.subject, error, so_far, "ignoring malformed presence messages");
            }
            false
        }
    }
}

/// Passes replies on to whoever waits for them.
async fn hear(shared: Arc<Shared>, mut replies: Subscriber) {
    let mut malformed = LogLimit::each_minute();
    while let Some(message) = replies.next().await {
        let Some(token) = message.subject.rsplit('.').next().and_then(|token| token.parse().ok()) else {
            continue;
        };
        if message.status == Some(StatusCode::NO_RESPONDERS) {
            shared.calls.deliver(token, Heard::Nobody);
            continue;
        }
        match from_cbor::<Reply>(&message.payload) {
            Ok(mut reply) => {
                reply.says.of_another();
                shared.calls.deliver(token, Heard::Reply(Box::new(reply)));
            }
            Err(error) => {
                if let Some(so_far) = malformed.count() {
                    tracing::warn!(error, so_far, "ignoring malformed replies");
                }
            }
        }
    }
}
