//! The state of a store, and the time limits of its calls.

use std::future::Future;
use std::sync::Arc;

use super::super::page_size::PageSizer;
use super::super::sql::{Controls, Progress};
use super::super::{StoreError, StoreInfo};
use super::command_batchers::CommandBatchers;
use super::conditional_permits::ConditionalPermits;
use super::connection::Connections;
use super::high_water_mark::HighWaterMark;
use super::numbers::Numbers;
use super::statements::{LogSql, Schema};
use super::stuck::Stuck;
use super::{notices, progress};

/// The state shared by calls and the tailer.
pub(super) struct PgInner {
    pub(super) info: StoreInfo,
    /// Whether the log had an index by name when the store was opened.
    pub(super) indexed_by_name: bool,
    pub(super) sql: LogSql,
    pub(super) progress: Progress,
    pub(super) controls: Controls,
    pub(super) connections: Arc<Connections>,
    pub(super) high_water_mark: HighWaterMark,
    pub(super) numbers: Numbers,
    pub(super) page_sizer: PageSizer,
    pub(super) commands: CommandBatchers,
    pub(super) stuck: Stuck,
    pub(super) conditional_permits: ConditionalPermits,
}

impl PgInner {
    pub(super) fn new(
        info: StoreInfo,
        indexed_by_name: bool,
        schema: &Schema,
        connections: Arc<Connections>,
        notifies_others: bool,
    ) -> Self {
        Self {
            info,
            indexed_by_name,
            sql: LogSql::new(|sql| schema.text(sql)),
            progress: progress::of_store(schema, connections.persistent()),
            controls: Controls::new(|sql| schema.text(sql), connections.persistent()),
            connections,
            high_water_mark: HighWaterMark::new(notifies_others),
            numbers: Numbers::default(),
            page_sizer: PageSizer::default(),
            commands: CommandBatchers::default(),
            stuck: Stuck::default(),
            conditional_permits: ConditionalPermits::default(),
        }
    }

    /// Limits the wait for a server that does not answer at all; it limits its statements itself.
    pub(super) async fn timed<T>(
        &self,
        call: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        let Some(limit) = self.connections.patience.call else { return call.await };
        tokio::time::timeout(limit, call).await.unwrap_or_else(|_| {
            Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "no answer in time").into())
        })
    }

    /// Runs a call that may commit.
    ///
    /// Returns its output and whether its wait for a synchronous standby was cancelled.
    pub(super) async fn watched<T>(&self, call: impl Future<Output = T>) -> (T, bool) {
        if self.high_water_mark.has_standbys() { notices::watch(call).await } else { (call.await, false) }
    }

    /// Runs a call like [`timed`](Self::timed), including the wait for a connection.
    pub(super) async fn timed_call<T, E: From<StoreError>>(
        &self,
        doing: &str,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let Some(limit) = self.connections.patience.call else { return call.await };
        let limit = limit + self.connections.patience.acquire;
        tokio::time::timeout(limit, call).await.unwrap_or_else(|_| {
            let reason = format!("{doing}: no answer within {limit:?}");
            Err(StoreError::Unavailable { reason, source: None }.into())
        })
    }
}
