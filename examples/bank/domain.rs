//! Accounts, and transfers between them.
//!
//! A transfer withdraws from one account and deposits on the other. If the deposit is declined, it
//! refunds. A transfer may be interrupted at any step and retried from the start, on this node or
//! another one, even while an earlier attempt still runs. Two rules make that safe:
//!
//! - the commands to the accounts have the same ids in every attempt, so each takes effect once;
//! - every decision on the rest of the transfer is an event in the stream of an account. A declined
//!   withdrawal or deposit is an event, not an error. An error would leave no trace: a later
//!   attempt could find money or room that the first attempt did not find, and move money that the
//!   first attempt reported as not moved.

use serde::{Deserialize, Serialize};
use storied::command::{HandleError, Handler, HandlerContext};
use storied::{Aggregate, Context, Decided, Decision, Event};
use uuid::Uuid;

/// Balance of a new account.
pub(crate) const OPENING: u64 = 1_000;

/// Maximum balance of an account, so that some deposits are declined.
pub(crate) const LIMIT: u64 = 1_500;

#[derive(Debug, Default)]
pub(crate) struct Account {
    open: bool,
    balance: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum AccountCommand {
    Open,
    Withdraw { transfer: Uuid, amount: u64 },
    Deposit { transfer: Uuid, amount: u64 },
    Refund { transfer: Uuid, amount: u64 },
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum AccountEvent {
    Opened {
        balance: u64,
    },
    Withdrawn {
        transfer: Uuid,
        amount: u64,
    },
    /// The balance was too small.
    Refused {
        transfer: Uuid,
        amount: u64,
    },
    Deposited {
        transfer: Uuid,
        amount: u64,
    },
    /// The balance would have exceeded the limit.
    Declined {
        transfer: Uuid,
        amount: u64,
    },
    Refunded {
        transfer: Uuid,
        amount: u64,
    },
}

impl Event for AccountEvent {
    const CATEGORY: &'static str = "account";
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum AccountError {
    #[error("no such account")]
    NotOpen,
}

/// The effect of a step on its account: money moved, or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Taken {
    Yes,
    No,
}

impl Aggregate for Account {
    type Event = AccountEvent;
    type Command = AccountCommand;
    type Reply = Taken;
    type Error = AccountError;

    fn handle(&self, command: &AccountCommand, _: &Context<'_>) -> Decided<Self> {
        if !self.open && !matches!(command, AccountCommand::Open) {
            return Err(AccountError::NotOpen);
        }
        let (event, taken) = match *command {
            AccountCommand::Open if self.open => return Ok(Decision::none().reply(Taken::Yes)),
            AccountCommand::Open => (AccountEvent::Opened { balance: OPENING }, Taken::Yes),
            AccountCommand::Withdraw { transfer, amount } if amount > self.balance => {
                (AccountEvent::Refused { transfer, amount }, Taken::No)
            }
            AccountCommand::Withdraw { transfer, amount } => {
                (AccountEvent::Withdrawn { transfer, amount }, Taken::Yes)
            }
            AccountCommand::Deposit { transfer, amount } if self.balance + amount > LIMIT => {
                (AccountEvent::Declined { transfer, amount }, Taken::No)
            }
            AccountCommand::Deposit { transfer, amount } => {
                (AccountEvent::Deposited { transfer, amount }, Taken::Yes)
            }
            // A refund returns money of this account, so the limit does not apply.
            AccountCommand::Refund { transfer, amount } => {
                (AccountEvent::Refunded { transfer, amount }, Taken::Yes)
            }
        };
        Ok(Decision::event(event).reply(taken))
    }

    fn apply(&mut self, event: &AccountEvent) {
        match event {
            AccountEvent::Opened { balance } => (self.open, self.balance) = (true, *balance),
            AccountEvent::Withdrawn { amount, .. } => self.balance -= amount,
            AccountEvent::Deposited { amount, .. } | AccountEvent::Refunded { amount, .. } => {
                self.balance += amount;
            }
            AccountEvent::Refused { .. } | AccountEvent::Declined { .. } => {}
        }
    }
}

/// Executes transfers.
#[derive(Debug)]
pub(crate) struct Transfers;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Transfer {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) amount: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum TransferError {
    #[error("account {account} has less than {amount}")]
    NotEnough { account: u64, amount: u64 },
    #[error("account {account} is at its limit; the money is refunded")]
    Declined { account: u64 },
    #[error("no account {account}")]
    NoAccount { account: u64 },
}

impl Handler for Transfers {
    const NAME: &'static str = "bank.transfer";
    type Command = Transfer;
    type Reply = ();
    type Error = TransferError;

    async fn handle(
        &self,
        &Transfer { from, to, amount }: &Transfer,
        context: &HandlerContext,
    ) -> Result<(), HandleError<TransferError>> {
        let transfer = context.command_id();
        let withdraw = AccountCommand::Withdraw { transfer, amount };
        match context.execute::<Account>(from, withdraw).await {
            Ok(receipt) if receipt.reply == Taken::Yes => {}
            Ok(_) => return Err(HandleError::Rejected(TransferError::NotEnough { account: from, amount })),
            Err(error) if error.rejection() == Some(&AccountError::NotOpen) => {
                return Err(HandleError::Rejected(TransferError::NoAccount { account: from }));
            }
            // The withdrawal may have taken effect: the next attempt finds out.
            Err(error) => return Err(error.into()),
        }
        let deposit = AccountCommand::Deposit { transfer, amount };
        let refused = match context.execute::<Account>(to, deposit).await {
            Ok(receipt) if receipt.reply == Taken::Yes => return Ok(()),
            Ok(_) => TransferError::Declined { account: to },
            // Accounts are never closed, so every attempt gets this answer.
            Err(error) if error.rejection() == Some(&AccountError::NotOpen) => {
                TransferError::NoAccount { account: to }
            }
            Err(error) => return Err(error.into()),
        };
        context.execute::<Account>(from, AccountCommand::Refund { transfer, amount }).await?;
        Err(HandleError::Rejected(refused))
    }
}
