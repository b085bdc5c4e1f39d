//! A command in flight to another node.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::codec::byte_string;
use crate::event::Version;
use crate::store::ExpectedVersion;

/// The kind of a command's target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    Aggregate,
    Handler,
}

/// A command in flight to another node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct CommandFrame {
    #[serde(rename = "wire")]
    pub(crate) format: u32,
    pub(crate) id: Uuid,
    pub(crate) kind: Kind,
    /// Category of the aggregate, or name of the handler.
    pub(crate) name: String,
    /// Id of the aggregate, or key from the handler.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) key: Option<String>,
    #[serde(with = "byte_string")]
    pub(crate) payload: Vec<u8>,
    #[serde(with = "byte_string")]
    pub(crate) metadata: Vec<u8>,
    #[serde(default, skip_serializing_if = "Expected::is_any")]
    pub(crate) expected: Expected,
    /// Time left at the time of sending, in milliseconds. Absent: no limit.
    ///
    /// The format compares no two clocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) left: Option<u64>,
    /// Sending node and the time on its clock, as in its presence messages.
    ///
    /// The receiver derives the transit time of the command from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sent: Option<Sent>,
    /// Number of the attempt: 1, 2, 3 …
    pub(crate) attempt: u32,
    /// Whether the caller waits for the acceptance of the command, and not only for its end.
    #[serde(default)]
    pub(crate) prompt: bool,
}

/// The sending node and time of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sent {
    /// Incarnation of the node: new with every start.
    pub(crate) node: Uuid,
    /// Milliseconds since that start.
    pub(crate) clock: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Expected {
    #[default]
    Any,
    NoStream,
    StreamExists,
    Exact(u64),
}

impl Expected {
    fn is_any(&self) -> bool {
        *self == Self::Any
    }
}

impl From<ExpectedVersion> for Expected {
    fn from(expected: ExpectedVersion) -> Self {
        match expected {
            ExpectedVersion::Any => Self::Any,
            ExpectedVersion::NoStream => Self::NoStream,
            ExpectedVersion::StreamExists => Self::StreamExists,
            ExpectedVersion::Exact(version) => Self::Exact(version.get()),
        }
    }
}

impl From<Expected> for ExpectedVersion {
    fn from(expected: Expected) -> Self {
        match expected {
            Expected::Any => Self::Any,
            Expected::NoStream => Self::NoStream,
            Expected::StreamExists => Self::StreamExists,
            Expected::Exact(version) => Self::Exact(Version::new(version)),
        }
    }
}
