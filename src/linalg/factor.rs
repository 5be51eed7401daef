//! Cholesky factors and eigenvalues of symmetric matrices in f64.

use faer::linalg::cholesky::llt::factor::{LltError, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
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

/// The inverse of a lower triangular `l` \[n, n\].
#[inline(never)]
pub fn invert_lower(l: &[f64], n: usize, par: Par) -> Vec<f64> {
    let mut inverse = vec![0.0; n * n];
    let into = MatMut::from_row_major_slice_mut(&mut inverse, n, n);
    faer::linalg::triangular_inverse::invert_lower_triangular(into, MatRef::from_row_major_slice(l, n, n), par);
    inverse
}

/// `x ← x (L Lᵀ)⁻¹`: `l` lower triangular \[n, n\], `x` \[m, n\].
#[inline(never)]
pub fn solve(l: &[f64], x: &mut [f64], n: usize, par: Par) {
    use faer::linalg::cholesky::llt::solve::{solve_in_place, solve_in_place_scratch};
    let m = x.len() / n;
    let mut memory = faer::dyn_stack::MemBuffer::new(solve_in_place_scratch::<f64>(n, m, par));
    let x = MatMut::from_column_major_slice_mut(x, n, m);
    let l = MatRef::from_row_major_slice(l, n, n);
    solve_in_place(l, x, par, faer::dyn_stack::MemStack::new(&mut memory));
}

#[cfg(test)]
mod tests {
    use super::super::tests::values;
    use super::super::{all_threads, gemm_f64, syrk_f64};
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
