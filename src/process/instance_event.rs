//! The event type of the aggregates that are the instances of a process.

use std::fmt;
use std::marker::PhantomData;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Process;
use super::event::ProcessEvent;
use crate::event::Event;

/// The events of the instances of `P`.
pub(crate) struct InstanceEvent<P>(pub(super) ProcessEvent, PhantomData<fn() -> P>);

impl<P> From<ProcessEvent> for InstanceEvent<P> {
    fn from(event: ProcessEvent) -> Self {
        Self(event, PhantomData)
    }
}

impl<P> fmt::Debug for InstanceEvent<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<P> Serialize for InstanceEvent<P> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de, P> Deserialize<'de> for InstanceEvent<P> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        ProcessEvent::deserialize(deserializer).map(Self::from)
    }
}

impl<P: Process> Event for InstanceEvent<P> {
    const CATEGORY: &'static str = P::NAME;
}
