//! Shell commands: their files exist, and their programs know the options.

use std::fs;
use std::process::Command;

use crate::docs::markdown::root;
use crate::support::example;

/// Foreign programs, which are not checked.
const FOREIGN: [&str; 8] = ["cd", "docker", "echo", "export", "git", "nats", "pg_dump", "psql"];

pub fn check_all(lines: &[String]) -> Result<(), String> {
    lines.iter().try_for_each(|line| check(line))
}

/// Checks one line.
pub fn check(line: &str) -> Result<(), String> {
    let line = line.split(" #").next().unwrap_or_default();
    let line = line.trim_start_matches('#').trim();
    // `eval "$(scripts/servers)"` runs the inner command.
    let line = line.strip_prefix("eval \"$(").and_then(|line| line.strip_suffix(")\"")).unwrap_or(line);
    let words = line.split_whitespace().skip_while(|word| is_assignment(word)).collect::<Vec<_>>();
    match words.as_slice() {
        [] => Ok(()),
        ["cargo", rest @ ..] => cargo(rest),
        ["storied", rest @ ..] => tool(rest),
        [first, rest @ ..] if first.starts_with("scripts/") => script(first, rest),
        // It passes its arguments to its own program, which is not built here.
        ["benches/peers/run", ..] => there(&["benches/peers/run"]),
        [first, ..] if FOREIGN.contains(first) => Ok(()),
        [first, ..] => Err(format!("no check for the program {first}")),
    }
    .map_err(|reason| format!("{line}: {reason}"))
}

/// Returns whether the word is like `STORIED_CHAOS_SECONDS=300`.
fn is_assignment(word: &str) -> bool {
    word.split_once('=').is_some_and(|(name, _)| name.chars().all(|c| c.is_ascii_uppercase() || c == '_'))
}

fn cargo(words: &[&str]) -> Result<(), String> {
    let end = words.iter().position(|word| *word == "--").unwrap_or(words.len());
    let (own, rest) = words.split_at(end);
    let rest = rest.get(1..).unwrap_or_default();
    let after = |option: &str| {
        let at = own.iter().position(|word| *word == option)?;
        own.get(at + 1).copied()
    };
    match own.first().copied() {
        Some("run") if after("--bin") == Some("storied") => tool(rest),
        Some("run") => {
            let example = after("--example").ok_or("which example?")?;
            let directory = format!("examples/{example}");
            there(&[&format!("{directory}.rs"), &format!("{directory}/main.rs")])?;
            if rest.iter().any(|word| word.starts_with('-')) {
                let help = help(example)?;
                options(rest, &help)?;
            }
            Ok(())
        }
        Some("bench") => {
            let bench = after("--bench").ok_or("which benchmark?")?;
            let args = format!("benches/{bench}/args.rs");
            let main = format!("benches/{bench}/main.rs");
            let read = |path: &str| {
                fs::read_to_string(root().join(path)).map_err(|error| format!("{path}: {error}"))
            };
            let (usage, main) = (read(&args)?, read(&main)?);
            options(rest, &usage)?;
            // A workload, or another mode.
            let word = rest.first().filter(|word| !word.starts_with('-'));
            let known = |word: &str| {
                usage.contains(&format!("\"{word}\"")) || main.contains(&format!("first == \"{word}\""))
            };
            match word {
                Some(word) if !known(word) => Err(format!("{args} has no {word}")),
                _ => Ok(()),
            }
        }
        Some("test") => match after("--test") {
            Some(test) => there(&[&format!("tests/{test}.rs"), &format!("tests/{test}/main.rs")]),
            None => Ok(()),
        },
        Some("add" | "build" | "check" | "clippy" | "doc" | "fmt" | "install" | "new") => Ok(()),
        Some(other) => Err(format!("no check for cargo {other}")),
        None => Ok(()),
    }
}

/// Checks options of the command-line tool against its `--help` for the same subcommand.
fn tool(words: &[&str]) -> Result<(), String> {
    let program =
        option_env!("CARGO_BIN_EXE_storied").ok_or("the tool is not built; test with --all-features")?;
    let named = words.split(|word| word.starts_with('-')).next().unwrap_or_default();
    let output = Command::new(program).args(named).arg("--help").output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    options(words, &String::from_utf8_lossy(&output.stdout))
}

fn there(paths: &[&str]) -> Result<(), String> {
    if paths.iter().any(|path| root().join(path).exists()) {
        return Ok(());
    }
    Err(format!("missing {}", paths.join(", nor ")))
}

/// Checks that `usage` knows every option.
fn options(words: &[&str], usage: &str) -> Result<(), String> {
    let known = |option: &str| {
        let option = option.split('=').next();
        usage.split(|c: char| !(c.is_alphanumeric() || c == '-' || c == '_')).any(|word| Some(word) == option)
    };
    match words.iter().filter(|word| word.starts_with('-')).find(|option| !known(option)) {
        Some(option) => Err(format!("unknown option {option}")),
        None => Ok(()),
    }
}

fn script(path: &str, words: &[&str]) -> Result<(), String> {
    let text = fs::read_to_string(root().join(path)).map_err(|error| format!("{path}: {error}"))?;
    let [first, ..] = words else { return Ok(()) };
    // Arguments passed to cargo test are checked as such.
    if text.contains("cargo test") && text.contains("\"$@\"") {
        return cargo(&[&["test"], words].concat());
    }
    // A number of minutes.
    let number = first.chars().all(|c| c.is_ascii_digit());
    if number && text.contains(&format!("{path} [MINUTES]")) {
        return Ok(());
    }
    // A branch of its `case`.
    let known = text.lines().any(|line| line.trim_start().starts_with(&format!("{first})")));
    if known { Ok(()) } else { Err(format!("unknown argument {first}")) }
}

/// Returns the help of an example.
fn help(name: &str) -> Result<String, String> {
    let output = Command::new(example(name)).arg("--help").output().unwrap();
    if !output.status.success() {
        return Err(format!("{name} --help ends with {}", output.status));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
