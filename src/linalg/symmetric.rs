//! Symmetric updates: second moments in f32 and f64, and the products in f64 that go with them.
//!
//! Matrices are halved until a part is no larger than a tile; parts do not depend on the number of threads.

use faer::linalg::matmul::{matmul, triangular};
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Edge of a tile in rows and columns. Large enough that packing is a small share, small enough for two cores to share.
const TILE: usize = 256;
/// Tokens whose products are summed in f32 before the sum goes to f64 ([`syrk_packed`]).
pub const F32_RUN: usize = 512;

/// Whether work may be spread over rayon's current pool.
fn parallel(par: Par) -> bool {
    !matches!(par, Par::Seq)
}

fn both(par: bool, a: impl FnOnce() + Send, b: impl FnOnce() + Send) {
    if par {
        rayon::join(a, b);
    } else {
        a();
        b();
    }
}

/// `c = a b` or `c += a b` over tiles.
fn product(c: MatMut<'_, f64>, a: MatRef<'_, f64>, b: MatRef<'_, f64>, how: Accum, par: bool) {
    let (m, n) = (c.nrows(), c.ncols());
    if n > TILE && n >= m {
        let at = (n / 2).next_multiple_of(TILE).min(n - 1);
        let (c0, c1) = c.split_at_col_mut(at);
        let (b0, b1) = b.split_at_col(at);
        both(par, || product(c0, a, b0, how, par), || product(c1, a, b1, how, par));
    } else if m > TILE {
        let at = (m / 2).next_multiple_of(TILE).min(m - 1);
        let (c0, c1) = c.split_at_row_mut(at);
        let (a0, a1) = a.split_at_row(at);
        both(par, || product(c0, a0, b, how, par), || product(c1, a1, b, how, par));
    } else {
        matmul(c, how, a, b, 1.0, Par::Seq);
    }
}

/// The lower triangle of `c += xᵀ x`, over tiles.
fn lower(c: MatMut<'_, f64>, x: MatRef<'_, f64>, par: bool) {
    use triangular::BlockStructure::{Rectangular, TriangularLower};
    let n = c.nrows();
    if n > TILE {
        let at = (n / 2).next_multiple_of(TILE).min(n - 1);
        let (top, _, below, bottom) = c.split_at_mut(at, at);
        let (x0, x1) = x.split_at_col(at);
        both(
            par,
            || product(below, x1.transpose(), x0, Accum::Add, par),
            || both(par, || lower(top, x0, par), || lower(bottom, x1, par)),
        );
    } else {
        let (xt, one) = (x.transpose(), 1.0);
        triangular::matmul(c, TriangularLower, Accum::Add, xt, Rectangular, x, Rectangular, one, Par::Seq);
    }
}

/// `C = A Bᵀ`: `a` is \[m, k\], `b` is \[n, k\], `c` is \[m, n\].
#[inline(never)]
pub fn gemm_f64(c: &mut [f64], a: &[f64], b: &[f64], (m, n, k): (usize, usize, usize), par: Par) {
    assert!(c.len() == m * n && a.len() == m * k && b.len() == n * k, "{m}x{n}x{k}");
    let (a, b) = (MatRef::from_row_major_slice(a, m, k), MatRef::from_row_major_slice(b, n, k));
    product(MatMut::from_row_major_slice_mut(c, m, n), a, b.transpose(), Accum::Replace, parallel(par));
}

/// `C += Xᵀ X`, lower triangle: `x` is \[tokens, n\], `c` is \[n, n\]; what is above the diagonal stays as it is.
#[inline(never)]
pub fn syrk_f64(c: &mut [f64], x: &[f64], tokens: usize, n: usize, par: Par) {
    assert!(c.len() == n * n && x.len() == tokens * n, "{tokens}x{n}");
    let x = MatRef::from_row_major_slice(x, tokens, n);
    lower(MatMut::from_row_major_slice_mut(c, n, n), x, parallel(par));
}

/// Elements of a packed lower triangle of `n` rows; `None` on overflow.
pub const fn packed_len(n: usize) -> Option<usize> {
    match n.checked_add(1) {
        // one of the two is even
        Some(m) if n.is_multiple_of(2) => (n / 2).checked_mul(m),
        Some(m) => n.checked_mul(m / 2),
        None => None,
    }
}

/// Where a packed lower triangle has its element of row `i` and column `j ≤ i`.
#[inline(always)]
pub const fn packed_at(i: usize, j: usize) -> usize {
    i * (i + 1) / 2 + j
}

/// Sets every element `(i, j)` of `a` \[n, n\] to `value(i, j)`, in tiles: it may look across rows.
pub fn fill<T: Send>(a: &mut [T], n: usize, value: impl Fn(usize, usize) -> T + Sync) {
    const EDGE: usize = 32;
    a.par_chunks_mut(EDGE * n.max(1)).enumerate().for_each(|(band, rows)| {
        for left in (0..n).step_by(EDGE) {
            for (i, row) in rows.chunks_exact_mut(n).enumerate() {
                let tile = &mut row[left..(left + EDGE).min(n)];
                tile.iter_mut().enumerate().for_each(|(j, v)| *v = value(band * EDGE + i, left + j));
            }
        }
    });
}

/// `H += Xᵀ X`, packed lower triangle (row `i` has its `i + 1` elements at `i (i + 1) / 2`): products in f32, summed in f32
/// over at most [`F32_RUN`] tokens, the sums added in f64. Beside `h` it takes one f32 tile per thread.
#[inline(never)]
pub fn syrk_packed(h: &mut [f64], x: &[f32], tokens: usize, n: usize, par: Par) {
    assert!(Some(h.len()) == packed_len(n) && x.len() == tokens * n, "{tokens}x{n}");
    let x = MatRef::from_row_major_slice(x, tokens, n);
    bands(h, x, 0, n, parallel(par));
}

/// Rows `from..to` of the triangle, `h` holding just these.
fn bands(h: &mut [f64], x: MatRef<'_, f32>, from: usize, to: usize, par: bool) {
    let start = from * (from + 1) / 2;
    if to - from > TILE {
        let at = from + ((to - from) / 2).next_multiple_of(TILE).min(to - from - 1);
        let (h0, h1) = h.split_at_mut(at * (at + 1) / 2 - start);
        return both(par, || bands(h0, x, from, at, par), || bands(h1, x, at, to, par));
    }
    let mut tile = vec![0f32; (to - from) * TILE];
    for left in (0..to).step_by(TILE) {
        let width = TILE.min(to - left);
        for first in (0..x.nrows()).step_by(F32_RUN) {
            let run = x.subrows(first, F32_RUN.min(x.nrows() - first));
            let tile = &mut tile[..(to - from) * width];
            let c = MatMut::from_row_major_slice_mut(&mut *tile, to - from, width);
            let a = run.subcols(from, to - from).transpose();
            matmul(c, Accum::Replace, a, run.subcols(left, width), 1.0, Par::Seq);
            for (row, sums) in (from..to).zip(tile.chunks_exact(width)) {
                let own = row * (row + 1) / 2 - start;
                let n = width.min((row + 1).saturating_sub(left));
                let into = &mut h[own + left.min(row + 1)..][..n];
                into.iter_mut().zip(sums).for_each(|(h, s)| *h += f64::from(*s));
            }
        }
    }
}

/// The whole of a packed lower triangle, `[n, n]`.
pub fn unpack(packed: &[f64], n: usize) -> Vec<f64> {
    let mut a = vec![0.0; n * n];
    for row in 0..n {
        let own = row * (row + 1) / 2;
        a[row * n..][..=row].copy_from_slice(&packed[own..=own + row]);
    }
    mirror(&mut a, n);
    a
}

/// Copies the lower triangle of `a` \[n, n\] to the upper one.
pub fn mirror(a: &mut [f64], n: usize) {
    // tiles that fit the nearest cache: one of the two sides goes across rows
    const EDGE: usize = 32;
    for top in (0..n).step_by(EDGE) {
        for left in (0..=top).step_by(EDGE) {
            for row in top..(top + EDGE).min(n) {
                for column in left..(left + EDGE).min(row) {
                    a[column * n + row] = a[row * n + column];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::all_threads;
    use super::super::tests::{abs, near, on_threads, textbook, values};
    use super::*;

    #[test]
    fn products_are_right() {
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (300, 17, 40), (17, 300, 40), (259, 770, 65), (513, 512, 3), (4, 0, 3)]
        {
            let (x, y) = (values(m * k, 1), values(n * k, 2));
            let exact = textbook(&x, &y, m, n, k);
            let (a, b): (Vec<f64>, Vec<f64>) =
                (x.iter().map(|v| (*v).into()).collect(), y.iter().map(|v| (*v).into()).collect());
            let mut c = vec![f64::NAN; m * n];
            gemm_f64(&mut c, &a, &b, (m, n, k), Par::Seq);
            assert!(c.iter().zip(&exact).all(|(c, e)| (c - e).abs() < 1e-12), "{m}x{n}x{k}");
            let mut again = vec![f64::NAN; m * n];
            on_threads(3, || gemm_f64(&mut again, &a, &b, (m, n, k), all_threads()));
            assert_eq!(c, again, "{m}x{n}x{k} on 3 threads");
        }
    }

    #[test]
    fn symmetric_updates_are_right_in_both_layouts() {
        for (tokens, n) in [(1, 1), (5, 3), (40, 257), (1100, 70), (30, 600), (0, 4)] {
            let x = values(tokens * n, 3);
            let t: Vec<f32> = (0..n * tokens).map(|at| x[at % tokens.max(1) * n + at / tokens.max(1)]).collect();
            let (exact, size) = (textbook(&t, &t, n, n, tokens), textbook(&abs(&t), &abs(&t), n, n, tokens));
            let wide: Vec<f64> = x.iter().map(|v| (*v).into()).collect();
            let mut square = vec![0.5f64; n * n];
            let mut packed = vec![0.5f64; packed_len(n).unwrap()];
            syrk_f64(&mut square, &wide, tokens, n, Par::Seq);
            syrk_packed(&mut packed, &x, tokens, n, Par::Seq);
            for at in 0..n * n {
                let (i, j) = (at / n, at % n);
                if j > i {
                    assert_eq!(square[at], 0.5, "above the diagonal");
                    continue;
                }
                let (exact, size) = (exact[at] + 0.5, size[at] + 0.5);
                assert!((square[at] - exact).abs() < 1e-12 * size.max(1.0), "{tokens}x{n} at {i},{j}");
                assert!(near(packed[i * (i + 1) / 2 + j], exact, size, F32_RUN), "{tokens}x{n} at {i},{j}");
            }
            let (mut again, mut packed_again) = (vec![0.5f64; n * n], vec![0.5f64; packed.len()]);
            on_threads(3, || {
                syrk_f64(&mut again, &wide, tokens, n, all_threads());
                syrk_packed(&mut packed_again, &x, tokens, n, all_threads());
            });
            assert_eq!((square, packed), (again, packed_again), "{tokens}x{n}");
        }
    }

    #[test]
    fn packed_lengths_do_not_overflow() {
        assert_eq!([0, 1, 2, 3, 4].map(|n| packed_len(n).unwrap()), [0, 1, 3, 6, 10]);
        assert_eq!(packed_len(usize::MAX), None);
        assert_eq!(packed_len(1 << 33), None);
    }
}
