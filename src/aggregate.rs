//! Aggregates: decide on commands, fold events.
//!
//! An [`Aggregate`] is plain, synchronous code of the user's. storied gives each live one an actor: it folds the stream
//! (snapshot and rest), decides, hands the events to the group-commit writer and goes on deciding on the speculated state
//! while the append is on its way; the reply goes out when *its* append is durable. When somebody else wrote to the stream,
//! the speculation is thrown away, what was missed is read, and the commands are decided again.
//!
//! ```text
//! execute ──► router (id → actor, bounded) ──► actor (fold, decide) ──► writer (many appends, one transaction) ──► store
//!                                                 ▲                                  │
//!                                                 └──────────── durable ─────────────┘──► receipt
//! ```

mod actor;
mod context;
mod decision;
mod fold;
mod options;
mod outcome;
mod router;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use self::context::Context;
pub use self::decision::Decision;
pub use self::options::AggregateOptions;
pub(crate) use self::options::MOST_IN_FLIGHT;
pub(crate) use self::outcome::node_runs;
pub use self::outcome::{ExecuteError, Receipt};
pub use self::router::RouterStatus;
pub(crate) use self::router::{Order, Router, SHUTDOWN, StartRouterError};
use crate::event::Event;

/// A consistency boundary: its state, how it decides and how it folds. Pure code: no I/O, no clock and no randomness but
/// the [`Context`]'s, because a command may be decided more than once before it is stored.
///
/// ```
/// use serde::{Deserialize, Serialize};
/// use storied::{Aggregate, Context, Decision, Event};
///
/// #[derive(Default)]
/// struct Account { balance: i64 }
///
/// #[derive(Serialize, Deserialize)]
/// enum AccountCommand { Deposit { amount: i64 }, Withdraw { amount: i64 } }
///
/// #[derive(Debug, Serialize, Deserialize)]
/// #[serde(rename_all = "snake_case")]
/// enum AccountEvent { Deposited { amount: i64 }, Withdrawn { amount: i64 } }
///
/// impl Event for AccountEvent { const CATEGORY: &'static str = "account"; }
///
/// #[derive(Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
/// enum AccountError {
///     #[error("the balance is only {balance}")]
///     Insufficient { balance: i64 },
/// }
///
/// impl Aggregate for Account {
///     type Event = AccountEvent;
///     type Command = AccountCommand;
///     type Reply = i64; // the new balance
///     type Error = AccountError;
///
///     fn handle(&self, command: &AccountCommand, _: &Context) -> Result<Decision<AccountEvent, i64>, AccountError> {
///         match *command {
///             AccountCommand::Deposit { amount } => {
///                 Ok(Decision::event(AccountEvent::Deposited { amount }).reply(self.balance + amount))
///             }
///             AccountCommand::Withdraw { amount } if amount > self.balance => {
///                 Err(AccountError::Insufficient { balance: self.balance })
///             }
///             AccountCommand::Withdraw { amount } => {
///                 Ok(Decision::event(AccountEvent::Withdrawn { amount }).reply(self.balance - amount))
///             }
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
    /// What happens to it. The event's category is the aggregate's.
    type Event: Event;
    /// What can be asked of it. A serde type, because the aggregate that owns an id may live on another node.
    type Command: Serialize + DeserializeOwned + Send + Sync + 'static;
    /// What a command is answered with beside the receipt; `()` if nothing. Stored with the command's last event, so that
    /// a repeated command gets the first answer.
    type Reply: Serialize + DeserializeOwned + Send + 'static;
    /// Why a command is refused.
    type Error: std::error::Error + Serialize + DeserializeOwned + Send + Sync + 'static;

    /// Decides on a command: events (and a reply), or a refusal. Must not have effects of its own.
    ///
    /// # Errors
    /// The aggregate's own reasons to refuse.
    fn handle(
        &self,
        command: &Self::Command,
        context: &Context<'_>,
    ) -> Result<Decision<Self::Event, Self::Reply>, Self::Error>;

    /// Folds an event into the state. What happened has happened: this cannot refuse.
    fn apply(&mut self, event: &Self::Event);
}
