//! Commands that are no aggregate's: a transfer between two accounts, an order that spans several services.

mod actor;
mod context;
mod options;
mod request;
mod run;

use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

pub(crate) use self::actor::{HandlerRouter, Job};
pub use self::context::HandlerContext;
pub(super) use self::context::{GiveWay, give_way};
pub use self::options::HandlerOptions;
pub use self::request::Request;
use super::ExecuteError;

/// Handles commands that are no aggregate's: usually by giving others, to aggregates and handlers wherever they live.
///
/// A command id takes effect once: what became of a command is recorded in the store, and the same id is answered with the
/// record. A node can die while it handles a command, though, before anything is recorded; the command is then handled
/// again, here or elsewhere, by a new attempt that starts from the beginning. So `handle` must bear to be repeated. The
/// commands that it gives through its [context](HandlerContext) do: in every attempt they have the same ids, and take
/// effect once. What decides the way that it goes on must be the same in every attempt, too: the reply of a command that
/// caused events is, since it is stored with them. A clock, chance, or a look into a read model are not. Nor is an
/// aggregate's refusal: it leaves no trace, and the same command may be accepted a moment later. Where a *no* decides
/// something, let the aggregate make an event of it and say so in its reply.
///
/// ```
/// use serde::{Deserialize, Serialize};
/// use storied::command::{HandleError, Handler, HandlerContext};
/// # use storied::{Aggregate, Context, Decision, Event};
/// # #[derive(Default)] struct Account;
/// # #[derive(Debug, Serialize, Deserialize)] enum AccountEvent { Changed }
/// # impl Event for AccountEvent { const CATEGORY: &'static str = "account"; }
/// # #[derive(Serialize, Deserialize)] enum AccountCommand { Withdraw(u64), Deposit(u64) }
/// # #[derive(Debug, Serialize, Deserialize, thiserror::Error)] #[error("never")] struct Never;
/// # impl Aggregate for Account {
/// #     type Event = AccountEvent; type Command = AccountCommand; type Reply = bool; type Error = Never;
/// #     fn handle(&self, _: &AccountCommand, _: &Context<'_>) -> Result<Decision<AccountEvent, bool>, Never> { Err(Never) }
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
    /// What the command is called on the bus and in the store's records: dotted tokens of ASCII letters, digits, `_`, `-`.
    const NAME: &'static str;
    /// What is asked.
    type Command: Serialize + DeserializeOwned + Send + Sync + 'static;
    /// What it is answered with.
    type Reply: Serialize + DeserializeOwned + Send + 'static;
    /// Why it is refused. Its variants and fields arrive wherever the command came from.
    type Error: std::error::Error + Serialize + DeserializeOwned + Send + Sync + 'static;

    /// Handles a command; again, from the start, when an attempt ended without a record. An attempt does not end with its
    /// callers, and a repetition joins it; after [`HandlerOptions::time_limit`] its future is dropped.
    ///
    /// # Errors
    /// [`HandleError::Rejected`] refuses the command for good, and is recorded. [`HandleError::Failed`] ends this attempt
    /// only: nothing is recorded, the caller gets `OutcomeUnknown`, and the same command id may be tried again.
    fn handle(
        &self,
        command: &Self::Command,
        context: &HandlerContext,
    ) -> impl Future<Output = Result<Self::Reply, HandleError<Self::Error>>> + Send;

    /// What commands have in common that must not be handled at the same time. Commands with the same key go to the same
    /// node, and there one at a time, in order (as long as no node comes or goes). None by default: any node, any order.
    fn key(command: &Self::Command) -> Option<String> {
        let _ = command;
        None
    }
}

/// Why a handler did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum HandleError<E> {
    /// It will not, ever. Recorded: the same command id is refused again.
    #[error(transparent)]
    Rejected(E),
    /// It could not, this time. Every error of a command that the handler gave becomes this by `?`.
    #[error("{0}")]
    Failed(String),
}

impl<E, N: fmt::Display> From<ExecuteError<N>> for HandleError<E> {
    fn from(error: ExecuteError<N>) -> Self {
        Self::Failed(error.to_string())
    }
}

/// The answer to a command that a handler handled. What became of it is durable.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Handled<R = ()> {
    /// The command.
    pub command_id: Uuid,
    /// The handler's reply.
    pub reply: R,
    /// The command had been handled before; this is the answer that was recorded then.
    pub duplicate: bool,
}

/// How a handler is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HandlerStatus {
    /// The handler's name.
    pub name: &'static str,
    /// Commands under way, those that wait for their turn among them.
    pub in_flight: usize,
}

/// The key of a command. I10: a panic in [`Handler::key`] refuses this command, and ends no task.
pub(super) fn key_of<H: Handler>(command: &H::Command) -> Result<Option<String>, String> {
    crate::panic::caught(|| H::key(command)).map_err(|panic| format!("Handler::key panicked: {panic}"))
}
