//! CBOR, and the calls of serde: panics of user code become errors.

use cbor4ii::core::dec::Read;
use cbor4ii::core::utils::SliceReader;
use cbor4ii::serde::Deserializer;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::depth::Bounded;
use crate::panic::caught;

/// A value that serde cannot serialize.
#[derive(Debug, Clone, thiserror::Error)]
#[error("serializing a value of type {type_name} failed: {reason}")]
pub(crate) struct SerializeError {
    /// The Rust type.
    pub(crate) type_name: &'static str,
    /// The error of serde.
    pub(crate) reason: String,
}

/// Encodes any value as CBOR: snapshots, replies, metadata.
pub(crate) fn to_cbor<T: Serialize>(value: &T) -> Result<Vec<u8>, SerializeError> {
    // Most values take between 60 and 250 bytes.
    let mut bytes = Vec::with_capacity(128);
    serialize::<T, _, _>(
        || ciborium::into_writer(&Bounded::new(value), &mut bytes),
        |error| match error {
            ciborium::ser::Error::Io(error) => error.to_string(),
            ciborium::ser::Error::Value(reason) => reason,
        },
    )?;
    Ok(bytes)
}

/// Runs the `Serialize` of a `T`.
///
/// I10: a panic becomes an error of this value, and ends no task.
pub(super) fn serialize<T, R, E>(
    write: impl FnOnce() -> Result<R, E>,
    explain: impl FnOnce(E) -> String,
) -> Result<R, SerializeError> {
    let reason = match caught(write) {
        Ok(Ok(written)) => return Ok(written),
        Ok(Err(error)) => explain(error),
        Err(panic) => format!("Serialize panicked: {panic}"),
    };
    Err(SerializeError { type_name: std::any::type_name::<T>(), reason })
}

/// Runs the `Deserialize` of a `T`.
///
/// I10: a panic becomes an error of these bytes, and ends no task.
pub(super) fn deserialize<T>(read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    caught(read).unwrap_or_else(|panic| Err(format!("Deserialize panicked: {panic}")))
}

/// Decodes one CBOR value and rejects trailing bytes.
pub(crate) fn from_cbor<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    match read_cbor(bytes)? {
        (value, []) => Ok(value),
        (_, rest) => Err(format!("{} trailing bytes", rest.len())),
    }
}

/// Decodes one CBOR value, and returns the bytes after it.
///
/// cbor4ii takes a quarter of the time of ciborium for most types, but does not read all that
/// ciborium writes: no number in a shorter form than its type (0.5 as `f64`), no `()`, no tags. If
/// cbor4ii fails, ciborium decides. Values that cbor4ii reads are equal to those of ciborium, but
/// cbor4ii does not validate fields that the type ignores.
pub(super) fn read_cbor<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, &[u8]), String> {
    deserialize(|| {
        if let Some(read) = quickly(bytes) {
            return Ok(read);
        }
        let mut rest = bytes;
        let value = ciborium::from_reader(&mut rest).map_err(|error| explain(error, bytes.len()))?;
        Ok((value, rest))
    })
}

/// Describes the cause of a decoding error; the text of ciborium is the `Debug` of Rust.
///
/// Offsets count from the end, because a caller may have put the name of a variant before the
/// payload of `length` bytes.
#[cold]
fn explain(error: ciborium::de::Error<std::io::Error>, length: usize) -> String {
    use ciborium::de::Error;

    match error {
        Error::Io(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            "unexpected end of the CBOR data".into()
        }
        Error::Io(error) => error.to_string(),
        Error::Syntax(offset) => {
            format!("malformed CBOR, {} bytes before the end", length.saturating_sub(offset))
        }
        Error::Semantic(_, reason) => reason,
        Error::RecursionLimitExceeded => "the CBOR data is nested too deeply".into(),
    }
}

pub(super) fn quickly<T: DeserializeOwned>(bytes: &[u8]) -> Option<(T, &[u8])> {
    let mut deserializer = Deserializer::new(SliceReader::new(bytes));
    let value = T::deserialize(&mut deserializer).ok()?;
    let mut reader = deserializer.into_inner();
    let left = reader.fill(usize::MAX).ok()?.as_ref().len();
    Some((value, bytes.get(bytes.len() - left..)?))
}
