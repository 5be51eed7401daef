//! The nearest point of a vector codebook in the norm of a few columns.
//!
//! A *unit* is what is decided together: the columns of one point, or of two where two share a parity of signs. Its norm is
//! `‖e R‖²` for an error `e`, with `R` upper triangular: as in the block LDL of QuIP# (Tseng et al. 2024, § 4), the cost of
//! an error when all later columns make up for it, with `R = U⁻¹` of the unit's own block of the factor; or, with
//! `R Rᵀ = H` of the unit's block of the Hessian, when all others stay. [`nearest`] goes through all points, sixteen at a
//! time: signs are decided column by column, each with what the columns before it left (Babai); where the number of minus
//! signs must be even and is not, the one sign that costs least is turned.

use super::factor::Factor;
use crate::formats::iq::codebook::{Codebook, LANES};

/// Most columns of a unit.
pub const UNIT: usize = 8;

/// The norm of a unit.
#[derive(Clone, Copy, Default)]
pub struct Norm {
    /// Upper triangular.
    r: [[f32; UNIT]; UNIT],
    /// Squared length of each row inside the columns of its own point.
    lengths: [f32; UNIT],
}

/// A choice for a unit.
#[derive(Clone, Copy, Debug, Default)]
pub struct Chosen {
    pub points: [u16; 2],
    pub signs: u8,
    /// What it stands for.
    pub values: [f32; UNIT],
    /// `e R`.
    pub z: [f32; UNIT],
    /// `‖e R‖²`.
    pub cost: f32,
}

/// Norms of all units of a matrix.
pub struct Norms {
    /// Later columns make up for errors.
    pub later: Vec<Norm>,
    /// All other columns stay.
    pub alone: Vec<Norm>,
    /// Inverse of the unit's block of the Hessian.
    pub inverse: Vec<[[f32; UNIT]; UNIT]>,
}

/// Columns of a unit.
pub fn unit(c: &Codebook) -> usize {
    if c.even { UNIT } else { c.dim }
}

type Square = [[f64; UNIT]; UNIT];

impl Norm {
    fn new(r: &Square, dim: usize) -> Norm {
        let mut norm = Norm::default();
        for (i, row) in r.iter().enumerate() {
            let end = (i / dim + 1) * dim;
            norm.lengths[i] = row[..end].iter().map(|v| v * v).sum::<f64>() as f32;
            norm.r[i] = row.map(|v| v as f32);
        }
        norm
    }
}

/// The inverse of an upper triangle of `k` columns.
fn invert_upper(a: &Square, k: usize) -> Square {
    let mut x = Square::default();
    for j in 0..k {
        x[j][j] = 1.0 / a[j][j];
        for i in (0..j).rev() {
            let sum: f64 = (i + 1..=j).map(|l| a[i][l] * x[l][j]).sum();
            x[i][j] = -sum / a[i][i];
        }
    }
    x
}

/// `R` upper triangular with `R Rᵀ = a`.
fn upper_factor(a: &Square, k: usize) -> Square {
    let mut r = Square::default();
    for j in (0..k).rev() {
        let rest: f64 = r[j][j + 1..].iter().map(|v| v * v).sum();
        // the Hessian is damped: what is left is above zero but for rounding
        r[j][j] = (a[j][j] - rest).max(1e-12 * a[j][j]).max(f64::MIN_POSITIVE).sqrt();
        for i in 0..j {
            let sum: f64 = (j + 1..k).map(|l| r[i][l] * r[j][l]).sum();
            r[i][j] = (a[i][j] - sum) / r[j][j];
        }
    }
    r
}

impl Norms {
    pub fn new(c: &Codebook, f: &Factor) -> Norms {
        let k = unit(c);
        let mut norms = Norms { later: Vec::new(), alone: Vec::new(), inverse: Vec::new() };
        for at in (0..f.n).step_by(k) {
            let (mut u, mut h) = (Square::default(), Square::default());
            for i in 0..k {
                for j in 0..k {
                    u[i][j] = f.u[(at + i) * f.n + at + j].into();
                    h[i][j] = f.h[(at + i) * f.n + at + j].into();
                }
            }
            let r = upper_factor(&h, k);
            let back = invert_upper(&r, k);
            // H⁻¹ = R⁻ᵀ R⁻¹
            let mut inverse = [[0f32; UNIT]; UNIT];
            for i in 0..k {
                for j in 0..k {
                    inverse[i][j] = (0..k).map(|l| back[l][i] * back[l][j]).sum::<f64>() as f32;
                }
            }
            norms.later.push(Norm::new(&invert_upper(&u, k), c.dim));
            norms.alone.push(Norm::new(&r, c.dim));
            norms.inverse.push(inverse);
        }
        norms
    }
}

/// The best point for columns `at..at + K` of a unit by parity of its signs (where parity is free, the best of all comes
/// first): its index. `t` is `w R` of the columns and what those before them left.
#[inline(always)]
fn scan<const K: usize, const EVEN: bool>(c: &Codebook, norm: &Norm, at: usize, t: &[f32; K], scale: f32) -> [u16; 2] {
    let mut r = [[0f32; K]; K];
    let mut lengths = [0f32; K];
    for (i, row) in r.iter_mut().enumerate() {
        lengths[i] = 4.0 * norm.lengths[at + i];
        row.copy_from_slice(&norm.r[at + i][at..at + K]);
    }
    let mut best = [[f32::MAX; LANES]; 2];
    let mut place = [[0u32; LANES]; 2];
    for (b, points) in c.points.iter().enumerate() {
        let (mut v, mut z) = ([[0f32; LANES]; K], [[0f32; LANES]; K]);
        let mut cost = [0f32; LANES];
        let mut parity = [0u32; LANES];
        for j in 0..K {
            let mut left = [t[j]; LANES];
            for i in 0..j {
                for l in 0..LANES {
                    left[l] -= v[i][l] * r[i][j];
                }
            }
            for l in 0..LANES {
                v[j][l] = (scale * points[j][l]).copysign(left[l]);
                z[j][l] = left[l] - v[j][l] * r[j][j];
                cost[l] += z[j][l] * z[j][l];
                parity[l] ^= left[l].to_bits();
            }
        }
        let mut costs = [cost; 2];
        if EVEN {
            let mut turn = [f32::MAX; LANES];
            for i in 0..K {
                let mut along = [0f32; LANES];
                for j in i..K {
                    for l in 0..LANES {
                        along[l] += z[j][l] * r[i][j];
                    }
                }
                for l in 0..LANES {
                    // e loses v and gains it with the other sign
                    turn[l] = turn[l].min(v[i][l] * (4.0 * along[l] + v[i][l] * lengths[i]));
                }
            }
            for l in 0..LANES {
                let odd = (parity[l] >> 31) as f32;
                costs[0][l] = cost[l] + odd * turn[l];
                costs[1][l] = cost[l] + (1.0 - odd) * turn[l];
            }
        }
        for p in 0..if EVEN { 2 } else { 1 } {
            for l in 0..LANES {
                let better = costs[p][l] < best[p][l];
                best[p][l] = if better { costs[p][l] } else { best[p][l] };
                place[p][l] = if better { b as u32 } else { place[p][l] };
            }
        }
    }
    let mut found = [0u16; 2];
    for p in 0..2 {
        let mut least = f32::MAX;
        for l in 0..LANES {
            let point = (place[p][l] as usize * LANES + l) as u16;
            if best[p][l] < least || (best[p][l] == least && point < found[p]) {
                (least, found[p]) = (best[p][l], point);
            }
        }
    }
    found
}

/// Signs of a point as [`scan`] decides them; `odd`: what the number of minus signs must be, if it must.
#[inline(always)]
fn place<const K: usize>(
    (c, norm, at): (&Codebook, &Norm, usize),
    t: &[f32; K],
    scale: f32,
    (point, odd): (u16, Option<bool>),
    out: &mut Chosen,
) {
    let magnitudes = c.magnitudes(point);
    let row = |i: usize| &norm.r[at + i][at..at + K];
    let (mut v, mut z) = ([0f32; K], *t);
    let mut signs = 0u8;
    for j in 0..K {
        let value = (scale * magnitudes[j]).copysign(z[j]);
        signs |= u8::from(value.is_sign_negative()) << j;
        z[j..].iter_mut().zip(&row(j)[j..]).for_each(|(z, r)| *z -= value * r);
        v[j] = value;
    }
    if odd.is_some_and(|odd| odd != (signs.count_ones() % 2 == 1)) {
        let mut least = (f32::MAX, 0);
        for (i, v) in v.iter().enumerate() {
            let along: f32 = z[i..].iter().zip(&row(i)[i..]).map(|(z, r)| z * r).sum();
            let turn = v * (4.0 * along + v * 4.0 * norm.lengths[at + i]);
            if turn < least.0 {
                least = (turn, i);
            }
        }
        let i = least.1;
        signs ^= 1 << i;
        z[i..].iter_mut().zip(&row(i)[i..]).for_each(|(z, r)| *z += 2.0 * v[i] * r);
        v[i] = -v[i];
    }
    out.points[at / K] = point;
    out.signs |= signs << at;
    out.values[at..at + K].copy_from_slice(&v);
    out.z[at..at + K].copy_from_slice(&z);
    out.cost += z.iter().map(|z| z * z).sum::<f32>();
}

/// The choice for the weights `w` of a unit, at a scale.
#[inline(always)]
pub fn nearest<const K: usize, const EVEN: bool>(c: &Codebook, norm: &Norm, w: &[f32], scale: f32) -> Chosen {
    let parts = if EVEN { UNIT / K } else { 1 };
    let mut t = [0f32; UNIT];
    for (i, w) in w[..parts * K].iter().enumerate() {
        t[i..parts * K].iter_mut().zip(&norm.r[i][i..]).for_each(|(t, r)| *t += w * r);
    }
    let first: [f32; K] = *t.first_chunk().expect("K of eight");
    let found = scan::<K, EVEN>(c, norm, 0, &first, scale);
    if parts == 1 {
        let mut out = Chosen::default();
        place((c, norm, 0), &first, scale, (found[0], EVEN.then_some(false)), &mut out);
        return out;
    }
    let mut best = Chosen { cost: f32::MAX, ..Chosen::default() };
    for odd in [false, true] {
        let mut out = Chosen::default();
        place((c, norm, 0), &first, scale, (found[usize::from(odd)], Some(odd)), &mut out);
        let mut second = [0f32; K];
        for j in 0..K {
            let before: f32 = (0..K).map(|i| out.values[i] * norm.r[i][K + j]).sum();
            second[j] = t[K + j] - before;
        }
        let point = scan::<K, EVEN>(c, norm, K, &second, scale)[usize::from(odd)];
        place((c, norm, K), &second, scale, (point, Some(odd)), &mut out);
        if out.cost < best.cost {
            best = out;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::GgmlType;
    use crate::linalg::{self, tests::values};

    fn factor(n: usize) -> Factor {
        let x: Vec<f64> = values(2 * n * n, 3)
            .iter()
            .scan(0.0, |c, v| {
                *c = 0.6 * *c + f64::from(*v);
                Some(*c)
            })
            .collect();
        let mut h = vec![0f64; n * n];
        linalg::syrk_f64(&mut h, &x, 2 * n, n, linalg::Par::Seq);
        Factor::new(&linalg::tests::packed(&h, n), 1, n, 0.01).unwrap()
    }

    fn quadratic(h: &[Vec<f64>], e: &[f64]) -> f64 {
        e.iter().zip(h).map(|(a, row)| a * row.iter().zip(e).map(|(h, b)| h * b).sum::<f64>()).sum()
    }

    /// The cost of an error alone is `e H eᵀ`; where later columns make up for it, the same after they are eliminated
    /// (Gauss) from the Hessian of the unit and all later columns.
    #[test]
    fn norms_are_those_of_the_hessian() {
        let n = 32;
        let f = factor(n);
        for ty in [GgmlType::IQ2_S, GgmlType::IQ3_S, GgmlType::IQ3_XXS] {
            let c = Codebook::of(ty).unwrap();
            let (k, norms) = (unit(c), Norms::new(c, &f));
            assert_eq!(norms.later.len(), n / k);
            for at in (0..n).step_by(k) {
                let e: Vec<f64> = values(k, at as u64 + 1).iter().map(|v| f64::from(*v)).collect();
                let mut h: Vec<Vec<f64>> =
                    (at..n).map(|i| (at..n).map(|j| f64::from(f.h[i * n + j])).collect()).collect();
                let cost = |norm: &Norm| -> f64 {
                    (0..k).map(|j| (0..k).map(|i| e[i] * f64::from(norm.r[i][j])).sum::<f64>().powi(2)).sum()
                };
                let block: Vec<Vec<f64>> = h[..k].iter().map(|r| r[..k].to_vec()).collect();
                let (alone, got) = (quadratic(&block, &e), cost(&norms.alone[at / k]));
                assert!((alone / got - 1.0).abs() < 1e-4, "{ty} at {at}: {alone} {got}");
                for last in (k..n - at).rev() {
                    let row = h[last].clone();
                    #[allow(clippy::needless_range_loop)]
                    for i in 0..last {
                        let by = h[i][last] / row[last];
                        (0..last).for_each(|j| h[i][j] -= by * row[j]);
                    }
                }
                let block: Vec<Vec<f64>> = h[..k].iter().map(|r| r[..k].to_vec()).collect();
                let (later, got) = (quadratic(&block, &e), cost(&norms.later[at / k]));
                assert!((later / got - 1.0).abs() < 1e-3, "{ty} at {at}: {later} {got}");
            }
        }
    }

    /// Every point with every allowed combination of signs: exact where columns do not interact, else close.
    fn against_all<const K: usize, const EVEN: bool>(ty: GgmlType, correlated: bool) {
        let c = Codebook::of(ty).unwrap();
        let n = 64;
        let f = if correlated {
            factor(n)
        } else {
            let h = (0..n * n).map(|i| if i / n == i % n { 1.0 + (i % 7) as f64 } else { 0.0 }).collect::<Vec<f64>>();
            Factor::new(&linalg::tests::packed(&h, n), 1, n, 0.0).unwrap()
        };
        let norms = Norms::new(c, &f);
        let (mut sum, mut sum_best) = (0.0, 0.0);
        for (i, w) in values(12 * UNIT, 9).chunks_exact(unit(c)).enumerate() {
            let norm = &norms.later[i % norms.later.len()];
            let scale = 1.0 / (40.0 * if ty == GgmlType::IQ3_S { 0.3 } else { 1.0 });
            let cost = |v: &[f32]| -> f32 {
                let column = |j: usize| (0..=j).map(|i| (w[i] - v[i]) * norm.r[i][j]).sum::<f32>();
                (0..K).map(|j| column(j).powi(2)).sum()
            };
            let got = nearest::<K, EVEN>(c, norm, w, scale);
            assert!((cost(&got.values[..K]) - got.cost).abs() <= 1e-4 * got.cost + 1e-6);
            assert!(!EVEN || got.signs.count_ones().is_multiple_of(2));
            let mut best = f32::MAX;
            for point in 0..(c.points.len() * LANES) as u16 {
                let m = c.magnitudes(point);
                for signs in (0..1u32 << K).filter(|s| !EVEN || s.count_ones() % 2 == 0) {
                    let v: [f32; K] =
                        std::array::from_fn(|i| if signs >> i & 1 == 1 { -scale * m[i] } else { scale * m[i] });
                    best = best.min(cost(&v));
                }
            }
            sum += f64::from(got.cost);
            sum_best += f64::from(best);
        }
        let above = sum / sum_best - 1.0;
        eprintln!("{ty}: {above:.5} above the best");
        assert!(above < if correlated { 0.1 } else { 1e-5 }, "{ty}: {above}");
    }

    #[test]
    fn the_nearest_is_the_best_of_all() {
        against_all::<4, false>(GgmlType::IQ3_S, false);
        against_all::<8, true>(GgmlType::IQ2_XXS, false);
        against_all::<4, false>(GgmlType::IQ3_S, true);
        against_all::<8, true>(GgmlType::IQ2_XXS, true);
        against_all::<8, false>(GgmlType::IQ2_S, true);
    }
}
