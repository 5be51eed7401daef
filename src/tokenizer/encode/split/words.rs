//! The large expressions: contractions, words, numbers, symbols, white space, in that order.
//!
//! In: a piece and a place. Out: the end of the match that begins there, or the place itself if there is none. Sources:
//! `unicode_regex_split_custom_gpt2`, `_llama3`, `_qwen2`, `_qwen35`, `_kimi_k2` of `src/unicode.cpp`, and the expressions of
//! `llm_tokenizer_bpe` in `src/llama-vocab.cpp` that go through `std::regex`: alternatives are tried in their order,
//! repetitions are greedy and give back what the rest needs.

use super::{Piece, White};

/// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)`, and single spaces.
pub fn gpt2(p: &Piece, i: usize, white: &mut White) -> usize {
    let contraction = p.contraction(i, false);
    if contraction > 0 {
        return i + contraction;
    }
    let start = i + usize::from(p.at(i) == Some(' '));
    if p.letter(start) {
        return p.run(start, |k| p.letter(k));
    }
    if p.number(start) {
        return p.run(start, |k| p.number(k));
    }
    if p.other(start) {
        return p.run(start, |k| p.other(k));
    }
    let run = p.white_run(i, white);
    if run.end > i + 1 && run.end < p.len() { run.end - 1 } else { run.end.max(i) }
}

/// How white space is taken.
#[derive(Debug, PartialEq)]
pub enum Spaces {
    /// `\s*[\r\n]+|\s+(?!\S)|\s+`.
    Runs,
    /// `\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|...|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}`: JAIS 2.
    Powers,
}

/// `(?i:'s|'t|...)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+` and variations.
#[derive(Debug)]
pub struct Words {
    /// It begins with the contractions.
    pub contractions: bool,
    /// `[\p{L}\p{M}]+` for `\p{L}+`, and no `\p{M}` among the symbols: Qwen 3.5.
    pub marks: bool,
    /// `(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+` for `\p{L}+`: EXAONE MoE.
    pub phrases: bool,
    /// How many `\p{N}` at most.
    pub numbers: usize,
    /// How many `[\r\n]` at most behind symbols.
    pub breaks: usize,
    pub spaces: Spaces,
}

impl Words {
    /// LLaMA 3.
    pub const LLAMA3: Words = Words {
        contractions: true,
        marks: false,
        phrases: false,
        numbers: 3,
        breaks: usize::MAX,
        spaces: Spaces::Runs,
    };
    /// Qwen 2.
    pub const QWEN2: Words = Words { numbers: 1, ..Words::LLAMA3 };
    /// Qwen 3.5.
    pub const QWEN35: Words = Words { marks: true, ..Words::QWEN2 };
    /// JAIS 2.
    pub const JAIS2: Words = Words { spaces: Spaces::Powers, ..Words::LLAMA3 };
    /// Seed-Coder.
    pub const SEED_CODER: Words = Words { breaks: 0, ..Words::QWEN2 };
    /// Qwen 2 without contractions.
    pub const UFAKZEKA: Words = Words { contractions: false, ..Words::QWEN2 };
    /// MiniCPM 5.
    pub const MINICPM5: Words = Words { numbers: usize::MAX, ..Words::LLAMA3 };
    /// EXAONE MoE.
    pub const EXAONE_MOE: Words = Words { phrases: true, breaks: 1, ..Words::QWEN2 };

    pub(super) fn find(&self, p: &Piece, i: usize, white: &mut White) -> usize {
        if self.contractions {
            let contraction = p.contraction(i, true);
            if contraction > 0 {
                return i + contraction;
            }
        }
        if !p.newline(i) && !p.number(i) {
            if self.phrases && (p.letter(i) || p.letter(i + 1)) {
                return phrase(p, if p.letter(i) { i } else { i + 1 });
            }
            let inside = |k: usize| p.letter(k) || self.marks && p.mark(k);
            if inside(i) || inside(i + 1) {
                return p.run(i + 1, inside);
            }
        }
        if p.number(i) {
            return numbers(p, i, self.numbers);
        }
        let symbol = |k: usize| p.other(k) && !(self.marks && p.mark(k));
        let end = symbols(p, i, symbol);
        if end > i {
            let limit = end.saturating_add(self.breaks);
            return p.run(end, |k| k < limit && p.newline(k));
        }
        match self.spaces {
            Spaces::Runs => p.spaces(i, white),
            Spaces::Powers => powers(p, i, white),
        }
    }
}

/// `\p{L}\p{M}*(?: ?\p{L}\p{M}*)*`, which is what `(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+` matches.
fn phrase(p: &Piece, i: usize) -> usize {
    let mut end = p.run(i + 1, |k| p.mark(k));
    loop {
        let next = end + usize::from(p.at(end) == Some(' '));
        if !p.letter(next) {
            return end;
        }
        end = p.run(next + 1, |k| p.mark(k));
    }
}

/// `\p{N}{1,most}` where a number is at `i`.
fn numbers(p: &Piece, i: usize, most: usize) -> usize {
    let limit = i.saturating_add(most);
    p.run(i, |k| k < limit && p.number(k))
}

/// ` ?` and one or more of `symbol`.
fn symbols(p: &Piece, i: usize, symbol: impl Fn(usize) -> bool) -> usize {
    let start = i + usize::from(p.at(i) == Some(' '));
    if start < p.len() && symbol(start) { p.run(start, symbol) } else { i }
}

fn powers(p: &Piece, i: usize, white: &mut White) -> usize {
    let run = p.white_run(i, white);
    if run.newline > i {
        return run.newline;
    }
    // (?!\S): more white space follows, or the end
    let left = run.end.saturating_sub(i);
    let fits = |n: usize| n < left || n == left && run.end == p.len();
    let size = [512, 256, 128, 64, 32, 16, 8, 4, 2, 1].into_iter().find(|&n| fits(n));
    i + size.unwrap_or(left.min(1))
}

/// `[^\r\n\p{L}\p{N}]?U*V+C?|[^\r\n\p{L}\p{N}]?U+V*C?|\p{N}{1,n}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+`,
/// where U are letters but `[a-z]`, V are letters but `[A-Z]`, and C is a contraction. llama.cpp's case ends with ASCII.
#[derive(Debug)]
pub struct Cased {
    /// `\p{M}` are letters too.
    pub marks: bool,
    /// C is there.
    pub contractions: bool,
    pub numbers: usize,
}

impl Cased {
    /// Tekken.
    pub const TEKKEN: Cased = Cased { marks: false, contractions: false, numbers: 1 };
    /// GPT-4o.
    pub const GPT4O: Cased = Cased { marks: false, contractions: true, numbers: 3 };
    /// Granite's embedding model of 97 M weights.
    pub const GRANITE: Cased = Cased { marks: true, ..Cased::GPT4O };

    pub(super) fn find(&self, p: &Piece, i: usize, white: &mut White) -> usize {
        // the optional character before the word is taken if the word goes on behind it
        let prefix = i < p.len() && !p.newline(i) && !p.letter(i) && !p.number(i);
        let starts = [prefix.then_some(i + 1), Some(i)];
        let starts = || starts.into_iter().flatten();
        let word = starts().find_map(|k| self.small(p, k)).or_else(|| starts().find_map(|k| self.capital(p, k)));
        match word {
            Some(end) if self.contractions => end + p.contraction(end, true),
            Some(end) => end,
            None => rest(p, i, self.numbers, white),
        }
    }

    fn inside(&self, p: &Piece, i: usize) -> bool {
        p.letter(i) || self.marks && p.mark(i)
    }

    fn upper(&self, p: &Piece, i: usize) -> bool {
        self.inside(p, i) && !matches!(p.at(i), Some('a'..='z'))
    }

    fn lower(&self, p: &Piece, i: usize) -> bool {
        self.inside(p, i) && !matches!(p.at(i), Some('A'..='Z'))
    }

    /// U*V+.
    fn small(&self, p: &Piece, i: usize) -> Option<usize> {
        let capitals = p.run(i, |k| self.upper(p, k));
        let end = p.run(capitals, |k| self.lower(p, k));
        if end > capitals {
            return Some(end);
        }
        // U* gives back up to the last character that is V as well
        (i..capitals).rev().find(|&k| self.lower(p, k)).map(|k| k + 1)
    }

    /// U+V*.
    fn capital(&self, p: &Piece, i: usize) -> Option<usize> {
        let capitals = p.run(i, |k| self.upper(p, k));
        (capitals > i).then(|| p.run(capitals, |k| self.lower(p, k)))
    }
}

/// `\p{N}{1,n}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+`.
fn rest(p: &Piece, i: usize, most: usize, white: &mut White) -> usize {
    if p.number(i) {
        return numbers(p, i, most);
    }
    let end = symbols(p, i, |k| p.other(k));
    if end > i {
        return p.run(end, |k| p.newline(k) || p.at(k) == Some('/'));
    }
    p.spaces(i, white)
}

/// `[^\r\n\p{L}\p{N}]?[\p{Lu}...\p{M}]*[\p{Ll}...\p{M}]+C?|...`, then the rest of [`Cased`]: to `std::regex` all letters are
/// the same category, so the two forms of a word are one, `[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+C?`.
#[derive(Debug)]
pub struct Marked {
    pub numbers: usize,
}

impl Marked {
    pub(super) fn find(&self, p: &Piece, i: usize, white: &mut White) -> usize {
        let prefix = i < p.len() && !p.newline(i) && !p.letter(i) && !p.number(i);
        match letters_and_marks(p, i, prefix) {
            Some(end) => end + p.contraction(end, true),
            None => rest(p, i, self.numbers, white),
        }
    }
}

/// `X?[\p{L}\p{M}]+`, where `prefix` says that the first character is an X.
fn letters_and_marks(p: &Piece, i: usize, prefix: bool) -> Option<usize> {
    let inside = |k: usize| p.letter(k) || p.mark(k);
    let start = if prefix && inside(i + 1) { i + 1 } else { i };
    inside(start).then(|| p.run(start, inside))
}

/// ``[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*`` and
/// `|\s*[\r\n]+|\s+(?!\S)|\s+`.
#[derive(Debug)]
pub struct Punctuated {
    /// No line breaks behind symbols, and each line break for itself: Spark 2.5.
    pub single_breaks: bool,
}

impl Punctuated {
    pub(super) fn find(&self, p: &Piece, i: usize, white: &mut White) -> usize {
        let ascii_letter = |k: usize| p.at(k).is_some_and(|c| c.is_ascii_alphabetic());
        if p.at(i).is_some_and(|c| c.is_ascii_punctuation()) && ascii_letter(i + 1) {
            return p.run(i + 1, ascii_letter);
        }
        let symbol = |k: usize| p.is(k, |c| c.punctuation_or_symbol());
        let prefix = i < p.len() && !p.newline(i) && !p.letter(i) && !symbol(i);
        if let Some(end) = letters_and_marks(p, i, prefix) {
            return end;
        }
        let end = symbols(p, i, symbol);
        if end > i {
            return if self.single_breaks { end } else { p.run(end, |k| p.newline(k)) };
        }
        if !self.single_breaks {
            return p.spaces(i, white);
        }
        if p.newline(i) {
            return i + 1;
        }
        let run = p.white_run(i, white);
        if run.end > i + 1 && run.end < p.len() { run.end - 1 } else { run.end.max(i) }
    }
}

/// Kimi K2: runs of Han characters, then words of other letters with their contraction, then as LLaMA 3.
pub fn kimi(p: &Piece, i: usize, white: &mut White) -> usize {
    let han = |k: usize| p.at(k).is_some_and(is_han);
    if han(i) {
        return p.run(i, han);
    }
    let letter = |k: usize| p.letter(k) && !han(k);
    let prefix = !p.newline(i) && !p.letter(i) && !p.number(i);
    if letter(i) || prefix && letter(i + 1) {
        let end = p.run(i + 1, letter);
        return end + p.contraction(end, true);
    }
    if p.number(i) {
        return numbers(p, i, 3);
    }
    let end = symbols(p, i, |k| p.other(k));
    if end > i {
        return p.run(end, |k| p.newline(k));
    }
    p.spaces(i, white)
}

/// `unicode_cpt_is_han`.
fn is_han(c: char) -> bool {
    matches!(c as u32,
        0x4E00..=0x9FFF | 0x3400..=0x4DBF | 0x20000..=0x2A6DF | 0x2A700..=0x2B73F | 0x2B740..=0x2B81F
        | 0x2B820..=0x2CEAF | 0x2CEB0..=0x2EBEF | 0xF900..=0xFAFF | 0x2F800..=0x2FA1F)
}
