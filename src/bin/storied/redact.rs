//! Keeps secrets out of what is printed.

/// What stands in their place.
const HIDDEN: &str = "***";

/// Passwords and other secrets that this run was given.
#[derive(Debug, Default)]
pub(crate) struct Secrets(Vec<String>);

impl Secrets {
    /// What is secret in these URLs and other texts.
    pub(crate) fn of(given: &[Given<'_>]) -> Self {
        let mut secrets: Vec<String> = given.iter().flat_map(Given::secrets).collect();
        secrets.retain(|secret| !secret.is_empty());
        // A short one may be a part of a long one.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        Self(secrets)
    }

    /// `text` without them, and without what any other URL in it has in front of its host.
    pub(crate) fn hide(&self, text: &str) -> String {
        let text = urls(text);
        self.0.iter().fold(text, |text, secret| text.replace(secret, HIDDEN))
    }
}

/// Something that was given to this run.
#[derive(Debug)]
pub(crate) enum Given<'a> {
    /// One URL or several, separated by commas.
    Urls(&'a str),
    /// A secret in itself.
    Secret(&'a str),
}

impl Given<'_> {
    fn secrets(&self) -> Vec<String> {
        match self {
            Given::Secret(secret) => vec![(*secret).to_owned()],
            Given::Urls(urls) => urls.split(',').flat_map(secrets_of).collect(),
        }
    }
}

/// The password in a URL, as written and as meant. What stands there alone is a user for a database, and a token for NATS.
fn secrets_of(url: &str) -> Vec<String> {
    let mut found = Vec::new();
    if let Some((scheme, rest)) = url.split_once("://")
        && let Some((login, _)) = rest.rsplit_once('@')
    {
        let alone = if scheme.trim().starts_with("postgres") { "" } else { login };
        found.push(login.split_once(':').map_or(alone, |(_, password)| password));
    }
    for (at, key) in url.match_indices("password=") {
        found.extend(url[at + key.len()..].split(['&', '#']).next());
    }
    found.iter().flat_map(|secret| [(*secret).to_owned(), decoded(secret)]).collect()
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

/// `text` without the logins of the URLs in it.
pub(crate) fn urls(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, behind) = rest.split_at(at + 3);
        shown.push_str(before);
        let end = behind
            .find(|c: char| c.is_whitespace() || matches!(c, '\'' | '"' | '`' | ','))
            .unwrap_or(behind.len());
        let (url, behind) = behind.split_at(end);
        match url.rsplit_once('@') {
            Some((_, place)) => {
                shown.push_str(HIDDEN);
                shown.push('@');
                shown.push_str(&parameters(place));
            }
            None => shown.push_str(&parameters(url)),
        }
        rest = behind;
    }
    shown.push_str(rest);
    shown
}

fn parameters(place: &str) -> String {
    match place.split_once("password=") {
        Some((before, behind)) => {
            let rest = behind.find(['&', '#']).map_or("", |end| &behind[end..]);
            format!("{before}password={HIDDEN}{rest}")
        }
        None => place.to_owned(),
    }
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
        ] {
            assert_eq!(urls(text), shown);
        }
    }

    #[test]
    fn secrets_are_hidden_as_written_and_as_meant() {
        let secrets =
            Secrets::of(&[Given::Urls("postgres://u:p%40ss@h/d,nats://t0ken@h"), Given::Secret("SUSEED")]);
        assert_eq!(secrets.hide("p@ss p%40ss t0ken SUSEED"), "*** *** *** ***");
        assert_eq!(Secrets::of(&[Given::Urls("sqlite:shop.db")]).hide("shop.db"), "shop.db");
    }
}
