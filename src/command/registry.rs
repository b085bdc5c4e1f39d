//! The aggregates and handlers of this process. They are fixed after the start of the runtime.

use std::any::TypeId;
use std::collections::HashMap;
use std::fmt;

use tokio::time::Instant;

use super::endpoint::Endpoint;
use super::handler::HandlerStatus;
use super::wire::Kind;
use crate::aggregate::RouterStatus;

/// The aggregates and handlers of a node.
#[derive(Default)]
pub(crate) struct Registry {
    by_type: HashMap<TypeId, (Kind, &'static str)>,
    endpoints: HashMap<(Kind, &'static str), Box<dyn Endpoint>>,
}

impl Registry {
    /// Adds the endpoint of the aggregate or handler `T`.
    pub(super) fn register<T: 'static>(
        &mut self,
        kind: Kind,
        name: &'static str,
        endpoint: Box<dyn Endpoint>,
    ) {
        self.by_type.insert(TypeId::of::<T>(), (kind, name));
        self.endpoints.insert((kind, name), endpoint);
    }

    /// Returns the endpoint, of type `R`, of the aggregate or handler `T`.
    pub(super) fn of<T: 'static, R: 'static>(&self) -> Option<&R> {
        self.endpoints.get(self.by_type.get(&TypeId::of::<T>())?)?.as_any().downcast_ref()
    }

    pub(super) fn endpoint(&self, kind: Kind, name: &str) -> Option<&dyn Endpoint> {
        // Names from other nodes are not `'static`, so they are compared as text.
        let found = self.endpoints.iter().find(|((of, called), _)| *of == kind && *called == name);
        found.map(|(_, endpoint)| &**endpoint)
    }

    /// Returns the names of one kind that this node handles.
    pub(super) fn names(&self, kind: Kind) -> impl Iterator<Item = &'static str> {
        self.endpoints.keys().filter(move |(of, _)| *of == kind).map(|(_, name)| *name)
    }

    pub(crate) fn aggregates(&self) -> Vec<RouterStatus> {
        let mut status: Vec<_> =
            self.endpoints.values().filter_map(|endpoint| endpoint.aggregate()).collect();
        status.sort_by(|a, b| a.category.cmp(&b.category));
        status
    }

    pub(crate) fn handlers(&self) -> Vec<HandlerStatus> {
        let mut status: Vec<_> = self.endpoints.values().filter_map(|endpoint| endpoint.handler()).collect();
        status.sort_by_key(|handler| handler.name);
        status
    }

    /// Stops admission of all endpoints, and waits for the commands in flight.
    ///
    /// Returns the number of commands without an answer at the deadline.
    pub(crate) async fn shut_down(&self, deadline: Instant) -> usize {
        // Stop handlers first: their running attempts need the aggregates.
        let mut unanswered = 0;
        for kind in [Kind::Handler, Kind::Aggregate] {
            let all = self.endpoints.iter().filter(|((of, _), _)| *of == kind);
            let all = all.map(|(_, endpoint)| endpoint.shut_down(deadline));
            unanswered += futures_util::future::join_all(all).await.into_iter().sum::<usize>();
        }
        unanswered
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.endpoints.keys()).finish()
    }
}
