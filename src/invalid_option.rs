//! Options out of their range, and their validation.

use std::fmt::Debug;
use std::ops::RangeInclusive;
use std::time::Duration;

/// Maximum lease, poll interval or timeout of options with an upper limit.
pub(crate) const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// An option with a value out of its range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid option {option}: value {value}; allowed: {range}")]
pub struct InvalidOption {
    /// The option, as `Type::method`.
    pub option: &'static str,
    /// The value that was set.
    pub value: String,
    /// The values that are allowed.
    pub range: String,
}

impl InvalidOption {
    pub(crate) fn new(option: &'static str, value: impl Debug, range: impl Into<String>) -> Self {
        Self { option, value: format!("{value:?}"), range: range.into() }
    }
}

/// Checks that `value` is `least` or more.
pub(crate) fn at_least<T: PartialOrd + Debug>(
    option: &'static str,
    value: T,
    least: T,
) -> Result<(), InvalidOption> {
    if value >= least {
        return Ok(());
    }
    Err(InvalidOption::new(option, value, format!("at least {least:?}")))
}

/// Checks that `value` is in `range`.
pub(crate) fn within<T: PartialOrd + Debug>(
    option: &'static str,
    value: T,
    range: RangeInclusive<T>,
) -> Result<(), InvalidOption> {
    if range.contains(&value) {
        return Ok(());
    }
    let (least, most) = range.into_inner();
    Err(InvalidOption::new(option, value, format!("{least:?} to {most:?}")))
}
