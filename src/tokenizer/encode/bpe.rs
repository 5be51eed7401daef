//! Byte-pair merges as llama.cpp does them: merge neighbours, the lowest rank first.
//!
//! In: text. Out: ids. Source: `llm_tokenizer_bpe_session` of `src/llama-vocab.cpp`. Neighbours may merge if they stand in
//! `tokenizer.ggml.merges`; of all such pairs the one that stands first there is next, of equal ones the first in the
//! word. Merges need not give tokens: what is none in the end is given as the tokens of its bytes, as far as there are any.
//!
//! Merges are between numbers here, not texts: every text that occurs in a merge has one.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::ops::Range;

use super::bytes;
use super::chain::{Chain, END};
use super::memory::Memory;
use super::pre::PreTokenizer;
use super::split::Splitter;
use super::spm::SPACE;
use super::vocab::{NONE, Vocab};

/// Merges and what comes before them.
#[derive(Debug)]
pub struct Bpe {
    pre: PreTokenizer,
    /// Rank and result of a pair.
    pairs: HashMap<(u32, u32), (u32, u32)>,
    /// The token of a symbol, or [`NONE`].
    tokens: Vec<u32>,
    /// Symbols of single characters: of bytes in GPT-2's alphabet, or of characters.
    bytes: [u32; 256],
    chars: HashMap<char, u32>,
    /// For a byte without a token: its tokens in the vocabulary.
    fallback: Vec<Vec<u32>>,
    /// Words that are tokens, where merges do not matter for them.
    whole: HashMap<Box<[u8]>, u32>,
}

/// Rank, left, right, length, result: the least is next.
type Bigram = Reverse<(u32, usize, usize, usize, u32)>;

/// Buffers, and what was met before.
#[derive(Debug, Default)]
pub struct Session<'t> {
    splitter: Splitter,
    ends: Vec<usize>,
    chain: Chain,
    queue: BinaryHeap<Bigram>,
    memory: Memory<'t>,
}

/// Gives every text a number.
struct Symbols<'v> {
    vocab: &'v Vocab,
    numbers: HashMap<Box<[u8]>, u32>,
    tokens: Vec<u32>,
}

impl Symbols<'_> {
    fn number(&mut self, text: &[u8]) -> u32 {
        if let Some(&number) = self.numbers.get(text) {
            return number;
        }
        let number = self.tokens.len() as u32;
        self.tokens.push(self.vocab.id(text).unwrap_or(NONE));
        self.numbers.insert(text.into(), number);
        number
    }
}

impl Bpe {
    /// `merges`: `left right`, the first has rank 0.
    pub fn new<'m>(vocab: &Vocab, pre: PreTokenizer, merges: impl Iterator<Item = &'m [u8]>) -> Bpe {
        let mut symbols = Symbols { vocab, numbers: HashMap::new(), tokens: Vec::new() };
        let mut pairs = HashMap::new();
        let mut joined = Vec::new();
        for (rank, merge) in merges.enumerate() {
            // the first space that is not the first byte
            let Some(space) = merge.iter().skip(1).position(|&b| b == b' ') else { continue };
            let (left, right) = (&merge[..space + 1], &merge[space + 2..]);
            joined.clear();
            joined.extend_from_slice(left);
            joined.extend_from_slice(right);
            let key = (symbols.number(left), symbols.number(right));
            let result = symbols.number(&joined);
            // of equal merges the first counts; arrays have at most 2^30 elements
            pairs.entry(key).or_insert((rank as u32, result));
        }
        let alphabet = bytes::alphabet();
        let text = |c: char| c.to_string().into_bytes();
        let bytes = alphabet.map(|c| symbols.number(&text(c)));
        let single = |b: u8| vocab.id(&[b]);
        let fallback = if pre.byte_level {
            alphabet.iter().map(|&c| text(c).into_iter().filter_map(single).collect()).collect()
        } else {
            (0..=255).map(|b| vocab.byte(b).into_iter().collect()).collect()
        };
        let whole = if pre.ignore_merges && pre.byte_level {
            let ids = vocab.texts.iter().zip(0..);
            ids.filter_map(|(text, id)| Some((bytes::decode(text)?.into(), id))).collect()
        } else {
            HashMap::new()
        };
        let Symbols { numbers, tokens, .. } = symbols;
        let one = |(text, number): (Box<[u8]>, u32)| {
            let mut chars = std::str::from_utf8(&text).ok()?.chars();
            Some((chars.next().filter(|_| chars.next().is_none())?, number))
        };
        let chars = if pre.byte_level { HashMap::new() } else { numbers.into_iter().filter_map(one).collect() };
        Bpe { pre, pairs, tokens, bytes, chars, fallback, whole }
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
        let mut ends = std::mem::take(&mut session.ends);
        session.splitter.words(text, self.pre.stages, &mut ends);
        if self.pre.metaspace {
            self.metaspace(vocab, text, &ends, session, out);
        } else {
            let mut start = 0;
            for &end in &ends {
                let word = &text[start..end];
                let Session { chain, queue, memory, .. } = session;
                memory.recall(word, out, |out| self.word(vocab, word, chain, queue, out));
                start = end;
            }
        }
        session.ends = ends;
    }

    /// Every word begins with a space: one is set before the first, and each space begins a word.
    fn metaspace(&self, vocab: &Vocab, text: &str, ends: &[usize], session: &mut Session<'_>, out: &mut Vec<u32>) {
        let mut start = 0;
        for &end in ends {
            let mut line = text[start..end].to_string();
            start = end;
            if !line.starts_with(['\n', SPACE]) {
                line.insert(0, SPACE);
            }
            let mut from = 0;
            let next = line.match_indices(SPACE).map(|(i, _)| i).filter(|&i| i > 0);
            for to in next.chain([line.len()]) {
                self.word(vocab, &line[from..to], &mut session.chain, &mut session.queue, out);
                from = to;
            }
        }
    }

    fn word(&self, vocab: &Vocab, word: &str, chain: &mut Chain, queue: &mut BinaryHeap<Bigram>, out: &mut Vec<u32>) {
        let bytes = word.as_bytes();
        let line_feeds = self.pre.line_feeds && bytes.iter().all(|&b| b == b'\n');
        let known = if self.pre.ignore_merges && self.pre.byte_level {
            self.whole.get(bytes).copied()
        } else if self.pre.ignore_merges || line_feeds {
            vocab.id(bytes)
        } else {
            None
        };
        if let Some(id) = known {
            out.push(id);
            return;
        }
        self.merge(word, chain, queue);
        for symbol in chain.pieces() {
            let piece = &bytes[symbol.start..symbol.start + symbol.len];
            let token = match self.tokens.get(symbol.id as usize) {
                Some(&token) => Some(token).filter(|&t| t != NONE),
                // a character that no merge has
                None => vocab.id(piece),
            };
            match token {
                Some(token) => out.push(token),
                None => piece.iter().for_each(|&b| out.extend(&self.fallback[usize::from(b)])),
            }
        }
    }

    /// Leaves in `chain` what `word` is merged to.
    fn merge(&self, word: &str, chain: &mut Chain, queue: &mut BinaryHeap<Bigram>) {
        chain.clear();
        queue.clear();
        if self.pre.byte_level {
            for (i, b) in word.bytes().enumerate() {
                chain.push(i, 1, self.bytes[usize::from(b)]);
            }
        } else {
            for (i, c) in word.char_indices() {
                chain.push(i, c.len_utf8(), self.chars.get(&c).copied().unwrap_or(NONE));
            }
        }
        let add = |chain: &Chain, queue: &mut BinaryHeap<Bigram>, left: usize, right: usize| {
            if left == END || right == END {
                return;
            }
            let (l, r) = (&chain.symbols[left], &chain.symbols[right]);
            if let Some(&(rank, result)) = self.pairs.get(&(l.id, r.id)) {
                queue.push(Reverse((rank, left, right, l.len + r.len, result)));
            }
        };
        for right in 1..chain.symbols.len() {
            add(chain, queue, right - 1, right);
        }
        while let Some(Reverse((_, left, right, size, result))) = queue.pop() {
            if !chain.holds(left, right, size) {
                continue;
            }
            chain.merge(left, right);
            chain.symbols[left].id = result;
            let merged = chain.symbols[left];
            add(chain, queue, merged.prev, left);
            add(chain, queue, left, merged.next);
        }
    }
}
