/// A decision on a command: the new events and the reply.
///
/// An event converts into the decision with this event and no reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision<E, R = ()> {
    pub(crate) events: Vec<E>,
    pub(crate) reply: R,
}

impl<E> Decision<E> {
    /// Creates a decision without events: the command is already fulfilled.
    #[must_use]
    pub fn none() -> Self {
        Self::events([])
    }

    /// Creates a decision with one event.
    #[must_use]
    pub fn event(event: E) -> Self {
        Self::events([event])
    }

    /// Creates a decision with several events in order. The store appends all of them or none.
    #[must_use]
    pub fn events(events: impl IntoIterator<Item = E>) -> Self {
        Self { events: events.into_iter().collect(), reply: () }
    }
}

impl<E> From<E> for Decision<E> {
    fn from(event: E) -> Self {
        Self::event(event)
    }
}

impl<E, R> Decision<E, R> {
    /// Sets the reply to the command. It replaces an earlier reply.
    #[must_use]
    pub fn reply<S>(self, reply: S) -> Decision<E, S> {
        Decision { events: self.events, reply }
    }
}
