//! Warnings that PostgreSQL sends beside an answer.
//!
//! If the wait of a commit for a synchronous standby was cancelled (`pg_cancel_backend`),
//! PostgreSQL still answers the commit as a success, with a WARNING. The driver has no hook for
//! warnings: it emits them as events of `tracing` while a call is polled. So a call that commits is
//! polled under a subscriber that records warnings and passes everything on to the outer
//! subscriber.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::OnceLock;

use tracing::dispatcher::{self, DefaultGuard, Dispatch};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};

/// Target of the driver's events, from its `PgStream::recv`.
const TARGET: &str = "sqlx::postgres::notice";

thread_local! {
    static SCOPE: RefCell<Option<Scope>> = const { RefCell::new(None) };
}

/// The state of one poll of a call.
struct Scope {
    /// Outer subscriber.
    outer: Dispatch,
    warned: bool,
    /// Whether the outer subscriber wants the last announced event.
    wanted: bool,
}

/// Runs `call`; returns its output and whether the server sent a warning beside its answers.
///
/// Cancel-safe if `call` is.
pub(super) async fn watch<T>(call: impl Future<Output = T>) -> (T, bool) {
    let mut call = pin!(call);
    let mut warned = false;
    let output = poll_fn(|context| {
        let scope = enter(warned);
        let polled = call.as_mut().poll(context);
        warned = leave(scope, warned);
        polled
    })
    .await;
    (output, warned)
}

/// Discards the warnings of the current call; those of a new connection do not concern a commit.
pub(super) fn forget() {
    SCOPE.with_borrow_mut(|scope| {
        if let Some(scope) = scope {
            scope.warned = false;
        }
    });
}

/// Returns whether warnings can be detected.
///
/// If a process logs only through `log`, `tracing` passes its events to `log` until a subscriber is
/// set for the first time. Such a process would lose its log lines.
fn can_watch() -> bool {
    dispatcher::has_been_set() || log::max_level() == log::LevelFilter::Off
}

fn enter(warned: bool) -> Option<DefaultGuard> {
    // Two, because `tracing` asks only the subscriber of the current thread about a new callsite
    // while a process has a single one. If the driver's first warning came outside of a call, its
    // callsite would be switched off for the life of the process.
    static NOTES: OnceLock<[Dispatch; 2]> = OnceLock::new();
    if !can_watch() || SCOPE.with_borrow(Option::is_some) {
        return None;
    }
    let outer = dispatcher::get_default(Clone::clone);
    SCOPE.set(Some(Scope { outer, warned, wanted: false }));
    let [notes, _] = NOTES.get_or_init(|| [Dispatch::new(Notes), Dispatch::new(Notes)]);
    Some(dispatcher::set_default(notes))
}

fn leave(scope: Option<DefaultGuard>, warned: bool) -> bool {
    if scope.is_none() {
        return warned;
    }
    drop(scope);
    SCOPE.take().map_or(warned, |scope| scope.warned)
}

struct Notes;

/// Returns the outer subscriber, or a no-op one for a span that outlives its poll.
fn outer() -> Dispatch {
    SCOPE.with_borrow(|scope| scope.as_ref().map_or_else(Dispatch::none, |scope| scope.outer.clone()))
}

fn is_warning(metadata: &Metadata<'_>) -> bool {
    metadata.target() == TARGET && *metadata.level() <= Level::WARN
}

impl Subscriber for Notes {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        // The outer subscribers decide about all other events; they are asked for each one here.
        if is_warning(metadata) { Interest::sometimes() } else { Interest::never() }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::WARN)
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let wanted = outer().enabled(metadata);
        if !is_warning(metadata) {
            return wanted;
        }
        SCOPE.with_borrow_mut(|scope| {
            if let Some(scope) = scope {
                scope.wanted = wanted;
            }
        });
        true
    }

    fn event(&self, event: &Event<'_>) {
        let (outer, wanted) = SCOPE.with_borrow_mut(|scope| match scope {
            Some(scope) if is_warning(event.metadata()) => {
                scope.warned = true;
                (scope.outer.clone(), scope.wanted)
            }
            Some(scope) => (scope.outer.clone(), true),
            None => (Dispatch::none(), false),
        });
        if wanted {
            outer.event(event);
        }
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        outer().new_span(span)
    }

    fn record(&self, span: &Id, values: &Record<'_>) {
        outer().record(span, values);
    }

    fn record_follows_from(&self, span: &Id, follows: &Id) {
        outer().record_follows_from(span, follows);
    }

    fn enter(&self, span: &Id) {
        outer().enter(span);
    }

    fn exit(&self, span: &Id) {
        outer().exit(span);
    }

    fn clone_span(&self, id: &Id) -> Id {
        outer().clone_span(id)
    }

    fn try_close(&self, id: Id) -> bool {
        outer().try_close(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends a warning as the driver does.
    fn warn() {
        if tracing::enabled!(target: TARGET, Level::WARN) {
            tracing::event!(target: TARGET, Level::WARN, "canceled");
        }
    }

    /// Without a subscriber of the application, and with the first warning outside of a call.
    #[tokio::test]
    #[ignore = "needs a process of its own: `the_first_warning_may_come_outside_of_a_call` starts it"]
    async fn alone() {
        assert!(!watch(async {}).await.1);
        warn();
        assert!(watch(async { warn() }).await.1);
        assert!(!watch(async {}).await.1);
    }

    #[test]
    fn the_first_warning_may_come_outside_of_a_call() {
        let name = "store::postgres::notices::tests::alone";
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--ignored"])
            .output()
            .unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && printed.contains("1 passed"), "{printed}");
    }
}
