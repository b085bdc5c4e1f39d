//! The conformance suite of event stores: the contract of [`EventStore`], as tests.
//!
//! A back end runs all of it, one named test per behaviour. It supplies the way to get an empty
//! database:
//!
//! ```
//! use storied::MemoryStore;
//! use storied::testing::store::Database;
//!
//! async fn memory() -> Database {
//!     let store = MemoryStore::new();
//!     Database::new(move || {
//!         let store = store.clone();
//!         async move { store }
//!     })
//! }
//!
//! storied::event_store_suite!(memory());
//! ```
//!
//! The behaviours are public functions in the modules below, for tests of a single one.

pub mod append;
pub mod boundaries;
pub mod command;
mod fixture;
pub mod lease;
pub mod oracle;
pub mod progress;
pub mod queries;
pub mod query_races;
pub mod read;
pub mod scheduled_commands;
pub mod schedules;
pub mod scheduling_races;
pub mod timers;

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use crate::store::{BoxFuture, EventStore};

/// Time limit of one behaviour; after it, the test fails as hanging.
const LIMIT: Duration = Duration::from_secs(120);

/// A database for one test: empty at first, shared by all openings, and dropped when the test ends.
pub struct Database {
    open: Box<dyn Fn() -> BoxFuture<'static, Arc<dyn EventStore>> + Send + Sync>,
    guards: Vec<Box<dyn Any + Send + Sync>>,
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database").field("guards", &self.guards.len()).finish_non_exhaustive()
    }
}

impl Database {
    /// Wraps a database that `open` opens.
    ///
    /// If possible, every opening has its own connections, as another process would.
    pub fn new<S, F>(open: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        S: EventStore,
        F: Future<Output = S> + Send + 'static,
    {
        let open = move || -> BoxFuture<'static, Arc<dyn EventStore>> {
            let store = open();
            Box::pin(async move { Arc::new(store.await) as Arc<dyn EventStore> })
        };
        Self { open: Box::new(open), guards: Vec::new() }
    }

    /// Keeps a guard (a temporary directory, a server) until the test is over.
    #[must_use]
    pub fn keeping(mut self, guard: impl Any + Send + Sync) -> Self {
        self.guards.push(Box::new(guard));
        self
    }

    /// Opens the database once more.
    pub async fn open(&self) -> Arc<dyn EventStore> {
        (self.open)().await
    }
}

/// Runs one behaviour, and fails if it hangs.
pub async fn run(behaviour: impl Future<Output = ()>) {
    tokio::time::timeout(LIMIT, behaviour).await.expect("the behaviour should end, and not hang");
}

/// Creates one `#[tokio::test]` per behaviour of an event store.
///
/// Takes an expression for a future of a [`Database`], which each test evaluates. The calling crate
/// needs `tokio` with `macros` and `rt-multi-thread`.
#[macro_export]
macro_rules! event_store_suite {
    ($make:expr) => {
        $crate::event_store_suite! { @topics $make;
            append:
                expected_versions_decide,
                conflicts_report_expected_and_actual,
                refused_appends_leave_no_trace,
                several_streams_are_all_or_nothing,
                batches_are_refused_piecewise,
                a_stream_comes_once_in_a_batch,
                invalid_appends_are_refused_alone,
                versions_have_no_gaps_and_positions_increase,
                everything_of_an_event_comes_back,
                streams_with_odd_ids_are_kept_apart,
                large_batches_arrive_whole,
                appended_events_survive_reopening;
            read:
                an_empty_store_is_empty,
                streams_are_read_in_pages,
                the_log_is_read_in_pages,
                filters_select,
                empty_filter_lists_match_nothing,
                invalid_filters_are_refused,
                long_filter_lists_work,
                large_events_come_in_small_pages,
                the_scan_skips_other_events,
                the_scan_stops_at_its_upper_end,
                the_scan_never_passes_the_head,
                the_high_water_mark_is_the_last_event,
                readers_are_woken;
            progress:
                a_checkpoint_starts_at_the_default,
                each_partition_and_version_has_a_checkpoint,
                a_checkpoint_moves_only_from_where_it_is,
                the_epoch_of_a_checkpoint_never_falls,
                one_of_many_rivals_moves_a_checkpoint,
                events_are_parked_with_the_checkpoint,
                parked_events_are_listed_and_removed,
                a_projection_changes_only_from_where_it_is,
                requests_are_listed_refused_and_removed,
                projections_are_paused_triggered_and_resumed,
                a_stale_publisher_is_fenced,
                snapshots_are_kept_and_replaced;
            lease:
                a_lease_has_one_owner,
                a_lease_is_taken_over_as_it_was_seen,
                an_expired_lease_changes_hands,
                a_released_lease_is_free_at_once,
                a_lease_is_renewed,
                leases_are_renewed_together,
                stale_holders_cannot_renew_or_release,
                leases_are_listed,
                one_of_many_rivals_gets_a_lease;
            command:
                the_first_record_of_a_command_counts,
                one_of_many_rivals_records_a_command,
                many_commands_are_recorded_at_once,
                old_records_are_forgotten,
                events_of_a_command_are_found,
                events_are_found_by_their_correlation;
            timers:
                timers_are_put_and_removed,
                the_version_of_a_timer_decides,
                an_instance_is_rescheduled,
                a_call_may_name_a_timer_twice,
                due_timers_are_returned_oldest_first,
                a_timer_becomes_due,
                timers_are_listed_in_pages,
                far_due_times_are_kept,
                invalid_timers_are_refused,
                timers_with_odd_names_are_kept_apart,
                many_timers_are_written_at_once,
                the_highest_of_many_rivals_wins,
                concurrent_writes_of_many_timers_succeed;
            scheduled_commands:
                a_command_waits_starts_and_ends,
                an_existing_command_stays_unchanged,
                due_commands_start_oldest_first,
                a_command_becomes_due,
                many_commands_start_and_end_at_once,
                large_commands_start_in_small_batches,
                a_parked_command_is_retried,
                a_command_is_cancelled_unless_it_is_started,
                ends_of_other_commands_are_ignored,
                commands_are_listed_in_pages,
                far_due_commands_are_kept,
                invalid_commands_are_refused;
            schedules:
                a_schedule_is_written_in_revisions,
                a_wrong_revision_writes_nothing,
                ticks_are_stored_with_their_schedule,
                a_removal_spares_started_and_parked_commands,
                due_schedules_are_returned_oldest_first,
                schedules_are_listed_by_name,
                schedules_with_odd_names_are_kept_apart,
                invalid_schedules_are_refused;
            scheduling_races:
                one_of_many_rivals_starts_a_command,
                cancelling_races_with_starting,
                rivals_store_a_command_once,
                one_of_many_rivals_writes_a_schedule,
                removal_races_with_starting,
                a_command_is_postponed,
                ends_of_a_stale_holder_are_ignored;
            queries:
                events_are_found_by_their_tags,
                queries_are_read_in_pages,
                events_without_tags_match_no_query,
                tags_with_odd_text_are_kept_apart,
                invalid_queries_are_refused,
                invalid_tags_are_refused_alone;
            boundaries:
                a_boundary_holds_until_a_matching_event,
                an_existing_event_is_reported,
                refused_decisions_leave_no_trace,
                other_tags_and_names_never_conflict,
                a_batch_is_checked_in_its_order,
                equal_reads_have_equal_boundaries,
                versions_and_boundaries_are_both_checked,
                several_streams_share_a_boundary;
            query_races:
                one_of_many_rivals_gets_a_unique_value,
                rivals_take_exactly_the_last_seats,
                plain_appends_race_with_decisions,
                decisions_are_made_on_all_matching_events;
            oracle:
                rivals_on_one_stream_leave_no_gap,
                followers_see_exactly_the_log,
                cancelled_appends_do_no_harm;
        }
    };
    (@topics $make:expr; $($topic:ident: $($behaviour:ident),+;)+) => {
        $($(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $behaviour() {
                let database = $make.await;
                $crate::testing::store::run($crate::testing::store::$topic::$behaviour(database)).await;
            }
        )+)+
    };
}
