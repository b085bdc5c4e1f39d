//! Routes: which events start or continue which instances.

use std::collections::BTreeSet;
use std::fmt;

use std::marker::PhantomData;

use crate::event::{DecodeError, Event, EventName, EventSet, RecordedEvent};
use crate::store::{Filter, FilterError};

/// The routes of a process, by event.
///
/// A variant is named as in [`Filter::variants`]. An event that several routes name takes all of
/// them; if two lead to the same instance, the first one counts.
pub struct Routes<E> {
    routes: Vec<Route>,
    /// The first reason why a route is invalid.
    problem: Option<FilterError>,
    events: PhantomData<fn() -> E>,
}

struct Route {
    kind: RouteKind,
    names: BTreeSet<EventName>,
    instances: Box<InstancesOf>,
}

type InstancesOf = dyn Fn(&RecordedEvent) -> Result<InstanceIds, DecodeError> + Send + Sync;

/// The effect of a route on an instance that exists or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) enum RouteKind {
    Starts,
    Continues,
    StartsOrContinues,
}

/// Ids of the instances that receive an event: none, one, or several.
///
/// Converts from a text, an optional text, and a list of texts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InstanceIds(pub(super) Vec<String>);

impl From<String> for InstanceIds {
    fn from(id: String) -> Self {
        Self(vec![id])
    }
}

impl From<Option<String>> for InstanceIds {
    fn from(id: Option<String>) -> Self {
        Self(id.into_iter().collect())
    }
}

impl From<Vec<String>> for InstanceIds {
    fn from(ids: Vec<String>) -> Self {
        Self(ids)
    }
}

impl<E: EventSet> Routes<E> {
    /// Creates an empty list.
    #[must_use]
    pub fn new() -> Self {
        Self { routes: Vec::new(), problem: None, events: PhantomData }
    }

    /// Adds events that start an instance.
    ///
    /// If the instance exists already, the event is ignored.
    #[must_use]
    pub fn starts<T: Event, I: Into<InstanceIds>>(
        self,
        variants: impl IntoIterator<Item = impl AsRef<str>>,
        instances: impl Fn(&T, &RecordedEvent) -> I + Send + Sync + 'static,
    ) -> Self {
        self.with(RouteKind::Starts, variants, instances)
    }

    /// Adds events that continue an instance.
    ///
    /// If the instance does not exist or has ended, the event is ignored.
    #[must_use]
    pub fn continues<T: Event, I: Into<InstanceIds>>(
        self,
        variants: impl IntoIterator<Item = impl AsRef<str>>,
        instances: impl Fn(&T, &RecordedEvent) -> I + Send + Sync + 'static,
    ) -> Self {
        self.with(RouteKind::Continues, variants, instances)
    }

    /// Adds events that start an instance if it does not exist, and else continue it.
    ///
    /// If the instance has ended, the event is ignored.
    #[must_use]
    pub fn starts_or_continues<T: Event, I: Into<InstanceIds>>(
        self,
        variants: impl IntoIterator<Item = impl AsRef<str>>,
        instances: impl Fn(&T, &RecordedEvent) -> I + Send + Sync + 'static,
    ) -> Self {
        self.with(RouteKind::StartsOrContinues, variants, instances)
    }

    fn with<T: Event, I: Into<InstanceIds>>(
        mut self,
        kind: RouteKind,
        variants: impl IntoIterator<Item = impl AsRef<str>>,
        instances: impl Fn(&T, &RecordedEvent) -> I + Send + Sync + 'static,
    ) -> Self {
        let filter = Filter::variants::<T>(variants).restricted_to::<E>();
        if let Err(problem) = filter.check() {
            self.problem.get_or_insert(problem);
        }
        self.routes.push(Route {
            kind,
            names: filter.names().cloned().unwrap_or_default(),
            instances: Box::new(move |event| Ok(instances(&event.decode::<T>()?, event).into())),
        });
        self
    }

    /// Returns the stored names of all events.
    ///
    /// # Errors
    /// If a route is invalid.
    pub(super) fn names(&self) -> Result<BTreeSet<EventName>, FilterError> {
        match &self.problem {
            Some(problem) => Err(problem.clone()),
            None => Ok(self.routes.iter().flat_map(|route| route.names.iter().cloned()).collect()),
        }
    }

    /// Returns the instances of an event, each with its first route.
    pub(super) fn route(&self, event: &RecordedEvent) -> Result<Vec<(String, RouteKind)>, DecodeError> {
        let mut found: Vec<(String, RouteKind)> = Vec::new();
        for route in self.routes.iter().filter(|route| route.names.contains(&event.name)) {
            for id in (route.instances)(event)?.0 {
                if found.iter().all(|(known, _)| *known != id) {
                    found.push((id, route.kind));
                }
            }
        }
        Ok(found)
    }
}

impl<E: EventSet> Default for Routes<E> {
    fn default() -> Self {
        Self::new()
    }
}

impl<E> fmt::Debug for Routes<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.routes.iter().map(|route| (route.kind, &route.names));
        f.debug_list().entries(names).finish()
    }
}
