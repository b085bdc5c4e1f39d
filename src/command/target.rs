//! The targets of commands: aggregates and handlers.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use ractor::Actor;
use ractor::concurrency::OneshotSender;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use uuid::Uuid;

use super::handler::HandlerStatus;
use super::hooks::{CommandHooks, CommandInfo};
use super::wire::{Done, Failure, Kind};
use super::{ExecuteError, NotExecutedKind};
use crate::aggregate::RouterStatus;
use crate::event::{Metadata, StreamId};
use crate::store::ExpectedVersion;
use crate::telemetry::trace::CommandSpan;

mod sealed {
    pub trait Sealed {}

    impl<A> Sealed for super::ToAggregate<A> {}
    impl<H> Sealed for super::ToHandler<H> {}
}

/// A target of commands: [`ToAggregate`] or [`ToHandler`].
pub trait Target: sealed::Sealed + Send + Sync + 'static {
    /// Command of the target.
    type Command: Serialize + DeserializeOwned + Send + Sync + 'static;
    /// Answer to a command: [`Receipt`](super::Receipt) or [`Handled`](super::Handled).
    type Answer: Send + 'static;
    /// Reason for rejecting a command.
    type Error: std::error::Error + Serialize + DeserializeOwned + Send + Sync + 'static;
}

/// The aggregates of type `A` as the target of a command.
pub struct ToAggregate<A>(PhantomData<fn() -> A>);

impl<A> fmt::Debug for ToAggregate<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ToAggregate")
    }
}

/// The handler `H` as the target of a command.
pub struct ToHandler<H>(PhantomData<fn() -> H>);

impl<H> fmt::Debug for ToHandler<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ToHandler")
    }
}

/// The answer to a command, or the error of a command without one.
pub(crate) type Answer<T> = Result<<T as Target>::Answer, ExecuteError<<T as Target>::Error>>;

/// The message of a target's actor.
pub(crate) type Message<T> = <<T as Routed>::Actor as Actor>::Msg;

/// A target with the actor that executes its commands.
pub(crate) trait Routed: Target + Sized {
    /// State that all actors of the target share.
    type Shared: Send + Sync + 'static;
    type Actor: Actor<Arguments = ()>;
    /// Address within the target.
    type Address: Send + 'static;
    /// Guard that the caller holds while it waits.
    type Guard: Send + 'static;

    const KIND: Kind;
    /// Category of the aggregate, or name of the handler.
    const NAME: &'static str;
    /// Items that [`limits`](Self::limits) counts, for an error.
    const LIMITED: &'static str;

    /// Returns the maximum number of commands in flight, and how long a command waits for a permit.
    fn limits(shared: &Self::Shared) -> (usize, Duration);
    fn status(shared: &Self::Shared, in_flight: usize) -> TargetStatus;
    fn actor(shared: Arc<Self::Shared>) -> Self::Actor;
    /// Returns the key of a command. `given`: the key from the caller.
    fn key(given: Option<String>, command: &Self::Command) -> Result<Option<String>, NotExecutedKind>;
    fn address(key: Option<&str>) -> Result<Self::Address, NotExecutedKind>;
    fn stream(address: &Self::Address) -> Option<&StreamId>;
    /// Creates the message with an admitted command.
    fn message(
        hooks: &CommandHooks,
        command: RoutedCommand<Self>,
        permit: OwnedSemaphorePermit,
        reply: OneshotSender<Answer<Self>>,
    ) -> Result<(Message<Self>, Self::Guard), NotExecutedKind>;
    /// Encodes an answer for another node.
    fn encode(answer: &Self::Answer) -> Result<Done, Failure>;
    /// Decodes the answer of another node.
    fn decode(done: Done, id: Uuid, address: Self::Address) -> Answer<Self>;
}

/// A command for the actor of its target.
pub(crate) struct RoutedCommand<T: Routed> {
    pub(crate) command: T::Command,
    pub(crate) id: Uuid,
    pub(crate) metadata: Metadata,
    /// Fingerprint of the content. It detects the reuse of an id for another command.
    pub(crate) fingerprint: u128,
    pub(crate) key: Option<String>,
    pub(crate) address: T::Address,
    pub(crate) expected: ExpectedVersion,
    /// Time until which the caller waits.
    pub(crate) deadline: Instant,
    pub(crate) span: CommandSpan,
}

impl<T: Routed> RoutedCommand<T> {
    pub(super) fn info(&self) -> CommandInfo<'_> {
        CommandInfo { name: T::NAME, key: self.key.as_deref(), id: self.id, metadata: &self.metadata }
    }
}

/// The status of a target on this node.
pub(crate) enum TargetStatus {
    Aggregate(RouterStatus),
    Handler(HandlerStatus),
}
