//! A parser for the subset of Markdown in the documents.

use std::fs;
use std::path::{Path, PathBuf};

/// A document of the repository.
pub struct Document {
    /// Path from the root of the repository.
    pub path: PathBuf,
    /// Anchors of its headings.
    pub anchors: Vec<String>,
    /// `[…](target)`.
    pub links: Vec<Piece>,
    /// Code spans in the text.
    pub codes: Vec<Piece>,
    pub blocks: Vec<Block>,
    /// Text of each line, without code and link targets.
    pub prose: Vec<Piece>,
}

/// A piece of a document.
pub struct Piece {
    pub line: usize,
    pub text: String,
}

/// A block of code.
pub struct Block {
    /// Number of its first line.
    pub line: usize,
    /// Info string of the fence: `rust,no_run`.
    pub info: String,
    pub lines: Vec<String>,
}

impl Block {
    pub fn language(&self) -> &str {
        self.info.split(',').next().unwrap_or_default()
    }
}

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns every document: at the root, and below docs/ and examples/.
pub fn documents() -> Vec<Document> {
    let mut found = Vec::new();
    files(root(), false, &mut found);
    for directory in ["docs", "examples"] {
        files(&root().join(directory), true, &mut found);
    }
    found.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    found.sort();
    found.iter().map(|path| read(path)).collect()
}

/// Collects the files of a directory, and of its subdirectories if `deep`.
pub fn files(directory: &Path, deep: bool, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display())) {
        let path = entry.unwrap().path();
        match path.is_dir() {
            false => found.push(path),
            true if deep => files(&path, true, found),
            true => {}
        }
    }
}

fn read(path: &Path) -> Document {
    let path = path.strip_prefix(root()).unwrap().to_owned();
    let text = fs::read_to_string(root().join(&path)).unwrap();
    let (mut anchors, mut links, mut codes, mut prose) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut blocks: Vec<Block> = Vec::new();
    let mut open = false;
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        if let Some(info) = line.trim_start().strip_prefix("```") {
            if !open {
                blocks.push(Block { line: number + 1, info: info.trim().into(), lines: Vec::new() });
            }
            open = !open;
        } else if open {
            blocks.last_mut().unwrap().lines.push(line.into());
        } else {
            if let Some(heading) = line.strip_prefix('#') {
                let anchor = anchor(heading.trim_start_matches('#').trim());
                let before = anchors.iter().filter(|other| **other == anchor).count();
                anchors.push(if before == 0 { anchor } else { format!("{anchor}-{before}") });
            }
            let (plain, code) = apart(line);
            codes.extend(code.into_iter().map(|text| Piece { line: number, text }));
            links.extend(targets(&plain).map(|text| Piece { line: number, text }));
            prose.push(Piece { line: number, text: without_targets(&plain) });
        }
    }
    assert!(!open, "{}: a block of code is not closed", path.display());
    Document { path, anchors, links, codes, blocks, prose }
}

/// Returns the anchor that GitHub derives from a heading.
fn anchor(heading: &str) -> String {
    let lower = heading.to_lowercase();
    let kept = lower.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// Splits a line into its text and its code spans.
fn apart(line: &str) -> (String, Vec<String>) {
    let (mut plain, mut codes) = (String::new(), Vec::new());
    for (index, part) in line.split('`').enumerate() {
        if index % 2 == 0 {
            plain.push_str(part);
        } else {
            codes.push(part.to_owned());
        }
    }
    (plain, codes)
}

fn targets(line: &str) -> impl Iterator<Item = String> + '_ {
    line.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(target, _)| target.to_owned()))
}

/// Returns a line without the targets of its links.
fn without_targets(line: &str) -> String {
    let mut parts = line.split("](");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + " " + part.split_once(')').map_or(part, |(_, rest)| rest))
}
