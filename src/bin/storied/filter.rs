//! The filter of events.

use storied::event::Category;
use storied::{EventName, Filter, StreamId};

/// Conditions on events: joined by OR within a kind, by AND between kinds.
#[derive(Debug, clap::Args)]
pub(crate) struct FilterArgs {
    /// Only events of this category; repeatable
    #[arg(long, value_name = "CATEGORY", value_parser = category)]
    category: Vec<Category>,

    /// Only events of this stream; repeatable
    #[arg(long, value_name = "CATEGORY/ID", value_parser = stream)]
    stream: Vec<StreamId>,

    /// Only events with this stored name; repeatable
    #[arg(long, value_name = "CATEGORY.EVENT", value_parser = name)]
    name: Vec<EventName>,
}

impl FilterArgs {
    /// Returns whether there is no condition.
    pub(crate) fn is_empty(&self) -> bool {
        self.category.is_empty() && self.stream.is_empty() && self.name.is_empty()
    }

    pub(crate) fn filter(&self) -> Filter {
        let mut filter = Filter::all();
        if !self.category.is_empty() {
            filter = filter.with_categories(self.category.clone());
        }
        if !self.stream.is_empty() {
            filter = filter.with_streams(self.stream.clone());
        }
        if !self.name.is_empty() {
            filter = filter.with_names(self.name.clone());
        }
        filter
    }
}

fn category(text: &str) -> Result<Category, String> {
    Category::new(text).map_err(|error| error.to_string())
}

fn name(text: &str) -> Result<EventName, String> {
    EventName::new(text).map_err(|error| error.to_string())
}

/// Parses `category/id`; the id may contain slashes.
pub(crate) fn stream(text: &str) -> Result<StreamId, String> {
    let (category, id) = text.split_once('/').ok_or("expected a form like order/17")?;
    StreamId::new(category, id).map_err(|error| error.to_string())
}
