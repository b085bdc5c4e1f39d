//! Reads the streams of instances, without the types of the user.

use uuid::Uuid;

use super::event::ProcessEvent;
use super::record::Record;
use crate::codec::decode_variant;
use crate::event::{DecodeError, StreamId, Version};
use crate::store::{EventStore, StoreError};

/// Number of events in a page of a stream.
const PAGE: usize = 500;

/// Folds the stream of an instance, without the state of the user.
pub(super) async fn load(store: &dyn EventStore, stream: &StreamId) -> Result<Record, StoreError> {
    let mut record = Record::default();
    read(store, stream, |event| _ = record.fold(event)).await?;
    Ok(record)
}

/// Folds the stream of an instance. Also returns the version of the last event that `is_marker` accepts.
pub(super) async fn load_with_last(
    store: &dyn EventStore,
    stream: &StreamId,
    is_marker: impl Fn(&ProcessEvent) -> bool,
) -> Result<(Record, Version), StoreError> {
    let (mut record, mut last) = (Record::default(), Version::NONE);
    let fold = |event: &ProcessEvent| {
        record.fold(event);
        if is_marker(event) {
            last = record.version;
        }
    };
    read(store, stream, fold).await?;
    Ok((record, last))
}

/// Returns the version of an instance, and whether it has consumed an input.
pub(super) async fn find_input(
    store: &dyn EventStore,
    stream: &StreamId,
    input: Uuid,
) -> Result<(Version, bool), StoreError> {
    let mut found = false;
    let is_input = |event: &ProcessEvent| matches!(event, ProcessEvent::Input(of) if of.id == input);
    let version = read(store, stream, |event| found |= is_input(event)).await?;
    Ok((version, found))
}

/// Reads the stream of an instance. Returns its version.
async fn read(
    store: &dyn EventStore,
    stream: &StreamId,
    mut each: impl FnMut(&ProcessEvent),
) -> Result<Version, StoreError> {
    let mut version = Version::NONE;
    loop {
        let page = store.read_stream(stream, version, PAGE).await?;
        for event in &page {
            let variant = event.name.as_str().strip_prefix(stream.category());
            let variant = variant.and_then(|rest| rest.strip_prefix('.')).unwrap_or_default();
            let decoded = decode_variant::<ProcessEvent>(variant, &event.payload, event.codec);
            let decoded = decoded.map_err(|reason| StoreError::Corrupt {
                reason: DecodeError::payload(event, reason).to_string(),
            })?;
            each(&decoded);
            version = event.version;
        }
        if page.len() < PAGE {
            return Ok(version);
        }
    }
}
