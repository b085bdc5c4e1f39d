//! Commands of other nodes.

use std::sync::Arc;
use std::time::Duration;

use async_nats::{Message, Subject, Subscriber};
use chrono::Utc;
use futures_util::StreamExt;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout_at};

use super::Shared;
use crate::bus::OpenLine;
use crate::codec::{from_cbor, to_cbor};
use crate::command::envelope::Deadline;
use crate::command::registry::Answering;
use crate::command::wire::{Answered, Code, CommandFrame, FORMAT, Failure, Outcome, Reply, Says};
use crate::rate_limit::LogLimit;
use crate::time::after;

/// How soon a dispatcher that did not ask for it hears that its command was accepted, unless the answer comes first.
const ACCEPTED: Duration = Duration::from_millis(50);

/// Room for what is around a reply's content.
const HEADROOM: usize = 1_024;

/// Takes commands until the connection ends.
pub(super) async fn serve(shared: Arc<Shared>, line: OpenLine, mut commands: Subscriber) {
    let mut malformed = LogLimit::each_minute();
    while let Some(message) = commands.next().await {
        let Message { reply: Some(reply), payload, .. } = message else {
            if let Some(so_far) = malformed.count() {
                tracing::warn!(so_far, "ignoring commands without a reply subject");
            }
            continue;
        };
        let answerer = Answerer { shared: shared.clone(), line: line.clone(), to: reply };
        let frame: CommandFrame = match from_cbor(&payload) {
            Ok(frame) => frame,
            Err(error) => {
                let reason = format!("the command cannot be read: {error}");
                answerer.refuse(Failure::new(Code::Refused, reason)).await;
                continue;
            }
        };
        // Whoever has no place is told so; nothing waits here, since every other command waits behind it.
        match shared.places.clone().try_acquire_owned() {
            Ok(place) => _ = tokio::spawn(execute(answerer, frame, place)),
            Err(_) => {
                let number = shared.limit as u64;
                let failure = Failure::new(Code::Overloaded, "commands of other nodes");
                answerer.refuse(Failure { number, ..failure }).await;
            }
        }
    }
}

/// Where the answers to one command go.
struct Answerer {
    shared: Arc<Shared>,
    line: OpenLine,
    to: Subject,
}

impl Answerer {
    /// Says something. What is lost is asked for again by whoever waits for it.
    async fn say(&self, says: Says) {
        // async-nats would keep it for after the outage.
        if self.line.check().is_err() {
            return;
        }
        let reply = Reply { format: FORMAT, incarnation: self.shared.incarnation, says };
        let sent = match to_cbor(&reply) {
            Ok(frame) if frame.len() > self.limit() => {
                let failure = Failure::new(
                    Code::OutcomeUnknown,
                    format!(
                        "its answer has {} bytes, which is more than a message here may have",
                        frame.len()
                    ),
                );
                let says = Says::Executed(Answered { runtime: 0, outcome: Outcome::Error(failure) });
                to_cbor(&Reply { says, ..reply })
            }
            other => other,
        };
        let sent = match sent {
            Ok(frame) => {
                let published = self.line.client().publish(self.to.clone(), frame.into()).await;
                published.map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = sent {
            tracing::warn!(error, "a command of another node cannot be answered");
        }
    }

    fn limit(&self) -> usize {
        self.line.client().max_payload().saturating_sub(HEADROOM)
    }

    async fn refuse(&self, mut failure: Failure) {
        failure.message = format!("{} (on node {})", failure.message, self.shared.name);
        self.say(Says::Refused(failure)).await;
    }
}

/// The point in time that a frame's deadline is on this machine.
pub(super) fn deadline(frame: &CommandFrame) -> Deadline {
    let Some(millis) = frame.deadline else { return Deadline::never() };
    let now = u64::try_from(Utc::now().timestamp_millis()).unwrap_or(0);
    Deadline::after(Duration::from_millis(millis.saturating_sub(now)))
}

/// Hands a command to whoever handles it here, if it may be; why not.
pub(super) async fn take(
    shared: &Shared,
    frame: CommandFrame,
    deadline: Deadline,
    admit_by: Instant,
) -> Result<Answering, Failure> {
    if frame.format != FORMAT {
        let reason = format!("it speaks format {FORMAT}, and the command has {}", frame.format);
        return Err(Failure::new(Code::Refused, reason));
    }
    // NATS may deliver late: nobody waits for this any more.
    if deadline.is_over() {
        return Err(Failure::new(Code::Refused, "the command came after its deadline"));
    }
    let Some(commands) = shared.commands.upgrade() else {
        return Err(Failure::new(Code::ShuttingDown, "it has ended"));
    };
    let Some(endpoint) = commands.registry().endpoint(frame.kind, &frame.name) else {
        return Err(Failure::new(Code::NoHandler, format!("it does not handle {:?}", frame.name)));
    };
    endpoint.accept(&commands, frame, deadline, admit_by).await
}

async fn execute(answerer: Answerer, frame: CommandFrame, _place: OwnedSemaphorePermit) {
    if *answerer.shared.draining.borrow() {
        let failure = Failure::new(Code::ShuttingDown, "it is shutting down");
        return answerer.refuse(failure).await;
    }
    let (prompt, deadline, started) = (frame.prompt, deadline(&frame), Instant::now());
    // Nothing is said meanwhile, and whoever hears nothing for two beats takes this node for dead.
    let admit_by = after(answerer.shared.beat);
    let mut answer = match take(&answerer.shared, frame, deadline, admit_by).await {
        Ok(answer) => answer,
        Err(failure) => return answerer.refuse(failure).await,
    };
    if prompt {
        answerer.say(Says::Accepted).await;
    }
    let beat = answerer.shared.beat;
    let mut accepted = prompt;
    let mut say_at = started + if prompt { beat } else { ACCEPTED.min(beat) };
    let outcome = loop {
        let Ok(outcome) = timeout_at(say_at, &mut answer).await else {
            // After the deadline nobody listens.
            if !deadline.is_over() {
                answerer.say(if accepted { Says::Alive } else { Says::Accepted }).await;
                accepted = true;
            }
            say_at = Instant::now() + beat;
            continue;
        };
        break outcome;
    };
    let runtime = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    answerer.say(Says::Executed(Answered { runtime, outcome })).await;
}
