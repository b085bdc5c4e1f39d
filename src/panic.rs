//! What is left of a panic that was caught.

use std::any::Any;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What it said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message").to_owned()
}

/// Runs code of the user's; the message of its panic.
pub(crate) fn caught<T>(user: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(user)).map_err(|panic| panic_text(&*panic))
}

/// The text of an error whose `Display` may be the user's.
pub(crate) fn text_of(error: &(impl Display + ?Sized)) -> String {
    caught(|| error.to_string()).unwrap_or_else(|panic| format!("an error whose Display panicked: {panic}"))
}
