//! The split search of IQ1: the best cut of a sorted sub-block into the codes 0, 1, 2.
//!
//! With three values in ascending order the best code is monotonic in x, so all pairs `i1 <= i2` of cuts of the sorted
//! elements are tried, in order, for each choice of the shift (+1/8 or −1/8 on all three values; IQ1_M chooses for each
//! half of 16). Prefix sums make each trial a few operations. A trial wins if it explains more of the sum of squares
//! than the best so far, so the first of equals stays. `simd::iq_split` does eight `i2` at a time.

#[cfg(target_arch = "x86_64")]
use crate::formats::simd::iq_scan::Avx2;

/// The three values without scale, for shift + and shift −; `IQ1S_DELTA` = `IQ1M_DELTA` = 1/8.
pub const SHIFTED: [[f32; 3]; 2] = [[-0.875, 0.125, 1.125], [-1.125, -0.125, 0.875]];

/// A split: the first `i1` sorted elements get code 0, those up to `i2` code 1, the rest code 2. `combo` has the shifts:
/// 0 or 1 for IQ1_S (+, −), 0..=3 for IQ1_M (++, +−, −+, −−).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Split {
    pub i1: usize,
    pub i2: usize,
    pub combo: usize,
    pub scale: f32,
}

/// Best split so far, and the score of the first one taken.
pub struct Best {
    pub score: f32,
    pub first: f32,
    pub split: Option<Split>,
}

impl Best {
    /// Nothing taken yet; `score` is to be exceeded (`-f32::MAX`: anything will do).
    pub fn from_score(score: f32) -> Best {
        Best { score, first: f32::NEG_INFINITY, split: None }
    }

    /// Takes a split if it is better.
    #[inline]
    pub fn offer(&mut self, i1: usize, i2: usize, combo: usize, sumqx: f32, sumq2: f32) {
        if sumq2 > 0.0 && sumqx * sumqx > self.score * sumq2 {
            let scale = sumqx / sumq2;
            self.score = scale * sumqx;
            if self.split.is_none() {
                self.first = self.score;
            }
            self.split = Some(Split { i1, i2, combo, scale });
        }
    }
}

/// Indices of the elements in ascending order, equal values (and −0, 0) by index: what glibc's `qsort` gives.
pub fn order<const N: usize>(x: &[f32; N]) -> [u8; N] {
    let mut rank = [0u32; N];
    for (j, &xj) in x.iter().enumerate() {
        for (i, r) in rank.iter_mut().enumerate() {
            *r += u32::from(xj < x[i]) | (u32::from(xj == x[i]) & u32::from(j < i));
        }
    }
    let mut order = [0; N];
    for (i, r) in rank.into_iter().enumerate() {
        order[r as usize] = i as u8;
    }
    order
}

/// Prefix sums over a sorted sub-block of 32: `x[j]` = Σ w·x and `w[j]` = Σ w of the first `j` elements. Places past
/// 32 are NaN, which no comparison accepts.
pub struct Sums32 {
    pub x: [f32; 40],
    pub w: [f32; 40],
}

impl Sums32 {
    pub fn new(x: &[f32; 32], w: &[f32; 32], order: &[u8; 32]) -> Sums32 {
        let mut s = Sums32 { x: [f32::NAN; 40], w: [f32::NAN; 40] };
        (s.x[0], s.w[0]) = (0.0, 0.0);
        for (j, &i) in order.iter().enumerate() {
            let i = usize::from(i);
            s.x[j + 1] = s.x[j] + w[i] * x[i];
            s.w[j + 1] = s.w[j] + w[i];
        }
        s
    }
}

/// The search of `quantize_row_iq1_s_impl`.
pub fn best_split_32(s: &Sums32) -> Option<Split> {
    #[cfg(target_arch = "x86_64")]
    if let Some(isa) = Avx2::get() {
        return isa.best_split_32(s);
    }
    best_split_32_scalar(s)
}

pub fn best_split_32_scalar(s: &Sums32) -> Option<Split> {
    let mut best = Best::from_score(-f32::MAX);
    for i1 in 0..=32 {
        for i2 in i1..=32 {
            for (combo, v) in SHIFTED.iter().enumerate() {
                let (x, w) = (&s.x, &s.w);
                let sumqx = (x[i1] - x[0]) * v[0] + (x[i2] - x[i1]) * v[1] + (x[32] - x[i2]) * v[2];
                let sumq2 =
                    (w[i1] - w[0]) * v[0] * v[0] + (w[i2] - w[i1]) * v[1] * v[1] + (w[32] - w[i2]) * v[2] * v[2];
                best.offer(i1, i2, combo, sumqx, sumq2);
            }
        }
    }
    best.split
}

/// Prefix sums over a sorted sub-block of 16, kept apart for its two halves (of the unsorted elements). Places past 16
/// are NaN.
pub struct Sums16 {
    pub x: [[f32; 24]; 2],
    pub w: [[f32; 24]; 2],
}

impl Sums16 {
    pub fn new(x: &[f32; 16], w: &[f32; 16], order: &[u8; 16]) -> Sums16 {
        let mut s = Sums16 { x: [[f32::NAN; 24]; 2], w: [[f32::NAN; 24]; 2] };
        for h in 0..2 {
            (s.x[h][0], s.w[h][0]) = (0.0, 0.0);
        }
        for (j, &i) in order.iter().enumerate() {
            let i = usize::from(i);
            let h = i / 8;
            s.x[h][j + 1] = s.x[h][j] + w[i] * x[i];
            s.w[h][j + 1] = s.w[h][j] + w[i];
            s.x[1 - h][j + 1] = s.x[1 - h][j];
            s.w[1 - h][j + 1] = s.w[1 - h][j];
        }
        s
    }
}

/// Differences of the squares of the values, `v0² − v1²` and `v1² − v2²`, for shift + and −.
pub const SQUARE_STEPS: [[f32; 2]; 2] = [[0.75, -1.25], [1.25, -0.75]];

/// The search of `quantize_row_iq1_m_impl`: as the three values are 1 apart, `Σ q·x` is `T·v2 − px[i1] − px[i2]`.
pub fn best_split_16(s: &Sums16) -> Option<Split> {
    #[cfg(target_arch = "x86_64")]
    if let Some(isa) = Avx2::get() {
        return isa.best_split_16(s);
    }
    best_split_16_scalar(s)
}

pub fn best_split_16_scalar(s: &Sums16) -> Option<Split> {
    let mut best = Best::from_score(-f32::MAX);
    for i1 in 0..=16 {
        for i2 in i1..=16 {
            // [half][shift]
            let (mut qx, mut q2) = ([[0.0; 2]; 2], [[0.0; 2]; 2]);
            for h in 0..2 {
                let (x, w) = (&s.x[h], &s.w[h]);
                let sx = x[i1] + x[i2];
                for (v, (values, steps)) in SHIFTED.iter().zip(&SQUARE_STEPS).enumerate() {
                    qx[h][v] = x[16] * values[2] - sx;
                    q2[h][v] = w[16] * values[2] * values[2] + w[i1] * steps[0] + w[i2] * steps[1];
                }
            }
            for combo in 0..4 {
                let (a, b) = (combo / 2, combo % 2);
                best.offer(i1, i2, combo, qx[0][a] + qx[1][b], q2[0][a] + q2[1][b]);
            }
        }
    }
    best.split
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_the_differences_of_squares() {
        for (v, s) in SHIFTED.iter().zip(&SQUARE_STEPS) {
            assert_eq!(*s, [v[0] * v[0] - v[1] * v[1], v[1] * v[1] - v[2] * v[2]]);
        }
    }

    #[test]
    fn order_is_stable() {
        let x = [0.0, -0.0, 1.0, -1.0, 0.0, 1.0, -1.0, 2.0];
        assert_eq!(order(&x), [3, 6, 0, 1, 4, 2, 5, 7]);
    }
}
