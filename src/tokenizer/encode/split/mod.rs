//! Text to words: what llama.cpp does before byte-pair merges.
//!
//! In: a text and the stages of a pre-tokenizer ([`super::pre`]). Out: where its words end, in bytes. Each stage cuts the
//! pieces of the stage before it. Source: `unicode_regex_split` of `src/unicode.cpp`: there a stage is one regular
//! expression, matched from left to right in every piece; matches and the text between them are pieces of their own.
//!
//! llama.cpp runs some expressions through hand-written functions and the others through `std::regex`, which sees a text
//! that was simplified: white space beyond ASCII is a vertical tab, and, for expressions with Unicode categories, every other
//! character beyond ASCII is its category alone (so `\p{Lu}` and `\p{Ll}` are the same thing there). Here all of them are
//! functions: [`words`] and [`runs`]. They look at characters and classes, take time in proportion to the text, and do
//! not recurse.

pub mod runs;
pub mod unicode;
pub mod words;

use self::runs::{Cutter, Runs};
use self::unicode::Class;
use self::words::{Cased, Marked, Punctuated, Words};

/// One regular expression of a pre-tokenizer.
#[derive(Debug)]
pub enum Stage {
    /// `'s|'t|... ?\p{L}+| ?\p{N}+|...`: GPT-2.
    Gpt2,
    /// `[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}...`: LLaMA 3, Qwen and their kin.
    Words(Words),
    /// Words that end where a capital letter follows a small one: Tekken, GPT-4o.
    Cased(Cased),
    /// Words of letters and marks with their contraction.
    Marked(Marked),
    /// Words that a punctuation mark may begin: DeepSeek V3.
    Punctuated(Punctuated),
    /// Kimi K2.
    Kimi,
    /// Runs of characters of a kind.
    Runs(Runs),
    /// Anything else.
    Cut(Cutter),
}

/// A piece of the text under the eyes of a stage.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    chars: &'a [char],
    classes: &'a [Class],
}

/// A run of white space: where it ends, and where the last line break in it ends (0: it has none).
#[derive(Clone, Copy, Debug, Default)]
pub struct White {
    end: usize,
    newline: usize,
}

impl Piece<'_> {
    fn len(&self) -> usize {
        self.chars.len()
    }

    fn at(&self, i: usize) -> Option<char> {
        self.chars.get(i).copied()
    }

    fn is(&self, i: usize, what: impl Fn(Class) -> bool) -> bool {
        self.classes.get(i).is_some_and(|&c| what(c))
    }

    fn letter(&self, i: usize) -> bool {
        self.is(i, Class::letter)
    }

    fn number(&self, i: usize) -> bool {
        self.is(i, Class::number)
    }

    fn mark(&self, i: usize) -> bool {
        self.is(i, Class::mark)
    }

    fn white(&self, i: usize) -> bool {
        self.is(i, Class::whitespace)
    }

    /// `[^\s\p{L}\p{N}]`.
    fn other(&self, i: usize) -> bool {
        self.is(i, |c| !c.whitespace() && !c.letter() && !c.number())
    }

    fn newline(&self, i: usize) -> bool {
        matches!(self.at(i), Some('\r' | '\n'))
    }

    /// The code point as an expression without categories sees it.
    fn wide(&self, i: usize) -> Option<u32> {
        let c = self.at(i)?;
        Some(if c > '\u{7f}' && self.white(i) { 0x0b } else { c as u32 })
    }

    /// The end of the run of `what` that begins at `i`.
    fn run(&self, mut i: usize, what: impl Fn(usize) -> bool) -> usize {
        while i < self.len() && what(i) {
            i += 1;
        }
        i
    }

    /// The run of white space around `i`; what ends at or before `i` does not count. `last` is what was returned for an
    /// earlier place: a long run is looked at once.
    fn white_run(&self, i: usize, last: &mut White) -> White {
        if i >= last.end {
            *last = White { end: i, newline: 0 };
            while self.white(last.end) {
                last.end += 1;
                if self.newline(last.end - 1) {
                    last.newline = last.end;
                }
            }
        }
        *last
    }

    /// The end of `\s*[\r\n]+|\s+(?!\S)|\s+`, or `i`.
    fn spaces(&self, i: usize, last: &mut White) -> usize {
        let run = self.white_run(i, last);
        if run.newline > i {
            run.newline
        } else if run.end > i + 1 && run.end < self.len() {
            run.end - 1
        } else {
            run.end.max(i)
        }
    }

    /// The length of `'s|'t|'re|'ve|'m|'ll|'d` at `i`, or 0. `fold`: in capitals too.
    fn contraction(&self, i: usize, fold: bool) -> usize {
        if self.at(i) != Some('\'') {
            return 0;
        }
        let at = |k: usize| self.at(i + k).map(|c| if fold { c.to_ascii_lowercase() } else { c });
        match (at(1), at(2)) {
            (Some('s' | 't' | 'm' | 'd'), _) => 2,
            (Some('r' | 'v'), Some('e')) | (Some('l'), Some('l')) => 3,
            _ => 0,
        }
    }
}

/// Splits texts; keeps its buffers from one to the next.
#[derive(Debug, Default)]
pub struct Splitter {
    chars: Vec<char>,
    classes: Vec<Class>,
    ends: Vec<usize>,
    next: Vec<usize>,
}

impl Splitter {
    /// The ends of the words of `text`, in bytes, in order; no word is empty.
    pub fn words(&mut self, text: &str, stages: &[Stage], words: &mut Vec<usize>) {
        words.clear();
        self.chars.clear();
        self.classes.clear();
        self.chars.extend(text.chars());
        self.classes.extend(self.chars.iter().map(|&c| Class::of(c)));
        self.ends.clear();
        self.ends.push(self.chars.len());
        for stage in stages {
            self.next.clear();
            let mut start = 0;
            for &end in &self.ends {
                let piece = Piece { chars: &self.chars[start..end], classes: &self.classes[start..end] };
                let from = self.next.len();
                stage.cut(piece, &mut self.next);
                self.next[from..].iter_mut().for_each(|e| *e += start);
                start = end;
            }
            std::mem::swap(&mut self.ends, &mut self.next);
        }
        let (mut start, mut bytes) = (0, 0);
        for &end in &self.ends {
            bytes += self.chars[start..end].iter().map(|c| c.len_utf8()).sum::<usize>();
            if end > start {
                words.push(bytes);
            }
            start = end;
        }
    }
}

impl Stage {
    /// Appends the ends of the pieces into which `piece` is cut.
    fn cut(&self, piece: Piece, ends: &mut Vec<usize>) {
        let p = &piece;
        match self {
            Stage::Gpt2 => matches(p, ends, |i, white| words::gpt2(p, i, white)),
            Stage::Words(rules) => matches(p, ends, |i, white| rules.find(p, i, white)),
            Stage::Cased(rules) => matches(p, ends, |i, white| rules.find(p, i, white)),
            Stage::Marked(rules) => matches(p, ends, |i, white| rules.find(p, i, white)),
            Stage::Punctuated(rules) => matches(p, ends, |i, white| rules.find(p, i, white)),
            Stage::Kimi => matches(p, ends, |i, white| words::kimi(p, i, white)),
            Stage::Runs(rules) => matches(p, ends, |i, _| rules.find(p, i)),
            Stage::Cut(cutter) => cutter(p, ends),
        }
    }
}

/// Matches and what is between them. `find` gives the end of the match that begins at a place, or the place.
fn matches(piece: &Piece, ends: &mut Vec<usize>, find: impl Fn(usize, &mut White) -> usize) {
    let mut white = White::default();
    let (mut done, mut i) = (0, 0);
    while i < piece.len() {
        let end = find(i, &mut white);
        if end <= i {
            i += 1;
            continue;
        }
        if i > done {
            ends.push(i);
        }
        ends.push(end);
        (done, i) = (end, end);
    }
    if done < piece.len() {
        ends.push(piece.len());
    }
}

/// The words of `text`, for tests.
#[cfg(test)]
pub fn split<'a>(text: &'a str, stages: &[Stage]) -> Vec<&'a str> {
    let mut ends = Vec::new();
    Splitter::default().words(text, stages, &mut ends);
    let mut start = 0;
    ends.iter()
        .map(|&end| {
            let word = &text[start..end];
            start = end;
            word
        })
        .collect()
}
