//! Answers commands: decided without events, or durable.

use super::super::fold::HydratedState;
use super::super::{Aggregate, ExecuteError, Receipt};
use super::message::answer;
use super::pending::{Pending, PendingOutcome};
use crate::codec::{from_cbor, to_cbor};
use crate::event::StreamId;
use crate::store::CommandEvents;

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
