//! Validation of projection names.

/// Maximum length of a name in bytes. A checkpoint's key stays well below PostgreSQL's index limit.
const MAX_NAME: usize = 200;

/// Returns the reason why a projection cannot have this name.
///
/// Operators must be able to see it, to type it, and to find it in logs.
pub(crate) fn problem(name: &str) -> Option<&'static str> {
    if name.trim().is_empty() {
        Some("the name is empty; choose a name such as \"revenue\"")
    } else if name.trim() != name {
        Some("the name begins or ends with a space")
    } else if name.len() > MAX_NAME {
        Some("the name is longer than 200 bytes")
    } else if name.chars().any(|c| c.is_control() || (!c.is_ascii() && !c.is_alphanumeric())) {
        Some("the name has an invisible character; use letters, digits and ASCII punctuation")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::problem;

    #[test]
    fn names_can_be_seen_and_typed() {
        let long = "x".repeat(201);
        for name in ["", " ", "\t", " a", "a ", "a\nb", "a\u{0}b", "a\u{200b}b", "\u{202e}a", &long] {
            assert!(problem(name).is_some(), "{name:?}");
        }
        for name in ["revenue", "sales by country", "a/b#c:d.e", "umsätze", &long[1..]] {
            assert_eq!(problem(name), None, "{name:?}");
        }
    }
}
