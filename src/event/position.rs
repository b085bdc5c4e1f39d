//! Positions in the log and versions in a stream.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A position in the log of a store.
///
/// Positions increase strictly, may have gaps, and are above [`Position::START`]. Serializes as a
/// number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Position(u64);

/// A position in a stream: 1, 2, 3 … without gaps. [`Version::NONE`] is an empty stream.
///
/// Serializes as a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Version(u64);

impl Position {
    /// The position before the first event.
    pub const START: Position = Position(0);
}

impl Version {
    /// The version of a stream without events.
    pub const NONE: Version = Version(0);

    /// Returns the version of the following event.
    #[must_use]
    pub const fn next(self) -> Version {
        Version(self.0 + 1)
    }

    /// Returns the version `events` later.
    #[must_use]
    pub const fn plus(self, events: u64) -> Version {
        Version(self.0 + events)
    }
}

macro_rules! number {
    ($type:ident) => {
        impl $type {
            /// Wraps a number.
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// Returns the number.
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}
number!(Position);
number!(Version);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_and_versions_are_numbers_in_json() {
        assert_eq!(
            serde_json::to_string(&(Position::new(7), Version::new(u64::MAX))).unwrap(),
            "[7,18446744073709551615]"
        );
        assert_eq!(serde_json::from_str::<Position>("7").unwrap(), Position::new(7));
        assert_eq!(serde_json::from_str::<Version>("0").unwrap(), Version::NONE);
        for json in ["-1", "0.5", "\"7\"", "[7]", "null"] {
            assert!(serde_json::from_str::<Position>(json).is_err(), "{json}");
            assert!(serde_json::from_str::<Version>(json).is_err(), "{json}");
        }
    }
}
