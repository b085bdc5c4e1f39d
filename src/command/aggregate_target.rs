//! Aggregates as targets of commands.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use chrono::Utc;
use ractor::concurrency::OneshotSender;
use tokio::sync::OwnedSemaphorePermit;
use uuid::Uuid;

use super::hooks::CommandHooks;
use super::target::{Answer, Routed, RoutedCommand, Target, TargetStatus, ToAggregate};
use super::wire::{Done, Failure, Kind, lost_reply};
use super::{NotExecutedKind, Receipt};
use crate::aggregate::{self, Aggregate, CommandRequest, RouterActor, RouterMessage, RouterStatus};
use crate::codec::to_cbor;
use crate::event::{Event, StreamId};

impl<A: Aggregate> Target for ToAggregate<A> {
    type Command = A::Command;
    type Answer = Receipt<A::Reply>;
    type Error = A::Error;
}

impl<A: Aggregate> Routed for ToAggregate<A> {
    type Shared = aggregate::Shared<A>;
    type Actor = RouterActor<A>;
    type Address = StreamId;
    type Guard = ();

    const KIND: Kind = Kind::Aggregate;
    const NAME: &'static str = <A::Event as Event>::CATEGORY;
    const LIMITED: &'static str = "commands in flight for this kind of aggregate";

    fn limits(shared: &Self::Shared) -> (usize, Duration) {
        (shared.options.in_flight, shared.options.admission)
    }

    fn status(shared: &Self::Shared, in_flight: usize) -> TargetStatus {
        let live = shared.live.load(Ordering::Relaxed);
        TargetStatus::Aggregate(RouterStatus { category: Self::NAME.to_owned(), live, in_flight })
    }

    fn actor(shared: Arc<Self::Shared>) -> Self::Actor {
        RouterActor(shared)
    }

    fn key(given: Option<String>, _: &A::Command) -> Result<Option<String>, NotExecutedKind> {
        Ok(Some(given.unwrap_or_default()))
    }

    fn address(key: Option<&str>) -> Result<StreamId, NotExecutedKind> {
        let stream = StreamId::new(Self::NAME, key.unwrap_or_default());
        stream.map_err(|error| NotExecutedKind::InvalidId { reason: error.to_string() })
    }

    fn stream(address: &StreamId) -> Option<&StreamId> {
        Some(address)
    }

    fn message(
        hooks: &CommandHooks,
        command: RoutedCommand<Self>,
        permit: OwnedSemaphorePermit,
        reply: OneshotSender<Answer<Self>>,
    ) -> Result<(RouterMessage<A>, ()), NotExecutedKind> {
        hooks.before(&command.info()).map_err(|reason| NotExecutedKind::NotAccepted { reason })?;
        let RoutedCommand { command, id, metadata, fingerprint, address, expected, deadline, span, .. } =
            command;
        let request = Box::new(CommandRequest {
            command,
            command_id: id,
            content: fingerprint as u64,
            metadata,
            expected,
            deadline,
            now: Utc::now(),
            attempts: 0,
            span,
            _permit: permit,
            reply,
        });
        Ok((RouterMessage::Execute(address, request), ()))
    }

    fn encode(receipt: &Self::Answer) -> Result<Done, Failure> {
        let reply = to_cbor(&receipt.reply).map_err(lost_reply)?;
        let (version, position) = (receipt.version.get(), receipt.position.get());
        let (events, duplicate) = (receipt.events, receipt.duplicate);
        Ok(Done { reply, duplicate, version, position, events, omitted: None })
    }

    fn decode(done: Done, id: Uuid, stream: StreamId) -> Answer<Self> {
        done.into_receipt(id, stream)
    }
}
