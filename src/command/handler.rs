//! Commands across aggregates, for example a transfer between two accounts.

mod actor;
mod caller;
mod context;
mod job;
mod message;
mod nested_commands;
mod options;
mod run;
mod status;
mod step;
mod target;
mod worker_slot;
mod yield_slot;

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

pub use self::context::HandlerContext;
pub(crate) use self::job::Shared as HandlerShared;
pub use self::options::HandlerOptions;
pub use self::status::HandlerStatus;
pub use self::step::StepError;
pub(super) use self::yield_slot::{YieldSlot, yield_slot_while};
use super::ExecuteError;

/// A handler of commands across aggregates.
///
/// A handler usually sends commands to aggregates and other handlers, on any node.
///
/// A command id takes effect once: the store records the outcome of the command, and a repeated id
/// gets the recorded outcome. A node can fail while it handles a command, before the outcome is
/// recorded. A new attempt, on any node, then handles the command from the beginning. Therefore
/// `handle` must be repeatable:
///
/// - Commands that it sends through its [context](HandlerContext) are repeatable. They have the
///   same ids in every attempt, and take effect once.
/// - Its control flow must depend only on values that are the same in every attempt. The reply of a
///   command that caused events qualifies, because it is stored with them.
/// - Calls to other systems belong into [recorded steps](HandlerContext::run). Their results are the
///   same in every attempt.
/// - A clock, randomness and a read model do not qualify. A rejection by an aggregate does not
///   qualify either: it leaves no trace, and the aggregate may accept the same command later. If a
///   rejection decides the flow, let the aggregate record it as an event and return it as a reply.
///
/// ```
/// use serde::{Deserialize, Serialize};
/// use storied::command::{HandleError, Handler, HandlerContext};
/// # use storied::{Aggregate, Context, Decided, Decision, Event, NeverRejects};
/// # #[derive(Default)] struct Account;
/// # #[derive(Debug, Serialize, Deserialize)] enum AccountEvent { Changed }
/// # impl Event for AccountEvent { const CATEGORY: &'static str = "account"; }
/// # #[derive(Serialize, Deserialize)] enum AccountCommand { Withdraw(u64), Deposit(u64) }
/// # impl Aggregate for Account {
/// #     type Event = AccountEvent; type Command = AccountCommand; type Reply = bool; type Error = NeverRejects;
/// #     fn handle(&self, _: &AccountCommand, _: &Context<'_>) -> Decided<Self> { Ok(Decision::none().reply(true)) }
/// #     fn apply(&mut self, _: &AccountEvent) {}
/// # }
///
/// struct Transfers;
///
/// #[derive(Serialize, Deserialize)]
/// struct Transfer { from: String, to: String, amount: u64 }
///
/// #[derive(Debug, Serialize, Deserialize, thiserror::Error)]
/// enum TransferError {
///     #[error("there is not enough on the account")]
///     NotEnough,
/// }
///
/// impl Handler for Transfers {
///     const NAME: &'static str = "transfer";
///     type Command = Transfer;
///     type Reply = ();
///     type Error = TransferError;
///
///     async fn handle(&self, transfer: &Transfer, context: &HandlerContext) -> Result<(), HandleError<TransferError>> {
///         let withdraw = AccountCommand::Withdraw(transfer.amount);
///         let withdrawn = context.execute::<Account>(&transfer.from, withdraw).await?.reply;
///         if !withdrawn {
///             return Err(HandleError::Rejected(TransferError::NotEnough));
///         }
///         context.execute::<Account>(&transfer.to, AccountCommand::Deposit(transfer.amount)).await?;
///         Ok(())
///     }
/// }
/// ```
pub trait Handler: Send + Sync + 'static {
    /// Name of the command on the bus and in the store's records.
    ///
    /// It consists of dotted tokens of ASCII letters, digits, `_` and `-`.
    const NAME: &'static str;
    /// Command of the handler.
    type Command: Serialize + DeserializeOwned + Send + Sync + 'static;
    /// Reply to the command.
    type Reply: Serialize + DeserializeOwned + Send + 'static;
    /// Reason for rejecting the command. The bus transfers its variants and fields to the caller.
    type Error: std::error::Error + Serialize + DeserializeOwned + Send + Sync + 'static;

    /// Handles a command.
    ///
    /// If an attempt ends without a record, a repetition of the command starts a new attempt from
    /// the beginning. An attempt continues after its callers stop waiting, and a repetition joins
    /// it. After [`HandlerOptions::time_limit`] its future is dropped.
    ///
    /// # Errors
    /// [`HandleError::Rejected`] rejects the command permanently, and is recorded.
    /// [`HandleError::Failed`] ends this attempt only: nothing is recorded, the caller gets
    /// `OutcomeUnknown`, and the same command id can be retried.
    fn handle(
        &self,
        command: &Self::Command,
        context: &HandlerContext,
    ) -> impl Future<Output = Result<Self::Reply, HandleError<Self::Error>>> + Send;

    /// Returns the key of a command. Commands with the same key do not run concurrently.
    ///
    /// They go to the same node and run there one at a time, in order, while no node joins or
    /// leaves. Default: no key, so any node handles the command in any order.
    fn key(command: &Self::Command) -> Option<String> {
        let _ = command;
        None
    }
}

/// An error of a handler.
#[derive(Debug, Clone, thiserror::Error)]
pub enum HandleError<E> {
    /// A permanent rejection. It is recorded: the same command id is rejected again.
    #[error(transparent)]
    Rejected(E),
    /// A failure of this attempt. `?` converts every error of a nested command to it.
    #[error("{0}")]
    Failed(String),
}

impl<E, N: fmt::Display> From<ExecuteError<N>> for HandleError<E> {
    fn from(error: ExecuteError<N>) -> Self {
        Self::Failed(error.to_string())
    }
}

/// The answer of a handler. The outcome of the command is durable.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Handled<R = ()> {
    /// Id of the command.
    pub command_id: Uuid,
    /// Reply of the handler.
    pub reply: R,
    /// Whether the command was handled before this call. The answer is then the recorded one.
    pub duplicate: bool,
}
