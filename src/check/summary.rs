//! What llama-perplexity prints under `--kl-divergence`, from the records of all positions.
//!
//! Formulas and error bars are those of `kl_divergence` in llama.cpp's tools/perplexity/perplexity.cpp: one standard
//! error of the mean, propagated to first order. Two sets of rounding rules: [`Rules::Exact`] adds up f64 as it comes,
//! [`Rules::LlamaCpp`] rounds to f32 where that function does, so that its printed digits are met from the same records.
//! Sums run in the order of the records.

use serde::{Deserialize, Serialize};

use super::stats::Position;

/// How squares and percentiles are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// f64 throughout.
    Exact,
    /// f32 where llama.cpp has f32.
    LlamaCpp,
}

/// A figure and its standard error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    pub value: f64,
    /// One standard error. 0 for the mean of ten values or fewer, as there.
    pub error: f64,
}

/// Where values lie: order statistics, linear between neighbours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    pub max: f64,
    pub p99_9: f64,
    pub p99: f64,
    pub p95: f64,
    pub p90: f64,
    pub p75: f64,
    pub median: f64,
    pub p25: f64,
    pub p10: f64,
    pub p5: f64,
    pub p1: f64,
    pub p0_1: f64,
    pub min: f64,
}

/// All positions of a model against the reference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Scored positions.
    pub positions: usize,
    /// e^(mean nll) of the model, `PPL(Q)`.
    pub ppl: Estimate,
    /// The same of the reference.
    pub ppl_base: Estimate,
    /// Correlation of ln PPL(Q) and ln PPL(base), -1 to 1; `null` where one of them does not vary.
    pub ln_ppl_correlation: Option<f64>,
    /// ln(PPL(Q)/PPL(base)).
    pub ln_ppl_ratio: Estimate,
    /// PPL(Q)/PPL(base).
    pub ppl_ratio: Estimate,
    /// PPL(Q)-PPL(base).
    pub ppl_difference: Estimate,
    /// Mean KL divergence, nats.
    pub kld: Estimate,
    /// Of the KL divergence, nats.
    pub kld_percentiles: Percentiles,
    /// Mean difference of the next token's probability, model minus reference; 0.01 is one percentage point.
    pub p_diff: Estimate,
    /// Root of the mean square of that.
    pub p_diff_rms: Estimate,
    pub p_diff_percentiles: Percentiles,
    /// Share of positions at which both have the same top word, 0 to 1.
    pub same_top: Estimate,
}

/// The perplexity of one model alone.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    pub positions: usize,
    pub ppl: Estimate,
}

/// Mean and standard error from sums of values and of squares.
fn mean(sum: f64, squares: f64, count: f64) -> Estimate {
    let value = sum / count;
    let variance = squares / count - value * value;
    let error = if variance > 0.0 && count > 10.0 { (variance / (count - 1.0)).sqrt() } else { 0.0 };
    Estimate { value, error }
}

/// Root of what rounding may have made negative.
fn root(v: f64) -> f64 {
    v.max(0.0).sqrt()
}

impl Rules {
    /// x y, rounded.
    fn times(self, x: f64, y: f64) -> f64 {
        match self {
            Rules::Exact => x * y,
            Rules::LlamaCpp => f64::from(x as f32 * y as f32),
        }
    }

    /// `fraction` of the way through sorted values, which are not empty.
    fn percentile(self, sorted: &[f64], fraction: f64) -> f64 {
        let last = sorted.len() - 1;
        match self {
            Rules::Exact => {
                let at = fraction * last as f64;
                let i = (at as usize).min(last);
                let part = at - i as f64;
                sorted[i] + part * (sorted[(i + 1).min(last)] - sorted[i])
            }
            Rules::LlamaCpp => {
                let at = fraction as f32 * last as f32;
                let i = (at as usize).min(last);
                let part = at - i as f32;
                f64::from((1.0 - part) * sorted[i] as f32 + part * sorted[(i + 1).min(last)] as f32)
            }
        }
    }

    fn percentiles(self, mut values: Vec<f64>) -> Percentiles {
        values.sort_by(f64::total_cmp);
        let Some((&min, &max)) = values.first().zip(values.last()) else { return Percentiles::default() };
        let round = |v: f64| if self == Rules::LlamaCpp { f64::from(v as f32) } else { v };
        let at = |fraction| self.percentile(&values, fraction);
        let half = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            round(0.5 * (round(values[half]) + round(values[half - 1])))
        } else {
            round(values[half])
        };
        Percentiles {
            max: round(max),
            p99_9: at(0.999),
            p99: at(0.99),
            p95: at(0.95),
            p90: at(0.9),
            p75: at(0.75),
            median,
            p25: at(0.25),
            p10: at(0.1),
            p5: at(0.05),
            p1: at(0.01),
            p0_1: at(0.001),
            min: round(min),
        }
    }
}

impl Summary {
    /// The figures of `records`, in their order; `None` if there are none. llama-perplexity prints them from 100 positions
    /// on only; with fewer, error bars mean little.
    pub fn of(records: &[Position], rules: Rules) -> Option<Summary> {
        if records.is_empty() {
            return None;
        }
        let count = records.len() as f64;
        let sum = |f: &dyn Fn(&Position) -> f64| records.iter().fold(0.0, |s, r| s + f(r));
        let square = |f: &dyn Fn(&Position) -> f64| sum(&|r| rules.times(f(r), f(r)));
        let ln_ppl = mean(sum(&|r| r.nll), square(&|r| r.nll), count);
        let ln_base = mean(sum(&|r| r.nll_base), square(&|r| r.nll_base), count);
        let ppl = Estimate { value: ln_ppl.value.exp(), error: ln_ppl.value.exp() * ln_ppl.error };
        let ppl_base = Estimate { value: ln_base.value.exp(), error: ln_base.value.exp() * ln_base.error };

        let products = sum(&|r| rules.times(r.nll, r.nll_base));
        let covariance =
            if count < 10.0 { 0.0 } else { (products / count - ln_ppl.value * ln_base.value) / (count - 1.0) };
        let errors = ln_ppl.error * ln_base.error;
        let ratio = ln_ppl.value - ln_base.value;
        let ratio_error = root(ln_ppl.error * ln_ppl.error + ln_base.error * ln_base.error - 2.0 * covariance);
        let cross = ppl.value * ppl_base.value * covariance;
        let difference_error = root(ppl.error * ppl.error + ppl_base.error * ppl_base.error - 2.0 * cross);

        let p_square = |r: &Position| rules.times(r.p_diff, r.p_diff);
        let mse = mean(sum(&p_square), sum(&|r| p_square(r) * p_square(r)), count);
        let rms = mse.value.sqrt();
        let same = records.iter().filter(|r| r.same_top).count() as f64 / count;
        let same_error = if count > 1.0 { root(same * (1.0 - same) / (count - 1.0)) } else { 0.0 };
        Some(Summary {
            positions: records.len(),
            ppl,
            ppl_base,
            ln_ppl_correlation: (errors > 0.0).then(|| covariance / errors),
            ln_ppl_ratio: Estimate { value: ratio, error: ratio_error },
            ppl_ratio: Estimate { value: ratio.exp(), error: ratio.exp() * ratio_error },
            ppl_difference: Estimate { value: ppl.value - ppl_base.value, error: difference_error },
            kld: mean(sum(&|r| r.kld), sum(&|r| r.kld * r.kld), count),
            kld_percentiles: rules.percentiles(records.iter().map(|r| r.kld).collect()),
            p_diff: mean(sum(&|r| r.p_diff), sum(&p_square), count),
            p_diff_rms: Estimate { value: rms, error: if rms > 0.0 { 0.5 / rms * mse.error } else { 0.0 } },
            p_diff_percentiles: rules.percentiles(records.iter().map(|r| r.p_diff).collect()),
            same_top: Estimate { value: same, error: same_error },
        })
    }
}

impl Perplexity {
    /// The perplexity of the positions whose -ln p are given, as `perplexity` of perplexity.cpp has it; `None` if there are
    /// none.
    pub fn of(nll: &[f64]) -> Option<Perplexity> {
        let count = nll.len() as f64;
        let (sum, squares) = nll.iter().fold((0.0, 0.0), |(s, q), v| (s + v, q + v * v));
        let value = (!nll.is_empty()).then(|| sum / count)?;
        let variance = squares / count - value * value;
        let error = if variance > 0.0 && nll.len() > 1 { (variance / (count - 1.0)).sqrt() } else { 0.0 };
        Some(Perplexity { positions: nll.len(), ppl: Estimate { value: value.exp(), error: value.exp() * error } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records of 200 positions with figures that can be worked out by hand.
    fn records() -> Vec<Position> {
        (0..200)
            .map(|i| {
                let x = f64::from(i);
                Position {
                    nll: 2.0 + 0.01 * x,
                    nll_base: 1.9 + 0.01 * x,
                    kld: 0.001 * x,
                    p_diff: if i % 2 == 0 { 0.02 } else { -0.04 },
                    same_top: i % 10 != 0,
                }
            })
            .collect()
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-12 * b.abs().max(1.0)
    }

    #[test]
    fn figures_worked_out_by_hand() {
        let s = Summary::of(&records(), Rules::Exact).unwrap();
        // mean 2.995; deviation of 0..199 times 0.01: sqrt((200^2 - 1)/12) / 100
        let error = ((200.0f64 * 200.0 - 1.0) / 12.0).sqrt() / 100.0 / 199f64.sqrt();
        assert!(close(s.ppl.value, 2.995f64.exp()) && close(s.ppl.error, 2.995f64.exp() * error), "{s:?}");
        assert!(close(s.ppl_base.value, 2.895f64.exp()));
        assert!(close(s.ln_ppl_correlation.unwrap(), 1.0));
        assert!(close(s.ln_ppl_ratio.value, 0.1) && s.ln_ppl_ratio.error < 1e-7, "{s:?}");
        assert!(close(s.ppl_ratio.value, 0.1f64.exp()));
        assert!(close(s.ppl_difference.value, 2.995f64.exp() - 2.895f64.exp()));
        // fully correlated: the errors subtract
        assert!((s.ppl_difference.error - (s.ppl.error - s.ppl_base.error)).abs() < 1e-9);
        assert!(close(s.kld.value, 0.0995) && close(s.kld.error, error / 10.0));
        let k = s.kld_percentiles;
        assert_eq!((k.min, k.max), (0.0, 0.001 * 199.0));
        assert!(close(k.median, 0.0995) && close(k.p90, 0.1791) && close(k.p0_1, 0.000199), "{k:?}");
        assert!(close(s.p_diff.value, -0.01));
        assert!(close(s.p_diff_rms.value, 0.001f64.sqrt()));
        // squares 0.0004 and 0.0016: deviation 0.0006
        assert!(close(s.p_diff_rms.error, 0.5 / 0.001f64.sqrt() * 0.0006 / 199f64.sqrt()));
        assert!(close(s.same_top.value, 0.9) && close(s.same_top.error, (0.09f64 / 199.0).sqrt()));
    }

    #[test]
    fn the_rounding_of_llama_cpp_is_small_and_not_nothing() {
        let (exact, there) =
            (Summary::of(&records(), Rules::Exact).unwrap(), Summary::of(&records(), Rules::LlamaCpp).unwrap());
        assert_ne!(exact, there);
        assert!((exact.ppl.error - there.ppl.error).abs() < 1e-5);
        assert!((exact.kld_percentiles.p99_9 - there.kld_percentiles.p99_9).abs() < 1e-6);
    }

    #[test]
    fn few_records_and_records_without_variance() {
        assert_eq!(Summary::of(&[], Rules::Exact), None);
        assert_eq!(Perplexity::of(&[]), None);
        let one = Summary::of(&records()[..1], Rules::LlamaCpp).unwrap();
        assert_eq!((one.positions, one.ppl.error, one.ln_ppl_correlation), (1, 0.0, None));
        let same = Position { nll: 1.0, nll_base: 1.0, kld: 0.0, p_diff: 0.0, same_top: true };
        let s = Summary::of(&[same; 50], Rules::Exact).unwrap();
        assert_eq!((s.p_diff_rms.error, s.same_top.error, s.ln_ppl_ratio.error), (0.0, 0.0, 0.0));
        // nothing that JSON cannot hold
        assert!(!serde_json::to_string(&s).unwrap().replace("\"ln_ppl_correlation\":null", "").contains("null"));
    }

    #[test]
    fn perplexity_alone_is_that_of_the_summary() {
        let all = records();
        let nll: Vec<f64> = all.iter().map(|r| r.nll).collect();
        assert_eq!(Perplexity::of(&nll).unwrap().ppl, Summary::of(&all, Rules::Exact).unwrap().ppl);
    }
}
