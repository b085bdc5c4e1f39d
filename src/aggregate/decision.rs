/// What an aggregate decided: the events that happen, and the reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision<E, R = ()> {
    pub(crate) events: Vec<E>,
    pub(crate) reply: R,
}

impl<E> Decision<E> {
    /// Nothing happens: the command is already fulfilled.
    #[must_use]
    pub fn none() -> Self {
        Self::events([])
    }

    /// One event.
    #[must_use]
    pub fn event(event: E) -> Self {
        Self::events([event])
    }

    /// Several events, in order; they are stored together or not at all.
    #[must_use]
    pub fn events(events: impl IntoIterator<Item = E>) -> Self {
        Self { events: events.into_iter().collect(), reply: () }
    }
}

impl<E, R> Decision<E, R> {
    /// Answers the command with `reply` (in place of the reply so far).
    #[must_use]
    pub fn reply<S>(self, reply: S) -> Decision<E, S> {
        Decision { events: self.events, reply }
    }
}
