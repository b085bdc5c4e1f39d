use serde::{Deserialize, Serialize};
use storied::{Aggregate, Context, Decision, Event};

/// An aggregate without cost: the benchmark measures its surroundings.
#[derive(Default)]
pub struct Account {
    pub entries: u64,
}

#[derive(Serialize, Deserialize)]
pub enum AccountCommand {
    Enter(String),
    Look,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AccountEvent {
    Entered { text: String },
}

#[derive(Debug, Serialize, Deserialize, thiserror::Error)]
#[error("never")]
pub struct Never;

impl Event for AccountEvent {
    const CATEGORY: &'static str = "account";
}

impl Aggregate for Account {
    type Event = AccountEvent;
    type Command = AccountCommand;
    type Reply = u64;
    type Error = Never;

    fn handle(
        &self,
        command: &AccountCommand,
        _: &Context<'_>,
    ) -> Result<Decision<AccountEvent, u64>, Never> {
        Ok(match command {
            AccountCommand::Enter(text) => {
                Decision::event(AccountEvent::Entered { text: text.clone() }).reply(self.entries + 1)
            }
            AccountCommand::Look => Decision::none().reply(self.entries),
        })
    }

    fn apply(&mut self, _: &AccountEvent) {
        self.entries += 1;
    }
}

pub fn text(bytes: usize) -> String {
    "x".repeat(bytes)
}
