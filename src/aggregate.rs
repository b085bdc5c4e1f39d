//! Aggregates: decide on commands, fold events.
//!
//! An [`Aggregate`] is plain, synchronous user code. Each aggregate in memory has an actor. The
//! actor folds the stream (snapshot and later events), decides, and submits the events to the
//! group-commit writer. While an append is in flight, the actor decides further commands on the
//! speculative state. It sends each reply when the append of that command is durable. If another
//! node wrote to the stream, the actor drops the speculative state, reads the missing events, and
//! decides again.
//!
//! ```text
//! execute ─► router (id → actor, bounded) ─► actor (fold, decide) ─► writer (groups) ─► store
//!                                              ▲                       │
//!                                              └─────── durable ───────┘──► receipt
//! ```

mod actor;
mod context;
mod decision;
mod encoding;
mod error;
mod fold;
mod options;
mod receipt;
mod repeated;
mod router;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub(crate) use self::actor::{CommandRequest, Shared};
pub use self::context::Context;
pub use self::decision::Decision;
pub(crate) use self::encoding::{DecidedCommand, EncodedDecision};
pub(crate) use self::error::node_runs;
pub use self::error::{ExecuteError, NeverRejects, NoReplyKind, NotExecutedKind};
pub use self::options::AggregateOptions;
pub(crate) use self::options::MOST_IN_FLIGHT;
pub use self::receipt::Receipt;
pub(crate) use self::repeated::repeat;
pub use self::router::RouterStatus;
pub(crate) use self::router::{RouterActor, RouterMessage};
use crate::event::Event;

/// A consistency boundary: its state, its decisions and its fold.
///
/// The code is pure: no I/O, and no clock or randomness except those of [`Context`]. A command may
/// be decided more than once before its events are stored.
///
/// ```
/// use serde::{Deserialize, Serialize};
/// use storied::{Aggregate, Context, Decided, Event};
///
/// #[derive(Serialize, Deserialize)]
/// #[serde(rename_all = "snake_case")]
/// enum AccountEvent { Deposited { amount: i64 }, Withdrawn { amount: i64 } }
///
/// impl Event for AccountEvent { const CATEGORY: &'static str = "account"; }
///
/// #[derive(Serialize, Deserialize)]
/// enum AccountCommand { Deposit { amount: i64 }, Withdraw { amount: i64 } }
///
/// #[derive(Debug, Serialize, Deserialize, thiserror::Error)]
/// #[error("the balance is only {0}")]
/// struct Insufficient(i64);
///
/// #[derive(Default)]
/// struct Account { balance: i64 }
///
/// impl Aggregate for Account {
///     type Event = AccountEvent;
///     type Command = AccountCommand;
///     type Reply = ();
///     type Error = Insufficient;
///
///     fn handle(&self, command: &AccountCommand, _: &Context) -> Decided<Self> {
///         match *command {
///             AccountCommand::Deposit { amount } => Ok(AccountEvent::Deposited { amount }.into()),
///             AccountCommand::Withdraw { amount } if amount > self.balance => {
///                 Err(Insufficient(self.balance))
///             }
///             AccountCommand::Withdraw { amount } => Ok(AccountEvent::Withdrawn { amount }.into()),
///         }
///     }
///
///     fn apply(&mut self, event: &AccountEvent) {
///         match event {
///             AccountEvent::Deposited { amount } => self.balance += amount,
///             AccountEvent::Withdrawn { amount } => self.balance -= amount,
///         }
///     }
/// }
/// ```
pub trait Aggregate: Default + Send + Sync + 'static {
    /// Events of the aggregate. Their category is the category of the aggregate.
    type Event: Event;
    /// Commands of the aggregate. A serde type, because another node may own the aggregate.
    type Command: Serialize + DeserializeOwned + Send + Sync + 'static;
    /// Reply to a command in addition to the receipt; `()` for none.
    ///
    /// If different commands get different replies, it is an enum, and a
    /// [`Command`](crate::Command) type selects its variant. The store keeps the reply with the
    /// command's last event, so that a repeated command gets the first reply.
    type Reply: Serialize + DeserializeOwned + Send + 'static;
    /// Reason for rejecting a command; [`NeverRejects`] for none.
    type Error: std::error::Error + Serialize + DeserializeOwned + Send + Sync + 'static;

    /// Decides on a command: events and a reply, or a rejection. Must have no side effects.
    ///
    /// # Errors
    /// The reason for which the aggregate rejects the command.
    fn handle(&self, command: &Self::Command, context: &Context<'_>) -> Decided<Self>;

    /// Folds an event into the state. It cannot reject the event, which has already happened.
    fn apply(&mut self, event: &Self::Event);
}

/// The outcome of [`Aggregate::handle`]: a decision, or the reason for rejecting the command.
pub type Decided<A> =
    Result<Decision<<A as Aggregate>::Event, <A as Aggregate>::Reply>, <A as Aggregate>::Error>;
