//! Pages of the log that the partitions of a projection share on a node: each page is read once.
//!
//! Partitions keep positions of their own. A page serves every partition with a position inside it,
//! also one that began in the middle; at its end, the two are at the same position. A partition
//! without a cached page reads one, so no partition waits for the progress of another.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::event::{Position, RecordedEvent};
use crate::partition::Partition;
use crate::projection::ProjectionOptions;
use crate::projection::interruption::Interruption;
use crate::store::{EventStore, LogPage, ReadLog, StoreError};
use crate::supervised::Task;

/// Maximum number of cached pages; the store limits each to about 4 MiB.
const PAGES: usize = 4;

/// Time for which a page is kept after its last use.
const IDLE: Duration = Duration::from_secs(5);

/// Maximum size of a page in batches.
///
/// Each partition finds only its own part of a page, and makes a transaction of it.
const BATCHES: usize = 32;

/// Maximum number of cached answers for the age of the next event.
const AGES: usize = 8;

/// The pages of one projection on one node. Cheap to clone.
#[derive(Clone)]
pub(in crate::projection) struct PageCache {
    inner: Arc<Inner>,
}

struct Inner {
    partitions: u16,
    /// Number of events in a page.
    limit: usize,
    state: Mutex<State>,
    /// Locked during a read, so that partitions at one position read once.
    ages: tokio::sync::Mutex<VecDeque<NextEvent>>,
}

#[derive(Default)]
struct State {
    /// The least recently used page first.
    pages: VecDeque<KeptPage>,
    /// Reads in progress. A read ends with the last partition that waits for it.
    reads: Vec<Weak<PageRead>>,
    /// Whether a task removes unused pages.
    sweeping: bool,
}

struct KeptPage {
    page: Arc<Page>,
    used_at: Instant,
}

/// A page of the log, for all partitions.
struct Page {
    after: Position,
    scanned_to: Position,
    head: Position,
    events: Vec<RecordedEvent>,
    /// Indices of the events of each partition, by partition index.
    parts: Vec<Vec<u32>>,
}

/// A page that is being read, in a task that is aborted on drop.
struct PageRead {
    after: Position,
    /// End of the read; `None`: the end of the log.
    upto: Option<Position>,
    began_at: Instant,
    result: watch::Receiver<Option<Result<Arc<Page>, StoreError>>>,
    _task: Task,
}

/// The first event after a position.
struct NextEvent {
    after: Position,
    position: Position,
    recorded_at: DateTime<Utc>,
}

/// Source of a page.
enum Found {
    Page(Arc<Page>),
    Read(Arc<PageRead>),
}

impl PageCache {
    pub(in crate::projection) fn new(partitions: u16, options: &ProjectionOptions) -> Self {
        let limit = options.batch.saturating_mul(usize::from(partitions).min(BATCHES));
        let inner = Inner { partitions, limit, state: Mutex::default(), ages: tokio::sync::Mutex::default() };
        Self { inner: Arc::new(inner) }
    }

    /// Reads the part of `partition` in the page after `read.after`.
    ///
    /// `read.limit` is replaced by the limit of shared pages. A page that ended at the head of the
    /// log is used only if it reaches `reach`: otherwise the answer is from a read that began after
    /// this call. Cancel-safe.
    pub(super) async fn read(
        &self,
        store: &Arc<dyn EventStore>,
        read: ReadLog,
        partition: Partition,
        reach: Position,
    ) -> Result<LogPage, Interruption> {
        let (after, upto, called_at) = (read.after, read.upto, Instant::now());
        let mut joined = false;
        loop {
            let page_read = match self.find(store, &read, reach, !joined) {
                Found::Page(page) => return Ok(page.part(partition, after)),
                Found::Read(page_read) => page_read,
            };
            let page = page_read.page().await?;
            let covers = covers(page_read.upto, upto);
            let fresh = page_read.after == after && covers && page_read.began_at >= called_at;
            if fresh || page.serves(after, reach) {
                return Ok(page.part(partition, after));
            }
            // Waiting for one page of a partition that lags is worthwhile, waiting for a second one
            // is not.
            joined |= page_read.after != after;
        }
    }

    /// Discards all pages.
    pub(super) fn clear(&self) {
        self.inner.state().pages.clear();
    }

    /// Returns a page, or a read to wait for: in progress, or new.
    ///
    /// `join` allows a read that began at a lower position.
    fn find(&self, store: &Arc<dyn EventStore>, read: &ReadLog, reach: Position, join: bool) -> Found {
        let after = read.after;
        let mut state = self.inner.state();
        if let Some(index) = state.pages.iter().position(|kept| kept.page.serves(after, reach))
            && let Some(kept) = state.pages.remove(index)
        {
            let page = kept.page.clone();
            state.pages.push_back(KeptPage { used_at: Instant::now(), ..kept });
            return Found::Page(page);
        }
        state.reads.retain(|page_read| page_read.upgrade().is_some_and(|read| read.in_progress()));
        let mut in_progress = state.reads.iter().filter_map(Weak::upgrade);
        let joinable = |page_read: &Arc<PageRead>| {
            page_read.after == after || (join && page_read.after < after && page_read.may_reach(after, read))
        };
        if let Some(page_read) = in_progress.find(joinable) {
            return Found::Read(page_read);
        }
        let page_read = self.begin(store.clone(), read.clone());
        state.reads.push(Arc::downgrade(&page_read));
        Found::Read(page_read)
    }

    fn begin(&self, store: Arc<dyn EventStore>, read: ReadLog) -> Arc<PageRead> {
        let (sender, result) = watch::channel(None);
        let (after, upto, began_at, inner) = (read.after, read.upto, Instant::now(), self.inner.clone());
        let task = Task::spawn(async move {
            let read = read.limit(inner.limit);
            let page = match store.read_log(read).await {
                Ok(page) => Ok(inner.keep(Page::new(after, page, inner.partitions))),
                Err(error) => {
                    // After a failover, the store may have lost events.
                    inner.state().pages.clear();
                    Err(error)
                }
            };
            sender.send_replace(Some(page));
        });
        Arc::new(PageRead { after, upto, began_at, result, _task: task })
    }

    /// Returns when the first event after a position was recorded. Cancel-safe.
    pub(super) async fn next_recorded_at(
        &self,
        store: &Arc<dyn EventStore>,
        after: Position,
    ) -> Result<Option<DateTime<Utc>>, StoreError> {
        let kept = self.inner.state().pages.iter().find_map(|kept| kept.page.next_recorded_at(after));
        if kept.is_some() {
            return Ok(kept);
        }
        let mut ages = self.inner.ages.lock().await;
        if let Some(known) = ages.iter().find(|next| next.after <= after && after < next.position) {
            return Ok(Some(known.recorded_at));
        }
        let page = store.read_log(ReadLog::after(after).limit(1)).await?;
        let Some(event) = page.events.first() else { return Ok(None) };
        if ages.len() == AGES {
            ages.pop_front();
        }
        let (position, recorded_at) = (event.position, event.recorded_at);
        ages.push_back(NextEvent { after, position, recorded_at });
        Ok(Some(recorded_at))
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(self: &Arc<Self>, page: Page) -> Arc<Page> {
        let page = Arc::new(page);
        let mut state = self.state();
        // At the head of the log, the newest page replaces the earlier ones.
        state.pages.retain(|kept| kept.page.after != page.after);
        if state.pages.len() == PAGES {
            state.pages.pop_front();
        }
        state.pages.push_back(KeptPage { page: page.clone(), used_at: Instant::now() });
        if !std::mem::replace(&mut state.sweeping, true) {
            drop(tokio::spawn(sweep(Arc::downgrade(self))));
        }
        page
    }
}

/// Returns whether a read up to `end` answers one up to `upto`; `None` is the end of the log.
fn covers(end: Option<Position>, upto: Option<Position>) -> bool {
    end.is_none_or(|end| upto.is_some_and(|upto| upto <= end))
}

/// Removes unused pages, until there are none.
async fn sweep(inner: Weak<Inner>) {
    loop {
        sleep(IDLE).await;
        let Some(inner) = inner.upgrade() else { return };
        let mut state = inner.state();
        state.pages.retain(|kept| kept.used_at.elapsed() < IDLE);
        if state.pages.is_empty() {
            state.sweeping = false;
            return;
        }
    }
}

impl Page {
    fn new(after: Position, page: LogPage, partitions: u16) -> Self {
        let LogPage { events, scanned_to, head } = page;
        let mut parts = vec![Vec::new(); usize::from(partitions)];
        for (index, event) in (0..).zip(&events) {
            parts[usize::from(Partition::of(&event.stream, partitions).index())].push(index);
        }
        Self { after, scanned_to, head, events, parts }
    }

    /// Returns whether the page answers a read after a position: see [`PageCache::read`].
    fn serves(&self, after: Position, reach: Position) -> bool {
        self.after <= after
            && if self.scanned_to < self.head {
                after < self.scanned_to
            } else {
                after <= self.scanned_to && reach <= self.scanned_to
            }
    }

    fn part(&self, partition: Partition, after: Position) -> LogPage {
        let part = self.parts.get(usize::from(partition.index())).map_or(&[][..], Vec::as_slice);
        let events = part.iter().filter_map(|&index| self.events.get(index as usize));
        let events = events.filter(|event| event.position > after).cloned().collect();
        LogPage { events, scanned_to: self.scanned_to, head: self.head }
    }

    fn next_recorded_at(&self, after: Position) -> Option<DateTime<Utc>> {
        if after < self.after {
            return None;
        }
        let index = self.events.partition_point(|event| event.position <= after);
        self.events.get(index).map(|event| event.recorded_at)
    }
}

impl PageRead {
    fn in_progress(&self) -> bool {
        self.result.borrow().is_none()
    }

    /// Returns whether the page may reach beyond a position.
    fn may_reach(&self, position: Position, read: &ReadLog) -> bool {
        let scan = read.upto.map_or(u64::MAX, |upto| upto.get().saturating_sub(read.after.get()));
        position.get() < self.after.get().saturating_add(scan)
    }

    /// Waits for the page. Cancel-safe.
    async fn page(&self) -> Result<Arc<Page>, Interruption> {
        let mut result = self.result.clone();
        let result = result.wait_for(Option::is_some).await;
        match result.ok().and_then(|result| result.clone()) {
            Some(page) => Ok(page?),
            None => {
                let reason = "reading the log failed: the task ended without a result".into();
                Err(Interruption::Later { reason })
            }
        }
    }
}

impl fmt::Debug for PageCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageCache").field("partitions", &self.inner.partitions).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::tests::recorded;
    use crate::store::{BoxFuture, MemoryStore};

    fn page(after: u64, scanned_to: u64, head: u64) -> Page {
        let events = (after + 1..=scanned_to).map(|position| recorded(position, 8)).collect();
        let (scanned_to, head) = (Position::new(scanned_to), Position::new(head));
        Page::new(Position::new(after), LogPage { events, scanned_to, head }, 4)
    }

    #[test]
    fn a_read_answers_no_longer_one() {
        let [none, near, far] = [None, Some(Position::new(100)), Some(Position::new(120))];
        for (end, upto, expected) in [
            (none, none, true),
            (none, far, true),
            (far, near, true),
            (far, far, true),
            (near, far, false),
            (far, none, false),
        ] {
            assert_eq!(covers(end, upto), expected, "{end:?} {upto:?}");
        }
    }

    fn serves(page: &Page, after: u64, reach: u64) -> bool {
        page.serves(Position::new(after), Position::new(reach))
    }

    #[test]
    fn a_page_serves_positions_within_it() {
        let middle = page(10, 20, 30);
        for (after, expected) in [(9, false), (10, true), (19, true), (20, false), (25, false)] {
            assert_eq!(serves(&middle, after, 0), expected, "{after}");
            assert_eq!(serves(&middle, after, 99), expected, "{after}: the next page is read anyway");
        }
        let last = page(10, 20, 20);
        for (after, reach, expected) in [
            (9, 0, false),
            (10, 0, true),
            (19, 20, true),
            (19, 21, false),
            (20, 20, true),
            (20, 21, false),
            (21, 0, false),
        ] {
            assert_eq!(serves(&last, after, reach), expected, "{after} {reach}");
        }
    }

    #[test]
    fn the_parts_of_a_page_are_the_page() {
        let page = page(10, 30, 30);
        let parts = Partition::all(4).map(|partition| page.part(partition, Position::new(15)));
        let mut positions: Vec<_> =
            parts.flat_map(|part| part.events).map(|event| event.position.get()).collect();
        positions.sort_unstable();
        assert_eq!(positions, (16..=30).collect::<Vec<_>>());
        let age = |after| page.next_recorded_at(Position::new(after));
        assert!(age(9).is_none() && age(10).is_some() && age(29).is_some() && age(30).is_none());
    }

    #[tokio::test]
    async fn pages_are_limited_and_removed_when_unused() {
        let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
        let cache = PageCache::new(4, &ProjectionOptions::new());
        for after in 0..10 {
            cache.inner.keep(page(after, after + 1, 99));
        }
        assert_eq!(cache.inner.state().pages.len(), PAGES);
        let kept = cache.inner.state().pages.iter().map(|kept| kept.page.after.get()).collect::<Vec<_>>();
        assert_eq!(kept, [6, 7, 8, 9]);
        // A page in use stays longest.
        let partition = Partition::of(&recorded(1, 8).stream, 4);
        let read = ReadLog::after(Position::new(6));
        let part: BoxFuture<'_, _> = Box::pin(cache.read(&store, read, partition, Position::START));
        assert_eq!(part.await.unwrap().scanned_to, Position::new(7));
        cache.inner.keep(page(20, 21, 99));
        let kept = cache.inner.state().pages.iter().map(|kept| kept.page.after.get()).collect::<Vec<_>>();
        assert_eq!(kept, [8, 9, 6, 20]);
    }

    /// Nothing else would end a read of a store that does not answer.
    #[tokio::test]
    async fn a_read_ends_with_the_last_that_waits_for_it() {
        let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
        let cache = PageCache::new(4, &ProjectionOptions::new());
        let read = ReadLog::after(Position::START);
        let find = || match cache.find(&store, &read, Position::START, true) {
            Found::Read(page_read) => page_read,
            Found::Page(_) => panic!("there is no page"),
        };
        let (one, two) = (find(), find());
        assert!(Arc::ptr_eq(&one, &two));
        drop((one, two));
        assert!(cache.inner.state().reads.iter().all(|page_read| page_read.upgrade().is_none()));
        assert_eq!(find().page().await.unwrap().head, Position::START);
    }
}
