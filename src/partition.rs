//! Which partition a stream belongs to: on the bus, as a token of the subject, and for whoever shares the log out.

use std::num::NonZeroU16;

/// The partition of the stream with this id (without its category), from 0: FNV-1a of its bytes, 32 bits wide, modulo the
/// number of partitions. Frozen: it is in subjects and checkpoints, and other languages compute it, too.
pub fn partition_of(stream_id: &str, partitions: NonZeroU16) -> u16 {
    const OFFSET: u32 = 0x811c_9dc5;
    const PRIME: u32 = 0x0100_0193;
    let hash = stream_id.bytes().fold(OFFSET, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(PRIME));
    // Smaller than the number of partitions, which is a u16.
    (hash % u32::from(partitions.get())) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_fnv_1a_as_published() {
        let all = NonZeroU16::MAX;
        for (text, hash) in [("", 0x811c_9dc5_u32), ("a", 0xe40c_292c), ("foobar", 0xbf9c_f968)] {
            assert_eq!(u32::from(partition_of(text, all)), hash % 65_535, "{text}");
        }
    }
}
