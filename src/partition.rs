//! Assignment of streams to partitions.
//!
//! The partition of a stream is the FNV-1a hash (32 bits) of the UTF-8 bytes of its
//! [id](StreamId::id), modulo the number of partitions. The category is not part of the hash:
//! streams with id 17 in two categories are in the same partition. This function is frozen:
//! checkpoints and programs in other languages rely on it.

use std::fmt;

use serde::Serialize;

use crate::event::StreamId;

/// Maximum number of partitions: each is an actor and a lease.
pub(crate) const MOST: u16 = 256;

/// One of the partitions of a projection. Serializes as a map of `index` and `count`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Partition {
    index: u16,
    count: u16,
}

impl Partition {
    /// Returns the partition of a stream, of `count` in all. A count of 0 means 1.
    pub fn of(stream: &StreamId, count: u16) -> Self {
        let count = count.max(1);
        // Less than `count`, so the cast does not truncate.
        let index = (fnv1a_32(stream.id().as_bytes()) % u32::from(count)) as u16;
        Self { index, count }
    }

    /// Returns the only partition of an unpartitioned projection.
    pub(crate) const fn whole() -> Self {
        Self { index: 0, count: 1 }
    }

    /// Iterates over all partitions in order.
    pub(crate) fn all(count: u16) -> impl ExactSizeIterator<Item = Self> {
        (0..count).map(move |index| Self { index, count })
    }

    /// Returns the index of the partition, from 0.
    pub fn index(self) -> u16 {
        self.index
    }

    /// Returns the number of partitions.
    pub fn count(self) -> u16 {
        self.count
    }

    /// Returns whether the stream is in this partition.
    pub fn contains(self, stream: &StreamId) -> bool {
        Self::of(stream, self.count) == self
    }
}

impl fmt::Display for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.index, self.count)
    }
}

/// The hash of <http://www.isthe.com/chongo/tech/comp/fnv/>, as in the `partition` mapping of NATS.
pub(crate) fn fnv1a_32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, &byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Test vectors of the authors of the hash.
    #[test]
    fn the_hash_is_fnv_1a() {
        for (text, hash) in
            [("", 0x811c_9dc5), ("a", 0xe40c_292c), ("b", 0xe70c_2de5), ("foobar", 0xbf9c_f968)]
        {
            assert_eq!(fnv1a_32(text.as_bytes()), hash, "{text}");
        }
    }

    /// Never change these values: checkpoints in existing stores depend on them.
    #[test]
    fn partitions_are_frozen() {
        let of = |category, id, count| Partition::of(&StreamId::new(category, id).unwrap(), count).index();
        let ids =
            ["1", "17", "536365", "C536379", "a7c9b6de-6f0c-4a3b-8f6e-2b1f0a9d3c11", "Zürich/3", "訂單"];
        let eight = [4, 1, 3, 5, 7, 2, 4];
        assert_eq!(ids.map(|id| of("order", id, 8)), eight);
        assert_eq!(ids.map(|id| of("invoice", id, 8)), eight, "independent of the category");
        assert_eq!(ids.map(|id| of("order", id, 1)), [0; 7]);
        assert_eq!(ids.map(|id| of("order", id, 0)), [0; 7]);
    }

    #[test]
    fn every_stream_is_in_one_partition() {
        let mut sizes = [0; 8];
        for id in 0..8_000 {
            let stream = StreamId::new("order", id).unwrap();
            let found: Vec<_> = Partition::all(8).filter(|partition| partition.contains(&stream)).collect();
            assert_eq!(found.len(), 1);
            sizes[usize::from(found[0].index())] += 1;
        }
        assert!(sizes.iter().all(|size| (800..1_200).contains(size)), "{sizes:?}");
    }
}
