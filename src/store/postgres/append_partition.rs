//! Divides the appends of a batch into transactions.

use std::collections::HashSet;

use super::super::{Append, Boundary};
use crate::event::Tag;

/// The transactions of a batch. Each append has its index in the batch.
#[derive(Debug, Default)]
pub(super) struct Partition {
    pub(super) transactions: Vec<Vec<(usize, Append)>>,
    /// Appends with a condition, each a transaction.
    pub(super) conditional: Vec<(usize, Append, Boundary)>,
}

impl Partition {
    pub(super) fn of(batch: Vec<Append>) -> Self {
        let mut partition = Self::default();
        // Tags of the last transaction.
        let mut used: HashSet<Tag> = HashSet::new();
        for (index, mut append) in batch.into_iter().enumerate() {
            let condition = append.unless.take();
            match condition {
                Some(boundary) => partition.conditional.push((index, append, boundary)),
                None => partition.add(index, append, &mut used),
            }
        }
        partition
    }

    /// Adds an append to the last transaction, or to a new one if that would have too many tags: each
    /// takes a lock of the server.
    fn add(&mut self, index: usize, append: Append, used: &mut HashSet<Tag>) {
        let own = distinct_tags(&append);
        let new = own.iter().filter(|tag| !used.contains(**tag)).count();
        if used.len() + new > Append::MAX_TAGS || self.transactions.is_empty() {
            used.clear();
            self.transactions.push(Vec::new());
        }
        used.extend(own.into_iter().cloned());
        if let Some(transaction) = self.transactions.last_mut() {
            transaction.push((index, append));
        }
    }
}

/// Returns whether an append has neither tags nor a condition.
pub(super) fn is_simple(append: &Append) -> bool {
    append.unless.is_none() && tags(append).next().is_none()
}

fn distinct_tags(append: &Append) -> HashSet<&Tag> {
    tags(append).collect()
}

fn tags(append: &Append) -> impl Iterator<Item = &Tag> {
    append.streams.iter().flat_map(|part| &part.events).flat_map(|event| event.tags.iter())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use uuid::Uuid;

    use super::*;
    use crate::event::{EventName, NewEvent, StreamId, Tags};
    use crate::store::{ExpectedVersion, Query};

    /// Returns an append of events with one tag each.
    fn append(tags: impl IntoIterator<Item = u32>) -> Append {
        let event = |tag: u32| NewEvent {
            id: Uuid::now_v7(),
            name: EventName::new("order.placed").unwrap(),
            payload: Bytes::new(),
            command_id: Uuid::nil(),
            correlation_id: None,
            metadata: Bytes::new(),
            tags: Tags::new().tag("n", tag),
        };
        let stream = StreamId::new("order", Uuid::now_v7()).unwrap();
        Append::one(stream, ExpectedVersion::Any, tags.into_iter().map(event).collect())
    }

    fn indexes(transactions: &[Vec<(usize, Append)>]) -> Vec<Vec<usize>> {
        transactions.iter().map(|appends| appends.iter().map(|(index, _)| *index).collect()).collect()
    }

    #[test]
    fn a_transaction_has_a_limited_number_of_tags() {
        let batch = vec![append(0..60), append(0..64), append(4..5), append(64..65), append(0..64)];
        let partition = Partition::of(batch);
        assert_eq!(indexes(&partition.transactions), [vec![0, 1, 2], vec![3], vec![4]]);
        // An append without tags joins the last transaction.
        let partition = Partition::of(vec![append(0..64), append([]), append([])]);
        assert_eq!(indexes(&partition.transactions), [vec![0, 1, 2]]);
    }

    #[test]
    fn a_conditional_append_is_alone() {
        let condition = || Query::tagged("n", 1).exists();
        let batch = vec![append(0..64).unless(condition()), append(70..80), append([]).unless(condition())];
        let partition = Partition::of(batch);
        assert_eq!(indexes(&partition.transactions), [[1]]);
        let alone: Vec<_> = partition.conditional.iter().map(|(index, ..)| *index).collect();
        assert_eq!(alone, [0, 2]);
    }
}
