//! The server side: executes commands of other nodes.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use async_nats::{Message, Subject, Subscriber};
use futures_util::{FutureExt, StreamExt};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout_at};

use super::shared::Shared;
use crate::bus::CommandConnection;
use crate::codec::{from_cbor, to_cbor};
use crate::command::endpoint::Answering;
use crate::command::envelope::Deadline;
use crate::command::wire::{Answered, Code, CommandFrame, FORMAT, Failure, Outcome, Reply, ReplyKind};
use crate::panic::panic_text;
use crate::rate_limit::LogLimit;
use crate::time::after;

/// Delay of the acceptance reply to a non-ack_on_accept command. An earlier answer replaces it.
const ACCEPTED: Duration = Duration::from_millis(50);

/// Receives commands until the connection ends.
pub(super) async fn serve(shared: Arc<Shared>, connection: CommandConnection, mut commands: Subscriber) {
    let mut malformed = LogLimit::each_minute();
    while let Some(message) = commands.next().await {
        let Message { reply: Some(reply), payload, .. } = message else {
            if let Some(so_far) = malformed.count() {
                tracing::warn!(so_far, "ignoring commands without a reply subject");
            }
            continue;
        };
        let answerer = Answerer { shared: shared.clone(), connection: connection.clone(), to: reply };
        let frame: CommandFrame = match from_cbor(&payload) {
            Ok(frame) => frame,
            Err(error) => {
                let reason = format!("the command does not decode: {error}");
                answerer.refuse(Failure::new(Code::Refused, reason)).await;
                continue;
            }
        };
        let deadline = deadline(&shared, &frame);
        // Refuse a command without a permit at once: waiting here would block all later commands.
        match shared.permits.clone().try_acquire_owned() {
            Ok(permit) => _ = tokio::spawn(execute(answerer, frame, deadline, permit)),
            Err(_) => {
                let number = shared.limit as u64;
                let failure = Failure::new(Code::Overloaded, "commands of other nodes");
                answerer.refuse(Failure { number, ..failure }).await;
            }
        }
    }
}

/// The sender of replies to one command.
struct Answerer {
    shared: Arc<Shared>,
    connection: CommandConnection,
    to: Subject,
}

impl Answerer {
    /// Sends a reply. If it is lost, the waiting node sends the command again.
    async fn say(&self, says: ReplyKind) {
        // async-nats would queue the reply until after the outage.
        if self.connection.check().is_err() {
            return;
        }
        let reply = Reply { format: FORMAT, incarnation: self.shared.incarnation, says };
        let limit = self.connection.client().max_payload();
        let sent = match to_cbor(&reply) {
            Ok(frame) if frame.len() > limit => {
                to_cbor(&Reply { says: reply.says.shortened(frame.len(), limit), ..reply })
            }
            other => other,
        };
        let sent = match sent {
            Ok(frame) => {
                let published = self.connection.client().publish(self.to.clone(), frame.into()).await;
                published.map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = sent {
            tracing::warn!(error, "could not reply to a command of another node");
        }
    }

    async fn refuse(&self, mut failure: Failure) {
        failure.message = format!("{} (on node {})", failure.message, self.shared.name);
        self.say(ReplyKind::Refused(failure)).await;
    }
}

/// Computes the local deadline of a received frame.
///
/// It is the time left at sending, minus the transit time.
fn deadline(shared: &Shared, frame: &CommandFrame) -> Deadline {
    let Some(left) = frame.left else { return Deadline::never() };
    let delay = frame.sent.map_or(Duration::ZERO, |sent| shared.clocks.delay(sent, shared.clock()));
    Deadline::after(Duration::from_millis(left).saturating_sub(delay))
}

/// Passes a command to the endpoint that handles it on this node, or refuses it.
pub(super) async fn take(
    shared: &Shared,
    frame: CommandFrame,
    deadline: Deadline,
    admit_by: Instant,
) -> Result<Answering, Failure> {
    if frame.format != FORMAT {
        let reason = format!("unsupported wire format {}: supported format {FORMAT}", frame.format);
        return Err(Failure::new(Code::Refused, reason));
    }
    // NATS may deliver late. The caller no longer waits then.
    if deadline.is_over() {
        return Err(Failure::new(
            Code::Refused,
            "the command arrived after its deadline, according to its transit time",
        ));
    }
    let Some(registry) = shared.registry.upgrade() else {
        return Err(Failure::new(Code::ShuttingDown, "node has ended"));
    };
    let Some(endpoint) = registry.endpoint(frame.kind, &frame.name) else {
        return Err(Failure::new(Code::NoHandler, format!("no handler for {:?}", frame.name)));
    };
    endpoint.accept(&shared.hooks, frame, deadline, admit_by).await
}

/// Creates the failure after a panic around a command, whose outcome is unknown.
fn panicked(panic: &(dyn Any + Send)) -> Failure {
    Failure::new(
        Code::OutcomeUnknown,
        format!("user code around the command panicked: {}", panic_text(panic)),
    )
}

async fn execute(answerer: Answerer, frame: CommandFrame, deadline: Deadline, _permit: OwnedSemaphorePermit) {
    if *answerer.shared.draining.borrow() {
        let failure = Failure::new(Code::ShuttingDown, "node is shutting down");
        return answerer.refuse(failure).await;
    }
    let (ack_on_accept, started) = (frame.prompt, Instant::now());
    // No reply goes out during admission. The caller counts this node as lost after 2 heartbeats of
    // silence.
    let admit_by = after(answerer.shared.beat);
    // I10: user code runs in the acceptance and in the answer. A panic in either is answered at
    // once.
    let taken = AssertUnwindSafe(take(&answerer.shared, frame, deadline, admit_by)).catch_unwind().await;
    let mut answer = match taken.unwrap_or_else(|panic| Err(panicked(&*panic))) {
        Ok(answer) => AssertUnwindSafe(answer)
            .catch_unwind()
            .map(|outcome| outcome.unwrap_or_else(|panic| Outcome::Error(panicked(&*panic)))),
        Err(failure) => return answerer.refuse(failure).await,
    };
    if ack_on_accept {
        answerer.say(ReplyKind::Accepted).await;
    }
    let beat = answerer.shared.beat;
    let mut accepted = ack_on_accept;
    let mut say_at = started + if ack_on_accept { beat } else { ACCEPTED.min(beat) };
    let outcome = loop {
        let Ok(outcome) = timeout_at(say_at, &mut answer).await else {
            // After the deadline, no caller waits.
            if !deadline.is_over() {
                answerer.say(if accepted { ReplyKind::Alive } else { ReplyKind::Accepted }).await;
                accepted = true;
            }
            say_at = Instant::now() + beat;
            continue;
        };
        break outcome;
    };
    let runtime = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    answerer.say(ReplyKind::Executed(Answered { runtime, outcome })).await;
}
