//! Checks of the documents against the repository.
//!
//! Links have targets. Named tests, files, types, options and commands exist. Code in Rust is a
//! documentation test, see src/lib.rs.

mod commands;
mod imports;
mod language;
mod markdown;
mod sizes;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use self::markdown::{Document, Piece, documents, files, root};

/// Calls `check` with every piece of every document, and fails with all errors.
fn all(pieces: impl Fn(&Document) -> &[Piece], check: impl Fn(&Document, &str) -> Result<(), String>) {
    let (mut wrong, mut seen) = (Vec::new(), 0);
    for document in documents() {
        for piece in pieces(&document) {
            seen += 1;
            if let Err(reason) = check(&document, &piece.text) {
                wrong.push(format!("{}:{}: {reason}", document.path.display(), piece.line));
            }
        }
    }
    assert!(seen > 50, "only {seen} pieces were found");
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

/// Normalizes a path: `a/b/../c` is `a/c`.
fn plain(path: &Path) -> PathBuf {
    path.components().fold(PathBuf::new(), |mut plain, component| {
        match component {
            Component::ParentDir => drop(plain.pop()),
            other => plain.push(other),
        }
        plain
    })
}

#[test]
fn links_lead_somewhere() {
    let anchors: BTreeMap<PathBuf, Vec<String>> =
        documents().into_iter().map(|document| (document.path, document.anchors)).collect();
    all(
        |document| &document.links,
        |document, link| {
            if link.contains("://") {
                return Ok(());
            }
            let (path, anchor) =
                link.split_once('#').map_or((link, None), |(path, anchor)| (path, Some(anchor)));
            let path = match path {
                "" => document.path.clone(),
                path => plain(&document.path.with_file_name(path)),
            };
            if !root().join(&path).exists() {
                return Err(format!("{link} leads to {}, which does not exist", path.display()));
            }
            match anchor {
                Some(anchor)
                    if !anchors.get(&path).is_some_and(|all| all.iter().any(|one| one == anchor)) =>
                {
                    Err(format!("{} has no heading #{anchor}", path.display()))
                }
                _ => Ok(()),
            }
        },
    );
}

/// Checks names like `tests/servers/bus/log stream.rs::a_full_stream_stops_the_publisher_and_no_append`.
#[test]
fn tests_that_are_named_exist() {
    all(
        |document| &document.codes,
        |_, code| {
            let Some((file, test)) = code.split_once(".rs::") else { return Ok(()) };
            let file = format!("{file}.rs");
            let source =
                fs::read_to_string(root().join(&file)).map_err(|error| format!("{file}: {error}"))?;
            if file.starts_with("benches/") {
                // A benchmark is a plain function; CI runs each once.
                let there = has_word(&source, &format!("fn {test}"));
                return if there { Ok(()) } else { Err(format!("{file} has no {test}")) };
            }
            // A suite for several back ends has plain functions. A list in the same file, or in the
            // parent file of its directory, turns them into tests, or a test calls one directly.
            let path = Path::new(&file);
            let above = path.parent().map(|directory| root().join(directory).with_extension("rs"));
            let above = above.and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
            let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            let names = [test.to_owned(), format!("{stem}::{test}")];
            let mut entries =
                source.lines().chain(above.lines()).map(|line| line.trim().trim_end_matches([',', ';']));
            let call = format!(" {stem}::{test}(");
            let listed = has_word(&source, &format!("fn {test}"))
                && entries.any(|entry| names.iter().any(|name| name == entry) || entry.contains(&call));
            let runs = is_test(&source, test) || listed;
            if runs { Ok(()) } else { Err(format!("{file} has no test {test}")) }
        },
    );
}

/// Checks that every promise has a test, or the file that implements it.
///
/// In the tables for contributors, every test is code with its path, so
/// `tests_that_are_named_exist` finds it.
#[test]
fn every_promise_has_a_test_or_code() {
    let mut wrong = Vec::new();
    for file in ["docs/dev/faults.md", "docs/dev/sentences.md"] {
        let text = fs::read_to_string(root().join(file)).unwrap();
        let rows = text.lines().skip_while(|line| !line.starts_with("|---")).skip(1);
        let rows: Vec<&str> = rows.take_while(|line| line.starts_with('|')).collect();
        assert!(rows.len() > 50, "{file} has {} rows", rows.len());
        for row in rows {
            let pieces: Vec<&str> = row.split('`').collect();
            let unchecked = pieces.iter().step_by(2).any(|prose| prose.contains(".rs::"))
                || pieces.iter().skip(1).step_by(2).any(|code| code.starts_with("::"));
            let last = row.trim_end_matches(['|', ' ']).rsplit('|').next().unwrap_or_default();
            let bare = file.ends_with("sentences.md") && !last.contains('`');
            if unchecked || bare {
                wrong.push(format!("{file}: {row}"));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

/// Returns whether `source` has a function of this name under a test attribute.
fn is_test(source: &str, name: &str) -> bool {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let heads = [format!("fn {name}("), format!("async fn {name}(")];
    lines.iter().enumerate().any(|(index, line)| {
        heads.iter().any(|head| line.starts_with(head.as_str()))
            && lines[..index]
                .iter()
                .rev()
                .take_while(|line| line.starts_with("#[") || line.starts_with("//"))
                .any(|line| line.starts_with("#[test]") || line.starts_with("#[tokio::test"))
    })
}

#[test]
fn files_that_are_named_exist() {
    let directories = ["benches/", "docs/", "examples/", "migrations/", "scripts/", "src/", "tests/"];
    all(
        |document| &document.codes,
        |_, code| {
            let path = code.split([' ', ':']).next().unwrap_or_default();
            let is_source = path.contains('/') && path.ends_with(".rs");
            let concerns = is_source || directories.iter().any(|directory| path.starts_with(directory));
            let path = path.trim_end_matches('/');
            if !concerns || path.contains(['*', '…', '{']) || exists(path) {
                return Ok(());
            }
            Err(format!("missing {path}"))
        },
    );
}

/// Returns whether a path exists, with or without extension, as `examples/retail` and `src/store`.
fn exists(path: &str) -> bool {
    root().join(path).exists() || root().join(format!("{path}.rs")).exists()
}

/// Checks names like `Type::item`, if the type is ours.
#[test]
fn items_that_are_named_exist() {
    let mut sources = Vec::new();
    files(&root().join("src"), true, &mut sources);
    let sources: Vec<String> = sources.iter().filter_map(|path| fs::read_to_string(path).ok()).collect();
    let ours: BTreeSet<&str> =
        sources.iter().flat_map(|source| source.lines()).filter_map(public_type).collect();
    // Covers macros too, because their types are unknown here.
    let about = |name: &str| {
        let heads = ["struct ", "enum ", "trait ", "for ", "impl ", "> "].map(|head| format!("{head}{name}"));
        let sources = sources.iter();
        sources.filter(move |source| {
            source.contains("macro_rules!") || heads.iter().any(|head| has_word(source, head))
        })
    };
    all(
        |document| &document.codes,
        |_, code| {
            let named = code.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':')).next();
            let mut named = named.unwrap_or_default().trim_end_matches(':').split("::");
            let (Some(of), Some(item), None) = (named.next(), named.next(), named.next()) else {
                return Ok(());
            };
            if !of.starts_with(char::is_uppercase) || item.is_empty() || !ours.contains(of) {
                return Ok(());
            }
            let heads = ["fn", "const", "type"].map(|kind| format!("{kind} {item}"));
            let there = about(of).any(|source| {
                heads.iter().any(|head| has_word(source, head))
                    || source.lines().any(|line| {
                        let line = line.trim_start();
                        let line = line.strip_prefix("pub ").unwrap_or(line);
                        line.strip_prefix(item).is_some_and(|rest| rest.starts_with([',', '(', ':', ' ']))
                    })
            });
            if there { Ok(()) } else { Err(format!("{of} has no {item}")) }
        },
    );
}

/// Returns the name of the public type that the line defines.
fn public_type(line: &str) -> Option<&str> {
    let (kind, name) = line.trim_start().strip_prefix("pub ")?.split_once(' ')?;
    let name = name.split(|c: char| !(c.is_alphanumeric() || c == '_')).next();
    name.filter(|_| ["struct", "enum", "trait", "type"].contains(&kind))
}

/// Returns whether `text` contains `words` as whole words.
fn has_word(text: &str, words: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(words).any(|(at, _)| !text[at + words.len()..].starts_with(part))
}

/// Checks that every code block has a checked language, and that Rust code is a documentation test.
#[test]
fn every_block_of_code_is_checked() {
    let lib = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let mut wrong = Vec::new();
    for document in documents() {
        for block in &document.blocks {
            let path = document.path.display();
            let reason = match block.language() {
                // A diagram.
                "mermaid" => continue,
                "rust" if lib.contains(&format!("include_str!(\"../{path}\")")) => continue,
                "rust" if is_verbatim(&block.lines) => continue,
                "rust" => {
                    "src/lib.rs makes no documentation test of it, nor is it in an example or a test".into()
                }
                "sh" => match commands::check_all(&block.lines) {
                    Ok(()) => continue,
                    Err(reason) => reason,
                },
                "toml" => match dependencies_fit(&block.lines) {
                    Ok(()) => continue,
                    Err(reason) => reason,
                },
                // A test reads it from this document and runs it.
                "sql" if is_read_by_a_test(&document.path) => continue,
                "sql" => "no test includes this document to run its SQL".into(),
                // Diagrams, protocols, output.
                "text" => continue,
                other => format!("no check for {other:?}; use text for other content"),
            };
            wrong.push(format!("{path}:{}: {reason}", block.line));
        }
    }
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

/// Checks commands in the text, as `scripts/services up`.
#[test]
fn commands_that_are_named_work() {
    all(
        |document| &document.codes,
        |_, code| match code.split_whitespace().next() {
            Some(first) if first == "cargo" || first.starts_with("scripts/") => commands::check(code),
            _ => Ok(()),
        },
    );
}

/// Returns whether an example or a test contains these lines, at any indentation.
fn is_verbatim(lines: &[String]) -> bool {
    let mut programs = Vec::new();
    for directory in ["examples", "tests"] {
        files(&root().join(directory), true, &mut programs);
    }
    programs.retain(|path| path.extension().is_some_and(|extension| extension == "rs"));
    let bare = |text: &str| text.lines().map(str::trim).collect::<Vec<_>>().join("\n");
    let wanted = format!("\n{}\n", bare(&lines.join("\n")));
    let mut programs = programs.iter().filter_map(|path| fs::read_to_string(path).ok());
    programs.any(|program| format!("\n{}\n", bare(&program)).contains(&wanted))
}

fn is_read_by_a_test(document: &Path) -> bool {
    let mut tests = Vec::new();
    files(&root().join("tests"), true, &mut tests);
    let include = format!("/{}\")", document.display());
    tests
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .any(|source| source.lines().any(|line| line.contains("include_str!(\"") && line.contains(&include)))
}

/// Checks that the documented dependencies match those of the examples and tests.
fn dependencies_fit(lines: &[String]) -> Result<(), String> {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let version = |line: &str| {
        let (name, rest) = line.split_once(" = ")?;
        let version = rest.trim_start_matches("{ version = ").strip_prefix('"')?.split('"').next()?;
        Some((name.to_owned(), version.to_owned()))
    };
    let ours: BTreeSet<_> = manifest.lines().filter_map(version).collect();
    let fits = |one: &(String, String)| match one.0.as_str() {
        "storied" => env!("CARGO_PKG_VERSION").starts_with(&one.1),
        _ => ours.contains(one),
    };
    let strange = lines.iter().filter_map(|line| version(line)).find(|one| !fits(one));
    strange.map_or(Ok(()), |(name, version)| Err(format!("Cargo.toml has no {name} {version}")))
}

/// Runs the example as a new user does: in an empty directory, and once more.
#[test]
fn the_quick_start_runs_and_remembers() {
    let directory = tempfile::tempdir().unwrap();
    for said in ["1299 pence\n", "the order has been placed already\n1299 pence\n"] {
        let output =
            Command::new(crate::support::example("quick_start")).current_dir(&directory).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(String::from_utf8_lossy(&output.stdout), said);
    }
}

#[test]
fn the_index_has_every_document() {
    let documents = documents();
    let index = documents.iter().find(|document| document.path == Path::new("docs/README.md")).unwrap();
    for document in &documents {
        let Ok(name) = document.path.strip_prefix("docs") else { continue };
        let listed = index.links.iter().any(|link| Path::new(&link.text) == name);
        assert!(
            listed || name == Path::new("README.md"),
            "docs/README.md does not lead to {}",
            name.display()
        );
    }
}
