//! Requests of operators to an instance.

use super::error::RequestError;
use super::event::{ProcessEvent, Verb};
use super::history::load;
use super::record::Phase;
use super::status::stream_of;
use crate::event::{Metadata, NewEvent, StreamId};
use crate::store::{Append, AppendError, EventStore, ExpectedVersion, StoreError};

/// Number of attempts at a request while the instance changes.
const ATTEMPTS: u32 = 20;

/// Appends an operator's request to the stream of an instance. Its owner then acts on it.
pub(super) async fn request(
    store: &dyn EventStore,
    process: &str,
    instance: &str,
    verb: Verb,
) -> Result<(), RequestError> {
    let stream = stream_of(process, instance)?;
    let mut last = None;
    for _ in 0..ATTEMPTS {
        let record = load(store, &stream).await?;
        let (process, instance) = (process.to_owned(), instance.to_owned());
        if !record.exists() {
            return Err(RequestError::UnknownInstance { process, instance });
        }
        if !record.applies(verb) {
            return Err(match verb {
                Verb::Retry => RequestError::NotParked { process, instance },
                Verb::Compensate if record.phase == Phase::Compensating => {
                    RequestError::Compensating { process, instance }
                }
                Verb::Cancel | Verb::Compensate => RequestError::Ended { process, instance },
            });
        }
        let event = requested(store, &stream, verb)?;
        let expected = ExpectedVersion::Exact(record.version);
        let append = Append::one(stream.clone(), expected, vec![event]);
        match store.append(vec![append]).await.pop() {
            Some(Ok(_)) => return Ok(()),
            Some(Err(AppendError::Store(error))) => return Err(error.into()),
            Some(Err(conflict)) => last = Some(conflict.to_string()),
            None => {}
        }
    }
    let reason = format!("requesting a change of {stream} failed: {}", last.unwrap_or_default());
    Err(StoreError::Unavailable { reason, source: None }.into())
}

fn requested(store: &dyn EventStore, stream: &StreamId, verb: Verb) -> Result<NewEvent, StoreError> {
    let invalid = |reason: String| StoreError::Invalid { reason };
    let event = ProcessEvent::Requested { verb };
    NewEvent::of_variant(stream.category(), &event, store.info().codec, &Metadata::default())
        .map_err(|error| invalid(error.to_string()))
}
