//! Publishes the log in a term: from the end of the log stream on, until a failure or a stop.

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::super::status::PublisherState;
use super::interruption::Interruption;
use super::term::{PublisherTerm, lost};
use crate::bus::BusPublisher;
use crate::event::Position;
use crate::feed::{LogChunk, read_chunk};
use crate::rate_limit::RateLimit;
use crate::supervised::Inbox;
use crate::time::after;

/// Number of messages after which the checkpoint is written in any case.
/// At most this many messages plus one read of the log are compared after a crash.
const SAVE_AFTER: u64 = 16_384;

impl PublisherTerm<'_> {
    /// Publishes until a failure or a stop. A stop publishes every event committed by then.
    pub(super) async fn publish_all(&mut self, inbox: &mut Inbox<()>) -> Result<(), Interruption> {
        let shared = self.shared;
        let mut publisher = shared.bus.publisher(shared.store.info().id).await?;
        tokio::select! {
            biased;
            () = publisher.wanted() => {}
            // The first subscriber finds every event in the store.
            () = self.unheard(inbox) => return Ok(()),
        }
        // Subscribe before the first read of the store, so that an append in between wakes the
        // publisher.
        let appended = shared.store.appended();
        self.resume(&mut *publisher).await?;
        shared.set(PublisherState::Publishing);
        let ended = self.publish_on(&mut *publisher, appended, inbox).await;
        if let Err(Interruption::Bus(error)) = &ended {
            self.keep(publisher.confirmed(), error).await;
        }
        ended
    }

    async fn publish_on(
        &mut self,
        publisher: &mut dyn BusPublisher,
        mut appended: watch::Receiver<Position>,
        inbox: &mut Inbox<()>,
    ) -> Result<(), Interruption> {
        let shared = self.shared;
        // End of the log at the time of the stop request.
        let mut last = None;
        let mut poll = shared.options.busy_poll;
        let mut beat_at = Instant::now();
        // An announced position is read without a query for the end of the log. This query is half
        // of the read time.
        let mut announced = None;
        // Any program can publish hints, so reads that find nothing are rate limited.
        let (mut reads, mut hint_at, mut hinted) = (RateLimit::of_reads(), None::<Instant>, false);
        // If the log has more than one chunk to publish, the next one is read while one is
        // published.
        let mut ahead = None;
        loop {
            if last.is_none() && inbox.is_stopping() {
                last = Some(shared.store.high_water_mark().await?);
            }
            let chunk = match ahead.take() {
                Some(chunk) => chunk,
                None => {
                    appended.mark_unchanged();
                    read_chunk(&*shared.store, self.end.position, announced.take()).await?
                }
            };
            let (upto, head, something) = (chunk.upto, chunk.head, !chunk.batches.is_empty());
            if std::mem::take(&mut hinted) && something {
                reads.refund();
            }
            let more = upto < head;
            shared.status.send_if_modified(|status| status.head.replace(head) != Some(head));
            if something {
                if more {
                    appended.mark_unchanged();
                }
                ahead = self.publish_and_read_ahead(publisher, chunk).await?;
                beat_at = after(shared.options.heartbeat);
                poll = shared.options.busy_poll;
            }
            if last.is_some_and(|last| self.end.position >= last) {
                return self.save().await;
            }
            self.save_if_due().await?;
            if more {
                continue;
            }
            let poll_at = after(poll);
            loop {
                tokio::select! {
                    biased;
                    () = lost(&mut self.lease) => return Err(Interruption::LeaseLost),
                    () = inbox.stopping(), if last.is_none() => {}
                    // An error means that the store is being dropped; the poll reports it.
                    Ok(()) = appended.changed() => announced = Some(*appended.borrow_and_update()),
                    () = sleep_until(hint_at.unwrap_or(beat_at)), if hint_at.is_some() => {
                        (hint_at, hinted) = (None, true);
                    }
                    () = sleep_until(poll_at) => poll = poll.saturating_mul(2).min(shared.options.idle_poll),
                    () = sleep_until(beat_at) => {
                        self.heartbeat(publisher).await?;
                        beat_at = after(shared.options.heartbeat);
                    }
                    // Last branch: a flood of hints delays nothing else.
                    () = publisher.hinted() => {
                        // All hints until then cause one read.
                        let due = *hint_at.get_or_insert_with(|| reads.take());
                        if due > Instant::now() {
                            continue;
                        }
                        (hint_at, hinted) = (None, true);
                    }
                }
                break;
            }
        }
    }

    /// Waits for the stop request.
    async fn unheard(&self, inbox: &mut Inbox<()>) {
        self.shared.set(PublisherState::Unheard);
        inbox.stopping().await;
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
        let ((), next) = tokio::try_join!(self.publish(publisher, chunk), next)?;
        Ok(next?)
    }

    /// Saves the checkpoint after its interval, or after many messages.
    async fn save_if_due(&mut self) -> Result<(), Interruption> {
        let unsaved = self.end.sequence.saturating_sub(self.saved.mark);
        if self.save_at <= Instant::now() || unsaved >= SAVE_AFTER {
            self.save().await?;
        }
        Ok(())
    }

    /// Sends a heartbeat with the end of the published log.
    async fn heartbeat(&mut self, publisher: &mut dyn BusPublisher) -> Result<(), Interruption> {
        tokio::select! {
            biased;
            () = lost(&mut self.lease) => Err(Interruption::LeaseLost),
            beat = publisher.heartbeat(self.end.position) => beat.map_err(Interruption::Bus),
        }
    }

    async fn publish(
        &mut self,
        publisher: &mut dyn BusPublisher,
        chunk: LogChunk,
    ) -> Result<(), Interruption> {
        let status = &self.shared.status;
        for batch in chunk.batches {
            let sending = self.shared.begin(&batch);
            let end = tokio::select! {
                biased;
                // The outcome of the publish in flight is unknown: the next term asks the bus.
                () = lost(&mut self.lease) => Err(Interruption::LeaseLost),
                end = publisher.publish(batch) => end.map_err(Interruption::Bus),
            };
            self.shared.ended(sending, end.as_ref().err());
            self.end = end?;
            self.backoff.succeeded();
            status.send_modify(|status| status.published = Some(self.end.position));
        }
        Ok(())
    }
}
