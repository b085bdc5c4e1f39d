//! From a batch of appends to calls of `storied.append()`, in which no stream may come twice.

use std::collections::HashMap;

use uuid::Uuid;

use super::super::{Append, ExpectedVersion, StoreError};
use super::stream_key;
use crate::event::{NewEvent, StreamId};

/// What one event may have in payload and metadata. PostgreSQL's limit is 1 GB, for the message and for everything that is
/// made of it on the way to the disk.
const MAX_EVENT_BYTES: usize = 100_000_000;
/// What one append may have, since it cannot be split.
const MAX_APPEND_BYTES: usize = 400_000_000;
/// One call takes no more, unless one append alone does.
const CALL_BYTES: usize = 16 << 20;
const CALL_EVENTS: usize = 5_000;

/// Refuses what no attempt could store, before it gets near a transaction that others share.
pub(super) fn check(append: &Append) -> Result<(), StoreError> {
    append.validate()?;
    let mut all = 0_usize;
    for part in &append.streams {
        for event in &part.events {
            let bytes = size(event);
            all = all.saturating_add(bytes);
            if bytes > MAX_EVENT_BYTES {
                let reason = format!(
                    "the event {} for {} has {bytes} bytes, at most {MAX_EVENT_BYTES} are stored; keep large content elsewhere and refer to it",
                    event.name, part.stream
                );
                return Err(StoreError::Invalid { reason });
            }
        }
    }
    if all > MAX_APPEND_BYTES {
        let reason = format!(
            "one append has {all} bytes of events, at most {MAX_APPEND_BYTES} are stored at once; split it, or keep large content elsewhere"
        );
        return Err(StoreError::Invalid { reason });
    }
    Ok(())
}

fn size(event: &NewEvent) -> usize {
    event.payload.len().saturating_add(event.metadata.len())
}

/// What is decided together: an append, or several that follow one another on one stream, so that if the first is as
/// expected, all are.
#[derive(Debug, Clone)]
pub(super) struct Unit<'a> {
    /// Which appends of the batch, in their order.
    pub(super) appends: Vec<usize>,
    pub(super) parts: Vec<Part<'a>>,
    bytes: usize,
}

/// What a unit has for one stream.
#[derive(Debug, Clone)]
pub(super) struct Part<'a> {
    pub(super) stream: &'a StreamId,
    pub(super) key: Uuid,
    pub(super) expected: ExpectedVersion,
    pub(super) events: Vec<&'a NewEvent>,
}

impl<'a> Unit<'a> {
    fn new(index: usize, append: &'a Append) -> Self {
        let parts: Vec<Part<'_>> = append
            .streams
            .iter()
            .map(|part| Part {
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

    /// Adds an append to the same stream whose expectation holds whenever this unit's does.
    fn merge(&mut self, index: usize, append: &'a Append) -> bool {
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

/// What can be done next of a batch.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    /// In calls of one transaction each. No stream comes twice in the whole plan.
    pub(super) calls: Vec<Vec<Unit<'a>>>,
    /// Appends that have to wait for the end of these, because they name the same streams.
    pub(super) later: Vec<usize>,
}

/// Plans the appends `todo` of a batch; `merge` says whether appends may be joined.
pub(super) fn plan<'a>(batch: &'a [Append], todo: &[usize], merge: bool) -> Plan<'a> {
    let mut units: Vec<Unit<'a>> = Vec::with_capacity(todo.len());
    let mut later = Vec::new();
    // The unit that has a stream, or none if an append to it has to wait: then all that follow it have to.
    let mut taken: HashMap<&StreamId, Option<usize>> = HashMap::new();
    for &index in todo {
        let Some(append) = batch.get(index) else { continue };
        if append.streams.iter().all(|part| !taken.contains_key(&part.stream)) {
            taken.extend(append.streams.iter().map(|part| (&part.stream, Some(units.len()))));
            units.push(Unit::new(index, append));
            continue;
        }
        let unit = match append.streams.as_slice() {
            [only] if merge => taken.get(&only.stream).copied().flatten(),
            _ => None,
        };
        let merged = unit.and_then(|unit| units.get_mut(unit)).is_some_and(|unit| unit.merge(index, append));
        if !merged {
            taken.extend(append.streams.iter().map(|part| (&part.stream, None)));
            later.push(index);
        }
    }
    let mut calls: Vec<Vec<Unit<'a>>> = Vec::new();
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
    Plan { calls, later }
}
