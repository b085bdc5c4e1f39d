//! Removal of secrets from the output.

use std::error::Error;
use std::sync::OnceLock;

/// The replacement of a secret.
const HIDDEN: &str = "***";

/// The secrets of this run.
static SECRETS: OnceLock<Secrets> = OnceLock::new();

/// Sets the secrets that [`error`] and [`driver`] hide. Called once, before any output.
pub(crate) fn set(secrets: Secrets) {
    // A second call has the same secrets.
    let _ = SECRETS.set(secrets);
}

/// Returns the text of an error, with secrets hidden in the parts of a driver or a server.
///
/// The text of this program stays unchanged, because a password may be a word of it.
pub(crate) fn error(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let message = inner.to_string();
        if !message.is_empty() {
            text = text.replace(&message, &driver(&message));
        }
        source = inner.source();
    }
    text
}

/// Returns the text of a driver or a server, with secrets hidden.
pub(crate) fn driver(text: &str) -> String {
    SECRETS.get().map_or_else(|| text.to_owned(), |secrets| secrets.hide(text))
}

/// Passwords and other secrets that this run was given.
#[derive(Debug, Default)]
pub(crate) struct Secrets(Vec<String>);

impl Secrets {
    /// Extracts the secrets of these URLs and texts.
    pub(crate) fn of(given: &[Given<'_>]) -> Self {
        let mut secrets: Vec<String> = given.iter().flat_map(Given::secrets).collect();
        secrets.retain(|secret| !secret.is_empty());
        // A short secret may be a part of a long one.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        Self(secrets)
    }

    /// Returns `text` without the secrets, and without the login of any other URL in it.
    pub(crate) fn hide(&self, text: &str) -> String {
        // Secrets go first: a character in a secret may look like the end of its URL.
        urls(&self.0.iter().fold(text.to_owned(), |text, secret| hide_word(&text, secret)))
    }
}

/// Returns `text` without `secret` as a whole word; parts of longer words stay.
fn hide_word(text: &str, secret: &str) -> String {
    let inner = |edge: Option<char>, outside: Option<char>| {
        edge.is_some_and(char::is_alphanumeric) && outside.is_some_and(char::is_alphanumeric)
    };
    let (mut shown, mut rest) = (String::with_capacity(text.len()), text);
    let mut before = None;
    while let Some(at) = rest.find(secret) {
        let (head, tail) = (&rest[..at], &rest[at + secret.len()..]);
        let left = head.chars().next_back().or(before);
        if inner(secret.chars().next(), left) || inner(secret.chars().next_back(), tail.chars().next()) {
            // No match here; continues one character later.
            let step = at + secret.chars().next().map_or(1, char::len_utf8);
            shown.push_str(&rest[..step]);
            before = rest[..step].chars().next_back();
            rest = &rest[step..];
        } else {
            shown.push_str(head);
            shown.push_str(HIDDEN);
            before = HIDDEN.chars().next_back();
            rest = tail;
        }
    }
    shown.push_str(rest);
    shown
}

/// An argument of this run that may contain secrets.
#[derive(Debug)]
pub(crate) enum Given<'a> {
    /// The URL of a database.
    Url(&'a str),
    /// URLs of NATS servers, separated by commas.
    Urls(&'a str),
    /// A text that is a secret as a whole.
    Secret(&'a str),
}

impl Given<'_> {
    fn secrets(&self) -> Vec<String> {
        let found = match self {
            Given::Url(url) => secrets_of(url, false),
            Given::Urls(urls) => urls.split(',').flat_map(|url| secrets_of(url, true)).collect(),
            Given::Secret(secret) => return vec![(*secret).to_owned()],
        };
        found.iter().flat_map(|secret| [(*secret).to_owned(), decoded(secret)]).collect()
    }
}

/// Returns the passwords of a URL. A lone login is a user for a database, and a `token` for NATS.
fn secrets_of(url: &str, token: bool) -> Vec<&str> {
    let mut found = Vec::new();
    let (_, rest) = split(url);
    if let Some((login, _)) = rest.rsplit_once('@') {
        let alone = if token { login } else { "" };
        found.push(login.split_once(':').map_or(alone, |(_, password)| password));
    }
    let query = rest.split_once('?').map_or("", |(_, query)| query);
    let parameters = query.split('&').filter_map(|parameter| parameter.split_once('='));
    found.extend(parameters.filter(|(key, _)| is_secret(key)).map(|(_, value)| value));
    found
}

/// Splits a URL after its scheme, with or without slashes.
fn split(url: &str) -> (&str, &str) {
    let scheme = url.find(':').map_or(0, |at| at + 1);
    let slashes = url[scheme..].bytes().take_while(|byte| *byte == b'/').count();
    url.split_at(scheme + slashes)
}

/// Returns whether a parameter of this name is a password.
fn is_secret(key: &str) -> bool {
    decoded(key).to_lowercase().contains("pass")
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        let escaped = (byte == b'%').then(|| behind.get(..2)).flatten();
        let escaped =
            escaped.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        bytes.push(escaped.unwrap_or(byte));
        rest = if escaped.is_some() { &behind[2..] } else { behind };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Returns the URL of a database without secrets, for any characters in its password.
pub(crate) fn url(url: &str) -> String {
    let (scheme, rest) = split(url);
    format!("{scheme}{}", without_login(rest))
}

/// Returns `text` without the logins of its URLs, each up to the next space or URL.
pub(crate) fn urls(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for word in text.split_inclusive(char::is_whitespace) {
        let mut rest = word;
        while let Some(start) = behind_scheme(rest) {
            let (scheme, behind) = rest.split_at(start);
            let (url, next) = behind.split_at(next_url(behind));
            shown.push_str(scheme);
            shown.push_str(&without_login(url));
            rest = next;
        }
        shown.push_str(rest);
    }
    shown
}

/// Returns the start of the login or host of a URL.
fn behind_scheme(text: &str) -> Option<usize> {
    let marks = ["://", "postgres:", "postgresql:"];
    let start = marks.iter().filter_map(|mark| Some(text.find(mark)? + mark.len())).min()?;
    Some(start + text[start..].bytes().take_while(|byte| *byte == b'/').count())
}

/// Returns the start of the next URL of a list: after a comma, a quote or a similar character.
fn next_url(text: &str) -> usize {
    let separators = text.match_indices([',', '\'', '"', '`', ';', '(', ')']);
    let starts = separators.map(|(at, separator)| at + separator.len());
    let begins = |at: &usize| {
        let scheme = text[*at..].split_once("://").map(|(scheme, _)| scheme);
        scheme.is_some_and(|scheme| {
            !scheme.is_empty() && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
        })
    };
    starts.into_iter().find(begins).unwrap_or(text.len())
}

/// Returns the part of a URL after its login, without passwords among its parameters.
fn without_login(rest: &str) -> String {
    match rest.rsplit_once('@') {
        // The text after it may be the end of a password.
        Some((before, _)) if before.split(['?', '&']).skip(1).any(is_parameter) => HIDDEN.to_owned(),
        Some((_, location)) => format!("{HIDDEN}@{}", parameters(location)),
        None => parameters(rest),
    }
}

fn is_parameter(text: &str) -> bool {
    text.split_once('=').is_some_and(|(key, _)| is_secret(key))
}

fn parameters(location: &str) -> String {
    let Some((location, query)) = location.split_once('?') else { return location.to_owned() };
    let hidden = query.split('&').map(|parameter| match parameter.split_once('=') {
        Some((key, _)) if is_secret(key) => format!("{key}={HIDDEN}"),
        _ => parameter.to_owned(),
    });
    format!("{location}?{}", hidden.collect::<Vec<_>>().join("&"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_lose_their_logins() {
        for (text, shown) in [
            ("nothing here", "nothing here"),
            ("postgres://shop:s3cret@db/shop: no", "postgres://***@db/shop: no"),
            (
                "'postgres://shop:a@b/c@db/shop' and nats://t0ken@n1,nats://n2",
                "'postgres://***@db/shop' and nats://***@n1,nats://n2",
            ),
            (
                "postgres://db/shop?password=s3cret&sslmode=require",
                "postgres://db/shop?password=***&sslmode=require",
            ),
            ("sqlite://shop.db", "sqlite://shop.db"),
            ("'postgres://shop:a,b'c@db/shop' found", "'postgres://***@db/shop' found"),
            ("postgres:shop:s3cret@db/shop", "postgres:***@db/shop"),
            ("it should begin with postgres:// or sqlite:", "it should begin with postgres:// or sqlite:"),
        ] {
            assert_eq!(urls(text), shown);
        }
    }

    #[test]
    fn a_database_url_loses_any_password() {
        for (text, shown) in [
            ("postgres://db/shop", "postgres://db/shop"),
            ("postgres://shop@db/shop", "postgres://***@db/shop"),
            ("postgres://shop:a,b@db/shop", "postgres://***@db/shop"),
            ("postgres://shop:a'b c@db/shop", "postgres://***@db/shop"),
            ("postgres://shop:a?b/c://d@db/shop", "postgres://***@db/shop"),
            ("postgres:shop:pw@h/d", "postgres:***@h/d"),
            (
                "postgres://u:a@h/d?sslmode=require&password=b&sslpassword=c,d",
                "postgres://***@h/d?sslmode=require&password=***&sslpassword=***",
            ),
            ("postgres://h/d?PassWord=a&%70assword=b", "postgres://h/d?PassWord=***&%70assword=***"),
            ("postgres://h/d?password=a@b", "postgres://***"),
        ] {
            assert_eq!(url(text), shown);
        }
    }

    #[test]
    fn a_password_with_commas_is_hidden_in_foreign_text() {
        for (given, message) in [
            ("postgres://shop:a1,b2@db/shop", "a1,b2 is wrong"),
            ("postgres://shop:a1'b2 c3@d4@db/shop", "postgres://shop:a1'b2 c3@d4@db/shop is wrong"),
            ("postgres:shop:a1,b2@db/shop", "postgres:shop:a1,b2@db/shop is wrong"),
            ("postgres://db/shop?password=a1,b2&user=u", "a1,b2 is wrong"),
        ] {
            let hidden = Secrets::of(&[Given::Url(given)]).hide(message);
            assert!(!["a1", "b2", "c3", "d4"].iter().any(|part| hidden.contains(part)), "{hidden}");
        }
        assert_eq!(Secrets::of(&[Given::Url("sqlite:shop@home.db")]).hide("shop"), "shop");
    }

    /// Any word may be a password.
    #[test]
    fn a_secret_is_hidden_where_it_stands_for_itself() {
        for (secret, message, shown) in [
            ("storied", "expected storied_tables, found storieds", "expected ***_tables, found storieds"),
            ("a", "password authentication failed for 'a'", "password authentication failed for '***'"),
            ("events", "events2 myevents events", "events2 myevents ***"),
            ("aa", "aaa aa", "aaa ***"),
            ("p@ss", "xp@ssx p@ss!", "xp@ssx ***!"),
            ("@1@", "x@1@y", "x***y"),
            ("é", "né é", "né ***"),
        ] {
            let secrets = Secrets::of(&[Given::Secret(secret)]);
            assert_eq!(secrets.hide(message), shown, "{secret}");
        }
        assert_eq!(Secrets::of(&[Given::Secret("")]).hide("nothing"), "nothing");
    }

    #[test]
    fn own_texts_are_not_redacted() {
        #[derive(Debug, thiserror::Error)]
        #[error("the store storied has another shape: {0}")]
        struct Own(#[source] std::io::Error);
        set(Secrets::of(&[Given::Url("postgres://storied:storied@db/storied")]));
        let own = Own(std::io::Error::other("login storied refused"));
        assert_eq!(error(&own), "the store storied has another shape: login *** refused");
    }

    #[test]
    fn secrets_are_hidden_as_written_and_as_decoded() {
        let secrets =
            Secrets::of(&[Given::Urls("postgres://u:p%40ss@h/d,nats://t0ken@h"), Given::Secret("SUSEED")]);
        assert_eq!(secrets.hide("p@ss p%40ss t0ken SUSEED"), "*** *** *** ***");
        assert_eq!(Secrets::of(&[Given::Urls("sqlite:shop.db")]).hide("shop.db"), "shop.db");
    }
}
