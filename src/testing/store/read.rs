//! Pages, filters, and the end of a scan.

use std::time::Duration;

use super::Database;
use super::fixture::{append_to, event, events, fill, ids, recorded_ids, scan, stream, whole_log};
use crate::event::{Category, EventName, Position, RecordedEvent, StreamId, Version};
use crate::store::{EventStore, ExpectedVersion, Filter, ReadLog, StoreError};

/// Checks that an empty store returns nothing, without an error.
pub async fn an_empty_store_is_empty(database: Database) {
    let store = database.open().await;
    assert_eq!(store.high_water_mark().await.unwrap(), Position::START);
    let page = store.read_log(ReadLog::after(Position::START)).await.unwrap();
    assert!(page.events.is_empty() && !page.has_more());
    assert_eq!((page.scanned_to, page.head), (Position::START, Position::START));
    assert!(store.read_stream(&stream("a"), Version::NONE, 10).await.unwrap().is_empty());
    assert_eq!(*store.appended().borrow(), Position::START);
}

/// Checks reads after a version, with a limit, to the end.
pub async fn streams_are_read_in_pages(database: Database) {
    let store = database.open().await;
    fill(&*store, &stream("other"), 3).await;
    fill(&*store, &stream("a"), 10).await;
    fill(&*store, &stream("other"), 3).await;
    for limit in [1, 3, 10, 11, usize::MAX] {
        let mut versions = Vec::new();
        loop {
            let after = versions.last().copied().unwrap_or_default();
            let page = store.read_stream(&stream("a"), after, limit).await.unwrap();
            assert!(page.len() <= limit);
            assert!(page.iter().all(|event| event.stream == stream("a")));
            versions.extend(page.iter().map(|event| event.version));
            if page.len() < limit {
                break;
            }
        }
        assert_eq!(versions, (1..=10).map(Version::new).collect::<Vec<_>>());
    }
    assert!(store.read_stream(&stream("a"), Version::new(10), 5).await.unwrap().is_empty());
    assert!(store.read_stream(&stream("a"), Version::new(u64::MAX), 5).await.unwrap().is_empty());
}

/// Appends events of three categories and four names, in a mixed order.
async fn mixed(store: &dyn EventStore) -> Vec<RecordedEvent> {
    for i in 0..40_usize {
        let category = ["order", "invoice", "shop.order"][i % 3];
        let to = StreamId::new(category, i % 5).unwrap();
        let name = format!("{category}.{}", ["placed", "paid", "shipped", "closed"][i % 4]);
        append_to(store, &to, ExpectedVersion::Any, vec![event(&name)]).await.unwrap();
    }
    whole_log(store).await
}

/// Checks that pages of any size make up the log.
pub async fn the_log_is_read_in_pages(database: Database) {
    let store = database.open().await;
    let log = mixed(&*store).await;
    assert_eq!(log.len(), 40);
    for limit in [1, 2, 3, 7, 39, 40, 41, 10_000] {
        let (found, scanned_to) = scan(&*store, ReadLog::after(Position::START).limit(limit)).await;
        assert_eq!(recorded_ids(&found), recorded_ids(&log));
        assert_eq!(scanned_to, log[39].position);
    }
    let page = store.read_log(ReadLog::after(log[9].position).limit(5)).await.unwrap();
    assert_eq!(recorded_ids(&page.events), recorded_ids(&log[10..15]));
    assert_eq!((page.scanned_to, page.head), (log[14].position, log[39].position));
    assert!(page.has_more());
    let page = store.read_log(ReadLog::after(log[34].position).limit(5)).await.unwrap();
    assert!(!page.has_more(), "the last page reports no more events");
    let page = store.read_log(ReadLog { limit: 0, ..ReadLog::after(Position::START) }).await.unwrap();
    assert_eq!(page.events.len(), 1, "a limit of 0 means 1");
}

fn names(list: &[&str]) -> Vec<EventName> {
    list.iter().map(|name| EventName::new(name).unwrap()).collect()
}

fn categories(list: &[&str]) -> Vec<Category> {
    list.iter().map(|name| Category::new(name).unwrap()).collect()
}

/// Checks every kind of condition, alone and combined.
pub async fn filters_select(database: Database) {
    let store = database.open().await;
    let log = mixed(&*store).await;
    let of = |category: &str, id: u64| StreamId::new(category, id).unwrap();
    let filters = [
        Filter::all(),
        Filter::all().with_names(names(&["order.placed"])),
        Filter::all().with_names(names(&["order.placed", "invoice.paid", "never.seen"])),
        Filter::all().with_categories(categories(&["order"])),
        Filter::all().with_categories(categories(&["invoice", "shop.order"])),
        Filter::all().with_categories(categories(&["shop"])),
        Filter::all().with_streams([of("order", 0)]),
        Filter::all().with_streams([of("order", 0), of("invoice", 1), of("invoice", 99)]),
        Filter::all()
            .with_categories(categories(&["order"]))
            .with_names(names(&["order.placed", "invoice.paid"])),
        Filter::all()
            .with_categories(categories(&["order"]))
            .with_streams([of("order", 0), of("invoice", 1)]),
        Filter::all().with_names(names(&["order.placed"])).with_streams([of("order", 0), of("order", 2)]),
        Filter::all()
            .with_names(names(&["order.placed", "order.paid"]))
            .with_categories(categories(&["order", "invoice"]))
            .with_streams([of("order", 0), of("order", 1), of("shop.order", 2)]),
    ];
    for filter in filters {
        let wanted: Vec<_> = log.iter().filter(|event| filter.matches(event)).map(|event| event.id).collect();
        for limit in [1, 4, 1_000] {
            let read = ReadLog::after(Position::START).filter(filter.clone()).limit(limit);
            let (found, scanned_to) = scan(&*store, read).await;
            assert_eq!(recorded_ids(&found), wanted, "{filter:?} by {limit}");
            assert_eq!(scanned_to, log[39].position);
        }
        let (found, _) = scan(&*store, ReadLog::after(log[19].position).filter(filter.clone())).await;
        let late: Vec<_> =
            log[20..].iter().filter(|event| filter.matches(event)).map(|event| event.id).collect();
        assert_eq!(recorded_ids(&found), late, "{filter:?} from the middle");
    }
}

/// Checks that a read with an invalid filter is refused, and does not look like an empty log.
pub async fn invalid_filters_are_refused(database: Database) {
    let store = database.open().await;
    fill(&*store, &stream("a"), 3).await;
    let filter = Filter::all().category("no name");
    for read in [ReadLog::after(Position::START), ReadLog::after(Position::START).upto(Position::new(1))] {
        let error = store.read_log(read.filter(filter.clone())).await.unwrap_err();
        let StoreError::Invalid { reason } = &error else { panic!("{error}") };
        assert!(reason.starts_with("invalid filter: invalid category \"no name\""), "{reason}");
    }
}

/// Checks that an empty list of a filter does not mean "everything".
pub async fn empty_filter_lists_match_nothing(database: Database) {
    let store = database.open().await;
    let log = mixed(&*store).await;
    for filter in [
        Filter::all().with_names([]),
        Filter::all().with_categories([]),
        Filter::all().with_streams([]),
        Filter::all().with_names(names(&["order.placed"])).with_categories([]),
        Filter::all().with_streams([]).with_categories(categories(&["order"])),
    ] {
        let (found, scanned_to) = scan(&*store, ReadLog::after(Position::START).filter(filter)).await;
        assert!(found.is_empty());
        assert_eq!(scanned_to, log[39].position);
    }
}

/// Checks filters with more values than a database accepts as parameters of one statement.
pub async fn long_filter_lists_work(database: Database) {
    let store = database.open().await;
    let log = mixed(&*store).await;
    let many = |category: &'static str| (0..40_000).map(move |id| StreamId::new(category, id).unwrap());
    let filter = Filter::all().with_streams(many("order")).with_names(
        (0..40_000).map(|i| EventName::new(format!("order.n{i}")).unwrap()).chain(names(&["order.paid"])),
    );
    let wanted: Vec<_> = log.iter().filter(|event| filter.matches(event)).map(|event| event.id).collect();
    assert!(!wanted.is_empty());
    let (found, _) = scan(&*store, ReadLog::after(Position::START).filter(filter)).await;
    assert_eq!(recorded_ids(&found), wanted);
}

/// Checks that a checkpoint moves over events that do not match, and stays at existing events.
pub async fn the_scan_skips_other_events(database: Database) {
    let store = database.open().await;
    let first =
        append_to(&*store, &stream("a"), ExpectedVersion::Any, vec![event("order.rare")]).await.unwrap();
    let rest = fill(&*store, &stream("a"), 50).await;
    let rare = Filter::all().with_names(names(&["order.rare"]));
    let (found, scanned_to) = scan(&*store, ReadLog::after(Position::START).filter(rare.clone())).await;
    assert_eq!(found.len(), 1);
    assert_eq!(scanned_to, rest[49]);
    let (found, scanned_to) = scan(&*store, ReadLog::after(first.positions[0]).filter(rare.clone())).await;
    assert!(found.is_empty());
    assert_eq!(scanned_to, rest[49]);
    // A full page ends at its last event; the scan has not read beyond it.
    let page = store.read_log(ReadLog::after(Position::START).filter(rare).limit(1)).await.unwrap();
    assert_eq!(page.events.len(), 1);
    assert!(page.scanned_to >= first.positions[0] && page.scanned_to <= rest[49]);
}

/// Checks that pages of 1 MiB events stay small at any limit. Small events still share a page.
pub async fn large_events_come_in_small_pages(database: Database) {
    let store = database.open().await;
    let mut sent = Vec::new();
    for large in [2, 40, 0, 9, 40, 0] {
        let mut new = events(40);
        for event in &mut new[..large] {
            event.payload = vec![7; 1 << 20].into();
        }
        sent.extend(ids(&new));
        append_to(&*store, &stream("a"), ExpectedVersion::Any, new).await.unwrap();
    }
    for filter in [
        Filter::all(),
        Filter::all().with_names(names(&["order.placed"])),
        Filter::all().with_categories(categories(&["order"])),
    ] {
        for upto in [None, Some(Position::new(u64::MAX))] {
            let mut read =
                ReadLog { upto, ..ReadLog::after(Position::START).filter(filter.clone()).limit(1_000) };
            let mut found = Vec::new();
            let mut pages = 0;
            loop {
                let page = store.read_log(read.clone()).await.unwrap();
                let bytes: usize = page.events.iter().map(|event| event.payload.len()).sum();
                assert!(bytes < 6 << 20, "{bytes} bytes in {} events", page.events.len());
                read.after = page.scanned_to;
                pages += 1;
                found.extend(recorded_ids(&page.events));
                if !page.has_more() {
                    break;
                }
            }
            assert_eq!(found, sent);
            assert!(pages <= 60, "{pages} pages");
        }
    }
}

/// Checks that neither events nor the scan go beyond an upper end.
pub async fn the_scan_stops_at_its_upper_end(database: Database) {
    let store = database.open().await;
    let positions = fill(&*store, &stream("a"), 20).await;
    let nothing = Filter::all().with_names([]);
    for filter in [Filter::all(), nothing] {
        let all = filter == Filter::all();
        for (after, upto) in [(0, 9), (3, 4), (5, 19), (9, 9), (12, 3)] {
            let read = ReadLog::after(positions[after]).upto(positions[upto]).filter(filter.clone());
            let (found, scanned_to) = scan(&*store, read).await;
            assert_eq!(found.len(), if all { upto.saturating_sub(after) } else { 0 });
            assert_eq!(scanned_to, positions[upto.max(after)], "after {after} upto {upto}");
        }
        let beyond = ReadLog::after(Position::START).upto(Position::new(u64::MAX)).filter(filter);
        assert_eq!(scan(&*store, beyond).await.1, positions[19]);
    }
    let page = store.read_log(ReadLog::after(Position::START).upto(positions[9]).limit(4)).await.unwrap();
    assert_eq!((page.scanned_to, page.head), (positions[3], positions[19]));
}

/// Checks that reads at and after the end of the log return nothing and move nothing.
pub async fn the_scan_never_passes_the_head(database: Database) {
    let store = database.open().await;
    let head = fill(&*store, &stream("a"), 3).await[2];
    for after in [head, Position::new(head.get() + 1_000), Position::new(u64::MAX)] {
        let page = store.read_log(ReadLog::after(after)).await.unwrap();
        assert!(page.events.is_empty() && !page.has_more());
        assert_eq!((page.scanned_to, page.head), (after, head));
    }
    conflict_at_the_end(&*store).await;
    let page = store.read_log(ReadLog::after(Position::START)).await.unwrap();
    assert_eq!((page.scanned_to, page.head), (head, head));
}

/// Makes an append fail, which may use up positions in some back ends.
async fn conflict_at_the_end(store: &dyn EventStore) {
    let refused =
        append_to(store, &stream("a"), ExpectedVersion::NoStream, vec![event("order.placed")]).await;
    super::fixture::conflict(refused);
}

/// Checks that the high-water mark is the last event while nothing is in flight.
pub async fn the_high_water_mark_is_the_last_event(database: Database) {
    let store = database.open().await;
    let other = database.open().await;
    for _ in 0..5 {
        let last = *fill(&*store, &stream("a"), 3).await.last().unwrap();
        assert_eq!(store.high_water_mark().await.unwrap(), last);
        assert_eq!(other.high_water_mark().await.unwrap(), last);
        conflict_at_the_end(&*store).await;
        assert_eq!(store.high_water_mark().await.unwrap(), last);
    }
}

/// Checks that an append wakes waiting readers of the same process, with the new end of the log.
pub async fn readers_are_woken(database: Database) {
    let store = database.open().await;
    let mut appended = store.appended();
    appended.mark_unchanged();
    for _ in 0..3 {
        let last = *fill(&*store, &stream("a"), 2).await.last().unwrap();
        tokio::time::timeout(Duration::from_secs(5), appended.changed()).await.expect("a wake-up").unwrap();
        assert_eq!(*appended.borrow_and_update(), last);
    }
    conflict_at_the_end(&*store).await;
    assert!(!appended.has_changed().unwrap(), "a rejected append wakes no reader");
}
