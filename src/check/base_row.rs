//! Log-probabilities of one position in 16 bits, as llama-perplexity stores and scores them.
//!
//! A row is `scale`, `min_log_prob` (f32) and one code per word: ln P = scale code + min_log_prob. Codes cover the 16 nats
//! below the largest logit, words below that get code 0. Writing ([`encode`]) and scoring ([`compare`]) do the f32 and f64
//! operations of the functions `log_softmax` in llama.cpp's tools/perplexity/perplexity.cpp in their order, with the same
//! `expf` and `log` of the system's library, so that files have the same bytes and figures the same digits. For the same
//! reason they are scalar. Where logits of the reference are at hand, [`super::stats`] is both faster and more exact.
//!
//! What 16 bits lose: scale is 16/65535 nats at most, so a stored ln P is off by up to 1.2e-4; words that the reference
//! gives less than e^-16 do not count.

use super::LogitsError;
use super::stats::{self, Position};

/// u16 units in front of the codes of a row: two f32.
pub const HEAD: usize = 4;

/// u16 units of a row of `n_vocab` words: the head, the codes, one of padding if their number is odd.
///
/// `None` if that overflows.
pub fn units(n_vocab: usize) -> Option<usize> {
    n_vocab.checked_next_multiple_of(2)?.checked_add(HEAD)
}

/// Words less likely than e^-16 in the reference do not count.
const CUT: f32 = -16.0;

/// One position of the reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BaseRow<'a> {
    /// Nats per code.
    pub scale: f32,
    /// ln P of code 0.
    pub min_log_prob: f32,
    /// One per word.
    pub codes: &'a [u16],
}

impl<'a> BaseRow<'a> {
    /// The row that stands in `units`, [`units`]`(n_vocab)` of them.
    pub fn new(units: &'a [u16], n_vocab: usize) -> Option<BaseRow<'a>> {
        let float = |low: u16, high: u16| f32::from_bits(u32::from(low) | u32::from(high) << 16);
        let (head, codes) = units.split_first_chunk::<HEAD>()?;
        let codes = codes.get(..n_vocab)?;
        Some(BaseRow { scale: float(head[0], head[1]), min_log_prob: float(head[2], head[3]), codes })
    }

    /// ln P of `word`, nats.
    pub fn log_prob(&self, word: usize) -> Option<f32> {
        self.codes.get(word).map(|&code| self.at(code))
    }

    fn at(&self, code: u16) -> f32 {
        self.scale * f32::from(code) + self.min_log_prob
    }
}

/// Rounds to nearest, ties to even, as `nearest_int` there: by adding 1.5 2^23.
fn nearest(v: f32) -> i32 {
    ((v + 12582912.0).to_bits() as i32 & 0x007f_ffff) - 0x0040_0000
}

/// Largest logit, ln of the sum of exponentials (rounded to f32).
fn max_and_sum(logits: &[f32]) -> (f32, f32) {
    let max = logits.iter().fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m });
    let sum = logits.iter().fold(0.0f64, |s, &v| s + f64::from((v - max).exp()));
    (max, sum.ln() as f32)
}

/// Writes the row of `logits` (n_vocab values) to `row` ([`units`]`(n_vocab)` units) and gives -ln P of `next`, nats, as
/// llama-perplexity adds it up while it writes.
///
/// Errors: a token beyond the vocabulary, NaN or infinite logits, a row of another length.
pub fn encode(logits: &[f32], next: usize, row: &mut [u16]) -> Result<f64, LogitsError> {
    stats::check_token(next, logits.len())?;
    if Some(row.len()) != units(logits.len()) {
        return Err(LogitsError::Shape { values: row.len(), positions: 1, n_vocab: logits.len() });
    }
    if let Some(error) = stats::not_finite(logits, "reference") {
        return Err(error);
    }
    let (max, log_sum) = max_and_sum(logits);
    let min = logits.iter().fold(f32::INFINITY, |m, &v| if v < m { v } else { m });
    let min = if min < max - 16.0 { max - 16.0 } else { min };
    let min_log_prob = min - max - log_sum;
    let scale = (max - min) / 65535.0;
    let (head, codes) = row.split_at_mut(HEAD);
    let words = [scale, min_log_prob].map(f32::to_bits);
    head.copy_from_slice(&words.map(|w| [w as u16, (w >> 16) as u16]).concat());
    codes.fill(0);
    if scale != 0.0 {
        let inverse = 1.0 / scale;
        for (code, &v) in codes.iter_mut().zip(logits) {
            *code = if v > min { nearest(inverse * (v - min)) as u16 } else { 0 };
        }
    }
    Ok(f64::from(max + log_sum - logits[next]))
}

/// Compares the logits of a model with a stored row; the record holds what `kl_divergence` there adds up.
///
/// Errors: another vocabulary, a token beyond it, NaN or infinite logits.
pub fn compare(base: BaseRow<'_>, logits: &[f32], next: usize) -> Result<Position, LogitsError> {
    if base.codes.len() != logits.len() {
        return Err(LogitsError::Vocabulary { reference: base.codes.len(), model: logits.len() });
    }
    stats::check_token(next, logits.len())?;
    if let Some(error) = stats::not_finite(logits, "model") {
        return Err(error);
    }
    let (max, log_sum) = max_and_sum(logits);
    let top = logits.iter().position(|&v| v == max);
    let nll = max + log_sum - logits[next];
    let nll_base = -base.at(base.codes[next]);
    let lse = max + log_sum;
    let mut kld = 0.0f64;
    let mut top_base = (0, f32::NEG_INFINITY);
    for (i, (&code, &logit)) in base.codes.iter().zip(logits).enumerate() {
        let log_prob = base.at(code);
        if i == 0 || log_prob > top_base.1 {
            top_base = (i, log_prob);
        }
        if log_prob > CUT {
            kld += f64::from(log_prob.exp() * (log_prob - logit + lse));
        }
    }
    Ok(Position {
        nll: f64::from(nll),
        nll_base: f64::from(nll_base),
        kld,
        p_diff: f64::from((-nll).exp() - (-nll_base).exp()),
        same_top: top == Some(top_base.0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits() -> Vec<f32> {
        (0..101).map(|i| ((i * 37) % 101) as f32 * 0.25 - 9.0).collect()
    }

    #[test]
    fn a_row_holds_the_log_probabilities_to_half_a_step() {
        let x = logits();
        let mut units = vec![0xffff; units(x.len()).unwrap()];
        let nll = encode(&x, 5, &mut units).unwrap();
        assert_eq!(units.len(), 106);
        assert_eq!(units[105], 0, "padding");
        let row = BaseRow::new(&units, x.len()).unwrap();
        let (max, sum) = (16.0, x.iter().map(|&v| f64::from(v).exp()).sum::<f64>().ln());
        let mut cut = 0;
        for (i, &v) in x.iter().enumerate() {
            let (got, want) = (f64::from(row.log_prob(i).unwrap()), f64::from(v) - sum);
            if v > max - 16.0 {
                assert!((got - want).abs() < 0.5 * 16.0 / 65535.0 + 2e-6, "{i}: {got} {want}");
            } else {
                assert_eq!(row.codes[i], 0);
                cut += 1;
            }
        }
        assert_eq!(cut, 37);
        assert!((nll - (sum - f64::from(x[5]))).abs() < 2e-6);
        assert_eq!(row.log_prob(101), None);
        assert_eq!(*row.codes.iter().max().unwrap(), 65535);
    }

    #[test]
    fn equal_logits_have_no_scale() {
        let mut row = vec![7; 12];
        encode(&[2.5; 8], 0, &mut row).unwrap();
        let row = BaseRow::new(&row, 8).unwrap();
        assert_eq!((row.scale, row.codes), (0.0, &[0; 8][..]));
        assert!((row.min_log_prob + 8f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn the_stored_row_against_its_own_logits_and_others() {
        let x = logits();
        let mut stored = vec![0; units(x.len()).unwrap()];
        encode(&x, 5, &mut stored).unwrap();
        let base = BaseRow::new(&stored, x.len()).unwrap();
        let same = compare(base, &x, 5).unwrap();
        // each ln P is off by half a step at most
        assert!(same.kld.abs() < 0.5 * 16.0 / 65535.0 && same.same_top && same.p_diff.abs() < 1e-6, "{same:?}");
        let other: Vec<f32> = x.iter().enumerate().map(|(i, v)| v + ((i * 13) % 7) as f32 * 0.1).collect();
        let (got, want) = (compare(base, &other, 5).unwrap(), stats::compare(&x, &other, 5).unwrap());
        assert!((got.kld / want.kld - 1.0).abs() < 1e-3, "{got:?} {want:?}");
        assert!((got.nll - want.nll).abs() < 1e-5 && (got.p_diff - want.p_diff).abs() < 1e-5);
    }

    #[test]
    fn rounding_is_to_even() {
        let cases = [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (65535.004, 65535), (3.49, 3)];
        for (v, want) in cases {
            assert_eq!(nearest(v), want, "{v}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let x = logits();
        assert!(encode(&x, 101, &mut [0; 106]).is_err());
        assert!(encode(&x, 0, &mut [0; 105]).is_err());
        assert!(encode(&[0.0, f32::NAN], 0, &mut [0; 6]).is_err_and(|e| e.to_string().contains("word 1 is NaN")));
        assert!(encode(&[], 0, &mut [0; 4]).is_err());
        let units = [0; 106];
        let base = BaseRow::new(&units, 101).unwrap();
        assert!(compare(base, &x[1..], 0).is_err_and(|e| e.to_string().contains("101 words, the model 100")));
        assert!(compare(base, &x, 101).is_err());
        assert_eq!((BaseRow::new(&units, 103), BaseRow::new(&[0; 3], 0), super::units(usize::MAX)), (None, None, None));
    }
}
