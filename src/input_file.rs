//! Files that options name: credentials, certificates and keys.
//!
//! The command-line tool includes this file as a module of its own.

use std::io::ErrorKind;
use std::path::Path;
#[cfg(feature = "postgres")]
use std::path::PathBuf;

/// Maximum size of such a file, in bytes.
pub(crate) const MOST: u64 = 1 << 20;

/// Returns why the file cannot be used, and the remedy. `None` if it can.
///
/// Opens nothing: opening a FIFO waits for a writer, and a device has no end.
pub(crate) fn problem(path: &Path) -> Option<String> {
    let shown = path.display();
    match path.metadata() {
        Ok(file) if file.is_dir() => Some(format!("{shown} is a directory; name a file in it")),
        Ok(file) if !file.is_file() => Some(format!("{shown} is not a regular file; name a regular file")),
        Ok(file) if file.len() > MOST => {
            Some(format!("{shown} has {} bytes (limit {MOST}); name another file", file.len()))
        }
        Ok(_) => None,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Some(format!("{shown} does not exist; create it, or correct the path"))
        }
        Err(error) => Some(format!("reading {shown} failed: {error}; correct the path or its permissions")),
    }
}

/// Returns why a file that a PostgreSQL URL or the environment names cannot be used.
///
/// The driver reads these files without a limit: the password file when it parses the URL, the
/// others when it connects.
#[cfg(feature = "postgres")]
pub(crate) fn postgres_problem(url: &str) -> Option<String> {
    let given: Vec<(String, String)> = sqlx_core::Url::parse(url)
        .map(|url| url.query_pairs().map(|(key, value)| (key.into_owned(), value.into_owned())).collect())
        .unwrap_or_default();
    let last = |keys: &[&str]| given.iter().rev().find(|(key, _)| keys.contains(&key.as_str())).cloned();
    let plain = last(&["sslmode", "ssl-mode"]).is_some_and(|(_, mode)| mode == "disable");
    let tls = [
        (&["sslrootcert", "ssl-root-cert", "ssl-ca"][..], "PGSSLROOTCERT"),
        (&["sslcert", "ssl-cert"], "PGSSLCERT"),
        (&["sslkey", "ssl-key"], "PGSSLKEY"),
    ];
    for (keys, variable) in tls {
        let of_environment = || std::env::var(variable).ok().map(|value| (variable.to_owned(), value));
        let named = last(keys).or_else(of_environment);
        // The value may also be the certificate itself.
        let named = named.filter(|(_, value)| !plain && !value.trim().starts_with("-----BEGIN"));
        if let Some((name, path)) = named
            && let Some(problem) = problem(Path::new(&path))
        {
            return Some(format!("{name}: {problem}"));
        }
    }
    let of_environment = std::env::var_os("PGPASSFILE").map(PathBuf::from);
    let of_home = std::env::home_dir().map(|home| home.join(".pgpass"));
    let passwords = [of_environment, of_home].into_iter().flatten();
    // The driver ignores a password file that does not exist.
    let unusable = |path: PathBuf| path.exists().then(|| problem(&path)).flatten();
    passwords.filter_map(unusable).next().map(|problem| format!("PGPASSFILE: {problem}"))
}
