//! Sources of the next events: the store during catch-up, and a follower when live.

use std::collections::VecDeque;

use tokio::task::JoinSet;

use super::context::TaskConfig;
use super::live::{DurableFollower, Follower};
use super::page_ahead::PageAhead;
use super::task::{Pending, ProjectionTask, SCAN, Source};
use super::wait::wait_for_input;
use crate::bus::{Follow, LogBatch};
use crate::event::{Position, RecordedEvent};
use crate::feed::{FeedItem, adjacent};
use crate::projection::interruption::Interruption;
use crate::projection::layout::Role;
use crate::projection::{FollowMode, Projection, ProjectionState, ReadModel};
use crate::store::{LogPage, ReadLog};

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'_, P, R> {
    /// Drops the work in progress; the next round continues from the applied position.
    pub(super) fn restart(&mut self) {
        self.pending = None;
        self.suspect = None;
        self.follower = None;
        self.ahead = None;
        self.timing.let_go();
        self.source = Source::Store;
    }

    /// Reads the next page from the store.
    pub(super) async fn read(&mut self) {
        if self.follower.is_none() {
            match self.listen() {
                Ok(follower) => {
                    self.follower = Some(follower);
                    self.read_to_feed();
                }
                Err(interruption) => return self.on_interruption(&interruption),
            }
        }
        let ahead = self.ahead.take().filter(|ahead| ahead.after == self.applied);
        let mut ahead = ahead.unwrap_or_else(|| self.begin_to_read(self.applied));
        // No time limit except the store's own: a page that takes longer than a tick would never be
        // read.
        let outcome = wait_for_input(&mut self.inbox, &mut self.lease, None, None, ahead.page()).await;
        match self.attend(outcome).await {
            Some(Ok(page)) => {
                let hole = page.scanned_to == self.applied && page.has_more();
                self.scan = if hole { self.scan.saturating_mul(2) } else { SCAN };
                if page.events.is_empty() {
                    // Otherwise only after the commit: a readable database may still reject writes.
                    self.retry.succeeded();
                }
                self.source = if page.has_more() { Source::Store } else { Source::Feed };
                self.context.set(match self.source {
                    Source::Store => ProjectionState::CatchingUp,
                    Source::Feed => ProjectionState::Following,
                });
                let LogPage { mut events, scanned_to, head } = page;
                self.batching.page.saw(&events);
                let upto = self.timing.goal().map_or(scanned_to, |goal| goal.min(scanned_to));
                events.retain(|event| self.context.is_here(event) && event.position <= upto);
                self.knows_of(head);
                if self.source == Source::Store && !hole && upto == scanned_to {
                    self.ahead = Some(self.begin_to_read(scanned_to));
                }
                self.enqueue(events.into(), upto);
            }
            Some(Err(interruption)) => self.on_interruption(&interruption),
            None => {}
        }
    }

    fn begin_to_read(&self, after: Position) -> PageAhead {
        let TaskConfig { filter, .. } = self.context;
        let upto = Position::new(after.get().saturating_add(self.scan));
        let read = ReadLog::after(after).upto(upto).filter(filter.clone()).limit(self.batching.page.get());
        let mut reading = JoinSet::new();
        reading.spawn(self.context.log.read(read, self.live_after));
        PageAhead { after, reading }
    }

    /// Switches to the store, up to the current position of the feed.
    fn read_to_feed(&mut self) {
        self.source = Source::Store;
        // I1: a page that the partitions share may be older than the subscription. If it ends here
        // or later, it contains everything that the feed sent before the subscription.
        self.live_after = self.context.feed.position();
    }

    /// Subscribes to the live source from now on.
    pub(super) fn listen(&self) -> Result<Follower, Interruption> {
        let TaskConfig { feed, bus, store, log, layout, partition, filter, options, role, .. } = self.context;
        let own = *role == Role::Live && self.read_model.shared();
        if options.follow == FollowMode::Feed || !own {
            return Ok(Follower::Feed(feed.follow()));
        }
        // The runtime has checked that there is a bus, and that it supports this.
        let Some(bus) = bus else { return Ok(Follower::Feed(feed.follow())) };
        let followed = bus.follow(Follow {
            name: layout.consumer(*partition, self.instance.version),
            store: store.info().id,
            names: filter.names().map(|names| names.iter().cloned().collect()),
            categories: filter.categories().map(|categories| categories.iter().cloned().collect()),
        });
        let durable =
            |followed| DurableFollower::new(followed, log.clone(), filter.clone(), self.batching.page.get());
        // An error means that the bus was shut down.
        followed.map(|followed| Follower::Durable(Box::new(durable(followed)))).map_err(|error| {
            Interruption::Later { reason: format!("{} cannot be followed: {error}", bus.name()) }
        })
    }

    /// Processes the next items of the live source.
    pub(super) async fn follow(&mut self) {
        let Some(follower) = &mut self.follower else { return self.restart() };
        self.context.set(ProjectionState::Following);
        let news = Some(&mut self.news);
        let after = self.pending.as_ref().map_or(self.applied, |pending| pending.upto);
        let held = self.pending.as_ref().and_then(|_| self.timing.until());
        let until = held.map_or(self.tick_at, |until| until.min(self.tick_at));
        let outcome =
            wait_for_input(&mut self.inbox, &mut self.lease, news, Some(until), follower.next(after)).await;
        let Some(mut item) = self.attend(outcome).await else { return };
        // The events that wait already, and the new ones.
        let held = self.pending.take().unwrap_or(Pending { events: VecDeque::new(), upto: self.applied });
        let before = held.events.len();
        let Pending { mut events, mut upto } = held;
        loop {
            match item {
                FeedItem::Batch(batch) => {
                    self.knows_of(batch.upto);
                    match adjacent(batch, upto) {
                        Some(LogBatch { upto: end, events: batch, .. }) => {
                            let wanted = batch.iter().filter(|event| self.context.wants(event));
                            events.extend(wanted.cloned());
                            upto = end;
                        }
                        None => self.read_to_feed(),
                    }
                }
                FeedItem::Lagged => {
                    tracing::debug!(projection = self.context.name, "lagged the feed; reading the store");
                    self.read_to_feed();
                }
                FeedItem::Failed => {
                    // A shared page may have events that a failover lost.
                    self.context.log.forget();
                    self.source = Source::Store;
                }
                FeedItem::Closed => {
                    // Only if the runtime stops, which stops this task as well, or the bus is
                    // closed.
                    let reason = "following the feed failed: the feed has ended".into();
                    self.source = Source::Store;
                    self.follower = None;
                    self.schedule_retry(&Interruption::Later { reason });
                }
            }
            // Events that have arrived meanwhile share the transaction.
            if self.source == Source::Store || events.len() >= self.context.options.batch {
                break;
            }
            match self.follower.as_mut().and_then(|follower| follower.try_next(upto)) {
                Some(next) => item = next,
                None => break,
            }
        }
        if events.len() > before {
            self.timing.arrived(self.context.options.schedule);
        }
        self.enqueue(events, upto);
    }

    pub(super) fn enqueue(&mut self, events: VecDeque<RecordedEvent>, upto: Position) {
        if !events.is_empty() {
            let pending = Pending { events, upto };
            self.waits_since(&pending);
            self.pending = Some(pending);
        } else if upto > self.applied {
            // Only the checkpoint is left to write, which can wait for the next tick.
            self.applied = upto;
            self.moved_to(upto);
            self.report_applied();
        }
    }

    pub(super) fn report_applied(&mut self) {
        if let Some(follower) = &mut self.follower {
            follower.applied(self.applied);
        }
    }
}
