//! The identity and capabilities of a store.

use serde::Serialize;
use uuid::Uuid;

use super::adoption::Adoption;
use crate::codec::Codec;

/// The identity and capabilities of a store; constant while the store is open.
///
/// Serializes as a map of its fields.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct StoreInfo {
    /// Identifier created with the store.
    ///
    /// Checkpoints and log streams carry it, so that a restored or another database is detected.
    pub id: Uuid,
    /// Encoding of the payloads.
    pub codec: Codec,
    /// Name of the back end: `memory`, `sqlite`, ….
    pub backend: &'static str,
    /// Number of append calls that may usefully run at the same time.
    ///
    /// SQLite has one writer. PostgreSQL gains from two or more.
    pub append_concurrency: usize,
    /// Whether the database is the store's own.
    pub adoption: Adoption,
}

impl StoreInfo {
    /// Describes a store; for the constructor of a back end.
    ///
    /// Default: one append at a time; see
    /// [`with_append_concurrency`](Self::with_append_concurrency).
    pub fn new(backend: &'static str, id: Uuid, codec: Codec) -> Self {
        Self { id, codec, backend, append_concurrency: 1, adoption: Adoption::Adopted }
    }

    /// Sets [`append_concurrency`](Self::append_concurrency).
    #[must_use]
    pub fn with_append_concurrency(mut self, appends: usize) -> Self {
        self.append_concurrency = appends;
        self
    }

    /// Sets [`adoption`](Self::adoption).
    ///
    /// Default: adopted.
    #[must_use]
    pub fn with_adoption(mut self, adoption: Adoption) -> Self {
        self.adoption = adoption;
        self
    }
}
