use serde::{Deserialize, Serialize};
use storied::{Aggregate, Context, Decided, Decision, Event, NeverRejects};

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

impl Event for AccountEvent {
    const CATEGORY: &'static str = "account";
}

impl Aggregate for Account {
    type Event = AccountEvent;
    type Command = AccountCommand;
    type Reply = u64;
    type Error = NeverRejects;

    fn handle(&self, command: &AccountCommand, _: &Context<'_>) -> Decided<Self> {
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
