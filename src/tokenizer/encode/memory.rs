//! What a word became the last time: most words of a text have been there before.

use std::collections::HashMap;
use std::ops::Range;

/// Longer words are not remembered: they do not come back.
const LONGEST: usize = 64;

/// Words of one text, and where their ids stand in the output.
#[derive(Debug, Default)]
pub struct Memory<'t> {
    places: HashMap<&'t str, Range<usize>>,
}

impl<'t> Memory<'t> {
    /// Appends the ids of `word`: those from before, or those that `make` appends. `out` only ever grows.
    pub fn recall(&mut self, word: &'t str, out: &mut Vec<u32>, make: impl FnOnce(&mut Vec<u32>)) {
        if let Some(place) = self.places.get(word) {
            out.extend_from_within(place.clone());
            return;
        }
        let from = out.len();
        make(out);
        if word.len() <= LONGEST {
            self.places.insert(word, from..out.len());
        }
    }
}
