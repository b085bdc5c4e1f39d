//! Partitions of a projection: their assignment to nodes, and their group on a node.

mod assignment;
mod group;

pub(super) use self::group::{Never, PartitionGroup, PartitionSlot, sum};
