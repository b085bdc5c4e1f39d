//! Commands: an intent with an id, brought to the one actor that owns it, once.
//!
//! A command is for an [aggregate](crate::Aggregate), or for a [`Handler`] of the user's. Within one process it goes straight
//! to its actor; over a [`CommandBus`] that reaches other nodes, to the node that owns it. Its id, deadline, receipt and
//! errors are the same either way.
//!
//! ```text
//! execute ──► owner? ── this node ─────────────────────────────► router or handler ──► answer
//!               └────── another ──► its own subject ──► accepted … alive … executed ──► answer
//!                          ▲   nobody there, refused: the next one at once
//!                          └── silence: the same command, same id, to the next one
//! ```

#[cfg_attr(not(feature = "nats"), allow(dead_code, reason = "parts of it are for other nodes"))]
mod bus;
mod dispatched;
#[cfg_attr(not(feature = "nats"), allow(dead_code, reason = "parts of it are for other nodes"))]
mod envelope;
mod execute;
mod follow;
mod handler;
#[cfg(feature = "nats")]
mod nats;
mod policy;
#[cfg_attr(not(feature = "nats"), allow(dead_code, reason = "parts of it are for other nodes"))]
mod registry;
#[cfg_attr(not(feature = "nats"), allow(dead_code, reason = "parts of it are for other nodes"))]
mod wire;

pub(crate) use self::bus::Commands;
pub use self::bus::{CommandBus, CommandBusStatus};
pub use self::dispatched::{Dispatched, Report};
pub(crate) use self::envelope::Envelope;
pub use self::envelope::{ASSIGN_TIMEOUT, RECEIVE_TIMEOUT};
pub use self::execute::Execute;
pub(crate) use self::follow::Follow;
pub use self::follow::{ExecuteAndFollow, Followed, NotApplied};
pub(crate) use self::handler::HandlerRouter;
pub use self::handler::{
    HandleError, Handled, Handler, HandlerContext, HandlerOptions, HandlerStatus, Request,
};
#[cfg(feature = "nats")]
pub use self::nats::NatsCommands;
pub use self::policy::{CommandEnd, CommandInfo};
pub(crate) use self::registry::{Registry, Respawn};
pub use crate::aggregate::{ExecuteError, Receipt};
pub(crate) use crate::aggregate::{SHUTDOWN, StartRouterError};
