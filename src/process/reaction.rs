//! The instructions of an instance to its driver.

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::event::Effect;
use crate::store::{NewTimer, TimerRef};

/// The reply of an instance to its driver, which carries it out.
///
/// It is not stored: a driver that does not have it asks the instance to [advance](CommandKind).
#[derive(Debug, Default)]
pub(crate) struct Reaction {
    pub(super) consumed: Consumed,
    /// Why the instance was parked.
    pub(super) parked: Option<String>,
    /// Commands to send, in order.
    pub(super) effects: Vec<Effect>,
    /// Number of the commands, from the first, that earlier reactions have caused.
    pub(super) resent: usize,
    /// Whether commands that are not answered yet must not be sent any more.
    pub(super) cancels: bool,
    /// Timers to store.
    pub(super) put: Vec<NewTimer>,
    /// Timers to delete.
    pub(super) remove: Vec<TimerRef>,
    /// Whether the instance must advance.
    pub(super) more: bool,
}

/// How an instance has treated an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Consumed {
    /// There was no input.
    #[default]
    Nothing,
    Reacted,
    /// Recorded for a later reaction.
    Held,
    /// Recorded for a later reaction, and the instance was parked.
    Parked,
    /// The instance had consumed it before.
    Duplicate,
    /// The instance has ended, or compensates.
    Late,
    /// The event starts an instance, and it exists.
    Existing,
    /// The event continues an instance, and there is none.
    Missing,
    /// The parked instance holds too many inputs.
    Full,
}

impl Serialize for Reaction {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_unit()
    }
}

impl<'de> Deserialize<'de> for Reaction {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer)?;
        Ok(Self { more: true, ..Self::default() })
    }
}
