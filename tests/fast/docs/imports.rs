//! Imports between the files of src: no circles, no private item of a parent module.
//!
//! A file imports another if it names an item that the other one defines, in a `use` or in a path.
//! A re-export alone is no import. Calls of methods, fields, and code under `#[cfg(test)]` are not
//! checked.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use syn::buffer::{Cursor, TokenBuffer};
use syn::visit::{Visit, visit_item, visit_path};
use syn::{Attribute, Ident, Item, Macro, UseTree, VisRestricted, Visibility};

use crate::docs::markdown::root;

const ROOTS: [(&str, &str); 2] = [("storied", "src/lib.rs"), ("bin", "src/bin/storied/main.rs")];

/// A module, by crate and path.
type Module = Vec<String>;

/// The meaning of a name in a module.
#[derive(Debug, Clone)]
enum Name {
    Item { private: bool },
    Import { path: Vec<String> },
}

#[derive(Debug, Default)]
struct Scope {
    file: PathBuf,
    names: BTreeMap<String, Name>,
    /// Paths of `use path::*`.
    globs: Vec<Vec<String>>,
}

/// An item that a path leads to.
#[derive(Debug, Clone, PartialEq)]
struct Target {
    module: Module,
    name: String,
    private: bool,
}

#[derive(Default)]
struct SourceTree {
    scopes: BTreeMap<Module, Scope>,
    items: Vec<(Module, Item)>,
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let syn::Meta::List(list) = &attribute.meta else { return false };
        list.path.is_ident("cfg") && list.tokens.to_string() == "test"
    })
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

fn definition(item: &Item) -> Option<(&Ident, &Visibility)> {
    Some(match item {
        Item::Const(item) => (&item.ident, &item.vis),
        Item::Enum(item) => (&item.ident, &item.vis),
        Item::Fn(item) => (&item.sig.ident, &item.vis),
        Item::Static(item) => (&item.ident, &item.vis),
        Item::Struct(item) => (&item.ident, &item.vis),
        Item::Trait(item) => (&item.ident, &item.vis),
        Item::Type(item) => (&item.ident, &item.vis),
        Item::Union(item) => (&item.ident, &item.vis),
        _ => return None,
    })
}

fn is_private(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Inherited)
}

/// The paths of a `use` tree, each with the name it gets in the module; none for `*`.
fn leaves(tree: &UseTree, path: &mut Vec<String>, found: &mut Vec<(Option<String>, Vec<String>)>) {
    match tree {
        UseTree::Path(tree) => {
            path.push(tree.ident.to_string());
            leaves(&tree.tree, path, found);
            path.pop();
        }
        UseTree::Name(tree) => {
            let name = tree.ident.to_string();
            if name == "self" {
                found.push((path.last().cloned(), path.clone()));
            } else {
                found.push((Some(name.clone()), [&path[..], &[name]].concat()));
            }
        }
        UseTree::Rename(tree) => {
            let name = tree.rename.to_string();
            found.push((Some(name), [&path[..], &[tree.ident.to_string()]].concat()));
        }
        UseTree::Glob(_) => found.push((None, path.clone())),
        UseTree::Group(tree) => tree.items.iter().for_each(|tree| leaves(tree, path, found)),
    }
}

fn imports(item: &syn::ItemUse) -> Vec<(Option<String>, Vec<String>)> {
    let mut found = Vec::new();
    leaves(&item.tree, &mut Vec::new(), &mut found);
    found
}

impl SourceTree {
    fn read(root: &Path) -> Self {
        let mut tree = Self::default();
        for (name, file) in ROOTS {
            let file = root.join(file);
            let children = file.parent().unwrap().to_owned();
            tree.read_file(vec![name.into()], &file, &children);
        }
        tree
    }

    fn read_file(&mut self, module: Module, file: &Path, children: &Path) {
        let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let parsed = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        self.add(&module, file, children, parsed.items);
    }

    fn add(&mut self, module: &Module, file: &Path, children: &Path, items: Vec<Item>) {
        if self.scopes.contains_key(module) {
            // The second of two variants, for a feature that is switched off.
            return;
        }
        self.scopes.insert(module.clone(), Scope { file: file.to_owned(), ..Scope::default() });
        for item in items {
            if is_test(attributes(&item)) {
                continue;
            }
            let scope = self.scopes.get_mut(module).unwrap();
            if let Some((name, visibility)) = definition(&item) {
                let private = is_private(visibility);
                scope.names.insert(name.to_string(), Name::Item { private });
            }
            match item {
                Item::Use(item) => {
                    for (name, path) in imports(&item) {
                        match name {
                            Some(name) => {
                                let import = Name::Import { path };
                                scope.names.entry(name).or_insert(import);
                            }
                            None => scope.globs.push(path),
                        }
                    }
                    self.items.push((module.clone(), Item::Use(item)));
                }
                Item::Mod(item) => {
                    let name = item.ident.to_string();
                    let child = [&module[..], std::slice::from_ref(&name)].concat();
                    let below = children.join(&name);
                    if let Some((_, items)) = item.content {
                        self.add(&child, file, &below, items);
                        continue;
                    }
                    let path = item.attrs.iter().find_map(|attribute| match &attribute.meta {
                        syn::Meta::NameValue(meta) if meta.path.is_ident("path") => match &meta.value {
                            syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(path), .. }) => {
                                Some(path.value())
                            }
                            _ => None,
                        },
                        _ => None,
                    });
                    let at = match path {
                        Some(path) => file.parent().unwrap().join(path),
                        None => children.join(format!("{name}.rs")),
                    };
                    self.read_file(child, &at, &below);
                }
                item => self.items.push((module.clone(), item)),
            }
        }
    }

    /// The item that a path in a module leads to; none outside the crate.
    fn resolve(&self, module: &[String], path: &[String], depth: usize) -> Option<Target> {
        assert!(depth < 30, "{module:?} {path:?} does not end");
        let mut at = module.to_vec();
        let mut rest = path;
        match path.first()?.as_str() {
            "crate" => (at, rest) = (vec![module[0].clone()], &path[1..]),
            "self" => rest = &path[1..],
            _ => {}
        }
        while let Some((first, after)) = rest.split_first() {
            if first == "super" {
                at.pop()?;
                rest = after;
                continue;
            }
            let child = [&at[..], std::slice::from_ref(first)].concat();
            if self.scopes.contains_key(&child) && !after.is_empty() {
                (at, rest) = (child, after);
                continue;
            }
            let scope = &self.scopes[&at];
            return match scope.names.get(first) {
                Some(Name::Item { private }) => {
                    Some(Target { module: at, name: first.clone(), private: *private })
                }
                Some(Name::Import { path }) if path[0] != *first => {
                    self.resolve(&at, &[path, after].concat(), depth + 1)
                }
                Some(Name::Import { .. }) => None,
                None => scope.globs.iter().find_map(|glob| {
                    (glob != &["super"]).then_some(())?;
                    self.resolve(&at, &[&glob[..], rest].concat(), depth + 1)
                }),
            };
        }
        None
    }
}

/// Finds the items that the code of a module names.
struct Finder<'a> {
    tree: &'a SourceTree,
    module: &'a Module,
    found: Vec<Target>,
}

impl Finder<'_> {
    fn find(&mut self, path: &[String]) {
        self.found.extend(self.tree.resolve(self.module, path, 0));
    }

    /// Finds paths in the tokens of a macro.
    fn find_in(&mut self, mut tokens: Cursor<'_>) {
        let mut path = Vec::new();
        while !tokens.eof() {
            if let Some((name, after)) = tokens.ident() {
                path.push(name.to_string());
                tokens = after;
                if let Some(after) = colons(after) {
                    tokens = after;
                    continue;
                }
                self.find(&path);
            } else if let Some((inside, _, _, after)) = tokens.any_group() {
                self.find_in(inside);
                tokens = after;
            } else if let Some((_, after)) = tokens.token_tree() {
                tokens = after;
            }
            path.clear();
        }
    }
}

/// The tokens after `::`.
fn colons(tokens: Cursor<'_>) -> Option<Cursor<'_>> {
    let (first, after) = tokens.punct()?;
    let (second, after) = after.punct()?;
    (first.as_char() == ':' && second.as_char() == ':').then_some(after)
}

impl<'ast> Visit<'ast> for Finder<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        if !is_test(attributes(item)) {
            visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if is_private(&item.vis) {
            for (_, path) in imports(item) {
                self.find(&path);
            }
        }
    }

    fn visit_vis_restricted(&mut self, _: &'ast VisRestricted) {}

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Vec<_> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.find(&names);
        visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast Macro) {
        self.find_in(TokenBuffer::new2(call.tokens.clone()).begin());
    }
}

/// The names that each file imports from each other one.
type Imports = BTreeMap<PathBuf, BTreeMap<PathBuf, BTreeSet<String>>>;

/// The imports of all files, and the uses of private items of a parent.
fn imports_of(tree: &SourceTree) -> (Imports, BTreeSet<String>) {
    let (mut imports, mut private) = (Imports::new(), BTreeSet::new());
    for (module, item) in &tree.items {
        let mut finder = Finder { tree, module, found: Vec::new() };
        finder.visit_item(item);
        let file = &tree.scopes[module].file;
        for target in finder.found {
            let other = &tree.scopes[&target.module].file;
            if other == file {
                continue;
            }
            if target.private && module.starts_with(&target.module) {
                private.insert(format!("{} uses {} of {}", file.display(), target.name, other.display()));
            }
            let names = imports.entry(file.clone()).or_default().entry(other.clone()).or_default();
            names.insert(target.name);
        }
    }
    assert!(imports.len() > 100, "only {} files import others", imports.len());
    (imports, private)
}

/// Everything that a file imports, directly or not.
fn reached<'a>(imports: &'a Imports, from: &'a PathBuf) -> BTreeSet<&'a PathBuf> {
    let (mut reached, mut open) = (BTreeSet::new(), vec![from]);
    while let Some(file) = open.pop() {
        for next in imports.get(file).into_iter().flat_map(BTreeMap::keys) {
            if reached.insert(next) {
                open.push(next);
            }
        }
    }
    reached
}

/// The imports that are part of a circle.
fn circles(imports: &Imports) -> Vec<String> {
    let reach: BTreeMap<_, _> = imports.keys().map(|file| (file, reached(imports, file))).collect();
    let mut circles = Vec::new();
    for (file, others) in imports {
        for (other, names) in others {
            if reach.get(other).is_some_and(|reach| reach.contains(file)) {
                circles.push(format!("{} imports {names:?} from {}", file.display(), other.display()));
            }
        }
    }
    circles
}

/// The top-level module of a file: `src/store` for `src/store/postgres.rs`.
fn top(file: &Path) -> PathBuf {
    file.strip_prefix(root()).unwrap().with_extension("").components().take(2).collect()
}

/// The rows of the table of modules in docs/dev/architecture.md, from top to bottom.
fn rows() -> BTreeMap<PathBuf, usize> {
    let text = fs::read_to_string(root().join("docs/dev/architecture.md")).unwrap();
    let rows = text.lines().skip_while(|line| *line != "| module | task |").skip(2).enumerate();
    let rows: BTreeMap<_, _> = rows
        .take_while(|(_, line)| line.starts_with('|'))
        .flat_map(|(row, line)| {
            let cell = line.split('|').nth(1).unwrap();
            let files = cell.split('`').filter(|part| part.starts_with("src/"));
            files.map(move |file| (Path::new(file).with_extension(""), row))
        })
        .collect();
    assert!(rows.len() > 8, "{rows:?}");
    rows
}

#[test]
fn imports_have_no_circle() {
    let (imports, _) = imports_of(&SourceTree::read(root()));
    let circles = circles(&imports);
    assert!(circles.is_empty(), "\n{}\n", circles.join("\n"));
}

#[test]
fn modules_import_only_from_below() {
    let (imports, _) = imports_of(&SourceTree::read(root()));
    let rows = rows();
    let mut wrong = Vec::new();
    for (file, others) in &imports {
        for (other, names) in others {
            if let (Some(from), Some(to)) = (rows.get(&top(file)), rows.get(&top(other)))
                && from > to
            {
                wrong.push(format!("{} imports {names:?} from {}", file.display(), other.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn children_use_no_private_item_of_a_parent() {
    let (_, private) = imports_of(&SourceTree::read(root()));
    let private: Vec<_> = private.into_iter().collect();
    assert!(private.is_empty(), "\n{}\n", private.join("\n"));
}
