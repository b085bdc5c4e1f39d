//! One call of `storied.append()` or a faster function: one round trip and one commit.

mod known;
mod many;
mod one;
mod reply;
mod seen;
mod tags;
mod unless;

use std::sync::Arc;

use self::known::{execute_known, known};
use self::many::execute_many;
use self::one::{execute_one, single};
pub(super) use self::reply::Outcome;
use self::reply::Reply;
pub(super) use self::unless::Condition;
use self::unless::{check_server, execute_unless};
use super::super::{Append, StoreError};
use super::append_failure::{CommitHandle, DOING, Failure};
use super::connection::Session;
use super::durability;
use super::error::{ErrorClass, class_of, failed};
use super::inner::PgInner;
use super::numbering::{NumberingError, number_names};

/// Sends appends in one transaction; returns the outcome of each.
///
/// An append with a condition is the only one of its transaction.
pub(super) async fn call(
    core: &Arc<PgInner>,
    appends: &[&Append],
    condition: Option<Condition<'_>>,
) -> Result<Vec<Outcome>, Failure> {
    core.stuck.check()?;
    number_names(core, appends).await.map_err(|error| match error {
        NumberingError::Store(error) => Failure::Failed(error),
        NumberingError::Database(error) if class_of(&error) == ErrorClass::Unknown => {
            core.connections.purge();
            Failure::NotSent(failed(DOING, error))
        }
        NumberingError::Database(error) => Failure::answered(error),
    })?;
    if let Some(condition) = condition {
        check_server(core, condition.boundary).await?;
    }
    let explicit = core.connections.appends_in_transactions();
    let server = core.connections.begun();
    let session =
        if explicit { core.connections.begin(DOING).await } else { core.connections.acquire(DOING).await };
    let mut session = session.map_err(Failure::Failed)?;
    let (reply, mut cancelled) =
        core.watched(core.timed(execute(core, &mut session, appends, condition))).await;
    let reply = match reply {
        Ok(reply) => reply,
        Err(error) if class_of(&error) == ErrorClass::Unknown => {
            core.connections.purge();
            let backend = session.backend();
            drop(session);
            let error = failed(DOING, error);
            return Err(match backend {
                // Without a commit, the server rolls back as soon as it notices the loss.
                _ if explicit => Failure::NotSent(error),
                Some(backend) => Failure::Unknown(error, CommitHandle::Backend(backend)),
                None => Failure::Failed(StoreError::OutcomeUnknown {
                    reason: format!(
                        "{error}; the server process is unknown, so the events cannot be looked up"
                    ),
                    source: Some(Arc::new(error)),
                }),
            });
        }
        Err(error) => {
            if class_of(&error) == ErrorClass::Failed {
                // Another server may be the primary now: the next attempt opens a new connection.
                core.connections.purge();
            } else {
                session.roll_back().await;
            }
            return Err(Failure::answered(error));
        }
    };
    let Some(Reply { outcomes, transaction, settled, server: number, seen }) = reply else {
        session.roll_back().await;
        return Err(Failure::OtherServer);
    };
    let (done, cancelled_at_end) = core.watched(core.timed(session.done())).await;
    if explicit {
        // A warning before the commit does not concern the wait of the commit.
        cancelled = cancelled_at_end;
    }
    match done {
        // I3: the server reports success, but perhaps no standby has the commit.
        Ok(()) if cancelled => Err(Failure::Unknown(durability::cancelled(), CommitHandle::Committed)),
        Ok(()) => {
            // Not for a connection opened since, which may lead to another server.
            if let Some((previous, event)) = settled
                && core.connections.begun() == server
            {
                core.high_water_mark.advance_locally(server, previous, event);
            }
            core.numbers.learn(number, seen);
            Ok(outcomes)
        }
        Err(error) if class_of(&error) == ErrorClass::Unknown => {
            core.connections.purge();
            let error = failed(DOING, error);
            Err(match transaction {
                Some(transaction) => Failure::Unknown(error, CommitHandle::Transaction(transaction)),
                None => Failure::NotSent(error),
            })
        }
        Err(error) => Err(Failure::answered(error)),
    }
}

/// Returns nothing if the numbers are those of another server process.
async fn execute(
    core: &PgInner,
    session: &mut Session,
    appends: &[&Append],
    condition: Option<Condition<'_>>,
) -> Result<Option<Reply>, sqlx::Error> {
    if let Some(condition) = condition {
        return execute_unless(core, session, appends, condition).await;
    }
    let mut look_up = false;
    // Not in an explicit transaction: its end is looked up by its id, which only `append()`
    // returns.
    if !core.connections.appends_in_transactions() {
        let reply = match single(appends) {
            Some((part, event)) => execute_one(core, session, part, event).await?,
            None => match known(core, appends) {
                Some(known) => {
                    look_up = true;
                    execute_known(core, session, appends, known).await?
                }
                None => None,
            },
        };
        if reply.is_some() {
            return Ok(reply);
        }
    }
    execute_many(core, session, appends, look_up).await
}
