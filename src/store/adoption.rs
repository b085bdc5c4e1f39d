//! Whether a store is where it belongs: a copy of a database has the identity of its original.

use std::fmt;

#[cfg(any(feature = "sqlite", feature = "postgres"))]
use super::StoreError;

/// The database that a store lives in: what the server or the file system says of it, which a copy does not share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    /// Equal for the same database only.
    pub(crate) identity: String,
    /// For people, such as `schema storied (16390) in database shop (16384) of server 7312…`.
    pub(crate) shown: String,
}

impl fmt::Display for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

/// Whether a store is in the database that it was created in or adopted for. Compared once, when the store is opened.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Adoption {
    /// The database is the store's own.
    #[default]
    Adopted,
    /// The database is another one: a copy, or the store was moved. Reading, appending and following work. The node neither
    /// publishes to a bus that nodes share, nor joins the command bus, nor uses durable consumers.
    Unadopted {
        /// Where the store was created, or adopted last.
        recorded: Home,
        /// Where it was opened.
        found: Home,
    },
}

impl Adoption {
    /// The adoption of a store that belongs to `recorded` and was opened in `found`.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(crate) fn of(recorded: Home, found: Home) -> Self {
        if recorded.identity == found.identity { Self::Adopted } else { Self::Unadopted { recorded, found } }
    }

    /// Whether the database is the store's own.
    pub fn is_adopted(&self) -> bool {
        *self == Self::Adopted
    }

    /// The error of a read model in `place`, which may be the original's.
    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    pub(crate) fn refuses(&self, place: &dyn fmt::Display) -> StoreError {
        StoreError::Incompatible {
            expected: "an adopted event store, or a read model that was copied together with it".into(),
            found: format!("a read model in {place}"),
            advice: self.problem().unwrap_or_default(),
        }
    }

    /// What keeps the node from talking to others, in one sentence; `None` for an adopted store.
    pub fn problem(&self) -> Option<String> {
        let Self::Unadopted { recorded, found } = self else { return None };
        Some(format!(
            "the event store belongs to {recorded} and was opened in {found}; stop its nodes, run `storied store adopt --moved` if it was moved or restored, or `storied store adopt --copy` if the original lives on, then start them again"
        ))
    }
}

/// Why a store is in another database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adopt {
    /// The original is gone: the store keeps its identity.
    Moved,
    /// The original lives on: the store gets a new identity. Its read models in the same database stay valid. Its publisher
    /// starts without a memory of the original's bus, and every lease is free.
    Copy,
}
