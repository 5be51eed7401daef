//! Cholesky factors and eigenvalues of symmetric matrices in f64.

use faer::linalg::cholesky::llt::factor::{LltError, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::{MatMut, MatRef, Par};

use super::mirror;

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

/// Largest block that is factored by the library at once.
const BLOCK: usize = 128;
/// Edge of a tile of an update.
const TILE: usize = 256;

/// Factors the symmetric positive definite `a` \[n, n\] as `Rᵀ R`, its upper triangle in place: element `(i, j)`, `j ≥ i`,
/// becomes `R_ij = L_ji` of `a = L Lᵀ`. Below the diagonal nothing is read or written. On an error the contents of `a` are
/// unspecified. Halved down to blocks, updates cut into tiles by size alone and spread over the current pool: the same for
/// any number of threads.
pub fn factor_upper(a: &mut [f64], n: usize) -> Result<(), LinalgError> {
    assert!(a.len() == n * n, "{n}x{n}");
    halves(MatMut::from_column_major_slice_mut(a, n, n)).map_err(|pivot| match a[pivot * n + pivot] {
        value if value.is_finite() => LinalgError::NotPositiveDefinite { n, pivot },
        value => LinalgError::NotFinite { n, row: pivot, column: pivot, value },
    })
}

/// The lower triangle of `a`, factored; the pivot that was not above zero.
fn halves(a: MatMut<'_, f64>) -> Result<(), usize> {
    let n = a.nrows();
    if n <= BLOCK {
        return block(a);
    }
    let at = (n / 2).next_multiple_of(BLOCK).min(n - 1);
    let (mut a00, _, mut a10, mut a11) = a.split_at_mut(at, at);
    halves(a00.as_mut())?;
    solve_columns(a00.as_ref(), a10.as_mut().transpose_mut(), true);
    downdate(a11.as_mut(), a10.as_ref(), a10.as_ref(), true);
    halves(a11).map_err(|pivot| at + pivot)
}

#[inline(never)]
fn block(mut a: MatMut<'_, f64>) -> Result<(), usize> {
    let n = a.nrows();
    let mut memory = faer::dyn_stack::MemBuffer::new(cholesky_in_place_scratch::<f64>(n, Par::Seq, Default::default()));
    let stack = faer::dyn_stack::MemStack::new(&mut memory);
    cholesky_in_place(a.as_mut(), Default::default(), Par::Seq, stack, Default::default())
        .map_err(|LltError::NonPositivePivot { index }| index)?;
    let good = |i: &usize| a[(*i, *i)].is_finite() && a[(*i, *i)] > 0.0;
    (0..n).find(|i| !good(i)).map_or(Ok(()), Err)
}

/// `c −= a bᵀ` over tiles; of a diagonal part (`a` is `b`) only what is on or below the diagonal.
fn downdate(c: MatMut<'_, f64>, a: MatRef<'_, f64>, b: MatRef<'_, f64>, diagonal: bool) {
    let (m, n) = (c.nrows(), c.ncols());
    if diagonal && n > TILE {
        let at = (n / 2).next_multiple_of(TILE).min(n - 1);
        let (top, _, below, bottom) = c.split_at_mut(at, at);
        let (a0, a1) = a.split_at_row(at);
        rayon::join(
            || downdate(below, a1, a0, false),
            || rayon::join(|| downdate(top, a0, a0, true), || downdate(bottom, a1, a1, true)),
        );
    } else if n > TILE && n >= m {
        let at = (n / 2).next_multiple_of(TILE).min(n - 1);
        let (left, right) = c.split_at_col_mut(at);
        let (b0, b1) = b.split_at_row(at);
        rayon::join(|| downdate(left, a, b0, false), || downdate(right, a, b1, false));
    } else if m > TILE {
        let at = (m / 2).next_multiple_of(TILE).min(m - 1);
        let (above, below) = c.split_at_row_mut(at);
        let (a0, a1) = a.split_at_row(at);
        rayon::join(|| downdate(above, a0, b, false), || downdate(below, a1, b, false));
    } else {
        downdate_tile(c, a, b, diagonal);
    }
}

/// Through a buffer, as [`super::add_times`].
#[inline(never)]
fn downdate_tile(c: MatMut<'_, f64>, a: MatRef<'_, f64>, b: MatRef<'_, f64>, diagonal: bool) {
    let (m, n) = (c.nrows(), c.ncols());
    let mut product = vec![0.0; m * n];
    let into = MatMut::from_column_major_slice_mut(&mut product, m, n);
    faer::linalg::matmul::matmul(into, faer::Accum::Replace, a, b.transpose(), 1.0, Par::Seq);
    for (j, (column, product)) in c.col_iter_mut().zip(product.chunks_exact(m)).enumerate() {
        let column = column.try_as_col_major_mut().expect("columns are contiguous").as_slice_mut();
        let from = if diagonal { j } else { 0 };
        column[from..].iter_mut().zip(&product[from..]).for_each(|(c, p)| *c -= p);
    }
}

/// Columns of the right-hand side that one task solves for, and the least edge of a triangle that is cut in two.
const TASK: usize = 64;

/// The upper triangle of `r` \[n, n\], in its own place: `r ← r⁻ᵀ` as a lower triangle in columns, that is, element `(i, j)`,
/// `j ≥ i`, becomes `(L⁻¹)_ji` where it was `L_ji` ([`factor_upper`]). Below the diagonal nothing is read or written.
pub fn invert_upper(r: &mut [f64], n: usize) {
    assert!(r.len() == n * n, "{n}x{n}");
    invert(MatMut::from_column_major_slice_mut(r, n, n));
}

/// `[A 0; B C]⁻¹ = [A⁻¹ 0; −C⁻¹ B A⁻¹, C⁻¹]`, halves beside each other.
fn invert(l: MatMut<'_, f64>) {
    let n = l.nrows();
    if n <= TASK {
        return invert_small(l);
    }
    let at = (n / 2).next_multiple_of(TASK).min(n - 1);
    let (mut a, _, mut b, mut c) = l.split_at_mut(at, at);
    solve_columns(c.as_ref(), b.as_mut(), true);
    // B A⁻¹ = (A⁻ᵀ Bᵀ)ᵀ
    solve_columns(a.as_ref().transpose(), b.as_mut().transpose_mut(), false);
    negate(b);
    rayon::join(|| invert(a.as_mut()), || invert(c.as_mut()));
}

fn negate(b: MatMut<'_, f64>) {
    let n = b.ncols();
    if n > TASK {
        let (left, right) = b.split_at_col_mut(n / 2);
        rayon::join(|| negate(left), || negate(right));
    } else {
        b.col_iter_mut().for_each(|c| c.iter_mut().for_each(|v| *v = -*v));
    }
}

#[inline(never)]
fn invert_small(mut l: MatMut<'_, f64>) {
    let n = l.nrows();
    let mut inverse = [0.0; TASK * TASK];
    let mut into = MatMut::from_column_major_slice_mut(&mut inverse[..n * n], n, n);
    faer::linalg::triangular_inverse::invert_lower_triangular(into.as_mut(), l.as_ref(), Par::Seq);
    for column in 0..n {
        (column..n).for_each(|row| l[(row, column)] = into[(row, column)]);
    }
}

/// `x ← T⁻¹ x` of a lower or upper triangle, some columns of `x` a task.
#[inline(never)]
fn solve_columns(t: MatRef<'_, f64>, x: MatMut<'_, f64>, lower: bool) {
    let m = x.ncols();
    if m > TASK {
        let (left, right) = x.split_at_col_mut((m / 2).next_multiple_of(TASK).min(m - 1));
        rayon::join(|| solve_columns(t, left, lower), || solve_columns(t, right, lower));
    } else if lower {
        solve_lower_triangular_in_place(t, x, Par::Seq);
    } else {
        solve_upper_triangular_in_place(t, x, Par::Seq);
    }
}

/// `x ← x (Rᵀ R)⁻¹`: `r` of [`factor_upper`], `x` \[m, n\]. Spread over the current pool; the same for any number of threads.
pub fn solve(r: &[f64], x: &mut [f64], n: usize) {
    let m = x.len() / n.max(1);
    assert!(r.len() == n * n && x.len() == m * n, "{m} rows of {n}");
    let l = MatRef::from_column_major_slice(r, n, n);
    let mut x = MatMut::from_column_major_slice_mut(x, n, m);
    solve_columns(l, x.as_mut(), true);
    solve_columns(l.transpose(), x, false);
}

#[cfg(test)]
mod tests {
    use super::super::tests::{on_threads, values};
    use super::super::{all_threads, gemm_f64, mirror, syrk_f64};
    use super::*;

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

    /// Rᵀ R is the matrix, R⁻ᵀ its inverse's factor, solve undoes a product; whatever the number of threads.
    #[test]
    fn upper_factors_inverses_and_solutions() {
        for n in [1usize, 5, 64, 129, 300, 577] {
            let tokens = 2 * n + 3;
            let x: Vec<f64> = values(tokens * n, 5).iter().map(|v| (*v).into()).collect();
            let mut a = vec![0.0; n * n];
            syrk_f64(&mut a, &x, tokens, n, Par::Seq);
            mirror(&mut a, n);
            // below the diagonal nothing may be read
            let mut r = a.clone();
            (0..n).for_each(|i| r[i * n..i * n + i].fill(f64::NAN));
            let start = r.clone();
            factor_upper(&mut r, n).unwrap();
            let mut inverse = r.clone();
            invert_upper(&mut inverse, n);
            let mut solved = a[..n.min(70) * n].to_vec();
            solve(&r, &mut solved, n);
            for (i, j) in (0..n).flat_map(|i| (0..n).map(move |j| (i, j))) {
                if j < i {
                    assert!(r[i * n + j].is_nan() && inverse[i * n + j].is_nan(), "{i},{j}");
                    continue;
                }
                let product: f64 = (0..=i).map(|k| r[k * n + i] * r[k * n + j]).sum();
                assert!((product - a[i * n + j]).abs() < 1e-10, "{n}: {i},{j}");
                // (L⁻¹ L)_ji
                let one: f64 = (i..=j).map(|k| inverse[k * n + j] * r[i * n + k]).sum();
                assert!((one - f64::from(i == j)).abs() < 1e-9, "{n}: {i},{j}: {one}");
            }
            for (at, v) in solved.iter().enumerate() {
                assert!((v - f64::from(at / n == at % n)).abs() < 1e-7, "{n} at {at}: {v}");
            }
            on_threads(3, || {
                let (mut again, mut other) = (start, inverse.clone());
                factor_upper(&mut again, n).unwrap();
                let same = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same(&again, &r), "{n} on 3 threads");
                other.copy_from_slice(&r);
                invert_upper(&mut other, n);
                assert!(same(&other, &inverse), "{n} on 3 threads");
                let mut x = a[..n.min(70) * n].to_vec();
                solve(&r, &mut x, n);
                assert!(x == solved, "{n} on 3 threads");
            });
        }
        let mut a = vec![0.0; 300 * 300];
        (0..300).for_each(|i| a[i * 301] = if i == 200 { -1.0 } else { 1.0 });
        assert_eq!(factor_upper(&mut a, 300), Err(LinalgError::NotPositiveDefinite { n: 300, pivot: 200 }));
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
