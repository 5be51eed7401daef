//! The twelve statistics that an imatrix file carries for every weight. Nothing of llama.cpp's quantizer reads them;
//! `llama-imatrix --show-statistics` computes them anew.
//!
//! Definitions: `compute_vector_statistics`, `compute_tensor_averages` and `compute_tensor_statistics` of
//! `tools/imatrix/imatrix.cpp`, llama.cpp b11434, with its widths: sums in f64, averages and results in f32, in the order
//! of the columns, so that the bits come out the same.
//!
//! Of the averages of a weight's columns (Σx / count; Σx² / count where there is no Σx): mean, standard deviation, skewness,
//! excess kurtosis, and the entropy of how Σx² is spread. Against the same weight of the nearest layer below that has it:
//! gain of the energy, distance, cosine, Pearson's correlation, covariance.

use std::collections::BTreeMap;

use super::imatrix_sums::{ImatrixSums, Sums};

/// Names of [`Statistics::values`], as the key `imatrix.stats_schema` lists them.
pub const SCHEMA: [&str; 12] = [
    "sum_sq",
    "mean",
    "elements",
    "std_deviation",
    "skewness",
    "kurtosis",
    "gain",
    "h_norm",
    "l2_dist",
    "cossim",
    "pearson",
    "covariance",
];

/// Statistics of one weight. NaN where there is nothing to compare with.
#[derive(Clone, Copy, Debug)]
pub struct Statistics {
    /// Σ over columns of E\[x²\].
    sum_sq: f64,
    mean: f32,
    /// Columns with tokens, over all experts.
    elements: i64,
    std_deviation: f32,
    skewness: f32,
    kurtosis: f32,
    gain: f32,
    /// Bits.
    entropy: f32,
    l2_dist: f32,
    cossim: f32,
    pearson: f32,
    covariance: f32,
}

impl Statistics {
    /// In the order of [`SCHEMA`].
    pub fn values(&self) -> [f32; 12] {
        let h_norm = match self.elements {
            n if n > 1 => 100.0 * (self.entropy / (n as f32).log2()),
            _ => f32::NAN,
        };
        [
            self.sum_sq as f32,
            self.mean,
            self.elements as f32,
            self.std_deviation,
            self.skewness,
            self.kurtosis,
            self.gain,
            h_norm,
            self.l2_dist,
            self.cossim,
            self.pearson,
            self.covariance,
        ]
    }
}

/// The statistics of every weight of `sums` that saw a token.
pub fn statistics(sums: &ImatrixSums) -> BTreeMap<&str, Statistics> {
    let own = sums.entries.iter().filter_map(|(name, s)| Some((name.as_str(), of_weight(s)?)));
    let mut all: BTreeMap<&str, Statistics> = own.collect();
    let first_nextn = first_nextn_layer(&all, sums.nextn_layers);
    let names: Vec<&str> = all.keys().copied().collect();
    for name in names {
        let Some(before) = layer_below(&all, name, first_nextn) else { continue };
        let (Some(now), Some(then)) = (sums.entries.get(name), sums.entries.get(before)) else { continue };
        let then_energy = all[before];
        if let Some(stats) = all.get_mut(name) {
            compare(stats, now, &then_energy, then);
        }
    }
    all
}

/// `f` of (what is averaged, E\[x²\]) of every column of every expert with tokens, in f64.
fn each_column(s: &Sums, mut f: impl FnMut(f64, f64)) {
    let row = s.in_sum2.len() / s.counts.len().max(1);
    for (i, &count) in s.counts.iter().enumerate() {
        let count = count as f32;
        if count <= 0.0 {
            continue;
        }
        let inverse = 1.0 / f64::from(count);
        for j in i * row..(i + 1) * row {
            let square = f64::from(s.in_sum2[j]) * inverse;
            let value = s.in_sum.as_ref().map_or(square, |sum| f64::from(sum[j]) * inverse);
            if value.is_finite() && square.is_finite() {
                f(value, square);
            }
        }
    }
}

/// `compute_vector_statistics`.
fn of_weight(s: &Sums) -> Option<Statistics> {
    let (mut n, mut sum, mut mean, mut energy) = (0i64, 0.0, 0.0, 0.0);
    each_column(s, |value, square| {
        sum += square;
        n += 1;
        mean += (value - mean) / n as f64;
        if square > 0.0 {
            energy += square;
        }
    });
    if n == 0 {
        return None;
    }
    let (mut squares, mut cubes, mut fourths, mut entropy) = (0.0, 0.0, 0.0, 0.0);
    let inverse_energy = if energy > 0.0 { 1.0 / energy } else { 0.0 };
    let bits = 1.0 / 2f64.ln();
    each_column(s, |value, square| {
        let d = value - mean;
        squares += d * d;
        cubes += d * d * d;
        fourths += d * d * d * d;
        if inverse_energy > 0.0 {
            let p = square.max(0.0) * inverse_energy;
            if p > 1e-10 {
                entropy -= p * p.ln() * bits;
            }
        }
    });
    let count = n as f64;
    let variance: f64 = if n > 1 { squares / count } else { 0.0 };
    let std_deviation = (variance.max(0.0) as f32).sqrt();
    let (mut skewness, mut kurtosis) = (0.0, 0.0);
    if std_deviation > 1e-10 {
        let m2 = squares / count;
        skewness = (cubes / count / (m2 * m2.sqrt())) as f32;
        kurtosis = (fourths / count / (m2 * m2) - 3.0) as f32;
    }
    Some(Statistics {
        sum_sq: sum,
        mean: mean as f32,
        elements: n,
        std_deviation,
        skewness,
        kurtosis,
        gain: f32::NAN,
        entropy: entropy as f32,
        l2_dist: f32::NAN,
        cossim: f32::NAN,
        pearson: f32::NAN,
        covariance: f32::NAN,
    })
}

/// The number of a layer: what follows `blk.`, as `std::stoi` reads it.
fn layer(name: &str) -> Option<i64> {
    let mut parts = name.split('.');
    parts.find(|p| *p == "blk")?;
    let text = parts.next()?;
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    text[..digits].parse().ok()
}

/// The first layer that predicts further tokens: by the key, else the first with a tensor `nextn.*` (`nextn_layer_start`).
fn first_nextn_layer(all: &BTreeMap<&str, Statistics>, nextn_layers: u32) -> i64 {
    let last = all.keys().filter_map(|name| layer(name)).max();
    if let (Some(last), 1..) = (last, nextn_layers) {
        return (last + 1 - i64::from(nextn_layers)).max(0);
    }
    let named = all.keys().filter(|name| {
        let parts: Vec<&str> = name.split('.').collect();
        parts.len() > 4 && parts[0] == "blk" && parts[2] == "nextn"
    });
    named.filter_map(|name| layer(name)).min().unwrap_or(i64::from(i32::MAX))
}

/// The same weight in the nearest layer below.
fn layer_below<'a>(all: &BTreeMap<&'a str, Statistics>, name: &str, first_nextn: i64) -> Option<&'a str> {
    let number = layer(name).filter(|&n| n > 0 && n != first_nextn)?;
    let first = if number > first_nextn { first_nextn } else { 0 };
    let prefix = format!("blk.{number}");
    let at = name.find(&prefix)?;
    (first..number).rev().find_map(|n| {
        let other = format!("{}blk.{n}{}", &name[..at], &name[at + prefix.len()..]);
        all.get_key_value(other.as_str()).map(|(key, _)| *key)
    })
}

/// `compute_tensor_averages`: f32, NaN for experts without tokens.
fn averages(s: &Sums, activations: bool) -> Option<Vec<f32>> {
    let values = if activations { s.in_sum.as_ref()? } else { &s.in_sum2 };
    if s.counts.is_empty() || values.is_empty() || !values.len().is_multiple_of(s.counts.len()) {
        return None;
    }
    let rows = values.chunks(values.len() / s.counts.len()).zip(&s.counts);
    let scaled = rows.flat_map(|(row, &count)| {
        let scale = if count > 0 { 1.0 / count as f32 } else { f32::NAN };
        row.iter().map(move |v| v * scale)
    });
    s.counts.iter().any(|&c| c > 0).then(|| scaled.collect())
}

/// `compute_tensor_statistics`, for one weight and that of the layer below.
fn compare(stats: &mut Statistics, now: &Sums, below: &Statistics, then: &Sums) {
    let activations = now.in_sum.is_some() && then.in_sum.is_some();
    let (Some(now), Some(then)) = (averages(now, activations), averages(then, activations)) else { return };
    if now.len() != then.len() {
        return;
    }
    let pairs = || {
        let both = now.iter().zip(&then).filter(|(c, p)| c.is_finite() && p.is_finite());
        both.map(|(&c, &p)| (f64::from(c), f64::from(p)))
    };
    let (mut n, mut sum_c, mut sum_p) = (0u64, 0.0, 0.0);
    pairs().for_each(|(c, p)| {
        sum_c += c;
        sum_p += p;
        n += 1;
    });
    if n == 0 {
        return;
    }
    let (mean_c, mean_p) = (sum_c / n as f64, sum_p / n as f64);
    let (mut dot, mut norm_c, mut norm_p, mut distance) = (0.0, 0.0, 0.0, 0.0);
    let (mut cov, mut var_c, mut var_p) = (0.0, 0.0, 0.0);
    pairs().for_each(|(c, p)| {
        dot += c * p;
        norm_c += c * c;
        norm_p += p * p;
        distance += (c - p) * (c - p);
        let (dc, dp) = (c - mean_c, p - mean_p);
        cov += dc * dp;
        var_c += dc * dc;
        var_p += dp * dp;
    });
    stats.l2_dist = distance.sqrt() as f32;
    if n > 1 {
        stats.covariance = (cov / n as f64) as f32;
    }
    stats.cossim = cosine(dot, norm_c, norm_p);
    stats.pearson = cosine(cov, var_c, var_p);
    stats.gain = if below.sum_sq > f64::from(1e-10f32) {
        let rms = |s: f64, n: i64| (s / n as f64).sqrt();
        (rms(stats.sum_sq, stats.elements) / rms(below.sum_sq, below.elements)) as f32
    } else if stats.sum_sq <= f64::from(1e-10f32) {
        1.0
    } else {
        f32::NAN
    };
}

/// `product / (√a √b)`; 0 where one of the two is 0, NaN where both are.
fn cosine(product: f64, a: f64, b: f64) -> f32 {
    if a > 0.0 && b > 0.0 {
        ((product / (a.sqrt() * b.sqrt())) as f32).clamp(-1.0, 1.0)
    } else if a == 0.0 && b == 0.0 {
        f32::NAN
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, Σx, Σx², counts.
    type Entry<'a> = (&'a str, &'a [f32], &'a [f32], &'a [i64]);

    fn sums(entries: &[Entry], nextn_layers: u32) -> ImatrixSums {
        let entry = |(name, sum, sum2, counts): &Entry| {
            let in_sum = (!sum.is_empty()).then(|| sum.to_vec());
            (name.to_string(), Sums { in_sum2: sum2.to_vec(), counts: counts.to_vec(), in_sum })
        };
        ImatrixSums { entries: entries.iter().map(entry).collect(), nextn_layers, ..ImatrixSums::default() }
    }

    #[test]
    fn by_hand() {
        // averages 1, 3 (one expert of two saw tokens): mean 2, deviation 1, two values are flat: kurtosis -2
        let s = sums(
            &[
                ("blk.0.w.weight", &[2.0, 6.0, 9.0, 9.0], &[8.0, 8.0, 9.0, 9.0], &[2, 0]),
                ("blk.2.w.weight", &[1.0, -3.0, 7.0, 7.0], &[4.0, 12.0, 1.0, 1.0], &[1, 0]),
            ],
            0,
        );
        let all = statistics(&s);
        let [sum_sq, mean, elements, deviation, skew, kurtosis, gain, h, ..] = all["blk.0.w.weight"].values();
        assert_eq!([sum_sq, mean, elements, deviation, skew, kurtosis], [8.0, 2.0, 2.0, 1.0, 0.0, -2.0]);
        assert!(gain.is_nan());
        assert_eq!(h, 100.0);
        let [.., gain, h, distance, cosine, pearson, covariance] = all["blk.2.w.weight"].values();
        assert_eq!(gain, 2f32.sqrt());
        // one part in four: 2 - log2(3) · 3/4 bits of 1
        assert!((f64::from(h) - 100.0 * (2.0 - 0.75 * 3f64.log2())).abs() < 1e-4);
        assert_eq!(distance, 6.0);
        assert!((f64::from(cosine) + 8.0 / 10.0).abs() < 1e-7, "{cosine}");
        assert_eq!((pearson, covariance), (-1.0, -2.0));
    }

    #[test]
    fn the_layers_that_predict_further_stand_apart() {
        let w: (&[f32], &[f32], &[i64]) = (&[1.0, 2.0], &[1.0, 4.0], &[1]);
        let names = ["blk.0.a.weight", "blk.1.a.weight", "blk.2.a.weight", "blk.2.nextn.b.weight", "output.weight"];
        let entries: Vec<_> = names.iter().map(|n| (*n, w.0, w.1, w.2)).collect();
        let gain = |name: &str, nextn: u32| {
            let s = sums(&entries, nextn);
            statistics(&s)[name].values()[6]
        };
        assert_eq!(gain("blk.1.a.weight", 0), 1.0);
        assert!(gain("blk.2.a.weight", 0).is_nan(), "the first NextN layer, by its name");
        assert!(gain("blk.1.a.weight", 2).is_nan(), "the first NextN layer, by the key");
        assert_eq!(gain("blk.2.a.weight", 2), 1.0);
        assert!(gain("output.weight", 0).is_nan());
        let unseen = sums(&[("w", &[0.0], &[0.0], &[0])], 0);
        assert!(statistics(&unseen).is_empty());
    }
}
