use std::fmt;

use crate::bus::BusError;

/// A pattern of event names or subjects.
///
/// Dotted tokens, `*` for exactly one token, `>` at the end for one or more.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in super::super) struct Pattern(String);

/// The error for an invalid pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "invalid pattern {pattern:?}: {reason}; use dotted tokens of printable ASCII, '*' for exactly \
     one token, '>' at the end for one or more"
)]
pub(in super::super) struct InvalidPattern {
    pattern: String,
    reason: &'static str,
}

impl InvalidPattern {
    pub(super) fn new(pattern: &str, reason: &'static str) -> Self {
        // A hostile pattern may be megabytes long. The error must not be.
        Self { pattern: pattern.chars().take(80).collect(), reason }
    }
}

impl From<InvalidPattern> for BusError {
    fn from(error: InvalidPattern) -> Self {
        Self::Incompatible { reason: error.to_string() }
    }
}

/// Maximum length of a pattern, in bytes.
const LONGEST: usize = 400;

impl Pattern {
    /// Checks a pattern. `*` alone matches everything, as `>` does: no name has one token.
    pub(in super::super) fn new(text: &str) -> Result<Self, InvalidPattern> {
        let token = |(last, token): (bool, &str)| match token {
            "" => Some("empty token"),
            ">" if last => None,
            ">" => Some("'>' before the end"),
            "*" => None,
            token if token.contains(['*', '>']) => Some("'*' or '>' inside a token"),
            token if !token.bytes().all(|byte| byte.is_ascii_graphic()) => {
                Some("character outside printable ASCII")
            }
            _ => None,
        };
        let tokens = text.split('.').count();
        let wrong = if text.len() > LONGEST {
            Some("longer than 400 bytes")
        } else {
            text.split('.').enumerate().map(|(at, token)| (at + 1 == tokens, token)).find_map(token)
        };
        match wrong {
            Some(reason) => Err(InvalidPattern::new(text, reason)),
            None if text == "*" => Ok(Self(">".into())),
            None => Ok(Self(text.to_owned())),
        }
    }

    /// Checks that an event name can match.
    ///
    /// Names have two or more tokens of ASCII letters, digits, `_` and `-`.
    pub(in super::super) fn check_names(&self) -> Result<(), InvalidPattern> {
        let reason = if self.is_everything() {
            None
        } else if !self.0.contains('.') {
            Some("event names have two or more tokens; append '.*' or '.>' for the events of a category")
        } else {
            let other = |byte: u8| !byte.is_ascii_alphanumeric() && !b"_-.*>".contains(&byte);
            self.0.bytes().any(other).then_some("event names have only letters, digits, '_' and '-'")
        };
        reason.map_or(Ok(()), |reason| Err(InvalidPattern::new(&self.0, reason)))
    }

    pub(in super::super) fn as_str(&self) -> &str {
        &self.0
    }

    pub(in super::super) fn is_everything(&self) -> bool {
        self.0 == ">"
    }

    /// Whether the pattern has wildcards.
    pub(in super::super) fn is_wild(&self) -> bool {
        self.0.split('.').any(|token| matches!(token, "*" | ">"))
    }

    /// Whether the pattern matches a name or a subject.
    pub(in super::super) fn matches(&self, text: &str) -> bool {
        self.covers(text)
    }

    /// Whether the pattern matches everything that `other` matches.
    pub(in super::super) fn covers(&self, other: &str) -> bool {
        let (mut own, mut others) = (self.0.split('.'), other.split('.'));
        loop {
            match (own.next(), others.next()) {
                (Some(">"), Some(_)) | (None, None) => return true,
                (Some("*"), Some(token)) if token != ">" => {}
                (Some(one), Some(another)) if one == another => {}
                _ => return false,
            }
        }
    }

    /// Whether both patterns match a common subject.
    pub(in super::super) fn overlaps(&self, other: &Self) -> bool {
        let (mut own, mut others) = (self.0.split('.'), other.0.split('.'));
        loop {
            match (own.next(), others.next()) {
                (Some(">"), Some(_)) | (Some(_), Some(">")) | (None, None) => return true,
                (Some("*"), Some(_)) | (Some(_), Some("*")) => {}
                (Some(one), Some(another)) if one == another => {}
                _ => return false,
            }
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> Pattern {
        Pattern::new(text).unwrap()
    }

    #[test]
    fn patterns_match_one_several_or_exact_tokens() {
        for (text, yes, no) in [
            ("order.placed", &["order.placed"][..], &["order.placed.late", "order", "order.paid"][..]),
            (
                "orders.*.created",
                &["orders.us.created", "orders.eu.created"],
                &["orders.us.updated", "orders.a.b.created"],
            ),
            ("orders.>", &["orders.us", "orders.us.east.created"], &["orders", "order.us"]),
            ("sensors.*.us.>", &["sensors.heat.us.x"], &["sensors.heat.eu.x", "sensors.heat.us"]),
            ("*", &["a", "a.b", "a.b.c"], &[]),
        ] {
            for name in yes {
                assert!(pattern(text).matches(name), "{text} {name}");
            }
            for name in no {
                assert!(!pattern(text).matches(name), "{text} {name}");
            }
        }
    }

    #[test]
    fn patterns_cover_and_overlap() {
        for (one, other, covers, overlaps) in [
            ("a.>", "a.*", true, true),
            ("a.*", "a.>", false, true),
            ("a.*.c", "a.b.*", false, true),
            ("a.*", "b.*", false, false),
            ("a.*", "a.*.c", false, false),
            ("*", "x.y", true, true),
        ] {
            assert_eq!(pattern(one).covers(pattern(other).as_str()), covers, "{one} {other}");
            assert_eq!(pattern(one).overlaps(&pattern(other)), overlaps, "{one} {other}");
            assert_eq!(pattern(other).overlaps(&pattern(one)), overlaps, "{other} {one}");
        }
    }

    #[test]
    fn invalid_patterns_are_refused() {
        for text in ["", ".", "a.", "a..b", "a b", "a.>.b", "a*", "a.b>", "tab\t", "ümlaut", &"x".repeat(500)]
        {
            let error = Pattern::new(text).unwrap_err();
            assert!(error.to_string().len() < 400, "{error}");
        }
    }
}
