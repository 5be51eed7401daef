//! The levels of a grid as the searches use them: numbers in f32, many at a time.

use crate::formats::grid;

/// Lanes of a sum: one AVX-512 register or two of AVX2.
pub const LANES: usize = 16;

/// Adding it rounds an f32 below 2²² to an integer, ties to even.
const MAGIC: f32 = 12_582_912.0;

/// Levels that a value can be rounded to.
pub trait Levels: Copy + Send + Sync {
    /// The level nearest to `t`; of NaN, some level.
    fn level(self, t: f32) -> f32;
    /// Its code.
    fn code(self, level: f32) -> u8;
    /// The level of a code.
    fn value(self, code: u8) -> f32;
    /// The lowest and the highest.
    fn ends(self) -> (f32, f32);
}

/// The integers `lo..=hi`.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    lo: f32,
    hi: f32,
}

impl Levels for Range {
    #[inline(always)]
    fn level(self, t: f32) -> f32 {
        (t.max(self.lo).min(self.hi) + MAGIC) - MAGIC
    }

    #[inline(always)]
    fn code(self, level: f32) -> u8 {
        (level - self.lo) as u8
    }

    #[inline(always)]
    fn value(self, code: u8) -> f32 {
        self.lo + f32::from(code)
    }

    #[inline(always)]
    fn ends(self) -> (f32, f32) {
        (self.lo, self.hi)
    }
}

/// Ascending values; unused places repeat the last.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    values: [f32; 16],
    borders: [f32; 15],
    steps: [f32; 15],
}

impl Levels for Table {
    #[inline(always)]
    fn level(self, t: f32) -> f32 {
        let mut level = self.values[0];
        for (border, step) in self.borders.iter().zip(&self.steps) {
            level += if t >= *border { *step } else { 0.0 };
        }
        level
    }

    #[inline(always)]
    fn code(self, level: f32) -> u8 {
        self.values[..15].iter().map(|v| u8::from(level > *v)).sum()
    }

    #[inline(always)]
    fn value(self, code: u8) -> f32 {
        self.values[usize::from(code)]
    }

    #[inline(always)]
    fn ends(self) -> (f32, f32) {
        (self.values[0], self.values[15])
    }
}

/// The levels of a grid.
#[derive(Clone, Copy, Debug)]
pub enum AnyLevels {
    Range(Range),
    Table(Table),
}

impl AnyLevels {
    pub fn of(levels: grid::Levels) -> AnyLevels {
        match levels {
            grid::Levels::Range { lo, hi } => AnyLevels::Range(Range { lo: lo as f32, hi: hi as f32 }),
            grid::Levels::Table(t) => {
                let values: [f32; 16] = std::array::from_fn(|i| f32::from(t[i.min(t.len() - 1)]));
                let border = |i: usize| if i + 1 < t.len() { (values[i] + values[i + 1]) / 2.0 } else { f32::MAX };
                let borders = std::array::from_fn(border);
                AnyLevels::Table(Table { values, borders, steps: std::array::from_fn(|i| values[i + 1] - values[i]) })
            }
        }
    }
}

impl AnyLevels {
    /// How many levels there are.
    pub fn count(&self) -> usize {
        match self {
            AnyLevels::Range(l) => (l.hi - l.lo) as usize + 1,
            AnyLevels::Table(l) => 1 + l.steps.iter().filter(|s| **s > 0.0).count(),
        }
    }

    /// How far the values that round to `level` reach below and above it; beyond the ends as far as half the mean distance.
    pub fn reach(&self, level: f32) -> (f32, f32) {
        match self {
            AnyLevels::Range(_) => (0.5, 0.5),
            AnyLevels::Table(l) => {
                let (count, i) = (self.count(), usize::from(l.code(level)));
                let beyond = (l.values[count - 1] - l.values[0]) / (count - 1) as f32 / 2.0;
                let below = if i == 0 { beyond } else { l.steps[i - 1] / 2.0 };
                (below, if i + 1 == count { beyond } else { l.steps[i] / 2.0 })
            }
        }
    }

    /// The level nearest to `t`, and its code.
    pub fn nearest(&self, t: f32) -> (f32, u8) {
        match self {
            AnyLevels::Range(l) => (l.level(t), l.code(l.level(t))),
            AnyLevels::Table(l) => (l.level(t), l.code(l.level(t))),
        }
    }

    /// The lowest and the highest.
    pub fn ends(&self) -> (f32, f32) {
        match self {
            AnyLevels::Range(l) => l.ends(),
            AnyLevels::Table(l) => l.ends(),
        }
    }
}

/// Sum of the lanes in a fixed order.
#[inline(always)]
pub fn total(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::grid::Grid;
    use crate::gguf::GgmlType;

    fn check(l: impl Levels, g: &Grid, codes: u8) {
        for c in 0..codes {
            assert_eq!(l.value(c), g.level(c), "{}", g.ty);
            assert_eq!(l.code(l.value(c)), c, "{}", g.ty);
        }
        for i in -3000..3000 {
            let t = i as f32 * 0.0617;
            let nearest = (0..codes).map(|c| (g.level(c) - t).abs()).fold(f32::MAX, f32::min);
            assert_eq!((l.level(t) - t).abs(), nearest, "{} at {t}", g.ty);
        }
    }

    #[test]
    fn levels_are_the_nearest_of_the_grid() {
        for g in GgmlType::ALL.iter().filter_map(|&t| Grid::of(t)) {
            match (AnyLevels::of(g.levels), g.levels) {
                (AnyLevels::Range(r), grid::Levels::Range { lo, hi }) => check(r, &g, (hi - lo + 1) as u8),
                (AnyLevels::Table(t), grid::Levels::Table(v)) => check(t, &g, v.len() as u8),
                _ => unreachable!(),
            }
        }
    }
}
