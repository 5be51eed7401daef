//! Dense linear algebra for calibration and checks: products, symmetric rank-k updates, Cholesky. The one place that
//! knows faer.
//!
//! Matrices are slices, row-major. Nothing here is generic, so that faer's kernels are compiled once. Products are cut
//! into tiles by shape alone and each tile is computed on one thread: the result does not depend on the number of
//! threads ([`Par`] only says whether tiles may run beside each other, on rayon's current pool). It may differ in the last
//! bits between processors, whose kernels sum in different orders.
//!
//! Lengths are the caller's duty and are asserted; what data can get wrong (a matrix that is not positive definite) is an
//! error.

use faer::linalg::cholesky::llt::factor::{LltError, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::matmul::{matmul, triangular};
use faer::{Accum, MatMut, MatRef};

pub use faer::Par;

/// Edge of a tile in rows and columns. Large enough that packing is a small share, small enough for two cores to share.
const TILE: usize = 256;
/// Tokens whose products are summed in f32 before the sum goes to f64 ([`syrk_packed`]).
pub const F32_RUN: usize = 512;

/// A matrix that cannot be factored.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum LinalgError {
    /// The leading minor up to `pivot` has a determinant of zero or below.
    #[error(
        "the {n}x{n} matrix is not positive definite: pivot {pivot} is not above zero; \
         it needs more damping, or more tokens than columns"
    )]
    NotPositiveDefinite { n: usize, pivot: usize },
    /// An element of the lower triangle is NaN or infinite.
    #[error("the {n}x{n} matrix holds {value} at row {row}, column {column}")]
    NotFinite { n: usize, row: usize, column: usize, value: f64 },
    /// The iteration for eigenvalues did not end.
    #[error("no eigenvalues were found for the {n}x{n} matrix")]
    NoConvergence { n: usize },
}

/// Whether work may be spread over rayon's current pool.
fn parallel(par: Par) -> bool {
    !matches!(par, Par::Seq)
}

/// All threads of rayon's current pool.
pub fn all_threads() -> Par {
    Par::rayon(0)
}

macro_rules! products {
    ($t:ty, $product:ident, $lower:ident) => {
        /// `c = a bᵀ` or `c += a bᵀ` over tiles; `b` comes transposed.
        fn $product(c: MatMut<'_, $t>, a: MatRef<'_, $t>, b: MatRef<'_, $t>, how: Accum, par: bool) {
            let (m, n) = (c.nrows(), c.ncols());
            if n > TILE && n >= m {
                let at = (n / 2).next_multiple_of(TILE).min(n - 1);
                let (c0, c1) = c.split_at_col_mut(at);
                let (b0, b1) = b.split_at_col(at);
                both(par, || $product(c0, a, b0, how, par), || $product(c1, a, b1, how, par));
            } else if m > TILE {
                let at = (m / 2).next_multiple_of(TILE).min(m - 1);
                let (c0, c1) = c.split_at_row_mut(at);
                let (a0, a1) = a.split_at_row(at);
                both(par, || $product(c0, a0, b, how, par), || $product(c1, a1, b, how, par));
            } else {
                matmul(c, how, a, b, 1.0, Par::Seq);
            }
        }

        /// The lower triangle of `c += xᵀ x`, over tiles.
        fn $lower(c: MatMut<'_, $t>, x: MatRef<'_, $t>, par: bool) {
            use triangular::BlockStructure::{Rectangular, TriangularLower};
            let n = c.nrows();
            if n > TILE {
                let at = (n / 2).next_multiple_of(TILE).min(n - 1);
                let (top, _, below, bottom) = c.split_at_mut(at, at);
                let (x0, x1) = x.split_at_col(at);
                both(
                    par,
                    || $product(below, x1.transpose(), x0, Accum::Add, par),
                    || both(par, || $lower(top, x0, par), || $lower(bottom, x1, par)),
                );
            } else {
                let (xt, one) = (x.transpose(), 1.0);
                triangular::matmul(c, TriangularLower, Accum::Add, xt, Rectangular, x, Rectangular, one, Par::Seq);
            }
        }
    };
}

products!(f32, product_f32, lower_f32);
products!(f64, product_f64, lower_f64);

fn both(par: bool, a: impl FnOnce() + Send, b: impl FnOnce() + Send) {
    if par {
        rayon::join(a, b);
    } else {
        a();
        b();
    }
}

/// `C = A Bᵀ`: `a` is \[m, k\], `b` is \[n, k\] (a weight as GGUF stores it), `c` is \[m, n\].
#[inline(never)]
pub fn gemm(c: &mut [f32], a: &[f32], b: &[f32], (m, n, k): (usize, usize, usize), par: Par) {
    assert!(c.len() == m * n && a.len() == m * k && b.len() == n * k, "{m}x{n}x{k}");
    let (a, b) = (MatRef::from_row_major_slice(a, m, k), MatRef::from_row_major_slice(b, n, k));
    product_f32(MatMut::from_row_major_slice_mut(c, m, n), a, b.transpose(), Accum::Replace, parallel(par));
}

/// [`gemm`] in f64.
#[inline(never)]
pub fn gemm_f64(c: &mut [f64], a: &[f64], b: &[f64], (m, n, k): (usize, usize, usize), par: Par) {
    assert!(c.len() == m * n && a.len() == m * k && b.len() == n * k, "{m}x{n}x{k}");
    let (a, b) = (MatRef::from_row_major_slice(a, m, k), MatRef::from_row_major_slice(b, n, k));
    product_f64(MatMut::from_row_major_slice_mut(c, m, n), a, b.transpose(), Accum::Replace, parallel(par));
}

/// `C += Xᵀ X`, lower triangle: `x` is \[tokens, n\], `c` is \[n, n\]; what is above the diagonal stays as it is.
#[inline(never)]
pub fn syrk(c: &mut [f32], x: &[f32], tokens: usize, n: usize, par: Par) {
    assert!(c.len() == n * n && x.len() == tokens * n, "{tokens}x{n}");
    let x = MatRef::from_row_major_slice(x, tokens, n);
    lower_f32(MatMut::from_row_major_slice_mut(c, n, n), x, parallel(par));
}

/// [`syrk`] in f64.
#[inline(never)]
pub fn syrk_f64(c: &mut [f64], x: &[f64], tokens: usize, n: usize, par: Par) {
    assert!(c.len() == n * n && x.len() == tokens * n, "{tokens}x{n}");
    let x = MatRef::from_row_major_slice(x, tokens, n);
    lower_f64(MatMut::from_row_major_slice_mut(c, n, n), x, parallel(par));
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

/// Factors the symmetric positive definite `a` \[n, n\] (its lower triangle is read) as `L Lᵀ`: `a` becomes `L`, zero above
/// the diagonal; the natural logarithm of `det a` is returned. On an error the contents of `a` are unspecified.
///
/// With [`Par::Seq`] the bits do not depend on the number of threads.
#[inline(never)]
pub fn cholesky(a: &mut [f64], n: usize, par: Par) -> Result<f64, LinalgError> {
    assert!(a.len() == n * n, "{n}x{n}");
    finite(a, n)?;
    // faer is fast where columns are contiguous: work on the transpose, whose lower triangle is our upper one
    mirror(a, n);
    let mut memory = faer::dyn_stack::MemBuffer::new(cholesky_in_place_scratch::<f64>(n, par, Default::default()));
    let stack = faer::dyn_stack::MemStack::new(&mut memory);
    let view = MatMut::from_column_major_slice_mut(&mut *a, n, n);
    cholesky_in_place(view, Default::default(), par, stack, Default::default())
        .map_err(|LltError::NonPositivePivot { index }| LinalgError::NotPositiveDefinite { n, pivot: index })?;
    let mut log_det = 0.0;
    for row in 0..n {
        for column in 0..row {
            a[row * n + column] = a[column * n + row];
            a[column * n + row] = 0.0;
        }
        let pivot = a[row * n + row];
        if !(pivot.is_finite() && pivot > 0.0) {
            return Err(LinalgError::NotPositiveDefinite { n, pivot: row });
        }
        log_det += 2.0 * pivot.ln();
    }
    Ok(log_det)
}

/// Eigenvalues, ascending, and eigenvectors of the symmetric `a` \[n, n\] (its lower triangle is read): the vector of value
/// `i` is `vectors[i * n..][..n]`.
#[inline(never)]
pub fn eigen(a: &[f64], n: usize, par: Par) -> Result<(Vec<f64>, Vec<f64>), LinalgError> {
    use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
    assert!(a.len() == n * n, "{n}x{n}");
    finite(a, n)?;
    let (mut values, mut vectors) = (vec![0.0; n], vec![0.0; n * n]);
    let scratch = self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, par, Default::default());
    let mut memory = faer::dyn_stack::MemBuffer::new(scratch);
    let stack = faer::dyn_stack::MemStack::new(&mut memory);
    let into = MatMut::from_column_major_slice_mut(&mut vectors, n, n);
    let diagonal = faer::diag::DiagMut::from_slice_mut(&mut values);
    let a = MatRef::from_row_major_slice(a, n, n);
    self_adjoint_evd(a, diagonal, Some(into), par, stack, Default::default())
        .map_err(|_| LinalgError::NoConvergence { n })?;
    Ok((values, vectors))
}

/// The lower triangle holds numbers.
fn finite(a: &[f64], n: usize) -> Result<(), LinalgError> {
    for row in 0..n {
        if let Some(column) = a[row * n..][..=row].iter().position(|v| !v.is_finite()) {
            return Err(LinalgError::NotFinite { n, row, column, value: a[row * n + column] });
        }
    }
    Ok(())
}

/// Copies the lower triangle of `a` \[n, n\] to the upper one.
pub fn mirror(a: &mut [f64], n: usize) {
    for row in 0..n {
        for column in 0..row {
            a[column * n + row] = a[row * n + column];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reproducible values in (-1, 1).
    fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    /// `a` \[m, k\] times the transpose of `b` \[n, k\], in f64.
    fn textbook(a: &[f32], b: &[f32], m: usize, n: usize, k: usize) -> Vec<f64> {
        let dot = |i: usize, j: usize| (0..k).map(|x| f64::from(a[i * k + x]) * f64::from(b[j * k + x])).sum();
        (0..m * n).map(|at| dot(at / n, at % n)).collect()
    }

    fn abs(values: &[f32]) -> Vec<f32> {
        values.iter().map(|v| v.abs()).collect()
    }

    /// Within the rounding of an f32 sum of `k` products in any order: k u Σ|ab|, u = eps / 2.
    fn near(ours: f64, exact: f64, size: f64, k: usize) -> bool {
        (ours - exact).abs() <= (k as f64) * f64::from(f32::EPSILON) / 2.0 * size
    }

    fn on_threads<T: Send>(n: usize, f: impl FnOnce() -> T + Send) -> T {
        rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(f)
    }

    #[test]
    fn products_are_right_and_the_same_for_any_number_of_threads() {
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (300, 17, 40), (17, 300, 40), (259, 770, 65), (513, 512, 3), (4, 0, 3)]
        {
            let (a, b) = (values(m * k, 1), values(n * k, 2));
            let mut c = vec![f32::NAN; m * n];
            gemm(&mut c, &a, &b, (m, n, k), Par::Seq);
            let (exact, size) = (textbook(&a, &b, m, n, k), textbook(&abs(&a), &abs(&b), m, n, k));
            let fits = c.iter().zip(&exact).zip(&size).all(|((c, e), s)| near((*c).into(), *e, *s, k));
            assert!(fits, "{m}x{n}x{k}");
            for threads in [2, 3] {
                let mut again = vec![f32::NAN; m * n];
                on_threads(threads, || gemm(&mut again, &a, &b, (m, n, k), all_threads()));
                assert_eq!(c, again, "{m}x{n}x{k} on {threads} threads");
            }
            let (a, b): (Vec<f64>, Vec<f64>) =
                (a.iter().map(|v| (*v).into()).collect(), b.iter().map(|v| (*v).into()).collect());
            let mut c = vec![f64::NAN; m * n];
            gemm_f64(&mut c, &a, &b, (m, n, k), all_threads());
            assert!(c.iter().zip(&exact).all(|(c, e)| (c - e).abs() < 1e-12), "f64 {m}x{n}x{k}");
        }
    }

    #[test]
    fn symmetric_updates_are_right_in_both_layouts() {
        for (tokens, n) in [(1, 1), (5, 3), (40, 257), (1100, 70), (30, 600), (0, 4)] {
            let x = values(tokens * n, 3);
            let t: Vec<f32> = (0..n * tokens).map(|at| x[at % tokens.max(1) * n + at / tokens.max(1)]).collect();
            let (exact, size) = (textbook(&t, &t, n, n, tokens), textbook(&abs(&t), &abs(&t), n, n, tokens));
            let mut square = vec![0.5f32; n * n];
            let mut packed = vec![0.5f64; packed_len(n).unwrap()];
            syrk(&mut square, &x, tokens, n, Par::Seq);
            syrk_packed(&mut packed, &x, tokens, n, Par::Seq);
            for at in 0..n * n {
                let (i, j) = (at / n, at % n);
                if j > i {
                    assert_eq!(square[at], 0.5, "above the diagonal");
                    continue;
                }
                let (exact, size) = (exact[at] + 0.5, size[at] + 0.5);
                assert!(near(square[at].into(), exact, size, tokens + 1), "{tokens}x{n} at {i},{j}");
                assert!(near(packed[i * (i + 1) / 2 + j], exact, size, F32_RUN), "{tokens}x{n} at {i},{j}");
            }
            let (mut again, mut packed_again) = (vec![0.5f32; n * n], vec![0.5f64; packed.len()]);
            on_threads(3, || {
                syrk(&mut again, &x, tokens, n, all_threads());
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

    #[test]
    fn cholesky_gives_the_factor_and_the_determinant() {
        // L = [2; 1 3; -1 2 4]: the determinant of L Lᵀ is (2·3·4)²
        let mut a = [4.0, f64::NAN, f64::NAN, 2.0, 10.0, f64::NAN, -2.0, 5.0, 21.0];
        let log_det = cholesky(&mut a, 3, Par::Seq).unwrap();
        assert!((log_det - 576f64.ln()).abs() < 1e-14);
        let l = [2.0, 0.0, 0.0, 1.0, 3.0, 0.0, -1.0, 2.0, 4.0];
        assert!(a.iter().zip(l).all(|(a, l)| (a - l).abs() < 1e-14), "{a:?}");
        assert_eq!(cholesky(&mut [], 0, Par::Seq), Ok(0.0));
    }

    #[test]
    fn a_large_factor_multiplies_back() {
        let (n, tokens) = (300, 700);
        let x: Vec<f64> = values(tokens * n, 5).iter().map(|v| (*v).into()).collect();
        let mut a = vec![0.0; n * n];
        syrk_f64(&mut a, &x, tokens, n, all_threads());
        let (mut l, mut back) = (a.clone(), vec![0.0; n * n]);
        let log_det = cholesky(&mut l, n, all_threads()).unwrap();
        assert!(log_det.is_finite());
        gemm_f64(&mut back, &l, &l, (n, n, n), Par::Seq);
        for (i, j) in (0..n).flat_map(|i| (0..=i).map(move |j| (i, j))) {
            assert!((back[i * n + j] - a[i * n + j]).abs() < 1e-10, "{i},{j}");
        }
    }

    #[test]
    fn eigenvectors_come_with_their_values() {
        // above the diagonal nothing is read
        let (values, vectors) = eigen(&[2.0, f64::NAN, 1.0, 2.0], 2, Par::Seq).unwrap();
        assert!((values[0] - 1.0).abs() < 1e-14 && (values[1] - 3.0).abs() < 1e-14, "{values:?}");
        assert!((vectors[0] + vectors[1]).abs() < 1e-14 && (vectors[2] - vectors[3]).abs() < 1e-14, "{vectors:?}");
    }

    #[test]
    fn what_has_no_factor_is_named() {
        let mut a = [1.0, 0.0, 1.0, 1.0];
        assert_eq!(cholesky(&mut a, 2, Par::Seq), Err(LinalgError::NotPositiveDefinite { n: 2, pivot: 1 }));
        let mut a = [1.0, 0.0, f64::INFINITY, 1.0];
        let error = cholesky(&mut a, 2, Par::Seq).unwrap_err();
        assert_eq!(error.to_string(), "the 2x2 matrix holds inf at row 1, column 0");
        assert!(cholesky(&mut [-1.0], 1, Par::Seq).unwrap_err().to_string().contains("pivot 0 is not above zero"));
    }
}
