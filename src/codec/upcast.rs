use std::fmt;
use std::sync::Arc;

use ciborium::Value;

/// Converts one stored payload to the next shape.
type Upcast = dyn Fn(Value) -> Result<Value, String> + Send + Sync;

/// Rules that convert stored events of older program versions.
///
/// They work on CBOR values, before serde reads them.
///
/// Rules are chained: the result of a rule for `placed` may itself be upcast. Prefer the `default`
/// and `alias` of serde where they suffice: they have no cost.
///
/// A rule applies to a name that new events do not use. The runtime does not start if the enum
/// still reads the name, if two rules have it, or if the chain returns to it: such a rule would
/// change new events too. To change the shape of `paid`, give the variant a new name
/// (`#[serde(rename = "paid_v2")]`).
///
/// ```
/// use storied::Upcasters;
/// use storied::ciborium::Value;
///
/// let upcasters = Upcasters::new()
///     // renamed only
///     .rename("ordered", "placed")
///     // new shape: amounts were in pounds, and are in pence
///     .upcast("paid", "paid_v2", |payload| {
///         let Value::Map(mut fields) = payload else { return Err("no map".into()) };
///         for (key, value) in &mut fields {
///             if key.as_text() == Some("pounds") {
///                 *key = "pence".into();
///                 *value = (i64::try_from(value.as_integer().ok_or("no number")?).map_err(|e| e.to_string())? * 100).into();
///             }
///         }
///         Ok(Value::Map(fields))
///     });
/// # let _ = upcasters;
/// ```
#[derive(Clone, Default)]
pub struct Upcasters {
    rules: Vec<Rule>,
}

#[derive(Clone)]
struct Rule {
    from: String,
    to: String,
    upcast: Option<Arc<Upcast>>,
}

impl Upcasters {
    /// Returns an empty set of rules.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads events stored as variant `from` as variant `to`, with the same payload.
    #[must_use]
    pub fn rename(self, from: impl Into<String>, to: impl Into<String>) -> Self {
        self.with(from.into(), to.into(), None)
    }

    /// Reads events of variant `from` as variant `to`, after `upcast` has converted the payload.
    ///
    /// An error of `upcast` is reported as an undecodable event, with its text.
    #[must_use]
    pub fn upcast(
        self,
        from: impl Into<String>,
        to: impl Into<String>,
        upcast: impl Fn(Value) -> Result<Value, String> + Send + Sync + 'static,
    ) -> Self {
        self.with(from.into(), to.into(), Some(Arc::new(upcast)))
    }

    fn with(mut self, from: String, to: String, upcast: Option<Arc<Upcast>>) -> Self {
        self.rules.push(Rule { from, to, upcast });
        self
    }

    fn rule(&self, from: &str) -> Option<&Rule> {
        self.rules.iter().find(|rule| rule.from == from)
    }

    pub(crate) fn concern(&self, variant: &str) -> bool {
        self.rule(variant).is_some()
    }

    pub(crate) fn old_names(&self) -> impl Iterator<Item = &str> {
        self.rules.iter().map(|rule| &*rule.from)
    }

    /// Returns the end of the chain from `variant`.
    pub(crate) fn today<'a>(&'a self, variant: &'a str) -> &'a str {
        self.chain(variant).last().map_or(variant, |rule| &rule.to)
    }

    pub(crate) fn apply<'a>(&'a self, variant: &'a str, payload: Value) -> Result<(&'a str, Value), String> {
        self.chain(variant).try_fold((variant, payload), |(_, payload), rule| {
            let payload = match &rule.upcast {
                Some(upcast) => upcast(payload)?,
                None => payload,
            };
            Ok((&*rule.to, payload))
        })
    }

    /// Returns the reason why these rules are invalid for an enum that reads `names`.
    pub(crate) fn problem(&self, reads: impl Fn(&str) -> bool) -> Option<String> {
        for (index, Rule { from, to, .. }) in self.rules.iter().enumerate() {
            if reads(from) {
                return Some(format!(
                    "the rule {from:?} -> {to:?} would change new events, because the enum still reads {from:?}; give the variant a new name with #[serde(rename)], or remove its alias"
                ));
            }
            if self.rules.iter().take(index).any(|other| other.from == *from) {
                return Some(format!("two rules for {from:?}; merge them"));
            }
            if self.today(from) == from {
                return Some(format!("the rules from {from:?} form a cycle; end them in a current variant"));
            }
        }
        None
    }

    /// Applies each rule at most once, so that a cycle ends.
    fn chain<'a>(&'a self, variant: &'a str) -> impl Iterator<Item = &'a Rule> {
        let mut taken = vec![false; self.rules.len()];
        let mut name = variant;
        std::iter::from_fn(move || {
            let index = (0..taken.len()).find(|&index| !taken[index] && self.rules[index].from == name)?;
            taken[index] = true;
            name = &self.rules[index].to;
            Some(&self.rules[index])
        })
    }
}

impl fmt::Debug for Upcasters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.rules.iter().map(|rule| format!("{} -> {}", rule.from, rule.to))).finish()
    }
}
