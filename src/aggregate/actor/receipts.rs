//! Answers commands: decided without events, durable, or repeated.

use super::super::fold::HydratedState;
use super::super::{Aggregate, ExecuteError, NotExecutedKind, Receipt};
use super::message::{CommandRequest, CommandResult, answer};
use super::pending::{Pending, PendingOutcome};
use crate::codec::{from_cbor, to_cbor};
use crate::event::{StreamId, Version};
use crate::store::{CommandEvents, EventStore};

/// CBOR's null: a reply without content (`()`). It is not stored.
pub(super) const NO_REPLY: [u8; 1] = [0xf6];

/// Answers a command that was decided without events on a durable state.
pub(super) fn conclude<A: Aggregate>(pending: Pending<A>, stream: &StreamId, folded: &HydratedState<A>) {
    let Pending { order, decided, .. } = pending;
    let PendingOutcome::Answer { version, result } = decided else { return };
    let result = result.map(|reply| Receipt {
        command_id: order.command_id,
        stream: stream.clone(),
        version,
        position: folded.position,
        events: 0,
        reply,
        duplicate: false,
    });
    answer(order.reply, result);
}

/// Answers a command whose events are durable, and its repetitions.
pub(super) fn receipt<A: Aggregate>(pending: Pending<A>, stream: &StreamId, record: CommandEvents) {
    let Pending { order, decided, repeated, .. } = pending;
    let PendingOutcome::Events { reply, .. } = decided else { return };
    if !repeated.is_empty() {
        let copy = to_cbor(&reply).map_err(|error| error.to_string());
        for (order, _load) in repeated {
            let copy = copy.as_ref().map_err(Clone::clone).and_then(|bytes| from_cbor(bytes));
            let receipt = copy.map(|reply| Receipt::repeated(order.command_id, stream, record, reply));
            let unreadable = |reason| {
                let receipt = Receipt::repeated(order.command_id, stream, record, ());
                ExecuteError::unreadable_reply(order.command_id, Some(receipt), reason)
            };
            answer(order.reply, receipt.map_err(unreadable));
        }
    }
    let mut receipt = Receipt::repeated(order.command_id, stream, record, reply);
    receipt.duplicate = false;
    answer(order.reply, Ok(receipt));
}

/// Rebuilds the first receipt of a durable command from the reply in its last event.
pub(super) async fn repeat<A: Aggregate>(
    store: &dyn EventStore,
    stream: &StreamId,
    order: &CommandRequest<A>,
    record: CommandEvents,
) -> CommandResult<A> {
    // I8: the command is durable. From here on, every error is `OutcomeUnknown`, except a
    // different content and an unreadable reply.
    let unknown = |reason| ExecuteError::OutcomeUnknown {
        command_id: order.command_id,
        reason: format!("it took effect, but its first receipt cannot be read: {reason}"),
    };
    // I3: the events may be visible only because the wait for a standby was cancelled. Confirm
    // that they are durable before the answer.
    let durable = store.confirm_durable().await;
    durable.map_err(|error| unknown(error.to_string()))?;
    let before = Version::new(record.last.get() - 1);
    let events = store.read_stream(stream, before, 1).await;
    let metadata = match events.map_err(|error| unknown(error.to_string()))?.first() {
        Some(event) if event.command_id == order.command_id => {
            event.decode_metadata().map_err(|error| unknown(error.to_string()))?
        }
        // A standby without the event took over, or the store was restored.
        _ => return Err(unknown("its last event is no longer in the log".into())),
    };
    // Events of other programs and of older versions have no fingerprint.
    if metadata.content.is_some_and(|content| content != order.content) {
        return Err(NotExecutedKind::CommandIdReused { command_id: order.command_id }.into());
    }
    let reply = from_cbor(if metadata.reply.is_empty() { &NO_REPLY } else { &metadata.reply });
    // A retry reads the same bytes: the outcome is known, and only the reply is not.
    reply.map(|reply| Receipt::repeated(order.command_id, stream, record, reply)).map_err(|reason| {
        let receipt = Receipt::repeated(order.command_id, stream, record, ());
        ExecuteError::unreadable_reply(order.command_id, Some(receipt), reason)
    })
}
