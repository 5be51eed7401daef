//! Hadamard matrices: entries ±1, `H Hᵀ = n I`. With random signs and scaled to length 1 they are the rotations of QuaRot.
//!
//! Orders `2^k m` are the Kronecker product of Sylvester's `2^k` with a base of order `m`: Paley's constructions for primes
//! (1933; I: `m - 1 ≡ 3`, II: `m / 2 - 1 ≡ 1` mod 4), or four symmetric circulants of Williamson's (1944). That covers
//! the bases of QuaRot and SpinQuant (12 20 28 36 40 44 52 60 108 140 156 172) and many more.

use super::random::Random;

/// Four symmetric circulants of order `n`, first rows `1 ± …`, with `A² + B² + C² + D² = 4n I`: bit `i` of a number says that
/// orbit `i` is negative. An orbit is that of the i-th smallest number not yet seen under `-1` and `multiplier`.
struct Williamson {
    n: usize,
    multiplier: usize,
    rows: [u32; 4],
}

/// Found by search among sequences of these symmetries; the test multiplies them out.
const WILLIAMSON: &[Williamson] = &[
    Williamson { n: 13, multiplier: 1, rows: [3, 20, 25, 49] },
    Williamson { n: 23, multiplier: 1, rows: [43, 339, 412, 1819] },
    Williamson { n: 39, multiplier: 1, rows: [248183, 179255, 88569, 512838] },
    Williamson { n: 43, multiplier: 6, rows: [7, 46, 52, 98] },
];

impl Williamson {
    /// `[[A B C D] [-B A -D C] [-C D A -B] [-D -C B A]]`.
    fn matrix(&self) -> Vec<i8> {
        let n = self.n;
        let mut orbit = vec![usize::MAX; n];
        let mut count = 0;
        for x in 1..n {
            if orbit[x] != usize::MAX {
                continue;
            }
            let mut y = x;
            loop {
                (orbit[y], orbit[n - y]) = (count, count);
                y = y * self.multiplier % n;
                if y == x {
                    break;
                }
            }
            count += 1;
        }
        let rows = self.rows.map(|bits| {
            let sign = |i: usize| if i > 0 && bits >> orbit[i] & 1 == 1 { -1i8 } else { 1 };
            (0..n).map(sign).collect::<Vec<i8>>()
        });
        const PLACES: [[(i8, usize); 4]; 4] = [
            [(1, 0), (1, 1), (1, 2), (1, 3)],
            [(-1, 1), (1, 0), (-1, 3), (1, 2)],
            [(-1, 2), (1, 3), (1, 0), (-1, 1)],
            [(-1, 3), (-1, 2), (1, 1), (1, 0)],
        ];
        let at = |i: usize, j: usize| {
            let (sign, which) = PLACES[i / n][j / n];
            sign * rows[which][(j % n + n - i % n) % n]
        };
        (0..16 * n * n).map(|x| at(x / (4 * n), x % (4 * n))).collect()
    }
}

fn is_prime(n: usize) -> bool {
    n > 1 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

/// The quadratic character of every residue of the prime `q`.
fn character(q: usize) -> Vec<i8> {
    let mut chi = vec![-1i8; q];
    chi[0] = 0;
    (1..q).for_each(|x| chi[x * x % q] = 1);
    chi
}

/// Paley's conference matrix of order `q + 1`, symmetric for `q ≡ 1`, antisymmetric for `q ≡ 3` mod 4; 0 on the diagonal.
fn conference(q: usize) -> Vec<i8> {
    let (chi, n) = (character(q), q + 1);
    let border = if q % 4 == 1 { 1 } else { -1 };
    let at = |i: usize, j: usize| match (i, j) {
        (0, 0) => 0,
        (0, _) => 1,
        (_, 0) => border,
        // chi(-1) is 1 or -1 with q mod 4: the core has the symmetry of the border
        (i, j) => chi[(j + q - i) % q],
    };
    (0..n * n).map(|x| at(x / n, x % n)).collect()
}

/// A base of order `m`, where a construction is known here.
fn base(m: usize) -> Option<Vec<i8>> {
    if m <= 1 {
        return (m == 1).then(|| vec![1]);
    }
    if !m.is_multiple_of(4) {
        return None;
    }
    if is_prime(m - 1) {
        let mut h = conference(m - 1);
        (0..m).for_each(|i| h[i * m + i] = 1);
        return Some(h);
    }
    let half = m / 2;
    if half % 4 == 2 && is_prime(half - 1) {
        let c = conference(half - 1);
        // every 0 becomes [1 -1; -1 -1], every ±1 ±[1 1; 1 -1]
        let at = |i: usize, j: usize| match (c[i / 2 * half + j / 2], i % 2, j % 2) {
            (0, 0, 0) => 1,
            (0, ..) => -1,
            (s, 1, 1) => -s,
            (s, ..) => s,
        };
        return Some((0..m * m).map(|x| at(x / m, x % m)).collect());
    }
    WILLIAMSON.iter().find(|w| 4 * w.n == m).map(Williamson::matrix)
}

/// A Hadamard matrix of order `n`, row-major; `None` where no construction is known here.
pub fn hadamard(n: usize) -> Option<Vec<i8>> {
    let (m, small) = split(n)?;
    let at = |i: usize, j: usize| {
        let sylvester = if ((i / m) & (j / m)).count_ones().is_multiple_of(2) { 1 } else { -1 };
        sylvester * small[i % m * m + j % m]
    };
    Some((0..n * n).map(|x| at(x / n, x % n)).collect())
}

/// The base that leaves the largest power of two: its order and entries.
fn split(n: usize) -> Option<(usize, Vec<i8>)> {
    if n == 0 {
        return None;
    }
    let odd = n >> n.trailing_zeros();
    (0..=n.trailing_zeros()).map(|j| odd << j).find_map(|m| Some((m, base(m)?)))
}

/// The largest order that divides `n` and has a Hadamard matrix here.
pub fn order(n: usize) -> usize {
    (1..=n).rev().find(|&b| n.is_multiple_of(b) && split(b).is_some()).unwrap_or(1)
}

/// `D H / √b`: an orthogonal matrix `[n, n]` of Hadamard blocks of [`order`] along the diagonal and random signs `D`.
pub fn rotation(n: usize, random: &mut Random) -> Vec<f64> {
    let b = order(n);
    let h = hadamard(b).expect("an order with a matrix");
    let scale = 1.0 / (b as f64).sqrt();
    let mut r = vec![0.0; n * n];
    for i in 0..n {
        let (first, length) = (i / b * b, if random.bit() { scale } else { -scale });
        let row = &mut r[i * n + first..][..b];
        row.iter_mut().zip(&h[i % b * b..]).for_each(|(r, h)| *r = f64::from(*h) * length);
    }
    r
}

/// The rotation `H / √n` without its matrix: n log n operations for the power of two, n m for the base of order m.
#[derive(Clone, Debug, PartialEq)]
pub struct Fast {
    n: usize,
    /// The base \[m, m\] and its order.
    base: Vec<f32>,
    m: usize,
}

impl Fast {
    /// Of order `n`, or of blocks of [`order`] along the diagonal where `n` has no matrix.
    pub fn new(n: usize) -> Fast {
        let n = order(n);
        let (m, base) = split(n).expect("an order with a matrix");
        let scale = 1.0 / (n as f32).sqrt();
        Fast { n, base: base.iter().map(|v| f32::from(*v) * scale).collect(), m }
    }

    /// `x ← x H` for every run of [`order`] values of `x`.
    pub fn apply(&self, x: &mut [f32]) {
        x.chunks_exact_mut(self.n).for_each(|x| self.one(x, false));
    }

    /// `x ← x Hᵀ`.
    pub fn undo(&self, x: &mut [f32]) {
        x.chunks_exact_mut(self.n).for_each(|x| self.one(x, true));
    }

    fn one(&self, x: &mut [f32], back: bool) {
        let (n, m) = (self.n, self.m);
        let mut half = m;
        while half < n {
            for pair in x.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                a.iter_mut().zip(b).for_each(|(a, b)| (*a, *b) = (*a + *b, *a - *b));
            }
            half *= 2;
        }
        if m == 1 {
            return x.iter_mut().for_each(|v| *v *= self.base[0]);
        }
        let mut out = vec![0f32; m];
        for x in x.chunks_exact_mut(m) {
            out.fill(0.0);
            for (i, v) in x.iter().enumerate() {
                if back {
                    out.iter_mut().enumerate().for_each(|(j, o)| *o += v * self.base[j * m + i]);
                } else {
                    out.iter_mut().zip(&self.base[i * m..][..m]).for_each(|(o, h)| *o += v * h);
                }
            }
            x.copy_from_slice(&out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(n: usize) {
        let h = hadamard(n).unwrap_or_else(|| panic!("order {n}"));
        for i in 0..n {
            for j in 0..=i {
                let dot: i32 = (0..n).map(|k| i32::from(h[i * n + k]) * i32::from(h[j * n + k])).sum();
                assert_eq!(dot, if i == j { n as i32 } else { 0 }, "order {n}, rows {i} and {j}");
            }
        }
    }

    #[test]
    fn rows_are_orthogonal() {
        for n in [1, 2, 4, 12, 20, 28, 36, 40, 44, 52, 60, 92, 108, 140, 156, 172, 576, 64] {
            check(n);
        }
    }

    #[test]
    fn the_fast_rotation_is_that_of_the_matrix() {
        for n in [1, 2, 64, 12, 40, 1280, 96, 6] {
            let (fast, b) = (Fast::new(n), order(n));
            let h = hadamard(b).unwrap();
            let x: Vec<f32> = (0..n).map(|i| (i * i % 17) as f32 - 7.5).collect();
            let mut y = x.clone();
            fast.apply(&mut y);
            for (j, y) in y.iter().enumerate() {
                let first = j / b * b;
                let terms = (0..b).map(|i| f64::from(x[first + i]) * f64::from(h[i * b + j % b]));
                let want = terms.sum::<f64>() / (b as f64).sqrt();
                assert!((f64::from(*y) - want).abs() < 1e-4, "{n}: {y} {want}");
            }
            fast.undo(&mut y);
            assert!(x.iter().zip(&y).all(|(x, y)| (x - y).abs() < 1e-5), "{n}");
        }
    }

    #[test]
    fn orders_without_a_matrix_fall_into_blocks() {
        assert!(hadamard(6).is_none() && hadamard(0).is_none());
        assert_eq!([6, 64, 576, 1, 7].map(order), [2, 64, 576, 1, 1]);
        for n in [6, 12, 24, 7] {
            let r = rotation(n, &mut Random::new(3));
            for (i, j) in (0..n * n).map(|x| (x / n, x % n)) {
                let dot: f64 = (0..n).map(|k| r[k * n + i] * r[k * n + j]).sum();
                assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-14, "{n}");
            }
        }
    }
}
