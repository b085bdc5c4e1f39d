//! Messages of caught panics.

use std::any::Any;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Returns the message of a panic, or `no message`.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message").to_owned()
}

/// Runs user code. A panic becomes an error with its message.
pub(crate) fn caught<T>(user: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(user)).map_err(|panic| panic_text(&*panic))
}

/// Returns the text of an error. A panic in a user's `Display` becomes part of the text.
pub(crate) fn text_of(error: &(impl Display + ?Sized)) -> String {
    caught(|| error.to_string()).unwrap_or_else(|panic| format!("error with a panicking Display: {panic}"))
}
