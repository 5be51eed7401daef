//! Lattices: a codebook with, for every point off it, the list of its near grid points.
//!
//! ggml (`iq2xs_init_impl`, `iq3xs_init_impl`) sorts the whole grid by (squared distance, index) for every point and
//! cuts the list after `nwant` distinct distances, keeping all ties. The order is total, so the tables are determined.
//! Here only points that an encoder can reach (digits 0..=2 of the 2-bit codes) get a list, distances come from two
//! half-code tables, and the points of each wanted distance are collected in one pass, which takes milliseconds.
//!
//! Lists are kept as blocks of eight codes for the vector search; the last block is filled up with [`PAD`] (2-bit) or
//! with the list's last point (3-bit), neither of which can be chosen before a listed point.

use super::grids;
use std::sync::OnceLock;

/// Filler of 2-bit lists: digit 3 everywhere, which stands for no coordinate.
pub const PAD: u16 = 0xffff;

/// What the lattice knows of a code: where its list starts, how long it is, and whether the code is on the grid (its
/// list then is the code itself).
#[derive(Clone, Copy, Default)]
pub struct Entry(u32);

impl Entry {
    fn new(first_block: usize, len: usize, on_grid: bool) -> Entry {
        assert!(first_block < 1 << 16 && len < 1 << 15);
        Entry((first_block as u32) << 16 | (len as u32) << 1 | u32::from(on_grid))
    }

    #[inline]
    pub fn on_grid(self) -> bool {
        self.0 & 1 == 1
    }

    /// Number of points in the list; 0 for codes that no encoder forms.
    #[inline]
    pub fn count(self) -> usize {
        (self.0 >> 1 & 0x7fff) as usize
    }

    /// Range of blocks of the list.
    #[inline]
    pub fn blocks(self) -> std::ops::Range<usize> {
        let first = (self.0 >> 16) as usize;
        first..first + self.count().div_ceil(8)
    }
}

/// A codebook and its neighbour lists.
pub struct Lattice {
    /// The code of each grid index.
    codes: &'static [u16],
    entries: Vec<Entry>,
    blocks: Vec<[u16; 8]>,
    index: Vec<u16>,
}

impl Lattice {
    /// `BITS` per digit, digits `0..digits`, lists of the `nwant` smallest distances.
    fn new(codes: &'static [u16], bits: u32, digits: u16, nwant: usize) -> Lattice {
        let dims = 16 / (bits + bits % 2);
        let half_bits = bits * dims / 2;
        let digit = |code: usize, i: u32| (code >> (bits * i) & ((1 << bits) - 1)) as i32;
        let half = |a: usize, b: usize| (0..dims / 2).map(|i| (digit(a, i) - digit(b, i)).pow(2)).sum::<i32>() as u8;
        // Squared distances (in digits, a quarter of those in coordinates) between all half codes.
        let n_half = 1usize << half_bits;
        let table: Vec<u8> = (0..n_half * n_half).map(|ab| half(ab / n_half, ab % n_half)).collect();
        let row = |h: usize| &table[h * n_half..][..n_half];
        let split: Vec<(usize, usize)> =
            codes.iter().map(|&c| (usize::from(c) % n_half, usize::from(c) / n_half)).collect();

        let n_codes = (0..dims).fold(0, |n, i| n | usize::from(digits - 1) << (bits * i)) + 1;
        let mut index = vec![u16::MAX; n_codes];
        for (i, &c) in codes.iter().enumerate() {
            index[usize::from(c)] = i as u16;
        }
        let mut entries = vec![Entry::default(); n_codes];
        let mut blocks = Vec::new();
        let mut d2 = vec![0u8; codes.len()];
        let mut list = Vec::new();
        for code in 0..n_codes {
            if (0..dims).any(|i| digit(code, i) >= i32::from(digits)) {
                continue;
            }
            let on_grid = index[code] != u16::MAX;
            list.clear();
            if on_grid {
                list.push(code as u16);
            } else {
                let (lo, hi) = (row(code % n_half), row(code / n_half));
                let mut seen = [0u64; 4];
                for (d, &(l, h)) in d2.iter_mut().zip(&split) {
                    *d = lo[l] + hi[h];
                    seen[usize::from(*d) / 64] |= 1 << (*d % 64);
                }
                let wanted = (0..=255u8).filter(|&d| seen[usize::from(d) / 64] >> (d % 64) & 1 == 1).take(nwant);
                for want in wanted {
                    list.extend(d2.iter().zip(codes).filter(|(d, _)| **d == want).map(|(_, &c)| c));
                }
            }
            entries[code] = Entry::new(blocks.len(), list.len(), on_grid);
            let fill = if bits == 2 { PAD } else { list[list.len() - 1] };
            for chunk in list.chunks(8) {
                let mut block = [fill; 8];
                block[..chunk.len()].copy_from_slice(chunk);
                blocks.push(block);
            }
        }
        Lattice { codes, entries, blocks, index }
    }

    /// Grid indices to codes.
    pub fn codes(&self) -> &'static [u16] {
        self.codes
    }

    /// What is known of a code that an encoder can form.
    #[inline]
    pub fn entry(&self, code: u32) -> Entry {
        self.entries[code as usize]
    }

    /// The blocks of a list.
    #[inline]
    pub fn blocks(&self, entry: Entry) -> &[[u16; 8]] {
        &self.blocks[entry.blocks()]
    }

    /// The grid index of a code on the grid.
    #[inline]
    pub fn index(&self, code: u32) -> u32 {
        let i = self.index[code as usize];
        debug_assert_ne!(i, u16::MAX, "code {code:#x} is not on the grid");
        u32::from(i)
    }
}

macro_rules! lattices {
    ($($(#[$doc:meta])* $name:ident($($arg:expr),*);)*) => {
        $($(#[$doc])* pub fn $name() -> &'static Lattice {
            static LATTICE: OnceLock<Lattice> = OnceLock::new();
            LATTICE.get_or_init(|| Lattice::new($($arg),*))
        })*
    };
}

lattices! {
    /// IQ2_XXS.
    iq2_xxs(&grids::GRID2_256, 2, 3, 2);
    /// IQ2_XS.
    iq2_xs(&grids::GRID2_512, 2, 3, 2);
    /// IQ2_S.
    iq2_s(&grids::GRID2_1024, 2, 3, 1);
    /// IQ1_S and IQ1_M.
    iq1(&grids::GRID1_2048, 2, 3, 3);
    /// IQ3_XXS.
    iq3_xxs(&grids::GRID3_256, 3, 8, 2);
    /// IQ3_S.
    iq3_s(&grids::GRID3_512, 3, 8, 3);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition: sort everything, cut after `nwant` distances.
    fn by_sorting(codes: &[u16], point: u32, bits: u32, nwant: usize) -> Vec<u16> {
        let digit = |c: u32, i: u32| (c >> (bits * i) & ((1 << bits) - 1)) as i32;
        let d2 = |c: u16| (0..16 / bits).map(|i| (digit(u32::from(c), i) - digit(point, i)).pow(2)).sum::<i32>();
        let mut all: Vec<(i32, usize)> = codes.iter().enumerate().map(|(i, &c)| (d2(c), i)).collect();
        all.sort();
        let mut distances: Vec<i32> = all.iter().map(|a| a.0).collect();
        distances.dedup();
        let last = distances[nwant - 1];
        all.iter().filter(|a| a.0 <= last).map(|a| codes[a.1]).collect()
    }

    #[test]
    fn lists_are_those_of_the_full_sort() {
        for (lattice, bits, nwant) in
            [(iq2_xxs(), 2, 2), (iq2_xs(), 2, 2), (iq2_s(), 2, 1), (iq1(), 2, 3), (iq3_xxs(), 3, 2), (iq3_s(), 3, 3)]
        {
            let mut checked = 0;
            for point in (0..lattice.entries.len() as u32).step_by(7) {
                let entry = lattice.entry(point);
                if entry.on_grid() || entry.count() == 0 {
                    continue;
                }
                let list: Vec<u16> = lattice.blocks(entry).iter().flatten().copied().take(entry.count()).collect();
                assert_eq!(list, by_sorting(lattice.codes(), point, bits, nwant), "point {point:#x}");
                checked += 1;
            }
            assert!(checked > 400);
        }
    }
}
