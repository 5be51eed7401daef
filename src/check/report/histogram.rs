//! How often which KL divergence occurs, in logarithmic bins that are the same for every model.

use serde::{Deserialize, Serialize};

/// Bins per factor of ten.
const PER_DECADE: i32 = 4;
/// The lowest edge is 10^LOW.
const LOW: i32 = -10;
/// The highest edge is 10^HIGH.
const HIGH: i32 = 2;

/// Counts of positions. Bin i holds 10^(low + i/per_decade) <= KLD < 10^(low + (i+1)/per_decade), nats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// Exponent of ten of the lowest edge.
    pub low: i32,
    pub per_decade: i32,
    pub counts: Vec<u64>,
    /// Positions below the lowest edge, those of divergence 0 among them.
    pub below: u64,
    /// Positions from the highest edge on.
    pub above: u64,
}

impl Histogram {
    /// Of the divergences of all positions, nats.
    pub fn of(klds: &[f64]) -> Histogram {
        let bins = ((HIGH - LOW) * PER_DECADE) as usize;
        let mut h = Histogram { low: LOW, per_decade: PER_DECADE, counts: vec![0; bins], below: 0, above: 0 };
        for &kld in klds {
            let place = (kld.log10() - f64::from(LOW)) * f64::from(PER_DECADE);
            if kld >= 0.0 && place >= 0.0 {
                // whole bins; beyond the last there is no entry
                match h.counts.get_mut(place as usize) {
                    Some(count) => *count += 1,
                    None => h.above += 1,
                }
            } else {
                h.below += 1;
            }
        }
        h
    }

    /// Lower edge of bin `i`, as exponent of ten.
    pub fn edge(&self, i: usize) -> f64 {
        f64::from(self.low) + i as f64 / f64::from(self.per_decade.max(1))
    }

    /// All positions.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum::<u64>() + self.below + self.above
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_is_in_one_bin() {
        let klds = [0.0, -1e-9, 1e-11, 1e-3, 1.5e-3, 2e-3, 0.5, 99.0, 100.0, 1e9];
        let h = Histogram::of(&klds);
        assert_eq!((h.below, h.above, h.total(), h.counts.len()), (3, 2, 10, 48));
        assert_eq!(h.counts[28..30], [2, 1]);
        assert_eq!(h.edge(28), -3.0);
        assert_eq!(h.counts[47], 1);
    }
}
