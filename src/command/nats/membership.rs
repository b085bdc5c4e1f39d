//! Membership: connects, subscribes, announces this node and receives the presence of others.

use std::sync::Arc;
use std::time::Duration;

use async_nats::{Client, Message, StatusCode, Subscriber};
use futures_util::StreamExt;
use tokio::time::{Instant, sleep, sleep_until};

use super::cluster_link::{ClusterLink, PeerDiscovery};
use super::peer_table::{BYTES, Presence};
use super::pending_replies::ReplyEvent;
use super::server::serve;
use super::shared::Shared;
use crate::backoff::Backoff;
use crate::bus::{BusError, CommandConnection, SharedConnection};
use crate::codec::{from_cbor, to_cbor};
use crate::command::wire::{FORMAT, Kind, Reply, Sent};
use crate::rate_limit::LogLimit;
use crate::supervised::Task;

/// Usual time after a connect until the other nodes have answered.
const GREETING: Duration = Duration::from_millis(250);

/// Minimum delay before the answer to a request for presence. It merges several requests.
const ANSWER: Duration = Duration::from_millis(20);

/// The subscriptions of the node. async-nats restores them after an outage.
struct Subscriptions {
    presence: Subscriber,
    _commands: Task,
    _replies: Task,
    inbox: Arc<str>,
}

/// Runs the membership of the node until its connection is closed.
pub(super) async fn run(shared: Arc<Shared>, connection: Arc<SharedConnection>) {
    // The backoff is short enough that a node reconnects before the others count it as lost.
    let longest = (shared.beat * 2).min(Duration::from_secs(2));
    let mut backoff = Backoff::new(longest.min(Duration::from_millis(100)), longest);
    let mut outage = false;
    let (connection, mut ears, mut since) = loop {
        match connect(&shared, &connection).await {
            Ok(open) => break open,
            Err(BusError::Closed) => return,
            Err(error) => report_down(&shared, &error),
        }
        outage = true;
        sleep(backoff.next()).await;
    };
    loop {
        let mut watch = connection.watch();
        let state = watch.until(|state| state.up || state.closed).await;
        if state.closed {
            return;
        }
        if !confirm(&shared, &connection, &mut ears, &mut since, &mut backoff).await {
            continue;
        }
        shared.table.listening();
        let up = |others| {
            let (connection, inbox, session) = (connection.clone(), ears.inbox.clone(), state.session);
            shared.link.send_replace(ClusterLink::Up { connection, inbox, session, others })
        };
        up(PeerDiscovery::Asked);
        broadcast_presence(&shared, connection.client(), true).await;
        let connected = Instant::now();
        // At a start, the other nodes are either present or not. After an outage, they come back
        // one by one.
        let known = if outage { shared.silence() } else { shared.beat * 3 / 2 }.max(GREETING * 2);
        outage = true;
        let mut next = Some((connected + GREETING, PeerDiscovery::Greeted));
        let mut beats = tokio::time::interval(shared.beat);
        beats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        beats.reset();
        let mut malformed = LogLimit::each_minute();
        // Separate timer: frequent requests must not delay heartbeats.
        let mut answer_at = None;
        let mut draining = shared.draining.subscribe();
        loop {
            tokio::select! {
                now = watch.until(|now| now != state) => {
                    // Any change of the state ends this session.
                    let _ = now;
                    break;
                }
                message = ears.presence.next() => match message {
                    Some(message) => if upsert(&shared, &message, &mut malformed) {
                        answer_at.get_or_insert_with(|| Instant::now() + ANSWER.min(shared.beat));
                    },
                    None => return,
                },
                () = sleep_until(answer_at.unwrap_or(connected)), if answer_at.is_some() => {
                    answer_at = None;
                    broadcast_presence(&shared, connection.client(), false).await;
                }
                _ = draining.changed() => broadcast_presence(&shared, connection.client(), false).await,
                _ = beats.tick() => {
                    broadcast_presence(&shared, connection.client(), false).await;
                    shared.table.evict_silent(shared.silence());
                }
                () = sleep_until(next.map_or(connected, |(at, _)| at)), if next.is_some() => {
                    if let Some((_, others)) = next {
                        up(others);
                        let known = (connected + known, PeerDiscovery::Known);
                        next = (others == PeerDiscovery::Greeted).then_some(known);
                    }
                }
            }
        }
        // Errors belong to one session: start from zero in the next.
        since = 0;
        let reason = "the connection to NATS is lost; retrying".into();
        shared.link.send_replace(ClusterLink::Down { reason });
    }
}

/// Reports the connection as down to the senders of commands.
fn report_down(shared: &Shared, error: &BusError) {
    shared.link.send_replace(ClusterLink::Down { reason: error.to_string() });
}

/// Connects and subscribes. Also returns the number of errors before the subscriptions.
async fn connect(
    shared: &Arc<Shared>,
    connection: &SharedConnection,
) -> Result<(CommandConnection, Subscriptions, u64), BusError> {
    let connection = connection.open().await?;
    let since = connection.errors();
    let ears = listen(shared, &connection).await?;
    Ok((connection, ears, since))
}

/// Confirms the subscriptions with the server. Returns whether it has accepted them.
///
/// Otherwise waits for the backoff and replaces refused subscriptions.
async fn confirm(
    shared: &Arc<Shared>,
    connection: &CommandConnection,
    ears: &mut Subscriptions,
    since: &mut u64,
    backoff: &mut Backoff,
) -> bool {
    let own = [shared.subjects.presence(), shared.subjects.node(shared.incarnation)];
    let Err(error) = connection.confirm("joining the other nodes", *since, &own).await else {
        backoff.succeeded();
        return true;
    };
    let refused = matches!(error, BusError::Incompatible { .. });
    report_down(shared, &error);
    sleep(backoff.next()).await;
    if refused {
        // The server drops a refused subscription, even if it would accept it now: subscribe again.
        *since = connection.errors();
        match listen(shared, connection).await {
            Ok(subscribed) => *ears = subscribed,
            Err(error) => report_down(shared, &error),
        }
    }
    false
}

async fn listen(shared: &Arc<Shared>, connection: &CommandConnection) -> Result<Subscriptions, BusError> {
    let client = connection.client();
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
    Ok(Subscriptions {
        presence,
        _commands: Task::spawn(serve(shared.clone(), connection.clone(), commands)),
        _replies: Task::spawn(receive_replies(shared.clone(), replies)),
        inbox,
    })
}

/// Publishes the presence of this node. The next heartbeat replaces a lost one.
async fn broadcast_presence(shared: &Shared, client: &Client, ask: bool) {
    let Some(registry) = shared.registry.upgrade() else { return };
    let names = |kind| registry.names(kind).map(str::to_owned).collect();
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
        tracing::warn!(error, "could not publish the presence of this node");
    }
}

/// Handles a presence message. Returns whether its sender requests this node's presence.
fn upsert(shared: &Shared, message: &Message, malformed: &mut LogLimit) -> bool {
    let bytes = message.payload.len();
    let decoded = match bytes <= BYTES {
        true => from_cbor::<Presence>(&message.payload).map_err(|error| error.to_string()),
        false => Err(format!("{bytes} bytes (limit {BYTES} bytes)")),
    };
    match decoded {
        Ok(presence) if !presence.fits() => false,
        Ok(presence) if presence.incarnation == shared.incarnation => false,
        // Nodes of another store have other aggregates.
        Ok(presence) if presence.store != shared.store || presence.format != FORMAT => false,
        Ok(presence) => {
            let ask = presence.ask;
            if let Some(clock) = presence.clock {
                let period = u64::try_from(shared.beat.as_millis()).unwrap_or(u64::MAX).saturating_mul(10);
                shared.clocks.observe(Sent { node: presence.incarnation, clock }, shared.clock(), period);
            }
            shared.table.upsert(presence);
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

/// Delivers replies to the commands that wait for them.
async fn receive_replies(shared: Arc<Shared>, mut replies: Subscriber) {
    let mut malformed = LogLimit::each_minute();
    while let Some(message) = replies.next().await {
        let Some(token) = message.subject.rsplit('.').next().and_then(|token| token.parse().ok()) else {
            continue;
        };
        if message.status == Some(StatusCode::NO_RESPONDERS) {
            shared.calls.deliver(token, ReplyEvent::NoResponders);
            continue;
        }
        match from_cbor::<Reply>(&message.payload) {
            Ok(mut reply) => {
                reply.says.of_another();
                shared.calls.deliver(token, ReplyEvent::Reply(Box::new(reply)));
            }
            Err(error) => {
                if let Some(so_far) = malformed.count() {
                    tracing::warn!(error, so_far, "ignoring malformed replies");
                }
            }
        }
    }
}
