//! Dense linear algebra for the forward pass, calibration and checks: products, symmetric rank-k updates, Cholesky,
//! eigenvalues. The one place that knows faer.
//!
//! Matrices are slices, row-major; a part of one is a [`View`]. No product is generic, so that faer's kernels are compiled
//! once. Products are cut into tiles by shape alone and each tile is computed on one thread: the result does not depend on
//! the number of threads ([`Par`] only says whether tiles may run beside each other, on rayon's current pool). It may differ
//! in the last bits between processors, whose kernels sum in different orders.
//!
//! Lengths are the caller's duty and are asserted; what data can get wrong (a matrix that is not positive definite) is an
//! error.

mod factor;
pub mod hadamard;
mod product;
pub mod random;
mod sums;
mod symmetric;
mod view;

pub use faer::Par;

pub use factor::{LinalgError, cholesky, eigen, factor_upper, invert_upper, solve};
pub use product::{Product, add_cross, add_times, add_times_whole, product, product_back, products, times};
pub use sums::add_sums;
pub use symmetric::{F32_RUN, fill, gemm_f64, mirror, packed_at, packed_len, syrk_f64, syrk_packed, unpack};
pub use view::{View, ViewMut};

/// All threads of rayon's current pool.
pub fn all_threads() -> Par {
    Par::rayon(0)
}

#[cfg(test)]
pub(crate) mod tests {
    /// Reproducible values in (-1, 1).
    pub(crate) fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    /// The packed lower triangle of `a` \[n, n\].
    pub(crate) fn packed(a: &[f64], n: usize) -> Vec<f64> {
        (0..n).flat_map(|i| &a[i * n..][..=i]).copied().collect()
    }

    pub(super) fn on_threads<T: Send>(n: usize, f: impl FnOnce() -> T + Send) -> T {
        rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(f)
    }

    /// `a` \[m, k\] times the transpose of `b` \[n, k\], in f64.
    pub(super) fn textbook(a: &[f32], b: &[f32], m: usize, n: usize, k: usize) -> Vec<f64> {
        let dot = |i: usize, j: usize| (0..k).map(|x| f64::from(a[i * k + x]) * f64::from(b[j * k + x])).sum();
        (0..m * n).map(|at| dot(at / n, at % n)).collect()
    }

    pub(super) fn abs(values: &[f32]) -> Vec<f32> {
        values.iter().map(|v| v.abs()).collect()
    }

    /// Within the rounding of an f32 sum of `k` products in any order: k u Σ|ab|, u = eps / 2.
    pub(super) fn near(ours: f64, exact: f64, size: f64, k: usize) -> bool {
        (ours - exact).abs() <= (k as f64) * f64::from(f32::EPSILON) / 2.0 * size
    }
}
