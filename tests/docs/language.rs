//! House style of the documents: the banned words of CONTRIBUTING.md, and the kind of each page.

use std::fs;

use crate::markdown::{documents, root};

const KINDS: [&str; 4] = ["Tutorial", "How-to", "Reference", "Explanation"];

/// The words of a text in lower case, without punctuation.
fn words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    lower.split(|c: char| !c.is_alphabetic()).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

#[test]
fn prose_has_no_banned_word() {
    let documents = documents();
    let lists = documents.iter().flat_map(|document| &document.blocks);
    let lists = lists.filter(|block| block.info == "text,banned").flat_map(|block| &block.lines);
    let phrases = lists.flat_map(|line| line.split(',')).map(words);
    let banned: Vec<_> = phrases.filter(|phrase| !phrase.is_empty()).collect();
    assert!(banned.len() > 20, "CONTRIBUTING.md has only {} banned words", banned.len());
    let mut wrong = Vec::new();
    for document in &documents {
        for piece in &document.prose {
            let words = words(&piece.text);
            for phrase in banned.iter().filter(|phrase| words.windows(phrase.len()).any(|w| w == *phrase)) {
                wrong.push(format!("{}:{}: {}", document.path.display(), piece.line, phrase.join(" ")));
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
