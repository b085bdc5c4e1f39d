//! Partition assignment: a pure function that every node computes from the same lease view.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use uuid::Uuid;

use crate::partition::fnv1a_32;

/// Returns the partitions that `me` should own, given the owner of each partition.
///
/// Each member has an equal share, rounded down or up. The members that hold the most partitions
/// keep the larger shares, so that as few partitions as possible move. Free partitions go to
/// members below their share, and a member above its share releases the surplus. If a partition
/// belongs to a node that is not a member (it is leaving, or dead but not yet detected), the
/// members wait for it.
///
/// Two nodes with the same view never want the same partition. With different views, the lease
/// decides.
pub(super) fn assign_partitions(
    owners: &[Option<Uuid>],
    members: &BTreeSet<Uuid>,
    me: Uuid,
    projection: &str,
) -> BTreeSet<usize> {
    if !members.contains(&me) {
        return BTreeSet::new();
    }
    let held = |node: Uuid| (0..owners.len()).filter(move |&index| owners[index] == Some(node));
    let mut ranked: Vec<Uuid> = members.iter().copied().collect();
    // The tie-break differs for each projection, so that the larger shares go to different nodes.
    ranked.sort_by_cached_key(|&node| (Reverse(held(node).count()), tie(projection, node)));
    let mut free = (0..owners.len()).filter(|&index| owners[index].is_none());
    for (rank, &node) in ranked.iter().enumerate() {
        let share = owners.len() / ranked.len() + usize::from(rank < owners.len() % ranked.len());
        let mut wanted: BTreeSet<usize> = held(node).take(share).collect();
        let missing = share - wanted.len();
        wanted.extend(free.by_ref().take(missing));
        if node == me {
            return wanted;
        }
    }
    BTreeSet::new()
}

fn tie(projection: &str, node: Uuid) -> u32 {
    fnv1a_32(&[projection.as_bytes(), node.as_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(n: usize) -> Uuid {
        Uuid::from_u128(n as u128 + 1)
    }

    fn members(count: usize) -> BTreeSet<Uuid> {
        (0..count).map(node).collect()
    }

    /// Applies one round of assignments on all members; returns how many were released and
    /// acquired.
    fn step(owners: &mut [Option<Uuid>], members: &BTreeSet<Uuid>) -> (usize, usize) {
        let before = owners.to_vec();
        let (mut given, mut taken) = (0, 0);
        for &member in members {
            let wanted = assign_partitions(&before, members, member, "p");
            for (index, owner) in owners.iter_mut().enumerate() {
                if before[index] == Some(member) && !wanted.contains(&index) {
                    *owner = None;
                    given += 1;
                } else if before[index] != Some(member) && wanted.contains(&index) {
                    assert_eq!((before[index], *owner), (None, None), "no other member has or wants it");
                    *owner = Some(member);
                    taken += 1;
                }
            }
        }
        (given, taken)
    }

    fn sizes(owners: &[Option<Uuid>], members: &BTreeSet<Uuid>) -> Vec<usize> {
        let mut sizes: Vec<_> = members
            .iter()
            .map(|member| owners.iter().filter(|owner| **owner == Some(*member)).count())
            .collect();
        sizes.sort_unstable_by_key(|size| Reverse(*size));
        sizes
    }

    #[test]
    fn three_nodes_share_eight_partitions_as_they_come_and_go() {
        let mut owners = vec![None; 8];
        for (count, expected) in
            [(1, vec![8]), (2, vec![4, 4]), (3, vec![3, 3, 2]), (2, vec![4, 4]), (3, vec![3, 3, 2])]
        {
            let members = members(count);
            for owner in &mut owners {
                *owner = owner.filter(|owner| members.contains(owner));
            }
            step(&mut owners, &members);
            step(&mut owners, &members);
            assert_eq!(sizes(&owners, &members), expected);
            assert_eq!(step(&mut owners, &members), (0, 0), "the assignment is stable");
        }
    }

    #[test]
    fn the_larger_shares_are_not_always_the_same_nodes() {
        let members = members(3);
        let first = |projection: &str| {
            members
                .iter()
                .copied()
                .find(|&me| !assign_partitions(&[None], &members, me, projection).is_empty())
        };
        let firsts: BTreeSet<_> = (0..50).map(|n| first(&format!("p{n}"))).collect();
        assert_eq!(firsts.len(), 3);
    }

    #[test]
    fn a_non_member_wants_nothing_and_keeps_its_partitions() {
        let members = members(2);
        let owners = vec![Some(node(7)); 4];
        assert!(assign_partitions(&owners, &members, node(7), "p").is_empty());
        assert!(assign_partitions(&owners, &members, node(0), "p").is_empty());
    }

    proptest! {
        /// From any start, with owners that are members, leaving nodes, or absent.
        #[test]
        fn assignment_converges_with_minimal_moves(
            count in 1_usize..8,
            owners in prop::collection::vec(prop::option::of(0_usize..10), 1..40),
        ) {
            let members = members(count);
            let mut owners: Vec<_> = owners.into_iter().map(|owner| owner.map(node)).collect();
            let (low, high) = (owners.len() / count, owners.len().div_ceil(count));
            // Number of partitions above any allowed share: `larger` members may keep the larger
            // share.
            let mut larger = owners.len() % count;
            let mut must: usize = 0;
            for size in sizes(&owners, &members) {
                must += size.saturating_sub(if larger > 0 { high } else { low });
                larger = larger.saturating_sub(1);
            }
            let mut given = step(&mut owners, &members).0;
            // Leaving nodes have left.
            for owner in &mut owners {
                *owner = owner.filter(|owner| members.contains(owner));
            }
            for _ in 0..3 {
                given += step(&mut owners, &members).0;
            }
            prop_assert!(owners.iter().all(Option::is_some));
            prop_assert!(sizes(&owners, &members).iter().all(|size| (low..=high).contains(size)));
            prop_assert_eq!(step(&mut owners, &members), (0, 0));
            prop_assert_eq!(given, must);
        }
    }
}
