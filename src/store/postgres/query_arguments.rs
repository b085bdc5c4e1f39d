//! A query as the arguments of `storied.matching()`.

use std::collections::BTreeSet;

use sqlx::postgres::{PgArguments, Postgres};
use sqlx::query::Query as Statement;

use super::super::Query;
use crate::event::EventName;

/// The items of a query that an event can match, as arrays; the migration describes them.
#[derive(Debug, Default)]
pub(super) struct QueryArguments<'a> {
    /// Smallest tag of each item.
    item_tags: Vec<&'a str>,
    /// Numbers of the items of the other tags, from 1.
    more_items: Vec<i32>,
    more_tags: Vec<&'a str>,
    /// Numbers of the items of the names, from 1.
    name_items: Vec<i32>,
    name_texts: Vec<&'a str>,
}

impl<'a> QueryArguments<'a> {
    pub(super) fn of(query: &'a Query) -> Self {
        let mut arguments = Self::default();
        // To the server, an item without names matches all of them.
        let possible = query.items().iter().filter(|item| !item.names().is_some_and(BTreeSet::is_empty));
        for (item, number) in possible.zip(1..) {
            let mut tags = item.tags().iter().map(|tag| tag.as_str());
            arguments.item_tags.extend(tags.next());
            for tag in tags {
                arguments.more_items.push(number);
                arguments.more_tags.push(tag);
            }
            for name in item.names().into_iter().flatten().map(EventName::as_str) {
                arguments.name_items.push(number);
                arguments.name_texts.push(name);
            }
        }
        arguments
    }

    /// Binds the arrays.
    pub(super) fn bind<'q>(
        &self,
        statement: Statement<'q, Postgres, PgArguments>,
    ) -> Statement<'q, Postgres, PgArguments> {
        statement
            .bind(&self.item_tags)
            .bind(&self.more_items)
            .bind(&self.more_tags)
            .bind(&self.name_items)
            .bind(&self.name_texts)
    }
}
