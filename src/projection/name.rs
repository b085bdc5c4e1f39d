//! Which names a projection can have.

/// The longest name, in bytes. A checkpoint's key stays well below what PostgreSQL can index.
const MAX_NAME: usize = 200;

/// Why a projection cannot have this name: operators have to see it, type it, and find it in logs.
pub(crate) fn problem(name: &str) -> Option<&'static str> {
    if name.trim().is_empty() {
        Some("it is empty; give it a name such as \"revenue\"")
    } else if name.trim() != name {
        Some("it begins or ends with a space")
    } else if name.len() > MAX_NAME {
        Some("it is longer than 200 bytes")
    } else if name.chars().any(|c| c.is_control() || (!c.is_ascii() && !c.is_alphanumeric())) {
        Some("it has a character that cannot be seen; use letters, digits and ASCII punctuation")
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
