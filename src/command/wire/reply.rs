//! A reply of a node to a command that it received.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::failure::{Code, Failure};
use super::outcome::{Answered, Done, Omitted, Outcome};

/// A reply of a node to a command that it received.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Reply {
    #[serde(rename = "wire")]
    pub(crate) format: u32,
    /// Incarnation of the replying node: new with every start.
    pub(crate) incarnation: Uuid,
    pub(crate) says: ReplyKind,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ReplyKind {
    /// The command has its permit and will be executed.
    Accepted,
    /// The command is still in flight.
    Alive,
    /// This node does not execute the command; nothing happened.
    Refused(Failure),
    /// The command has ended with this answer.
    Executed(Answered),
}

impl ReplyKind {
    /// Shortens a reply of `size` bytes to fit into a message of `limit` bytes.
    ///
    /// The result of the command stays; its content is dropped.
    pub(crate) fn shortened(self, size: usize, limit: usize) -> Self {
        match self {
            ReplyKind::Refused(failure) => ReplyKind::Refused(failure.shortened(size, limit)),
            ReplyKind::Executed(Answered { runtime, outcome }) => {
                let outcome = match outcome {
                    Outcome::Done(Done { reply, version, position, events, duplicate, .. }) => {
                        let omitted = Some(Omitted { size: reply.len() as u64, limit: limit as u64 });
                        Outcome::Done(Done {
                            reply: Vec::new(),
                            omitted,
                            version,
                            position,
                            events,
                            duplicate,
                        })
                    }
                    Outcome::Error(failure) => Outcome::Error(failure.shortened(size, limit)),
                };
                ReplyKind::Executed(Answered { runtime, outcome })
            }
            says @ (ReplyKind::Accepted | ReplyKind::Alive) => says,
        }
    }

    /// Converts the shutdown of another node to `Unavailable`: this node is not shutting down.
    pub(crate) fn of_another(&mut self) {
        if let ReplyKind::Refused(failure)
        | ReplyKind::Executed(Answered { outcome: Outcome::Error(failure), .. }) = self
            && failure.code == Code::ShuttingDown
        {
            failure.code = Code::Unavailable;
        }
    }
}
