//! SentencePiece as llama.cpp does it: merge neighbours, the best score first.
//!
//! In: text whose spaces are U+2581. Out: ids. Source: `llm_tokenizer_spm_session` and `byte_to_token` of
//! `src/llama-vocab.cpp`. Neighbours may merge if their text is a token; of all such pairs the one with the highest score
//! is next, of equal ones the first. What is no token in the end is given byte by byte.
//!
//! llama.cpp does this for a whole text at once. Here the text is cut where no token could reach across: before a U+2581
//! behind a character that no token has before a U+2581. The pieces are words, mostly, and what one of them became is
//! remembered.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashSet};
use std::ops::Range;

use super::chain::{Chain, END};
use super::memory::Memory;
use super::vocab::Vocab;

/// U+2581, the visible space.
pub const SPACE: char = '\u{2581}';

/// What the algorithm needs besides the vocabulary.
#[derive(Debug)]
pub struct Spm {
    /// The ids of byte tokens.
    bytes: [Option<u32>; 256],
    unknown: Option<u32>,
    /// Characters that some token has before a [`SPACE`].
    joined: HashSet<char>,
}

/// A pair that may merge.
#[derive(Debug)]
struct Bigram {
    score: f32,
    left: usize,
    right: usize,
    size: usize,
}

impl Ord for Bigram {
    fn cmp(&self, other: &Bigram) -> Ordering {
        // no score is NaN (Vocab::read)
        let score = self.score.partial_cmp(&other.score).unwrap_or(Ordering::Equal);
        score.then(Reverse(self.left).cmp(&Reverse(other.left)))
    }
}

impl PartialOrd for Bigram {
    fn partial_cmp(&self, other: &Bigram) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Bigram {
    fn eq(&self, other: &Bigram) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Bigram {}

/// Buffers, and what was met before.
#[derive(Debug, Default)]
pub struct Session<'t> {
    chain: Chain,
    queue: BinaryHeap<Bigram>,
    memory: Memory<'t>,
}

impl Spm {
    /// `unknown` stands for a byte that the vocabulary has no token for (llama.cpp fails there).
    pub fn new(vocab: &Vocab, unknown: Option<u32>) -> Spm {
        let mut joined = HashSet::new();
        for text in vocab.texts.iter().filter_map(|t| std::str::from_utf8(t).ok()) {
            for (i, _) in text.match_indices(SPACE) {
                joined.extend(text[..i].chars().next_back());
            }
        }
        let bytes = std::array::from_fn(|b| vocab.byte(b as u8).or_else(|| vocab.id(&[b as u8])));
        Spm { bytes, unknown, joined }
    }

    /// Appends the ids of `text[range]`.
    pub fn encode<'t>(
        &self,
        vocab: &Vocab,
        text: &'t str,
        range: Range<usize>,
        session: &mut Session<'t>,
        out: &mut Vec<u32>,
    ) {
        let text = &text[range];
        let mut start = 0;
        let mut before = None;
        for (i, c) in text.char_indices() {
            if c == SPACE && before.is_some_and(|b| !self.joined.contains(&b)) {
                self.word(vocab, &text[start..i], session, out);
                start = i;
            }
            before = Some(c);
        }
        self.word(vocab, &text[start..], session, out);
    }

    fn word<'t>(&self, vocab: &Vocab, word: &'t str, session: &mut Session<'t>, out: &mut Vec<u32>) {
        let Session { chain, queue, memory } = session;
        memory.recall(word, out, |out| self.merge(vocab, word, chain, queue, out));
    }

    fn merge(&self, vocab: &Vocab, word: &str, chain: &mut Chain, queue: &mut BinaryHeap<Bigram>, out: &mut Vec<u32>) {
        let bytes = word.as_bytes();
        chain.clear();
        queue.clear();
        for (start, c) in word.char_indices() {
            chain.push(start, c.len_utf8(), 0);
        }
        let add = |chain: &Chain, queue: &mut BinaryHeap<Bigram>, left: usize, right: usize| {
            if left == END || right == END {
                return;
            }
            let start = chain.symbols[left].start;
            let size = chain.symbols[left].len + chain.symbols[right].len;
            if let Some(id) = vocab.id(&bytes[start..start + size]) {
                queue.push(Bigram { score: vocab.score(id), left, right, size });
            }
        };
        for right in 1..chain.symbols.len() {
            add(chain, queue, right - 1, right);
        }
        while let Some(Bigram { left, right, size, .. }) = queue.pop() {
            if !chain.holds(left, right, size) {
                continue;
            }
            chain.merge(left, right);
            let merged = chain.symbols[left];
            add(chain, queue, merged.prev, left);
            add(chain, queue, left, merged.next);
        }
        for symbol in chain.pieces() {
            let piece = &bytes[symbol.start..symbol.start + symbol.len];
            match vocab.id(piece) {
                Some(id) => out.push(id),
                None => out.extend(piece.iter().filter_map(|&b| self.bytes[usize::from(b)].or(self.unknown))),
            }
        }
    }
}
