//! The body of a message: a CBOR map of the payload and the metadata.

use bytes::{BufMut, Bytes, BytesMut};

use crate::codec::Codec;
use crate::event::RecordedEvent;

/// CBOR: a map of two entries, and the keys with the tag of their value.
/// The tag is "encoded CBOR data item" (24) or "embedded JSON" (262).
const MAP: &[u8] = &[0xa2];
const PAYLOAD_CBOR: &[u8] = b"\x67payload\xd8\x18";
const PAYLOAD_JSON: &[u8] = b"\x67payload\xd9\x01\x06";
const METADATA: &[u8] = b"\x68metadata\xd8\x18";

fn payload_key(codec: Codec) -> &'static [u8] {
    match codec {
        Codec::Cbor => PAYLOAD_CBOR,
        Codec::Json => PAYLOAD_JSON,
    }
}

pub(super) fn body(event: &RecordedEvent) -> Bytes {
    let mut body = BytesMut::with_capacity(event.payload.len() + event.metadata.len() + 48);
    body.put_slice(MAP);
    for (key, value) in [(payload_key(event.codec), &event.payload), (METADATA, &event.metadata)] {
        body.put_slice(key);
        put_byte_string(&mut body, value);
    }
    body.freeze()
}

/// Reads payload and metadata, which share the body's memory.
pub(super) fn read_body(body: &Bytes, codec: Codec) -> Option<(Bytes, Bytes)> {
    let mut rest = body.clone();
    take(&mut rest, MAP)?;
    take(&mut rest, payload_key(codec))?;
    let payload = take_byte_string(&mut rest)?;
    take(&mut rest, METADATA)?;
    let metadata = take_byte_string(&mut rest)?;
    rest.is_empty().then_some((payload, metadata))
}

/// Writes a byte string as in RFC 8949, with the shortest length encoding.
fn put_byte_string(body: &mut BytesMut, value: &[u8]) {
    const BYTE_STRING: u8 = 0x40;
    match value.len() {
        length @ 0..24 => body.put_u8(BYTE_STRING | length as u8),
        length @ 24..0x100 => body.put_slice(&[BYTE_STRING | 24, length as u8]),
        length @ 0x100..0x1_0000 => {
            body.put_u8(BYTE_STRING | 25);
            body.put_u16(length as u16);
        }
        length @ 0x1_0000..0x1_0000_0000 => {
            body.put_u8(BYTE_STRING | 26);
            body.put_u32(length as u32);
        }
        length => {
            body.put_u8(BYTE_STRING | 27);
            body.put_u64(length as u64);
        }
    }
    body.put_slice(value);
}

fn take_byte_string(rest: &mut Bytes) -> Option<Bytes> {
    let first = *rest.first()?;
    let (short, extra) = match first.checked_sub(0x40)? {
        length @ 0..24 => (Some(length), 0),
        size @ 24..28 => (None, 1_usize << (size - 24)),
        _ => return None,
    };
    let digits = rest.get(1..1 + extra)?;
    let length = match short {
        Some(length) => usize::from(length),
        None => {
            let length = digits.iter().fold(0, |length, digit| length << 8 | u64::from(*digit));
            usize::try_from(length).ok()?
        }
    };
    let start = 1 + extra;
    let end = start.checked_add(length).filter(|end| *end <= rest.len())?;
    let value = rest.slice(start..end);
    *rest = rest.slice(end..);
    Some(value)
}

fn take(rest: &mut Bytes, expected: &[u8]) -> Option<()> {
    if !rest.starts_with(expected) {
        return None;
    }
    *rest = rest.slice(expected.len()..);
    Some(())
}
