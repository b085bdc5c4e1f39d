//! Divides a batch of appends into calls of `storied.append()`; a call contains a stream only once.

use std::collections::HashMap;

use uuid::Uuid;

use super::super::{Append, ExpectedVersion, StoreError};
use super::convert::stream_key;
use crate::event::{NewEvent, StreamId};

/// Maximum size of an event's payload and metadata in bytes.
///
/// PostgreSQL limits to 1 GB the message and every structure built from it.
const MAX_EVENT_BYTES: usize = 100_000_000;
/// Maximum size of an append in bytes; an append cannot be split.
const MAX_APPEND_BYTES: usize = 400_000_000;
/// Maximum size of a call in bytes, unless a single append is larger.
const CALL_BYTES: usize = 16 << 20;
const CALL_EVENTS: usize = 5_000;

/// Rejects an append that can never be stored, before it joins a transaction with others.
pub(super) fn check(append: &Append) -> Result<(), StoreError> {
    append.validate()?;
    let mut all = 0_usize;
    for part in &append.streams {
        for event in &part.events {
            let bytes = size(event);
            all = all.saturating_add(bytes);
            if bytes > MAX_EVENT_BYTES {
                let reason = format!(
                    "the event {} of {} is too large: {bytes} bytes (limit {MAX_EVENT_BYTES}); store large content elsewhere and refer to it",
                    event.name, part.stream
                );
                return Err(StoreError::Invalid { reason });
            }
        }
    }
    if all > MAX_APPEND_BYTES {
        let reason = format!(
            "the append is too large: {all} bytes of events (limit {MAX_APPEND_BYTES}); split it, or store large content elsewhere"
        );
        return Err(StoreError::Invalid { reason });
    }
    Ok(())
}

fn size(event: &NewEvent) -> usize {
    event.payload.len().saturating_add(event.metadata.len())
}

/// The appends that are decided together.
///
/// A unit is one append, or several successive ones to one stream: if the first meets its expected
/// version, all do.
#[derive(Debug, Clone)]
pub(super) struct AppendGroup<'a> {
    /// Indexes of the appends in the batch, in order.
    pub(super) appends: Vec<usize>,
    pub(super) parts: Vec<StreamPart<'a>>,
    bytes: usize,
}

/// The events of a unit for one stream.
#[derive(Debug, Clone)]
pub(super) struct StreamPart<'a> {
    pub(super) stream: &'a StreamId,
    pub(super) key: Uuid,
    pub(super) expected: ExpectedVersion,
    pub(super) events: Vec<&'a NewEvent>,
}

impl<'a> AppendGroup<'a> {
    fn new(index: usize, append: &'a Append) -> Self {
        let parts: Vec<StreamPart<'_>> = append
            .streams
            .iter()
            .map(|part| StreamPart {
                stream: &part.stream,
                key: stream_key(&part.stream),
                expected: part.expected,
                events: part.events.iter().collect(),
            })
            .collect();
        let bytes = parts.iter().flat_map(|part| &part.events).map(|event| size(event)).sum();
        Self { appends: vec![index], parts, bytes }
    }

    fn events(&self) -> usize {
        self.parts.iter().map(|part| part.events.len()).sum()
    }

    /// Merges an append to the same stream, if its expectation holds whenever this unit's does.
    fn coalesce(&mut self, index: usize, append: &'a Append) -> bool {
        let ([part], [next]) = (self.parts.as_mut_slice(), append.streams.as_slice()) else { return false };
        let length = part.events.len() as u64;
        let end = match part.expected {
            ExpectedVersion::Exact(version) => Some(version.plus(length)),
            ExpectedVersion::NoStream => Some(crate::event::Version::new(length)),
            ExpectedVersion::Any | ExpectedVersion::StreamExists => None,
        };
        let follows = match next.expected {
            ExpectedVersion::Any | ExpectedVersion::StreamExists => true,
            ExpectedVersion::Exact(version) => end == Some(version),
            ExpectedVersion::NoStream => false,
        };
        if !follows || self.bytes >= CALL_BYTES || part.events.len() >= CALL_EVENTS {
            return false;
        }
        self.bytes += next.events.iter().map(size).sum::<usize>();
        part.events.extend(&next.events);
        self.appends.push(index);
        true
    }
}

/// The next calls of a batch.
#[derive(Debug)]
pub(super) struct AppendBatch<'a> {
    /// Calls, each one transaction. A stream occurs only once in the whole plan.
    pub(super) calls: Vec<Vec<AppendGroup<'a>>>,
    /// Appends deferred until after these calls, because they share streams with them.
    pub(super) deferred: Vec<usize>,
}

/// Plans the appends `todo` of a batch; with `coalesce`, appends may be merged.
pub(super) fn plan<'a>(batch: &'a [Append], todo: &[usize], coalesce: bool) -> AppendBatch<'a> {
    let mut units: Vec<AppendGroup<'a>> = Vec::with_capacity(todo.len());
    let mut deferred = Vec::new();
    // The unit that holds a stream, or `None` after a deferred append, which defers all later ones.
    let mut taken: HashMap<&StreamId, Option<usize>> = HashMap::new();
    for &index in todo {
        let Some(append) = batch.get(index) else { continue };
        if append.streams.iter().all(|part| !taken.contains_key(&part.stream)) {
            taken.extend(append.streams.iter().map(|part| (&part.stream, Some(units.len()))));
            units.push(AppendGroup::new(index, append));
            continue;
        }
        let unit = match append.streams.as_slice() {
            [only] if coalesce => taken.get(&only.stream).copied().flatten(),
            _ => None,
        };
        let merged =
            unit.and_then(|unit| units.get_mut(unit)).is_some_and(|unit| unit.coalesce(index, append));
        if !merged {
            taken.extend(append.streams.iter().map(|part| (&part.stream, None)));
            deferred.push(index);
        }
    }
    let mut calls: Vec<Vec<AppendGroup<'a>>> = Vec::new();
    let (mut bytes, mut events) = (0, 0);
    for unit in units {
        bytes += unit.bytes;
        events += unit.events();
        match calls.last_mut() {
            Some(call) if bytes <= CALL_BYTES && events <= CALL_EVENTS => call.push(unit),
            _ => {
                (bytes, events) = (unit.bytes, unit.events());
                calls.push(vec![unit]);
            }
        }
    }
    AppendBatch { calls, deferred }
}
