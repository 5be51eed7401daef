//! Moments of the activations: what a forward pass leaves behind for every weight.
//!
//! For the input `x` of a linear layer, rows being tokens: the number of tokens, Σx and Σx² by column, and where it is
//! wanted the second moment Σxxᵀ. Σx² over count is the importance that llama.cpp's imatrix files hold
//! (`IMatrixCollector::collect_imatrix` of `tools/imatrix/imatrix.cpp`, b11434), the second moment is the Hessian of
//! GPTQ without its factor 2, and both with the mean give the covariance.
//!
//! Σx and Σx² are summed in f64, token by token (llama.cpp: f32), the second moment as [`linalg::syrk_packed`] says:
//! products in f32, runs of at most [`linalg::F32_RUN`] tokens, sums in f64. Work is spread by column and by
//! block of the triangle, never by token, so the number of threads does not change a bit; how tokens are cut into calls may
//! change the last bits of second moments.

use rayon::prelude::*;

use crate::linalg::{self, packed_len};

/// Tokens of the layer's mean that [`with_prior`] is given where the user says nothing. A mean square over 32 tokens of a
/// Gaussian is off by a quarter (`√(2/n)`); an expert with ten times as many is hardly moved.
pub const PRIOR_TOKENS: u64 = 32;

/// Columns that one task sums.
const COLUMNS: usize = 512;

/// Activations that cannot be summed. The caller knows the weight and says it ([`super::collector`]).
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum MomentsError {
    #[error(
        "the activation of token {token} is {value} at column {column}; \
         the forward pass overflowed: check the weights before this layer"
    )]
    NotFinite { token: usize, column: usize, value: f32 },
    #[error(
        "the activation of token {token} is {value:e} at column {column}, too large for second moments \
         (products are f32); collect without them"
    )]
    TooLarge { token: usize, column: usize, value: f32 },
    #[error("{values} values are not {tokens} tokens of {columns} columns")]
    Shape { values: usize, tokens: usize, columns: usize },
    #[error("moments of {theirs} columns cannot be added to moments of {ours}")]
    Columns { ours: usize, theirs: usize },
    #[error("one of the two has second moments and the other has none")]
    Second,
    #[error("a second moment of {columns} columns is too large for memory")]
    Memory { columns: usize },
    #[error("the number of tokens overflows")]
    Count,
}

/// Bytes of the second moment of `columns` columns in memory: the lower triangle in f64. `None` on overflow.
///
/// 576 columns take 1.3 MB, 4096 take 67 MB, 11008 take 485 MB.
pub const fn second_bytes(columns: usize) -> Option<usize> {
    match packed_len(columns) {
        Some(n) => n.checked_mul(size_of::<f64>()),
        None => None,
    }
}

/// Sums over the tokens of one layer's input, or of the part of it that went to one expert.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    columns: usize,
    count: u64,
    sum: Vec<f64>,
    sum2: Vec<f64>,
    second: Option<Vec<f64>>,
}

impl Moments {
    /// Zero tokens of `columns` columns; with `second`, [`second_bytes`] are reserved for Σxxᵀ.
    pub fn new(columns: usize, second: bool) -> Result<Moments, MomentsError> {
        let memory = MomentsError::Memory { columns };
        let second = match (second, packed_len(columns)) {
            (false, _) => None,
            (true, Some(n)) => Some(zeros(n).ok_or(memory)?),
            (true, None) => return Err(memory),
        };
        Ok(Moments { columns, count: 0, sum: vec![0.0; columns], sum2: vec![0.0; columns], second })
    }

    /// Columns of the weight: the length of an activation.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Tokens seen.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Σx, one value per column.
    pub fn sum(&self) -> &[f64] {
        &self.sum
    }

    /// Σx², one value per column.
    pub fn sum2(&self) -> &[f64] {
        &self.sum2
    }

    /// Σxxᵀ, packed lower triangle: row `i` has its `i + 1` elements at `i (i + 1) / 2`.
    pub fn second(&self) -> Option<&[f64]> {
        self.second.as_deref()
    }

    /// Adds `tokens` activations, `x` row-major \[tokens, columns\]. All or, on an error, none of them.
    pub fn add(&mut self, x: &[f32], tokens: usize) -> Result<(), MomentsError> {
        let columns = self.columns;
        if tokens.checked_mul(columns) != Some(x.len()) {
            return Err(MomentsError::Shape { values: x.len(), tokens, columns });
        }
        let count = self.count.checked_add(tokens as u64).ok_or(MomentsError::Count)?;
        check(x, columns, self.second.is_some())?;
        if tokens == 0 || columns == 0 {
            self.count = count;
            return Ok(());
        }
        let sums = self.sum.par_chunks_mut(COLUMNS).zip(self.sum2.par_chunks_mut(COLUMNS));
        sums.enumerate().for_each(|(i, (sum, sum2))| {
            for row in x.chunks_exact(columns) {
                let row = &row[i * COLUMNS..][..sum.len()];
                for ((s, s2), &v) in sum.iter_mut().zip(sum2.iter_mut()).zip(row) {
                    let v = f64::from(v);
                    *s += v;
                    *s2 += v * v;
                }
            }
        });
        if let Some(second) = &mut self.second {
            linalg::syrk_packed(second, x, tokens, columns, linalg::all_threads());
        }
        self.count = count;
        Ok(())
    }

    /// Adds the tokens of `other`.
    pub fn merge(&mut self, other: &Moments) -> Result<(), MomentsError> {
        self.add_scaled(other, 1.0, other.count)
    }

    /// Adds `factor` times the sums of `other`, as `count` tokens.
    fn add_scaled(&mut self, other: &Moments, factor: f64, count: u64) -> Result<(), MomentsError> {
        if self.columns != other.columns {
            return Err(MomentsError::Columns { ours: self.columns, theirs: other.columns });
        }
        let count = self.count.checked_add(count).ok_or(MomentsError::Count)?;
        let add = |into: &mut [f64], from: &[f64]| into.iter_mut().zip(from).for_each(|(a, b)| *a += factor * b);
        match (&mut self.second, &other.second) {
            (Some(ours), Some(theirs)) => add(ours, theirs),
            (None, None) => {}
            _ => return Err(MomentsError::Second),
        }
        add(&mut self.sum, &other.sum);
        add(&mut self.sum2, &other.sum2);
        self.count = count;
        Ok(())
    }

    /// E\[x²\] by column, the importance of llama.cpp; `None` without tokens.
    pub fn mean_square(&self) -> Option<Vec<f64>> {
        (self.count > 0).then(|| self.sum2.iter().map(|s| s / self.count as f64).collect())
    }

    /// E\[x\] by column; `None` without tokens.
    pub fn mean(&self) -> Option<Vec<f64>> {
        (self.count > 0).then(|| self.sum.iter().map(|s| s / self.count as f64).collect())
    }

    /// Bytes that the sums take in memory.
    pub fn bytes(&self) -> usize {
        size_of::<f64>() * (self.sum.len() + self.sum2.len() + self.second.as_ref().map_or(0, Vec::len))
    }
}

/// Finite, and for second moments small enough that an f32 sum of products cannot overflow: `x` is \[tokens, columns\].
pub fn check(x: &[f32], columns: usize, second: bool) -> Result<(), MomentsError> {
    let limit = match second {
        true => (f32::MAX / linalg::F32_RUN as f32).sqrt(),
        false => f32::MAX,
    };
    // false for NaN as well
    let good = |v: f32| v.abs() <= limit;
    let piece = 4 * COLUMNS;
    let Some(part) = x.par_chunks(piece).position_first(|part| !part.iter().fold(true, |ok, &v| ok & good(v))) else {
        return Ok(());
    };
    let bad = x[part * piece..].iter().position(|&v| !good(v)).map_or(0, |i| part * piece + i);
    let (token, column, value) = (bad / columns, bad % columns, x[bad]);
    Err(match value.is_finite() {
        true => MomentsError::TooLarge { token, column, value },
        false => MomentsError::NotFinite { token, column, value },
    })
}

/// Zeroed memory, or `None` where there is not enough.
fn zeros(n: usize) -> Option<Vec<f64>> {
    let mut v = Vec::new();
    v.try_reserve_exact(n).ok()?;
    v.resize(n, 0.0);
    Some(v)
}

/// The experts of one layer with a prior, so that importance does not rest on a handful of tokens.
///
/// Every expert `e` is given `tokens` more tokens which are like the mean over all experts of the weight:
///
/// ```text
/// E'[x²] = (Σ_e x² + k·m) / (n_e + k),   m = Σ_all x² / n_all,   k = tokens
/// ```
///
/// and the same for Σx and Σxxᵀ. An expert with `n_e = k` tokens is half its own, one with `100 k` is 99 % its own, and one
/// that saw none has the mean of the layer. llama-quantize, given a count of 0, takes 1.0 for every column of that expert: as if
/// all columns mattered alike, and on another scale than its neighbours (`prepare_imatrix`, b11434); with counts above 0 it
/// takes the expert's own mean however few they are. A file written from the result has counts `n_e + k`, so llama-quantize
/// sees the blend. Where no expert saw a token nothing is known and the result is as the input, count 0.
pub fn with_prior(experts: &[Moments], tokens: u64) -> Result<Vec<Moments>, MomentsError> {
    let mut blended = experts.to_vec();
    let Some(first) = experts.first().filter(|_| tokens > 0) else { return Ok(blended) };
    let mut all = Moments::new(first.columns, first.second.is_some())?;
    for e in experts {
        all.merge(e)?;
    }
    if all.count == 0 {
        return Ok(blended);
    }
    let factor = tokens as f64 / all.count as f64;
    for e in &mut blended {
        e.add_scaled(&all, factor, tokens)?;
    }
    Ok(blended)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::tests::values;

    fn of(x: &[f32], columns: usize, second: bool) -> Moments {
        let mut m = Moments::new(columns, second).unwrap();
        m.add(x, x.len() / columns).unwrap();
        m
    }

    #[test]
    fn sums_of_three_tokens() {
        let m = of(&[1.0, -2.0, 0.5, 4.0, 3.0, -1.0], 2, true);
        assert_eq!((m.count(), m.sum(), m.sum2()), (3, &[4.5, 1.0][..], &[10.25, 21.0][..]));
        assert_eq!(m.second().unwrap(), [10.25, -3.0, 21.0]);
        assert_eq!(m.mean_square().unwrap(), [10.25 / 3.0, 7.0]);
        assert_eq!(Moments::new(2, false).unwrap().mean(), None);
    }

    /// The two sums of a column as `collect_imatrix` makes them, f32 and token by token, are ours within the rounding of an f32
    /// sum: n · eps · Σ|x|.
    #[test]
    fn the_sums_of_llama_cpp_within_float_noise() {
        let (tokens, columns) = (3000, 37);
        let x = values(tokens * columns, 9);
        let m = of(&x, columns, false);
        for c in 0..columns {
            let column = || x[c..].iter().step_by(columns);
            let theirs = column().fold(0f32, |s, v| s + v * v);
            let bound = tokens as f64 * f64::from(f32::EPSILON) * m.sum2()[c];
            assert!((f64::from(theirs) - m.sum2()[c]).abs() <= bound, "column {c}");
            let theirs = column().fold(0f32, |s, v| s + v);
            let size: f64 = column().map(|v| f64::from(v.abs())).sum();
            assert!((f64::from(theirs) - m.sum()[c]).abs() <= tokens as f64 * f64::from(f32::EPSILON) * size);
        }
    }

    #[test]
    fn the_diagonal_of_the_second_moment_is_the_sum_of_squares() {
        let (tokens, columns) = (1300, 300);
        let m = of(&values(tokens * columns, 4), columns, true);
        let second = m.second().unwrap();
        for (i, s2) in m.sum2().iter().enumerate() {
            let diagonal = second[i * (i + 1) / 2 + i];
            assert!((diagonal / s2 - 1.0).abs() < linalg::F32_RUN as f64 * f64::from(f32::EPSILON), "column {i}");
        }
    }

    #[test]
    fn threads_change_nothing() {
        let (tokens, columns) = (700, 1100);
        let x = values(tokens * columns, 5);
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| of(&x, columns, true))
        };
        let one = on(1);
        assert_eq!(one, on(2));
        assert_eq!(one, on(5));
    }

    #[test]
    fn merging_is_adding() {
        let x = values(60 * 5, 6);
        let mut parts = of(&x[..100], 5, true);
        parts.merge(&of(&x[100..], 5, true)).unwrap();
        let whole = of(&x, 5, true);
        assert_eq!(parts.count(), whole.count());
        for (a, b) in parts.second().unwrap().iter().zip(whole.second().unwrap()) {
            assert!((a - b).abs() < 1e-4);
        }
        assert_eq!(parts.merge(&of(&x, 6, true)), Err(MomentsError::Columns { ours: 5, theirs: 6 }));
        assert_eq!(parts.merge(&of(&x, 5, false)), Err(MomentsError::Second));
    }

    #[test]
    fn what_is_not_finite_is_named_and_leaves_the_sums_alone() {
        for (at, value) in [(0, f32::NAN), (2500 * 3 + 2, f32::INFINITY), (8999, f32::NEG_INFINITY)] {
            for second in [false, true] {
                let mut x = values(3000 * 3, 7);
                let mut m = of(&x, 3, second);
                let before = m.clone();
                x[at] = value;
                let error = m.add(&x, 3000).unwrap_err();
                let (token, column) = (at / 3, at % 3);
                assert!(
                    matches!(error, MomentsError::NotFinite { token: t, column: c, .. } if (t, c) == (token, column)),
                    "{error}"
                );
                assert_eq!(m, before);
            }
        }
        let mut m = Moments::new(2, true).unwrap();
        let error = m.add(&[1.0, 1e30], 1).unwrap_err();
        assert_eq!(error, MomentsError::TooLarge { token: 0, column: 1, value: 1e30 });
        assert!(error.to_string().starts_with("the activation of token 0 is 1e30 at column 1, too large"), "{error}");
        let mut m = Moments::new(2, false).unwrap();
        m.add(&[1.0, 1e30], 1).unwrap();
        assert!((m.sum2()[1] / 1e60 - 1.0).abs() < 1e-6);
        assert!(matches!(m.add(&[1.0], 1), Err(MomentsError::Shape { .. })));
    }

    #[test]
    fn memory_is_known_before_it_is_taken() {
        assert_eq!(second_bytes(3), Some(48));
        assert_eq!(second_bytes(4096), Some(67_125_248));
        assert_eq!(second_bytes(usize::MAX), None);
        let m = Moments::new(3, true).unwrap();
        assert_eq!(m.bytes(), 48 + 2 * 24);
        assert_eq!(Moments::new(1 << 40, true), Err(MomentsError::Memory { columns: 1 << 40 }));
    }

    #[test]
    fn a_prior_of_k_tokens_weighs_as_k_tokens() {
        let (rich, poor, none) = (of(&[2.0; 30], 1, true), of(&[4.0; 10], 1, true), Moments::new(1, true).unwrap());
        let experts = [rich, poor, none];
        // the mean over the layer: (30·4 + 10·16) / 40
        let m = 7.0;
        let blended = with_prior(&experts, 10).unwrap();
        let square: Vec<f64> = blended.iter().map(|e| e.mean_square().unwrap()[0]).collect();
        let exact = [(30.0 * 4.0 + 10.0 * m) / 40.0, (10.0 * 16.0 + 10.0 * m) / 20.0, m];
        for (s, e) in square.iter().zip(exact) {
            assert!((s - e).abs() < 1e-12, "{square:?}");
        }
        assert_eq!(blended.iter().map(Moments::count).collect::<Vec<_>>(), [40, 20, 10]);
        for e in &blended {
            assert!((e.second().unwrap()[0] - e.sum2()[0]).abs() < 1e-9);
            assert!(e.mean().unwrap()[0] > 2.0);
        }
        assert_eq!(with_prior(&experts, 0).unwrap(), experts);
        let unseen = [Moments::new(1, false).unwrap()];
        assert_eq!(with_prior(&unseen, 10).unwrap()[0].count(), 0);
    }
}
