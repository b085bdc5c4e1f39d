//! Sources of the next events: the store during catch-up, and a follower when live.

use std::collections::VecDeque;

use tokio::task::JoinSet;

use super::context::TaskConfig;
use super::live::{DurableFollower, Follower};
use super::page_ahead::PageAhead;
use super::reading::{Pending, Reading, SCAN, Source};
use super::state::{Activity, Owning, State};
use super::task::ProjectionTask;
use super::wait::wait_for_input;
use crate::bus::{Follow, LogBatch};
use crate::event::{Position, RecordedEvent};
use crate::feed::{FeedItem, adjacent};
use crate::projection::interruption::Interruption;
use crate::projection::layout::Role;
use crate::projection::{FollowMode, Projection, ReadModel, Schedule};
use crate::store::{LogPage, ReadLog};

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'_, P, R> {
    /// Subscribes to the live source, then reads the store.
    pub(super) async fn begin_reading(&mut self) {
        match self.listen() {
            Ok(follower) => {
                // I1: a page that the partitions share may be older than the subscription. If it
                // ends here or later, it contains everything that the feed sent before the
                // subscription.
                self.state.begin_reading(follower, self.context.feed.position());
                self.read().await;
            }
            Err(interruption) => self.on_interruption(&interruption),
        }
    }

    /// Reads the next page from the store.
    pub(super) async fn read(&mut self) {
        let State::Owning(Owning { lease, applied, activity: Activity::Reading(reading), .. }) =
            &mut self.state
        else {
            return;
        };
        let Source::CatchingUp { ahead, scan } = &mut reading.source else { return };
        let (ahead, scan, live_after) = (ahead.take(), *scan, reading.live_after);
        let mut ahead = match ahead.filter(|ahead| ahead.after == *applied) {
            Some(ahead) => ahead,
            None => read_ahead(self.context, *applied, scan, self.batching.page.get(), live_after),
        };
        // No time limit except the store's own: a page that takes longer than a tick would never be
        // read.
        let outcome = wait_for_input(&mut self.inbox, lease.as_mut(), None, None, ahead.page()).await;
        match self.attend(outcome).await {
            Some(Ok(page)) => self.on_page(page, scan),
            Some(Err(interruption)) => self.on_interruption(&interruption),
            None => {}
        }
    }

    /// Processes a page of a scan with so many positions.
    fn on_page(&mut self, page: LogPage, scan: u64) {
        let context = self.context;
        let Some(applied) = self.state.owning().map(|owning| owning.applied) else { return };
        let Some(reading) = self.state.reading_mut() else { return };
        let has_more = page.has_more();
        let hole = page.scanned_to == applied && has_more;
        let scan = if hole { scan.saturating_mul(2) } else { SCAN };
        if page.events.is_empty() {
            // Otherwise only after the commit: a readable database may still reject writes.
            self.retry.succeeded();
        }
        let LogPage { mut events, scanned_to, head } = page;
        self.batching.page.saw(&events);
        let upto = self.timing.goal().map_or(scanned_to, |goal| goal.min(scanned_to));
        events.retain(|event| context.is_here(event) && event.position <= upto);
        if has_more {
            let limit = self.batching.page.get();
            let ahead = (!hole && upto == scanned_to)
                .then(|| read_ahead(context, scanned_to, scan, limit, reading.live_after));
            reading.source = Source::CatchingUp { ahead, scan };
        } else {
            reading.reached_end();
        }
        self.show();
        context.knows_of(head);
        self.enqueue(events.into(), upto);
    }

    /// Subscribes to the live source from now on.
    fn listen(&self) -> Result<Follower, Interruption> {
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
        let limit = self.batching.page.get();
        let durable = |followed| DurableFollower::new(followed, log.clone(), filter.clone(), limit);
        // An error means that the bus was shut down.
        followed.map(|followed| Follower::Durable(Box::new(durable(followed)))).map_err(|error| {
            Interruption::Later { reason: format!("{} cannot be followed: {error}", bus.name()) }
        })
    }

    /// Processes the next items of the live source.
    pub(super) async fn follow(&mut self) {
        self.show();
        let State::Owning(Owning { lease, applied, activity: Activity::Reading(reading), .. }) =
            &mut self.state
        else {
            return;
        };
        let Reading { follower, pending, hold, matched, .. } = &mut **reading;
        let after = pending.as_ref().map_or(*applied, |pending| pending.upto);
        let until = match hold {
            Some((_, until)) if pending.is_some() => self.tick_at.min(*until),
            _ => self.tick_at,
        };
        let news = Some(&mut self.news);
        let (read_model, context) = (self.read_model, self.context);
        let applies = *matched && context.options.schedule == Schedule::Immediate;
        let on_read = || {
            // The transaction begins while the event is read.
            if applies {
                read_model.will_begin(&context.name, Some(context.transaction_limit()));
            }
        };
        let next = follower.next(after, on_read);
        let outcome = wait_for_input(&mut self.inbox, lease.as_mut(), news, Some(until), next).await;
        if let Some(item) = self.attend(outcome).await {
            self.receive(item);
        }
    }

    /// Processes an item of the live source, and those that have arrived meanwhile.
    fn receive(&mut self, mut item: FeedItem) {
        let context = self.context;
        let Some(applied) = self.state.owning().map(|owning| owning.applied) else { return };
        let Some(reading) = self.state.reading_mut() else { return };
        // The events that wait already, and the new ones.
        let held = reading.pending.take().unwrap_or(Pending { events: VecDeque::new(), upto: applied });
        let before = held.events.len();
        let Pending { mut events, mut upto } = held;
        loop {
            match item {
                FeedItem::Batch(batch) => {
                    context.knows_of(batch.upto);
                    match adjacent(batch, upto) {
                        Some(LogBatch { upto: end, events: batch, .. }) => {
                            let wanted = batch.iter().filter(|event| context.wants(event));
                            events.extend(wanted.cloned());
                            upto = end;
                        }
                        None => reading.read_to(context.feed.position()),
                    }
                }
                FeedItem::Lagged => {
                    tracing::debug!(projection = context.name, "lagged the feed; reading the store");
                    reading.read_to(context.feed.position());
                }
                FeedItem::Failed => {
                    // A shared page may have events that a failover lost.
                    context.log.forget();
                    reading.catch_up();
                }
                FeedItem::Closed => {
                    // Only if the runtime stops, which stops this task as well, or the bus is
                    // closed. The next attempt reads the events of this call again.
                    let reason = "following the feed failed: the feed has ended".into();
                    self.state.end_reading();
                    return self.schedule_retry(&Interruption::Later { reason });
                }
            }
            // Events that have arrived meanwhile share the transaction.
            if !reading.is_live() || events.len() >= context.options.batch {
                break;
            }
            match reading.follower.try_next(upto) {
                Some(next) => item = next,
                None => break,
            }
        }
        reading.matched = events.len() > before;
        if reading.matched {
            reading.hold = self.timing.hold(reading.hold, context.options.schedule);
        }
        self.enqueue(events, upto);
    }

    pub(super) fn enqueue(&mut self, events: VecDeque<RecordedEvent>, upto: Position) {
        if !events.is_empty() {
            let pending = Pending { events, upto };
            self.waits_since(&pending);
            self.state.set_pending(pending);
        } else if let Some(owning) = self.state.owning_mut()
            && upto > owning.applied
        {
            // Only the checkpoint is left to write, which can wait for the next tick.
            owning.applied = upto;
            self.context.moved_to(upto);
            self.report_applied();
        }
    }

    pub(super) fn report_applied(&mut self) {
        if let Some(Owning { applied, activity: Activity::Reading(reading), .. }) = self.state.owning_mut() {
            reading.follower.applied(*applied);
        }
    }
}

/// Begins to read a page of at most `scan` positions and `limit` events, which reaches `reach`.
fn read_ahead(context: &TaskConfig, after: Position, scan: u64, limit: usize, reach: Position) -> PageAhead {
    let upto = Position::new(after.get().saturating_add(scan));
    let read = ReadLog::after(after).upto(upto).filter(context.filter.clone()).limit(limit);
    let mut reading = JoinSet::new();
    reading.spawn(context.log.read(read, reach));
    PageAhead { after, reading }
}
