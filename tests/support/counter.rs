//! The aggregate of tests whose subject is not the aggregate.

use serde::{Deserialize, Serialize};
use storied::{Aggregate, Context, Decided, Decision, Event};

/// A sum, and the number of its parts.
#[derive(Default, Debug, Serialize, Deserialize)]
pub struct Counter {
    pub total: u64,
    pub adds: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum CounterCommand {
    Add(u64),
    /// Adds only if the total has exactly this value.
    AddIf {
        total: u64,
        add: u64,
    },
    /// Adds only up to a limit.
    AddUpTo {
        add: u64,
        limit: u64,
    },
    AddTwice(u64),
    /// Decides without events.
    Look,
    Panic,
    AddAndPanicInApply,
}
pub use CounterCommand::{Add, AddAndPanicInApply, AddIf, AddTwice, AddUpTo, Look};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CounterEvent {
    Added { n: u64 },
    Broken,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
pub enum CounterError {
    #[error("the total is {total}")]
    OtherTotal { total: u64 },
    #[error("the total is {total} and may be {limit}")]
    TooMuch { total: u64, limit: u64 },
}

impl Event for CounterEvent {
    const CATEGORY: &'static str = "counter";
}

impl Aggregate for Counter {
    type Event = CounterEvent;
    type Command = CounterCommand;
    type Reply = u64;
    type Error = CounterError;

    fn handle(&self, command: &CounterCommand, _: &Context<'_>) -> Decided<Self> {
        tracing::info!("the user's own line");
        let add = |n| Decision::event(CounterEvent::Added { n }).reply(self.total + n);
        match *command {
            Add(n) => Ok(add(n)),
            AddIf { total, add: n } if total == self.total => Ok(add(n)),
            AddIf { .. } => Err(CounterError::OtherTotal { total: self.total }),
            AddUpTo { add: n, limit } if self.total + n <= limit => Ok(add(n)),
            AddUpTo { limit, .. } => Err(CounterError::TooMuch { total: self.total, limit }),
            AddTwice(n) => Ok(Decision::events([CounterEvent::Added { n }, CounterEvent::Added { n }])
                .reply(self.total + 2 * n)),
            Look => Ok(Decision::none().reply(self.total)),
            CounterCommand::Panic => panic!("as requested"),
            AddAndPanicInApply => Ok(Decision::event(CounterEvent::Broken).reply(0)),
        }
    }

    fn apply(&mut self, event: &CounterEvent) {
        match event {
            CounterEvent::Added { n } => {
                self.total += n;
                self.adds += 1;
            }
            CounterEvent::Broken => panic!("cannot fold this"),
        }
    }
}
