//! Special tokens in a text.
//!
//! In: a text. Out: fragments: special tokens and the text between them. Source: `tokenizer_st_partition` of
//! `src/llama-vocab.cpp`: one special token after the other, the longest first, takes all its places in what is still text.
//! Control and unknown tokens take part where they are asked for, user-defined ones always.
//!
//! llama.cpp searches the whole text for each of them. Here one pass over the text finds which of them occur at all
//! (a trie of their texts), and only these are searched for.
//!
//! Tokens of equal length are taken in the order of their ids; in llama.cpp the order is that of `std::sort`, which is
//! another one where there are more than 16. It matters only where two of them overlap.

use std::ops::Range;

use super::EncodeError;
use super::vocab::{Vocab, attr};

/// A part of a text.
#[derive(Clone, Debug, PartialEq)]
pub enum Fragment {
    Token(u32),
    /// In bytes.
    Text(Range<usize>),
}

/// The special tokens of a vocabulary.
#[derive(Debug)]
pub struct Partition {
    /// The longest first.
    tokens: Vec<Special>,
    trie: Trie,
}

#[derive(Debug)]
struct Special {
    id: u32,
    text: String,
    /// Only where special tokens are asked for.
    hidden: bool,
    lstrip: bool,
    rstrip: bool,
}

impl Partition {
    /// `special`: ids, in the order in which they are looked for.
    ///
    /// # Errors
    /// A special token that is not UTF-8: it could cut a character.
    pub fn new(vocab: &Vocab, special: &[u32]) -> Result<Partition, EncodeError> {
        let mut tokens = Vec::with_capacity(special.len());
        let mut trie = Trie::default();
        for &id in special {
            let bytes = &vocab.texts[id as usize];
            let attrs = vocab.attrs[id as usize];
            let text = String::from_utf8(bytes.to_vec()).map_err(|_| EncodeError::Token {
                id,
                text: String::from_utf8_lossy(bytes).into_owned(),
                reason: "is a special token and not UTF-8",
            })?;
            trie.insert(text.as_bytes(), tokens.len());
            tokens.push(Special {
                id,
                text,
                hidden: attrs & (attr::CONTROL | attr::UNKNOWN) != 0,
                lstrip: attrs & attr::LSTRIP != 0,
                rstrip: attrs & attr::RSTRIP != 0,
            });
        }
        Ok(Partition { tokens, trie })
    }

    /// Takes `text` apart. No text of a fragment is empty.
    pub fn fragments(&self, text: &str, parse_special: bool) -> Vec<Fragment> {
        if text.is_empty() {
            return Vec::new();
        }
        let mut fragments = vec![Fragment::Text(0..text.len())];
        for index in self.trie.occurring(text.as_bytes(), self.tokens.len()) {
            let token = &self.tokens[index];
            if !token.hidden || parse_special {
                token.take(text, &mut fragments);
            }
        }
        fragments
    }
}

impl Special {
    /// Replaces every place of this token in the texts of `fragments`.
    fn take(&self, text: &str, fragments: &mut Vec<Fragment>) {
        let within = |f: &Fragment| matches!(f, Fragment::Text(range) if text[range.clone()].contains(&self.text));
        let Some(first) = fragments.iter().position(within) else { return };
        let rest = fragments.split_off(first);
        for fragment in rest {
            match fragment {
                Fragment::Text(range) => self.cut(text, range, fragments),
                token => fragments.push(token),
            }
        }
    }

    fn cut(&self, text: &str, range: Range<usize>, out: &mut Vec<Fragment>) {
        // C's isspace: these six
        const SPACES: [char; 6] = [' ', '\t', '\n', '\u{b}', '\u{c}', '\r'];
        let mut start = range.start;
        while let Some(place) = text[start..range.end].find(&self.text) {
            let at = start + place;
            let mut left = &text[start..at];
            if self.lstrip {
                left = left.trim_end_matches(SPACES);
            }
            if !left.is_empty() {
                out.push(Fragment::Text(start..start + left.len()));
            }
            out.push(Fragment::Token(self.id));
            start = at + self.text.len();
            if self.rstrip {
                start = range.end - text[start..range.end].trim_start_matches(SPACES).len();
            }
        }
        if start < range.end {
            out.push(Fragment::Text(start..range.end));
        }
    }
}

/// Texts by their bytes.
#[derive(Debug)]
struct Trie {
    nodes: Vec<Node>,
}

#[derive(Debug, Default)]
struct Node {
    /// Sorted by byte.
    children: Vec<(u8, usize)>,
    token: Option<usize>,
}

impl Default for Trie {
    fn default() -> Trie {
        Trie { nodes: vec![Node::default()] }
    }
}

impl Trie {
    fn insert(&mut self, text: &[u8], token: usize) {
        let mut at = 0;
        for &byte in text {
            at = match self.nodes[at].children.binary_search_by_key(&byte, |c| c.0) {
                Ok(k) => self.nodes[at].children[k].1,
                Err(k) => {
                    let new = self.nodes.len();
                    self.nodes.push(Node::default());
                    self.nodes[at].children.insert(k, (byte, new));
                    new
                }
            };
        }
        self.nodes[at].token = Some(token);
    }

    fn child(&self, at: usize, byte: u8) -> Option<usize> {
        let children = &self.nodes[at].children;
        children.binary_search_by_key(&byte, |c| c.0).ok().map(|k| children[k].1)
    }

    /// Which of `count` tokens occur in `text`, in order.
    fn occurring(&self, text: &[u8], count: usize) -> Vec<usize> {
        let mut first = [false; 256];
        self.nodes[0].children.iter().for_each(|c| first[usize::from(c.0)] = true);
        let mut seen = vec![false; count];
        for start in (0..text.len()).filter(|&i| first[usize::from(text[i])]) {
            let mut at = 0;
            for &byte in &text[start..] {
                let Some(next) = self.child(at, byte) else { break };
                at = next;
                if let Some(token) = self.nodes[at].token {
                    seen[token] = true;
                }
            }
        }
        (0..count).filter(|&i| seen[i]).collect()
    }
}
