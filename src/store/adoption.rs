//! Detects that a database was copied or moved: a copy has the identity of its original.

use std::fmt;

use serde::{Serialize, Serializer};

#[cfg(any(feature = "sqlite", feature = "postgres"))]
use super::StoreError;

/// The database of a store, as the server or the file system identifies it.
///
/// A copy of the database has another home. Serializes as its display form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    /// Value that is equal for the same database only.
    pub(crate) identity: String,
    /// Display form, such as `schema storied (16390) in database shop (16384) of server 7312…`.
    pub(crate) shown: String,
}

impl fmt::Display for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl Serialize for Home {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.shown)
    }
}

/// Whether a store is in the database that it was created in or adopted for.
///
/// Compared once, when the store is opened. Serializes as `"adopted"` or
/// `{"unadopted": {"recorded": …, "found": …}}`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Adoption {
    /// The database is the store's own.
    #[default]
    Adopted,
    /// The database is another one: a copy, or the store was moved.
    ///
    /// Reading, appending and following work. The node does not publish to a bus that nodes share,
    /// does not join the command bus, uses no durable consumers and runs no processes. Scheduled
    /// commands and recurring schedules wait until the store is [adopted](Adopt).
    Unadopted {
        /// Database in which the store was created or last adopted.
        recorded: Home,
        /// Database in which the store was opened.
        found: Home,
    },
}

impl Adoption {
    /// Compares the `recorded` home of a store with the home that it was `found` in.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(crate) fn of(recorded: Home, found: Home) -> Self {
        if recorded.identity == found.identity { Self::Adopted } else { Self::Unadopted { recorded, found } }
    }

    /// Returns whether the database is the store's own.
    pub fn is_adopted(&self) -> bool {
        *self == Self::Adopted
    }

    /// Returns the error for a read model in `location`, which may belong to the original.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(crate) fn refuses(&self, location: &dyn fmt::Display) -> StoreError {
        StoreError::Incompatible {
            expected: "an adopted event store, or a read model that was copied together with it".into(),
            found: format!("a read model in {location}"),
            advice: self.problem().unwrap_or_default(),
        }
    }

    /// Returns why the node stays separate from other nodes, as one sentence; `None` if adopted.
    pub fn problem(&self) -> Option<String> {
        let Self::Unadopted { recorded, found } = self else { return None };
        Some(format!(
            "the event store belongs to {recorded} and was opened in {found}; stop its nodes, run `storied store adopt --moved` if the store was moved or restored, or `storied store adopt --copy` if the original remains in use, then start the nodes again"
        ))
    }
}

/// The reason why a store is in another database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adopt {
    /// The original no longer exists: the store keeps its identity.
    Moved,
    /// The original remains in use: the store gets a new identity.
    ///
    /// Its read models in the same database stay valid. Its publisher starts with no record of the
    /// original's bus, and every lease is free.
    Copy,
}
