//! One record per scored position, from the logits of reference and model in f32.
//!
//! With P the softmax of the reference's logits a, Q that of the model's logits b, and next the token that follows:
//! nll = -ln Q(next), nll_base = -ln P(next), p_diff = Q(next) - P(next), same_top says whether both have the same first
//! word of highest probability, and KLD = sum P ln(P/Q) over the whole vocabulary, in nats.
//!
//! The textbook formula subtracts sums that agree in all digits when the models are nearly equal. Here, with
//! d = a - b and any constant c, u = d - c and D = E\[u\] under P,
//!
//! ```text
//! KLD = D + ln E[e^-u] = D + ln(1 + E[e^-u - 1 + u] - D)
//! ```
//!
//! where e^-u - 1 + u is nowhere negative and about u^2/2 near zero; with c close to the mean of d, D is small and nothing
//! cancels. c is the difference at the reference's top word; where that turns out to be far from the mean, the pass is
//! repeated with the mean itself. Where |u| > 1/2, P e^-u is taken as Q times a constant, which cannot overflow.

use rayon::prelude::*;

use super::LogitsError;
use super::kernel::{self, Tops};

/// What one scored position says.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Position {
    /// -ln of the model's probability of the next token, nats.
    pub nll: f64,
    /// The same of the reference.
    pub nll_base: f64,
    /// KL divergence of the model from the reference, nats.
    pub kld: f64,
    /// Probability of the next token, model minus reference.
    pub p_diff: f64,
    /// Both have the same word on top.
    pub same_top: bool,
}

/// Above this, the plain formula has all the digits that f32 logits give.
const LARGE: f64 = 0.5;
/// How much larger than the result its terms may be before the pass is repeated.
const SPREAD: f64 = 8.0;

/// Compares two rows of logits: `reference` and `model` are n_vocab values each, `next` is the token that follows.
///
/// Errors: rows of different length, a token beyond them, a logit that is NaN or infinite.
pub fn compare(reference: &[f32], model: &[f32], next: usize) -> Result<Position, LogitsError> {
    if reference.len() != model.len() {
        return Err(LogitsError::Vocabulary { reference: reference.len(), model: model.len() });
    }
    check_token(next, model.len())?;
    let (a, a_top) = kernel::peak(reference);
    let (b, b_top) = kernel::peak(model);
    let mut top = Tops { a, b, shift: reference[a_top] - model[a_top] };
    let mut sums = kernel::compare(reference, model, &top);
    if ![sums.a, sums.b, sums.u].iter().all(|v| v.is_finite()) {
        return Err(not_finite(reference, "reference")
            .or_else(|| not_finite(model, "model"))
            .unwrap_or(LogitsError::NotFinite { side: "the difference", word: a_top, value: top.shift }));
    }
    let lse_a = f64::from(a) + sums.a.ln();
    let lse_b = f64::from(b) + sums.b.ln();
    let (mut kld, spread) = divergence(&sums, &top);
    let settled = kld.is_finite() && spread <= SPREAD * kld;
    if !settled && spread != 0.0 {
        top.shift = (f64::from(top.shift) + sums.u / sums.a) as f32;
        sums = kernel::compare(reference, model, &top);
        kld = divergence(&sums, &top).0;
    }
    let nll = lse_b - f64::from(model[next]);
    let nll_base = lse_a - f64::from(reference[next]);
    // rounding may leave -1e-17 where nothing differs
    let kld = kld.max(0.0);
    Ok(Position { nll, nll_base, kld, p_diff: (-nll).exp() - (-nll_base).exp(), same_top: a_top == b_top })
}

/// The divergence, and the size of the terms that it is the sum of.
fn divergence(sums: &kernel::Sums, top: &Tops) -> (f64, f64) {
    let mean = sums.u / sums.a;
    // ln of e^-u P / eb, but for the sum of ea
    let offset = f64::from(top.b) - f64::from(top.a) + f64::from(top.shift);
    let plain = mean + offset + (sums.b / sums.a).ln();
    if plain >= LARGE {
        return (plain, mean.abs());
    }
    let far = if sums.far == 0.0 { 0.0 } else { offset.exp() * sums.far };
    let spread = (sums.near + far) / sums.a;
    (mean + (spread - mean).ln_1p(), spread)
}

/// -ln of the probability of `next`, nats, from one row of n_vocab logits.
///
/// Errors: a token beyond the row, a logit that is NaN or infinite.
pub fn nll(logits: &[f32], next: usize) -> Result<f64, LogitsError> {
    check_token(next, logits.len())?;
    let (max, _) = kernel::peak(logits);
    let sum = kernel::sum(logits, max);
    match not_finite(&[max, logits[next]], "model") {
        None if sum.is_finite() => Ok(f64::from(max) + sum.ln() - f64::from(logits[next])),
        found => Err(not_finite(logits, "model").or(found).unwrap_or(LogitsError::NotFinite {
            side: "model",
            word: next,
            value: logits[next],
        })),
    }
}

/// [`compare`] for positions x n_vocab logits, on all threads of the pool; records in the order of the positions.
///
/// Errors: those of [`compare`] (of the first position that has one), buffers that are not positions x n_vocab.
pub fn compare_rows(
    reference: &[f32],
    model: &[f32],
    n_vocab: usize,
    next: &[i32],
) -> Result<Vec<Position>, LogitsError> {
    check_shape(reference.len(), n_vocab, next.len())?;
    check_shape(model.len(), n_vocab, next.len())?;
    let rows = reference.par_chunks_exact(n_vocab).zip(model.par_chunks_exact(n_vocab)).zip(next);
    first_error(rows.map(|((a, b), &next)| compare(a, b, token(next, n_vocab)?)).collect())
}

/// [`nll`] for positions x n_vocab logits, on all threads of the pool; values in the order of the positions.
///
/// Errors: those of [`nll`] (of the first position that has one), a buffer that is not positions x n_vocab.
pub fn nll_rows(logits: &[f32], n_vocab: usize, next: &[i32]) -> Result<Vec<f64>, LogitsError> {
    check_shape(logits.len(), n_vocab, next.len())?;
    let rows = logits.par_chunks_exact(n_vocab).zip(next);
    first_error(rows.map(|(row, &next)| nll(row, token(next, n_vocab)?)).collect())
}

/// All values, or the error of the lowest position: not that of the fastest thread.
pub(super) fn first_error<T>(all: Vec<Result<T, LogitsError>>) -> Result<Vec<T>, LogitsError> {
    all.into_iter().collect()
}

pub(super) fn check_shape(values: usize, n_vocab: usize, positions: usize) -> Result<(), LogitsError> {
    match positions.checked_mul(n_vocab) {
        Some(n) if n == values && n_vocab > 0 => Ok(()),
        _ => Err(LogitsError::Shape { values, positions, n_vocab }),
    }
}

/// A token of a file or a tokenizer as an index.
pub(super) fn token(next: i32, n_vocab: usize) -> Result<usize, LogitsError> {
    usize::try_from(next).map_err(|_| LogitsError::Token { next: next as u32 as usize, n_vocab })
}

pub(super) fn check_token(next: usize, n_vocab: usize) -> Result<(), LogitsError> {
    if next < n_vocab { Ok(()) } else { Err(LogitsError::Token { next, n_vocab }) }
}

/// The first logit that is no number.
pub(super) fn not_finite(row: &[f32], side: &'static str) -> Option<LogitsError> {
    let word = row.iter().position(|v| !v.is_finite())?;
    Some(LogitsError::NotFinite { side, word, value: row[word] })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition in f64, two passes, sums of sorted terms left out of it: good to 1e-13.
    fn textbook(a: &[f32], b: &[f32], next: usize) -> Position {
        let log_softmax = |x: &[f32]| -> Vec<f64> {
            let max = x.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(f64::from(v)));
            let sum: f64 = x.iter().map(|&v| (f64::from(v) - max).exp()).sum();
            x.iter().map(|&v| f64::from(v) - max - sum.ln()).collect()
        };
        let (p, q) = (log_softmax(a), log_softmax(b));
        // each term P ln(P/Q) - P + Q is nowhere negative, and the added ones cancel over the vocabulary
        let kld = p.iter().zip(&q).map(|(p, q)| p.exp() * ((q - p).exp_m1() - (q - p))).sum();
        let top = |x: &[f32]| (0..x.len()).rev().max_by(|&i, &j| x[i].total_cmp(&x[j])).unwrap();
        let p_diff = q[next].exp() - p[next].exp();
        Position { nll: -q[next], nll_base: -p[next], kld, p_diff, same_top: top(a) == top(b) }
    }

    struct Random(u64);

    impl Random {
        fn unit(&mut self) -> f32 {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.0 >> 40) as f32 / 16777216.0
        }

        /// About normal, of deviation 1.
        fn normal(&mut self) -> f32 {
            (0..12).map(|_| self.unit()).sum::<f32>() - 6.0
        }

        fn row(&mut self, n: usize, scale: f32) -> Vec<f32> {
            (0..n).map(|_| self.normal() * scale).collect()
        }
    }

    /// Relative error of the KLD against the textbook.
    fn relative(a: &[f32], b: &[f32]) -> (f64, f64) {
        let (got, want) = (compare(a, b, 7).unwrap(), textbook(a, b, 7));
        assert!((got.nll - want.nll).abs() < 2e-6, "{got:?} {want:?}");
        assert!((got.nll_base - want.nll_base).abs() < 2e-6, "{got:?} {want:?}");
        assert!((got.p_diff - want.p_diff).abs() < 1e-6, "{got:?} {want:?}");
        assert_eq!(got.same_top, want.same_top);
        ((got.kld - want.kld).abs() / want.kld, want.kld)
    }

    #[test]
    fn the_divergence_is_that_of_the_textbook_at_every_size() {
        let mut random = Random(1);
        let (mut smallest, mut largest) = (f64::MAX, 0.0f64);
        for n in [64, 8191, 49152] {
            for scale in [0.5, 3.0, 6.0] {
                let a = random.row(n, scale);
                for noise in [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0, 3.0, 10.0] {
                    let b: Vec<f32> = a.iter().map(|v| v + noise * random.normal()).collect();
                    let (error, kld) = relative(&a, &b);
                    assert!(error < 1e-5, "n {n}, scale {scale}, noise {noise}: KLD {kld:e}, relative error {error:e}");
                    (smallest, largest) = (smallest.min(kld), largest.max(kld));
                }
            }
        }
        assert!(smallest < 1e-9 && largest > 10.0, "{smallest:e} {largest:e}");
    }

    #[test]
    fn a_constant_on_all_logits_changes_nothing_but_rounding() {
        let mut random = Random(2);
        for shift in [0.37, -5.0, 30.0] {
            let a = random.row(49152, 3.0);
            let b: Vec<f32> = a.iter().map(|v| v + shift + 1.4e-3 * random.normal()).collect();
            let (error, kld) = relative(&a, &b);
            assert!((5e-7..2e-6).contains(&kld), "{kld:e}");
            assert!(error < 1e-4, "shift {shift}: KLD {kld:e}, relative error {error:e}");
        }
    }

    #[test]
    fn one_word_that_moves_far_is_not_lost() {
        let mut random = Random(3);
        let a = random.row(5000, 3.0);
        let top = (0..5000).max_by(|&i, &j| a[i].total_cmp(&a[j])).unwrap();
        for word in [top, 17] {
            for by in [-95.0, -30.0, -3.0, 3.0, 30.0, 95.0, 300.0] {
                let mut b = a.clone();
                b[word] += by;
                let (error, kld) = relative(&a, &b);
                assert!(error < 1e-5, "word {word} by {by}: KLD {kld:e}, relative error {error:e}");
            }
        }
        // a word of probability e^-100 that becomes a likely one
        let mut a = vec![0.0; 100];
        a[5] = -100.0;
        let mut b = a.clone();
        b[5] = -4.0;
        assert!(relative(&a, &b).0 < 1e-5);
        // the top word is an outlier of the differences
        let mut a = random.row(49152, 0.1);
        a[9] = 1.0;
        let mut b: Vec<f32> = a.iter().map(|v| v + 1e-3 * random.normal()).collect();
        b[9] -= 0.3;
        let (error, kld) = relative(&a, &b);
        assert!(error < 1e-5, "KLD {kld:e}, relative error {error:e}");
        // and so far that the first pass overflows
        for by in [2000.0, 20000.0] {
            b[9] -= by;
            let (error, kld) = relative(&a, &b);
            assert!(error < 1e-5, "KLD {kld:e}, relative error {error:e}");
        }
    }

    #[test]
    fn equal_rows_differ_by_nothing() {
        let a = Random(4).row(10000, 4.0);
        let p = compare(&a, &a, 3).unwrap();
        assert_eq!((p.kld, p.p_diff, p.same_top, p.nll), (0.0, 0.0, true, p.nll_base));
        assert_eq!(nll(&a, 3).unwrap(), p.nll);
        let even = compare(&[1.0; 8], &[2.0; 8], 3).unwrap();
        assert!(even.kld == 0.0 && (even.nll - 8f64.ln()).abs() < 1e-14);
    }

    #[test]
    fn broken_logits_are_named() {
        let good = Random(5).row(600, 1.0);
        for (bad, text) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
            let mut row = good.clone();
            row[555] = bad;
            let errors =
                [compare(&good, &row, 1), compare(&row, &good, 1), nll(&row, 555).map(|_| Position::default())];
            for (error, side) in errors.into_iter().zip(["model", "reference", "model"]) {
                let text = format!("{side}: the logit of word 555 is {text};");
                assert!(error.clone().is_err_and(|e| e.to_string().starts_with(&text)), "{error:?}");
            }
        }
        assert!(nll(&[], 0).is_err());
        assert!(compare(&good, &good[1..], 0).is_err_and(|e| e.to_string().contains("600 words, the model 599")));
        assert!(compare(&good, &good, 600).is_err_and(|e| e.to_string().contains("is 600, but")));
        assert!(compare_rows(&good, &good, 300, &[1, -1]).is_err());
        assert!(compare_rows(&good, &good, 300, &[1]).is_err_and(|e| e.to_string().contains("600 logits for 1")));
        assert!(compare_rows(&good, &good, 0, &[]).is_err());
    }

    #[test]
    fn threads_change_nothing() {
        let mut random = Random(6);
        let (a, b) = (random.row(40 * 1000, 3.0), random.row(40 * 1000, 3.0));
        let next: Vec<i32> = (0..40).collect();
        let on = |n| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
            pool.install(|| (compare_rows(&a, &b, 1000, &next).unwrap(), nll_rows(&b, 1000, &next).unwrap()))
        };
        let one = on(1);
        assert_eq!(one, on(5));
        assert_eq!(one.0[39], compare(&a[39000..], &b[39000..], 39).unwrap());
        assert!(one.0.iter().zip(&one.1).all(|(p, nll)| (p.nll - nll).abs() < 1e-12));
    }
}
