//! House style: the banned words of CONTRIBUTING.md, the kind of each page, and commit subjects.

use std::fs;
use std::process::Command;

use crate::docs::markdown::{Document, documents, root};

const KINDS: [&str; 4] = ["Tutorial", "How-to", "Reference", "Explanation"];

/// The words of a text in lower case, without punctuation.
fn words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    lower.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// The banned phrases of CONTRIBUTING.md, as lists of words.
fn banned(documents: &[Document]) -> Vec<Vec<String>> {
    let lists = documents.iter().flat_map(|document| &document.blocks);
    let lists = lists.filter(|block| block.info == "text,banned").flat_map(|block| &block.lines);
    let phrases = lists.flat_map(|line| line.split(',')).map(words);
    let banned: Vec<_> = phrases.filter(|phrase| !phrase.is_empty()).collect();
    assert!(banned.len() > 20, "CONTRIBUTING.md has only {} banned words", banned.len());
    banned
}

/// The banned phrases in a text.
fn found(banned: &[Vec<String>], text: &str) -> Vec<String> {
    let words = words(text);
    let is_in = |phrase: &&Vec<String>| words.windows(phrase.len()).any(|window| window == phrase.as_slice());
    banned.iter().filter(is_in).map(|phrase| phrase.join(" ")).collect()
}

#[test]
fn prose_has_no_banned_word() {
    let documents = documents();
    let banned = banned(&documents);
    let mut wrong = Vec::new();
    for document in &documents {
        for piece in &document.prose {
            for phrase in found(&banned, &piece.text) {
                wrong.push(format!("{}:{}: {phrase}", document.path.display(), piece.line));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn the_first_line_of_a_page_states_its_kind() {
    for document in documents().iter().filter(|document| document.path.starts_with("docs")) {
        let text = fs::read_to_string(root().join(&document.path)).unwrap();
        let first = text.lines().next().unwrap_or_default();
        let known = KINDS.iter().any(|kind| first.starts_with(&format!("# {kind}: ")));
        assert!(known, "{} begins with {first:?}, not with one of {KINDS:?}", document.path.display());
    }
}

/// The last commit before subjects were checked.
const UNCHECKED: &str = "b441b57";

const AREAS: [&str; 16] = [
    "store",
    "postgres",
    "sqlite",
    "bus",
    "nats",
    "command",
    "aggregate",
    "projection",
    "process",
    "schedule",
    "console",
    "cli",
    "docs",
    "tests",
    "bench",
    "ci",
];

#[test]
fn commit_subjects_follow_the_rules() {
    let banned = banned(&documents());
    let log = Command::new("git").args(["log", "--no-merges", "--format=%h %s"]).current_dir(root()).output();
    let log = log.expect("git, and the history of the checkout");
    assert!(log.status.success(), "{}", String::from_utf8_lossy(&log.stderr));
    let log = String::from_utf8(log.stdout).unwrap();
    let mut wrong = Vec::new();
    for line in log.lines().take_while(|line| !line.starts_with(UNCHECKED)) {
        let (_, subject) = line.split_once(' ').unwrap_or_default();
        let area = subject.split_once(": ").map(|(area, _)| area);
        if !area.is_some_and(|area| AREAS.contains(&area)) {
            wrong.push(format!("{line}: the area is none of {AREAS:?}"));
        }
        if subject.chars().count() > 72 {
            wrong.push(format!("{line}: longer than 72 characters"));
        }
        wrong.extend(found(&banned, subject).iter().map(|phrase| format!("{line}: {phrase}")));
    }
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}
