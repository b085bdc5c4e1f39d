//! The batchers of requests about commands.

use std::sync::Arc;

use uuid::Uuid;

use super::super::{CommandEvents, CommandRecord};
use super::request_batcher::RequestBatcher;
use crate::event::StreamId;

#[derive(Debug, Default)]
pub(super) struct CommandBatchers {
    pub(super) looked_up: Arc<RequestBatcher<Uuid, Option<CommandRecord>>>,
    pub(super) recorded: Arc<RequestBatcher<CommandRecord, CommandRecord>>,
    /// Requests are pairs of stream and command id.
    pub(super) events: Arc<RequestBatcher<(StreamId, Uuid), Option<CommandEvents>>>,
}
