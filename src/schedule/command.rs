//! A command as the store keeps it until it is due.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::codec::{byte_string, fingerprint, from_cbor, to_cbor};
use crate::command::{ErasedCommand, Expected, Kind};
use crate::event::{EncodeError, Metadata};
use crate::store::{DueTime, NewScheduledCommand};

/// Version number of this format.
const FORMAT: u32 = 1;

/// A command with its target, encoded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredCommand {
    format: u32,
    kind: Kind,
    /// Category of the aggregate, or name of the handler.
    name: String,
    /// Id of the aggregate, or key from the handler.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    #[serde(with = "byte_string")]
    payload: Vec<u8>,
    #[serde(with = "byte_string")]
    metadata: Vec<u8>,
    #[serde(default)]
    expected: Expected,
    /// Requested time, if the command has a time of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    due: Option<RequestedTime>,
}

/// The part of every format that says which one it is.
#[derive(Deserialize)]
struct Version {
    format: u32,
}

/// The reason why a stored command cannot be executed by this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// A newer version wrote it.
    Newer(String),
    /// It does not decode.
    Invalid(String),
}

impl Unreadable {
    fn invalid(reason: String) -> Self {
        Self::Invalid(format!("the command does not decode: {reason}"))
    }
}

/// The time that the caller has requested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum RequestedTime {
    /// Microseconds after the request.
    After(u64),
    At(DateTime<Utc>),
}

impl StoredCommand {
    pub(super) fn of(command: &ErasedCommand, due: Option<RequestedTime>) -> Result<Self, EncodeError> {
        let ErasedCommand { kind, name, key, payload, metadata, expected, .. } = command;
        Ok(Self {
            format: FORMAT,
            kind: *kind,
            name: name.clone(),
            key: key.clone(),
            payload: payload.clone(),
            metadata: metadata.encode()?.into(),
            expected: *expected,
            due,
        })
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Unreadable> {
        // A newer form may have other fields.
        let Version { format } = from_cbor(bytes).map_err(Unreadable::invalid)?;
        if format != FORMAT {
            let reason = format!("unknown format {format} (expected {FORMAT}); update this node");
            return Err(Unreadable::Newer(reason));
        }
        from_cbor(bytes).map_err(Unreadable::invalid)
    }

    /// Returns the command for its execution under an id.
    pub(super) fn command(self, id: Uuid) -> Result<ErasedCommand, Unreadable> {
        let Self { kind, name, key, payload, metadata, expected, .. } = self;
        let metadata = Metadata::decode(&metadata).map_err(Unreadable::invalid)?;
        Ok(ErasedCommand { id, kind, name, key, payload, metadata, expected })
    }

    /// Returns the target in clear: `category/id`, or the name of the handler.
    pub(super) fn target(&self) -> String {
        match (self.kind, &self.key) {
            (Kind::Aggregate, Some(id)) => format!("{}/{id}", self.name),
            _ => self.name.clone(),
        }
    }

    /// Returns whether both are the same request.
    ///
    /// A retry may have other metadata, and another order of the entries of a map.
    pub(super) fn is_same_request(&self, other: &Self) -> bool {
        let rest = |it: &Self| Self { metadata: Vec::new(), payload: Vec::new(), ..it.clone() };
        let content = |it: &Self| {
            let value = from_cbor::<ciborium::Value>(&it.payload).ok()?;
            fingerprint(&value).ok()
        };
        rest(self) == rest(other)
            && (self.payload == other.payload || content(self).is_some_and(|it| content(other) == Some(it)))
    }

    /// Returns the command as the store writes it.
    pub(super) fn to_store(
        &self,
        id: Uuid,
        due: DueTime,
        schedule: Option<&str>,
    ) -> Result<NewScheduledCommand, EncodeError> {
        let (target, schedule) = (self.target(), schedule.map(str::to_owned));
        Ok(NewScheduledCommand { id, target, body: to_cbor(self)?, due, schedule })
    }
}
