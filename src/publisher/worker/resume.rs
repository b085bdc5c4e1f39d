//! Determines where a term continues: at the last message of the log stream that the log confirms.

use uuid::Uuid;

use super::claims::{Walk, find_end};
use super::interruption::Interruption;
use super::term::PublisherTerm;
use crate::bus::{BusPublisher, Claim, ClaimedEvent, LogStreamEnd, Resume};
use crate::event::Position;
use crate::store::StoreError;

impl PublisherTerm<'_> {
    /// Determines where to continue.
    pub(super) async fn resume(&mut self, publisher: &mut dyn BusPublisher) -> Result<(), Interruption> {
        let shared = self.shared;
        self.saved = shared.store.publisher_checkpoint().await?;
        self.epoch = self.lease.epoch_above(self.saved.epoch).await?.ok_or(Interruption::LeaseLost)?;
        let known = LogStreamEnd { position: self.saved.position, sequence: self.saved.sequence };
        self.end = match publisher.resume(known).await? {
            Resume::After(end) => self.confirm(publisher, known, end).await?,
            Resume::AtHighWaterMark => {
                LogStreamEnd { position: shared.store.high_water_mark().await?, sequence: 0 }
            }
        };
        // Another process may have published beyond the high-water mark of this process. Only the
        // event shows whether the log has lost it.
        let LogStreamEnd { position: end, sequence } = self.end;
        if end > Position::START && shared.store.event_id_at(end).await?.is_none() {
            let log = shared.store.high_water_mark().await?;
            if end > log {
                return Err(Interruption::Ahead { log_stream: end, log, first: sequence });
            }
        }
        // I7: this save claims the checkpoint. From here on, the store refuses a publisher with an
        // older lease.
        self.save().await?;
        *self.fenced = None;
        shared.status.send_modify(|status| {
            status.published = Some(self.end.position);
        });
        Ok(())
    }

    /// Finds the end of the log stream: the last message that the log confirms.
    async fn confirm(
        &mut self,
        publisher: &mut dyn BusPublisher,
        known: LogStreamEnd,
        end: LogStreamEnd,
    ) -> Result<LogStreamEnd, Interruption> {
        let store = &*self.shared.store;
        let mut claims = publisher.claims().await?;
        let Some(first) = claims.first().copied() else { return Ok(end) };
        // This process published nothing after the end at which it was fenced.
        let fenced = *self.fenced == Some(self.saved) && known.sequence == self.saved.sequence;
        let mut walk = if known.sequence > 0 && first.sequence == known.sequence {
            if self.is_recreated(known, first).await? {
                let known = LogStreamEnd::default();
                let Resume::After(end) = publisher.resume(known).await? else { return Ok(end) };
                return Box::pin(self.confirm(publisher, known, end)).await;
            }
            claims.remove(0);
            Walk::new(store, known.position, first.event != ClaimedEvent::Missing)
        // Else the claims are the last ones only: they do not follow the checkpoint.
        } else if fenced && known.sequence == 0 && first.sequence == 1 {
            Walk::new(store, known.position, true)
        } else if let Some(index) = find_end(store, &claims).await?
            && let Some(Claim { event: ClaimedEvent::Event { position, .. }, .. }) = claims.get(index)
        {
            let position = *position;
            claims.drain(..=index);
            Walk::new(store, position, true)
        } else {
            // The log stream has nothing of this log. It may have events of another log under the
            // same store id.
            for claim in claims.iter().rev() {
                if let ClaimedEvent::Event { position, id, .. } = claim.event {
                    return Err(self.lost(position, id, claim.sequence).await?);
                }
            }
            return Ok(end);
        };
        while !claims.is_empty() {
            for claim in claims {
                walk.take(claim).await?;
            }
            claims = publisher.claims().await?;
        }
        if let Some(lost) = walk.lost.filter(|_| !fenced) {
            return Err(self.lost(lost.position, lost.id, lost.first).await?);
        }
        let (ignored, position) = (walk.ignored(), walk.position);
        if ignored > 0
            && let Some(messages) = self.foreign.add(ignored)
        {
            let bus = self.shared.bus.name();
            tracing::warn!(bus, messages, "ignoring messages of another program in the log stream");
        }
        publisher.confirm(position, walk.is_exact);
        Ok(LogStreamEnd { position, ..end })
    }

    /// Whether the log stream was recreated since the checkpoint: it has a later event there.
    /// Fails if the log has lost the event of the checkpoint.
    async fn is_recreated(&self, known: LogStreamEnd, claim: Claim) -> Result<bool, Interruption> {
        let ClaimedEvent::Event { position, id, .. } = claim.event else { return Ok(false) };
        // An earlier event or another id proves nothing: the last message may have been of another
        // program.
        if position < known.position {
            return Ok(false);
        }
        let log = self.shared.store.event_id_at(position).await?;
        if position == known.position && log.is_none() {
            return Err(self.lost(position, id, claim.sequence).await?);
        }
        Ok(position > known.position && log == Some(id))
    }

    /// Determines why the log does not have an event of the log stream.
    async fn lost(&self, position: Position, id: Uuid, first: u64) -> Result<Interruption, StoreError> {
        let store = &self.shared.store;
        let (log, head) = (store.event_id_at(position).await?, store.high_water_mark().await?);
        Ok(match log {
            None if position > head => Interruption::Ahead { log_stream: position, log: head, first },
            log => Interruption::Diverged { position, log_stream: id, log, first },
        })
    }
}
