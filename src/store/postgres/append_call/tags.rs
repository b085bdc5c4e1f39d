//! The tags of the events of a call.

use sqlx::postgres::{PgArguments, Postgres};
use sqlx::query::Query;

use crate::event::NewEvent;

/// Tags as arguments: for each tag the number of its event, from 1, and its text.
#[derive(Debug, Default)]
pub(super) struct EventTags<'e> {
    events: Vec<i32>,
    texts: Vec<&'e str>,
}

impl<'e> EventTags<'e> {
    pub(super) fn of(events: impl Iterator<Item = &'e NewEvent>) -> Self {
        let mut tags = Self::default();
        for (event, number) in events.zip(1..) {
            for tag in event.tags.iter() {
                tags.events.push(number);
                tags.texts.push(tag.as_str());
            }
        }
        tags
    }

    pub(super) fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// Returns the texts, for a call of a single event.
    pub(super) fn texts(&self) -> &[&'e str] {
        &self.texts
    }

    pub(super) fn bind<'q>(
        &self,
        query: Query<'q, Postgres, PgArguments>,
    ) -> Query<'q, Postgres, PgArguments> {
        query.bind(&self.events).bind(&self.texts)
    }
}
