//! Handlers as targets of commands.

use std::sync::Arc;
use std::time::Duration;

use ractor::concurrency::OneshotSender;
use tokio::sync::OwnedSemaphorePermit;
use uuid::Uuid;

use super::actor::HandlerActor;
use super::caller::{Caller, CallerPermit, ReleaseOnDrop};
use super::job::Shared;
use super::message::Message;
use super::status::HandlerStatus;
use super::{Handled, Handler};
use crate::codec::to_cbor;
use crate::command::NotExecutedKind;
use crate::command::hooks::CommandHooks;
use crate::command::target::{Answer, Routed, RoutedCommand, Target, TargetStatus, ToHandler};
use crate::command::wire::{Done, Failure, Kind, lost_reply, read_reply};
use crate::event::StreamId;
use crate::panic::caught;

impl<H: Handler> Target for ToHandler<H> {
    type Command = H::Command;
    type Answer = Handled<H::Reply>;
    type Error = H::Error;
}

impl<H: Handler> Routed for ToHandler<H> {
    type Shared = Shared<H>;
    type Actor = HandlerActor<H>;
    type Address = ();
    type Guard = ReleaseOnDrop;

    const KIND: Kind = Kind::Handler;
    const NAME: &'static str = H::NAME;
    const LIMITED: &'static str = "commands in flight for this handler";

    fn limits(shared: &Self::Shared) -> (usize, Duration) {
        (shared.options.in_flight, shared.options.admission)
    }

    fn status(_: &Self::Shared, in_flight: usize) -> TargetStatus {
        TargetStatus::Handler(HandlerStatus { name: H::NAME, in_flight })
    }

    fn actor(shared: Arc<Self::Shared>) -> Self::Actor {
        HandlerActor(shared)
    }

    /// I10: a panic in [`Handler::key`] refuses only this command.
    fn key(_: Option<String>, command: &H::Command) -> Result<Option<String>, NotExecutedKind> {
        caught(|| H::key(command)).map_err(|panic| {
            let reason = format!("Handler::key panicked: {panic}");
            NotExecutedKind::NotAccepted { reason }
        })
    }

    fn address(_: Option<&str>) -> Result<(), NotExecutedKind> {
        Ok(())
    }

    fn stream((): &()) -> Option<&StreamId> {
        None
    }

    fn message(
        _: &CommandHooks,
        command: RoutedCommand<Self>,
        permit: OwnedSemaphorePermit,
        reply: OneshotSender<Answer<Self>>,
    ) -> Result<(Message<H>, ReleaseOnDrop), NotExecutedKind> {
        // Commands within this process are not encoded. Encode the metadata to apply the same
        // limit.
        command.metadata.encode().map_err(NotExecutedKind::Encode)?;
        let permit = Arc::new(permit);
        let waiting = CallerPermit::new(permit.clone());
        let caller = Caller { reply, permit: waiting.clone() };
        Ok((Message::Run(command, caller, permit), ReleaseOnDrop(waiting)))
    }

    fn encode(handled: &Self::Answer) -> Result<Done, Failure> {
        let reply = to_cbor(&handled.reply).map_err(lost_reply)?;
        Ok(Done { reply, duplicate: handled.duplicate, ..Done::default() })
    }

    fn decode(done: Done, id: Uuid, (): ()) -> Answer<Self> {
        if let Some(omitted) = done.omitted {
            return Err(omitted.into_error(id, None));
        }
        let reply = read_reply(&done.reply, id)?;
        Ok(Handled { command_id: id, reply, duplicate: done.duplicate })
    }
}
