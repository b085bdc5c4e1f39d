//! Appending: one round trip for each transaction of a batch, most often for the whole batch.

use std::sync::Arc;

use futures_util::future::join_all;
use tokio::sync::Semaphore;

use super::super::append::{SizeLimits, append_valid};
use super::super::{Append, AppendError, Appended, StoreError};
use super::append_call::{Outcome, call};
use super::append_failure::Failure;
use super::append_partition::{Partition, is_simple};
use super::append_retry::AppendRetry;
use super::conditional_append::append_unless;
use super::inner::PgInner;

/// PostgreSQL limits to 1 GB the message and every structure built from it.
const LIMITS: SizeLimits = SizeLimits { event: 100_000_000, batch: 400_000_000 };

/// Maximum number of transactions of a batch at a time: one commits while the server executes
/// another.
const TRANSACTIONS: usize = 2;

/// Appends a batch. Once polled, it must run to completion.
pub(super) async fn append(core: &Arc<PgInner>, batch: Vec<Append>) -> Vec<Result<Appended, AppendError>> {
    let _appending = core.high_water_mark.appending();
    let answers = append_valid(batch, LIMITS, |batch| send(core, batch)).await;
    let last = answers.iter().flatten().filter_map(|appended| appended.positions.last()).max();
    if let Some(&last) = last {
        core.high_water_mark.announce(last);
    }
    answers
}

async fn send(core: &Arc<PgInner>, batch: Vec<Append>) -> Vec<Result<Appended, AppendError>> {
    if batch.iter().all(is_simple) {
        return send_until_resolved(core, batch).await;
    }
    // Boxed: it would enlarge the future of every append.
    Box::pin(send_partitioned(core, batch)).await
}

/// Sends appends with tags in transactions, and each one with a condition by itself.
async fn send_partitioned(core: &Arc<PgInner>, batch: Vec<Append>) -> Vec<Result<Appended, AppendError>> {
    let Partition { transactions, conditional } = Partition::of(batch);
    let permits = &Semaphore::new(TRANSACTIONS);
    let plain = join_all(transactions.into_iter().map(|transaction| async move {
        let _permit = permits.acquire().await;
        let (indexes, appends): (Vec<usize>, Vec<Append>) = transaction.into_iter().unzip();
        indexes.into_iter().zip(send_until_resolved(core, appends).await).collect::<Vec<_>>()
    }));
    let mut answers: Vec<_> = plain.await.into_iter().flatten().collect();
    // In their order: a condition sees the earlier appends of its batch.
    for (index, append, boundary) in conditional {
        answers.push((index, append_unless(core, &append, &boundary).await));
    }
    answers.sort_unstable_by_key(|(index, _)| *index);
    answers.into_iter().map(|(_, answer)| answer).collect()
}

/// Sends calls until every append of a transaction has an outcome.
async fn send_until_resolved(core: &Arc<PgInner>, batch: Vec<Append>) -> Vec<Result<Appended, AppendError>> {
    let mut outcomes: Vec<Outcome> = vec![None; batch.len()];
    let mut retry = AppendRetry::new(core);
    let error = loop {
        let pending = || batch.iter().zip(&outcomes).filter(|(_, outcome)| outcome.is_none());
        let appends: Vec<&Append> = pending().map(|(append, _)| append).collect();
        if appends.is_empty() {
            break None;
        }
        let failure = match call(core, &appends, None).await {
            Ok(found) => {
                resolve(&mut outcomes, found);
                if outcomes.iter().all(Option::is_some) {
                    break None;
                }
                Failure::VersionRace
            }
            Err(failure) => failure,
        };
        match retry.after(failure, &appends).await {
            Ok(found) => resolve(&mut outcomes, found),
            Err(error) => break Some(error),
        }
    };
    let error = error.unwrap_or_else(|| StoreError::Corrupt { reason: "an append got no outcome".into() });
    outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(|| Err(error.clone().into()))).collect()
}

/// Stores the outcomes of the appends that had none.
fn resolve(outcomes: &mut [Outcome], found: Vec<Outcome>) {
    for (slot, outcome) in outcomes.iter_mut().filter(|slot| slot.is_none()).zip(found) {
        *slot = outcome;
    }
}
