use tracing::subscriber::{DefaultGuard, NoSubscriber};
use tracing::{Dispatch, Subscriber};

/// The tracing subscriber of this thread, until it is dropped.
pub struct ThreadSubscriber {
    _guard: DefaultGuard,
    /// While a process has one subscriber, tracing asks only the thread that first reaches a log
    /// statement. A thread without a subscriber would disable the statement for all threads.
    _second: Dispatch,
}

impl ThreadSubscriber {
    pub fn set(subscriber: impl Subscriber + Send + Sync + 'static) -> Self {
        let _second = Dispatch::new(NoSubscriber::new());
        Self { _guard: tracing::subscriber::set_default(subscriber), _second }
    }
}
