//! Publishes the log in a term: from the end of the log stream on, until a failure or a stop.

use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use super::super::status::PublisherState;
use super::interruption::Interruption;
use super::term::PublisherTerm;
use crate::bus::{BusPublisher, LogBatch};
use crate::event::Position;
use crate::feed::{FeedFollower, FeedItem, LogChunk, adjacent, read_chunk};
use crate::supervised::Inbox;
use crate::time::after;

/// Number of messages after which the checkpoint is written in any case.
/// At most this many messages plus one read of the log are compared after a crash.
const SAVE_AFTER: u64 = 16_384;

/// Size of a publish to which no further batches of the feed are added, in events and bytes.
const MERGED_EVENTS: usize = 2_048;
const MERGED_BYTES: usize = 1 << 20;

/// Pause before the store is read again because its last events are not readable yet.
const UNREADABLE: Duration = Duration::from_millis(5);

impl PublisherTerm<'_> {
    /// Publishes until a failure or a stop. A stop publishes every event committed by then.
    pub(super) async fn publish_all(&mut self, inbox: &mut Inbox<()>) -> Result<(), Interruption> {
        let shared = self.shared;
        let mut publisher = shared.bus.publisher(shared.store.info().id).await?;
        self.resume(&mut *publisher).await?;
        shared.set(PublisherState::Publishing);
        let ended = self.publish_on(&mut *publisher, inbox).await;
        if let Err(Interruption::Bus(error)) = &ended {
            self.keep(publisher.confirmed(), error).await;
        }
        ended
    }

    async fn publish_on(
        &mut self,
        publisher: &mut dyn BusPublisher,
        inbox: &mut Inbox<()>,
    ) -> Result<(), Interruption> {
        loop {
            // I1: subscribe before the read, which then reaches the first batch of the feed.
            let follower = self.shared.feed.follow_without_bus();
            if self.catch_up(publisher, inbox).await? {
                return self.save().await;
            }
            self.follow(publisher, follower, inbox).await?;
        }
    }

    /// Publishes what the store has: up to its end, or up to its end at the time of a stop request.
    ///
    /// Returns whether the stop is complete.
    async fn catch_up(
        &mut self,
        publisher: &mut dyn BusPublisher,
        inbox: &mut Inbox<()>,
    ) -> Result<bool, Interruption> {
        let shared = self.shared;
        // End of the log at the time of the stop request.
        let mut last: Option<Position> = None;
        // The next chunk is read while one is published.
        let mut ahead = None;
        loop {
            if last.is_none() && inbox.is_stopping() {
                last = Some(shared.store.high_water_mark().await?);
            }
            let chunk = match ahead.take() {
                Some(chunk) => chunk,
                None => read_chunk(&*shared.store, self.end.position, None).await?,
            };
            let (upto, head) = (chunk.upto, chunk.head);
            shared.saw(head);
            ahead = self.publish_and_read_ahead(publisher, chunk).await?;
            self.save_if_due().await?;
            match last {
                Some(last) if upto >= last => return Ok(true),
                Some(_) if upto >= head => sleep(UNREADABLE).await,
                None if upto >= head => return Ok(false),
                _ => {}
            }
        }
    }

    /// Publishes what the feed sends, until the store has to be read or a stop is requested.
    async fn follow(
        &mut self,
        publisher: &mut dyn BusPublisher,
        mut follower: FeedFollower,
        inbox: &mut Inbox<()>,
    ) -> Result<(), Interruption> {
        let shared = self.shared;
        loop {
            tokio::select! {
                biased;
                () = self.lease.lost() => return Err(Interruption::LeaseLost),
                () = inbox.stopping() => return Ok(()),
                () = sleep_until(self.save_at), if self.is_unsaved() => self.save().await?,
                item = follower.next() => {
                    if matches!(item, FeedItem::Closed) {
                        // The runtime ends.
                        inbox.stopping().await;
                        return Ok(());
                    }
                    let (batch, is_adjacent) = self.merge(item, &mut follower);
                    shared.saw(batch.upto);
                    if !batch.events.is_empty() {
                        self.publish(publisher, batch).await?;
                        self.save_if_due().await?;
                    }
                    if !is_adjacent {
                        return Ok(());
                    }
                }
                () = sleep_until(self.beat_at) => self.heartbeat(publisher).await?,
                // Last branch: a flood of hints delays nothing else.
                () = publisher.hinted() => shared.feed.hint(),
            }
        }
    }

    /// Merges the items that the feed has sent so far into one batch after the published end.
    ///
    /// Also returns whether they are adjacent. Otherwise the store has the events after the batch.
    fn merge(&self, mut item: FeedItem, follower: &mut FeedFollower) -> (LogBatch, bool) {
        let after = self.end.position;
        let (mut upto, mut parts, mut events, mut bytes) = (after, Vec::new(), 0, 0);
        let is_adjacent = loop {
            let FeedItem::Batch(batch) = item else { break false };
            let Some(batch) = adjacent(batch, upto) else { break false };
            upto = batch.upto;
            events += batch.events.len();
            bytes +=
                batch.events.iter().map(|event| event.payload.len() + event.metadata.len()).sum::<usize>();
            parts.push(batch.events);
            if events >= MERGED_EVENTS || bytes >= MERGED_BYTES {
                break true;
            }
            match follower.try_next() {
                Some(next) => item = next,
                None => break true,
            }
        };
        let events = match &*parts {
            [part] => part.clone(),
            parts => parts.concat().into(),
        };
        (LogBatch { after, upto, events }, is_adjacent)
    }

    /// Publishes a chunk. Meanwhile reads the next one, if the log has more.
    async fn publish_and_read_ahead(
        &mut self,
        publisher: &mut dyn BusPublisher,
        chunk: LogChunk,
    ) -> Result<Option<LogChunk>, Interruption> {
        let shared = self.shared;
        let (upto, head) = (chunk.upto, chunk.head);
        let next = async {
            let next = match upto < head {
                true => read_chunk(&*shared.store, upto, Some(head)).await.map(Some),
                false => Ok(None),
            };
            // A failed read must not cancel the publish in flight.
            Ok::<_, Interruption>(next)
        };
        let publish = async {
            for batch in chunk.batches {
                self.publish(publisher, batch).await?;
            }
            Ok(())
        };
        let ((), next) = tokio::try_join!(publish, next)?;
        Ok(next?)
    }

    /// Saves the checkpoint after its interval, or after many messages.
    async fn save_if_due(&mut self) -> Result<(), Interruption> {
        let unsaved = self.end.sequence.saturating_sub(self.saved.sequence);
        if self.save_at <= Instant::now() || unsaved >= SAVE_AFTER {
            self.save().await?;
        }
        Ok(())
    }

    /// Sends a heartbeat with the end of the published log.
    async fn heartbeat(&mut self, publisher: &mut dyn BusPublisher) -> Result<(), Interruption> {
        self.beat_at = after(self.shared.options.heartbeat);
        tokio::select! {
            biased;
            () = self.lease.lost() => Err(Interruption::LeaseLost),
            beat = publisher.heartbeat(self.end.position) => beat.map_err(Interruption::Bus),
        }
    }

    async fn publish(
        &mut self,
        publisher: &mut dyn BusPublisher,
        batch: LogBatch,
    ) -> Result<(), Interruption> {
        let sending = self.shared.begin(&batch);
        let end = tokio::select! {
            biased;
            // The outcome of the publish in flight is unknown: the next term asks the bus.
            () = self.lease.lost() => Err(Interruption::LeaseLost),
            end = publisher.publish(batch) => end.map_err(Interruption::Bus),
        };
        self.shared.ended(sending, end.as_ref().err());
        self.end = end?;
        self.beat_at = after(self.shared.options.heartbeat);
        self.backoff.succeeded();
        self.shared.status.send_modify(|status| status.published = Some(self.end.position));
        Ok(())
    }
}
