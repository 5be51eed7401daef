//! YAML as a model card needs it: maps and lists of scalars, each scalar as the text that stands in the file.
//!
//! PyYAML, which the reference uses, reads YAML 1.1: `no`, `on`, `1.0` and `2024-01-01` become booleans, numbers and dates,
//! and then cannot be written as GGUF strings (the language code of Norwegian is the known case). Here a scalar keeps its
//! text, so nothing is lost; only null is told apart.

use std::collections::HashMap;

use saphyr_parser::{Event, Parser, ScalarStyle};

/// Front matter is small; a file of aliases to aliases is not followed further than this.
const MAX_NODES: usize = 200_000;
const MAX_DEPTH: usize = 64;

/// A YAML node.
#[derive(Clone, Debug, PartialEq)]
pub enum Yaml {
    Null,
    Scalar(String),
    List(Vec<Yaml>),
    /// In the order of the file; of equal keys the last one counts, at its first place (as in a Python dict).
    Map(Vec<(String, Yaml)>),
}

impl Yaml {
    /// The value of `key` in a map.
    pub fn get(&self, key: &str) -> Option<&Yaml> {
        match self {
            Yaml::Map(entries) => entries.iter().find(|(k, _)| k == key).map(|(_, v)| v),
            _ => None,
        }
    }

    fn size(&self) -> usize {
        1 + match self {
            Yaml::Null | Yaml::Scalar(_) => 0,
            Yaml::List(items) => items.iter().map(Yaml::size).sum(),
            Yaml::Map(entries) => entries.iter().map(|(_, v)| v.size()).sum(),
        }
    }
}

/// A list or map that is being read.
struct Open {
    anchor: usize,
    node: Yaml,
    /// The key that waits for its value, in a map.
    key: Option<String>,
}

/// Parses the first document of `text`. An empty one is null.
pub fn parse(text: &str) -> Result<Yaml, String> {
    let mut anchors: HashMap<usize, Yaml> = HashMap::new();
    let mut open: Vec<Open> = Vec::new();
    let mut nodes = 0usize;
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|e| e.to_string())?;
        let (anchor, node) = match event {
            Event::Scalar(value, style, anchor, tag) => {
                let plain = style == ScalarStyle::Plain && tag.is_none();
                let null = plain && matches!(&*value, "" | "~" | "null" | "Null" | "NULL");
                (anchor, if null { Yaml::Null } else { Yaml::Scalar(value.into_owned()) })
            }
            Event::Alias(id) => (0, anchors.get(&id).cloned().ok_or("an alias to a node that is not finished")?),
            Event::SequenceStart(anchor, _) => {
                open.push(Open { anchor, node: Yaml::List(Vec::new()), key: None });
                if open.len() > MAX_DEPTH {
                    return Err(format!("nested deeper than {MAX_DEPTH} levels"));
                }
                continue;
            }
            Event::MappingStart(anchor, _) => {
                open.push(Open { anchor, node: Yaml::Map(Vec::new()), key: None });
                if open.len() > MAX_DEPTH {
                    return Err(format!("nested deeper than {MAX_DEPTH} levels"));
                }
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(done) => (done.anchor, done.node),
                None => return Err(format!("line {}: an end without a beginning", span.start.line())),
            },
            Event::DocumentEnd => break,
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentStart(_) => continue,
        };
        nodes += node.size();
        if nodes > MAX_NODES {
            return Err(format!("more than {MAX_NODES} nodes"));
        }
        if anchor > 0 {
            anchors.insert(anchor, node.clone());
        }
        match open.last_mut() {
            None => return Ok(node),
            Some(parent) => add(parent, node),
        }
    }
    Ok(Yaml::Null)
}

/// Puts a finished node into its parent.
fn add(parent: &mut Open, node: Yaml) {
    match &mut parent.node {
        Yaml::List(items) => items.push(node),
        Yaml::Map(entries) => match parent.key.take() {
            None => {
                parent.key = Some(match node {
                    Yaml::Scalar(text) => text,
                    _ => String::new(),
                });
            }
            Some(key) => match entries.iter_mut().find(|(k, _)| *k == key) {
                Some(slot) => slot.1 = node,
                None => entries.push((key, node)),
            },
        },
        Yaml::Null | Yaml::Scalar(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scalar(s: &str) -> Yaml {
        Yaml::Scalar(s.into())
    }

    #[test]
    fn scalars_keep_their_text() {
        let y = parse("tags: [no, 'yes', 1.0]\nversion: 2024-01-01\nnone:\ntext: \"null\"\n").unwrap();
        assert_eq!(y.get("tags"), Some(&Yaml::List(vec![scalar("no"), scalar("yes"), scalar("1.0")])));
        assert_eq!(y.get("version"), Some(&scalar("2024-01-01")));
        assert_eq!(y.get("none"), Some(&Yaml::Null));
        assert_eq!(y.get("text"), Some(&scalar("null")));
    }

    #[test]
    fn aliases_duplicates_and_emptiness() {
        let y = parse("a: &x [1]\nb: *x\nc: 1\nc: 2\n").unwrap();
        assert_eq!(y.get("a"), y.get("b"));
        assert_eq!(y.get("c"), Some(&scalar("2")));
        assert_eq!(parse("# nothing\n"), Ok(Yaml::Null));
    }

    #[test]
    fn hostile_text_is_an_error() {
        let laughs =
            (1..30).fold("a0: &a0 [x]\n".to_string(), |s, i| format!("{s}a{i}: &a{i} [*a{0}, *a{0}, *a{0}]\n", i - 1));
        assert!(parse(&laughs).is_err());
        assert!(parse(&"[".repeat(100_000)).is_err());
        assert!(parse(&"- ".repeat(1000)).is_err());
        for bad in ["a: b: c", "a: [1", "\"open", "a: *missing", "key: @at"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
