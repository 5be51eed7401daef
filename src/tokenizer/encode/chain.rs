//! The pieces of a word while they are merged: a list that is linked by index.

/// No neighbour.
pub const END: usize = usize::MAX;

/// A piece: `len` bytes from `start`; 0 once it is part of its left neighbour.
#[derive(Clone, Copy, Debug)]
pub struct Symbol {
    pub start: usize,
    pub len: usize,
    pub prev: usize,
    pub next: usize,
    /// What it is to the merges; unused by SentencePiece.
    pub id: u32,
}

/// Pieces in the order of the text.
#[derive(Debug, Default)]
pub struct Chain {
    pub symbols: Vec<Symbol>,
}

impl Chain {
    pub fn clear(&mut self) {
        self.symbols.clear();
    }

    /// Appends a piece.
    pub fn push(&mut self, start: usize, len: usize, id: u32) {
        let at = self.symbols.len();
        let prev = at.checked_sub(1).unwrap_or(END);
        if let Some(last) = self.symbols.last_mut() {
            last.next = at;
        }
        self.symbols.push(Symbol { start, len, prev, next: END, id });
    }

    /// Whether `left` and `right` are still what they were when `size` was their length together. Neighbours only grow, so
    /// an equal length means the same text.
    pub fn holds(&self, left: usize, right: usize, size: usize) -> bool {
        let (l, r) = (&self.symbols[left], &self.symbols[right]);
        l.len != 0 && r.len != 0 && l.len + r.len == size
    }

    /// Makes `right`, the right neighbour of `left`, a part of it.
    pub fn merge(&mut self, left: usize, right: usize) {
        let Symbol { len, next, .. } = self.symbols[right];
        self.symbols[right].len = 0;
        self.symbols[left].len += len;
        self.symbols[left].next = next;
        if next != END {
            self.symbols[next].prev = left;
        }
    }

    /// The pieces that are left.
    pub fn pieces(&self) -> impl Iterator<Item = &Symbol> {
        self.symbols.iter().filter(|s| s.len > 0)
    }
}
