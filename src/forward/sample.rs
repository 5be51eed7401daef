//! Draws from a softmax that depend on a seed and a place alone, so that neither threads nor batches change them.

/// A number in \[0, 1): output `i` of SplitMix64 (Steele et al. 2014), mixed once more so that streams of neighbouring seeds
/// have nothing in common.
pub fn uniform(seed: u64, i: u64) -> f64 {
    const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
    let mix = |z: u64| {
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let bits = mix(mix(seed.wrapping_add(GAMMA)).wrapping_add(i.wrapping_add(1).wrapping_mul(GAMMA)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// The word whose share of the cumulative sum of `p` holds `u`.
pub fn draw(p: &[f32], u: f64) -> usize {
    let target = u * p.iter().map(|&v| f64::from(v)).sum::<f64>();
    let mut sum = 0.0;
    let found = p.iter().position(|&v| {
        sum += f64::from(v);
        sum > target
    });
    found.unwrap_or(p.len().saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_probabilities() {
        let p = [0.5f32, 0.0, 0.25, 0.25];
        let mut counts = [0; 4];
        for i in 0..40_000 {
            counts[draw(&p, uniform(7, i))] += 1;
        }
        assert_eq!(counts[1], 0);
        for (count, p) in counts.iter().zip(p) {
            assert!((f64::from(*count) / 40_000.0 - f64::from(p)).abs() < 0.01, "{counts:?}");
        }
        assert_eq!((draw(&p, 0.0), draw(&p, 0.5), draw(&p, 0.999_999)), (0, 2, 3));
        assert_ne!(uniform(1, 0), uniform(0, 1));
    }
}
