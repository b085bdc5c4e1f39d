//! Commands: requests with an idempotency key, each executed once by the actor that owns it.
//!
//! A command addresses an [aggregate](crate::Aggregate) or a [`Handler`]. Within one process it
//! goes directly to the actor. Over a [`CommandBus`] that reaches other nodes it goes to the node
//! that owns it. Its id, deadline, receipt and errors are the same in both cases.
//!
//! A [decision over several streams](crate::decide) has the same ids, deadlines, receipts and
//! errors. It has no owner, and runs on the node of its caller.
//!
//! [`Execute::after`], [`Execute::at`] and [`Execute::repeat`] store a command for later:
//! [`schedule`](crate::schedule).
//!
//! ```text
//! execute ──► owner? ── this node ──────────────────────────► router ─► actor ──► answer
//!               └────── other node ──► its subject ──► accepted … alive … executed ──► answer
//!                          ▲   no responder, refused: next node at once
//!                          └── silence: same command, same id, to the next node
//! ```

mod admission;
mod aggregate_target;
mod bus;
mod decisions;
mod dispatched;
mod dispatcher;
#[cfg_attr(not(feature = "nats"), allow(dead_code, reason = "parts serve other nodes"))]
mod endpoint;
#[cfg_attr(not(feature = "nats"), allow(dead_code, reason = "parts serve other nodes"))]
mod envelope;
mod erased;
mod execute;
mod execute_and_wait;
mod execute_command;
mod execute_decision;
mod handler;
mod hooks;
mod local_aggregates;
#[cfg(feature = "nats")]
mod nats;
#[cfg_attr(not(feature = "nats"), allow(dead_code, reason = "parts serve other nodes"))]
mod registry;
#[cfg_attr(not(feature = "nats"), allow(dead_code, reason = "parts serve other nodes"))]
mod route;
mod router;
#[cfg_attr(not(feature = "nats"), allow(dead_code, reason = "parts serve other nodes"))]
mod target;
#[cfg_attr(not(feature = "nats"), allow(dead_code, reason = "parts serve other nodes"))]
mod wire;

pub use self::bus::{CommandBus, CommandBusStatus};
pub use self::dispatched::{Dispatched, Report};
pub(crate) use self::dispatcher::Dispatcher;
pub(crate) use self::envelope::Envelope;
pub use self::envelope::{ASSIGN_TIMEOUT, RECEIVE_TIMEOUT};
pub(crate) use self::erased::{ATTEMPT_LIFETIME, ErasedAnswer, ErasedCommand};
pub use self::execute::Execute;
pub use self::execute_and_wait::{Applied, ExecuteAndWait, ProjectionLag};
pub use self::execute_command::{Command, ExecuteCommand};
pub use self::execute_decision::ExecuteDecision;
pub(crate) use self::handler::HandlerShared;
pub use self::handler::{
    HandleError, Handled, Handler, HandlerContext, HandlerOptions, HandlerStatus, StepError,
};
pub use self::hooks::{CommandEnd, CommandInfo};
pub(crate) use self::local_aggregates::LocalAggregates;
#[cfg(feature = "nats")]
pub use self::nats::NatsCommandOptions;
pub(crate) use self::registry::Registry;
pub(crate) use self::target::Routed;
pub use self::target::{Target, ToAggregate, ToHandler};
pub(crate) use self::wire::{Expected, Kind};
pub use crate::aggregate::{ExecuteError, NoReplyKind, NotExecutedKind, Receipt};
