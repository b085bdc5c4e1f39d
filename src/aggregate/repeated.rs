//! Answers commands that are already durable.

use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::encoding::decode_reply;
use super::error::{ExecuteError, NotExecutedKind};
use super::receipt::Receipt;
use crate::event::{StreamId, Version};
use crate::store::{CommandEvents, EventStore};

/// Rebuilds the first receipt of a durable command from the reply in its last event.
///
/// `content` is the fingerprint of the repeated command.
pub(crate) async fn repeat<R: DeserializeOwned, E>(
    store: &dyn EventStore,
    stream: &StreamId,
    command_id: Uuid,
    content: u64,
    record: CommandEvents,
) -> Result<Receipt<R>, ExecuteError<E>> {
    // I8: the command is durable. From here on, every error is `OutcomeUnknown`, except a
    // different content and an unreadable reply.
    let unknown = |reason| ExecuteError::OutcomeUnknown {
        command_id,
        reason: format!("it took effect, but its first receipt cannot be read: {reason}"),
    };
    // I3: the events may be visible only because the wait for a standby was cancelled. Confirm
    // that they are durable before the answer.
    let durable = store.confirm_durable().await;
    durable.map_err(|error| unknown(error.to_string()))?;
    let before = Version::new(record.last.get() - 1);
    let events = store.read_stream(stream, before, 1).await;
    let metadata = match events.map_err(|error| unknown(error.to_string()))?.first() {
        Some(event) if event.command_id == command_id => {
            event.decode_metadata().map_err(|error| unknown(error.to_string()))?
        }
        // A standby without the event took over, or the store was restored.
        _ => return Err(unknown("its last event is no longer in the log".into())),
    };
    // Events of other programs and of older versions have no fingerprint.
    if metadata.content.is_some_and(|stored| stored != content) {
        return Err(NotExecutedKind::CommandIdReused { command_id }.into());
    }
    // A retry reads the same bytes: the outcome is known, and only the reply is not.
    let reply = decode_reply(&metadata);
    reply.map(|reply| Receipt::repeated(command_id, stream, record, reply)).map_err(|reason| {
        let receipt = Receipt::repeated(command_id, stream, record, ());
        ExecuteError::unreadable_reply(command_id, Some(receipt), reason)
    })
}
