//! The multiple-choice knapsack: one choice for each tensor, the least cost under a number of bytes.
//!
//! Dynamic programming over bytes in units (Kellerer, Pferschy & Pisinger, *Knapsack Problems*, 2004, section 11.5), sizes
//! rounded up so that the cap holds; the gap that rounding leaves is filled with the upgrades that bring most per byte.

/// Units that the cap is cut into.
const UNITS: usize = 1 << 15;

/// A way to store a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    pub bytes: u64,
    pub cost: f64,
}

/// The best choice of every tensor under `cap` bytes; `None` if even the smallest do not fit.
pub fn solve(tensors: &[Vec<Candidate>], cap: u64) -> Option<Vec<usize>> {
    let least: u64 = tensors.iter().map(|t| t.iter().map(|o| o.bytes).min().unwrap_or(0)).sum();
    if least > cap {
        return None;
    }
    // what exceeds the smallest choice, in units rounded up
    let room = cap - least;
    let unit = (room / UNITS as u64).max(1);
    let width = (room / unit) as usize + 1;
    let mut best = vec![0f64; width];
    let mut chosen: Vec<Vec<u8>> = Vec::with_capacity(tensors.len());
    for t in tensors {
        let smallest = t.iter().map(|o| o.bytes).min().unwrap_or(0);
        let (mut next, mut picks) = (vec![f64::INFINITY; width], vec![0u8; width]);
        for (i, o) in t.iter().enumerate() {
            let step = (o.bytes - smallest).div_ceil(unit) as usize;
            for at in step..width {
                let cost = best[at - step] + o.cost;
                if cost < next[at] {
                    (next[at], picks[at]) = (cost, i as u8);
                }
            }
        }
        best = next;
        chosen.push(picks);
    }
    let mut at = width - 1;
    let mut picks = vec![0usize; tensors.len()];
    for (i, t) in tensors.iter().enumerate().rev() {
        picks[i] = usize::from(chosen[i][at]);
        let smallest = t.iter().map(|o| o.bytes).min().unwrap_or(0);
        at -= (t[picks[i]].bytes - smallest).div_ceil(unit) as usize;
    }
    fill(tensors, cap, &mut picks);
    Some(picks)
}

/// Upgrades single tensors while one fits.
fn fill(tensors: &[Vec<Candidate>], cap: u64, picks: &mut [usize]) {
    loop {
        let used: u64 = tensors.iter().zip(&*picks).map(|(t, &p)| t[p].bytes).sum();
        let mut best: Option<(f64, usize, usize)> = None;
        for (i, t) in tensors.iter().enumerate() {
            let now = t[picks[i]];
            for (j, o) in t.iter().enumerate() {
                let gain = now.cost - o.cost;
                if gain > 0.0 && used - now.bytes + o.bytes <= cap {
                    let rate = gain / (o.bytes.saturating_sub(now.bytes)).max(1) as f64;
                    if best.is_none_or(|b| rate > b.0) {
                        best = Some((rate, i, j));
                    }
                }
            }
        }
        match best {
            Some((_, i, j)) => picks[i] = j,
            None => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(seed: u64) -> Vec<Vec<Candidate>> {
        let mut s = seed;
        let mut next = |n: u64| {
            s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (s >> 33) % n
        };
        (0..7)
            .map(|_| {
                let (size, weight) = (10 + next(50), 1.0 + next(100) as f64);
                (2..6u64).map(|b| Candidate { bytes: size * b, cost: weight / f64::from(1 << (2 * b)) }).collect()
            })
            .collect()
    }

    fn total(t: &[Vec<Candidate>], picks: &[usize]) -> (u64, f64) {
        t.iter().zip(picks).fold((0, 0.0), |s, (t, &p)| (s.0 + t[p].bytes, s.1 + t[p].cost))
    }

    #[test]
    fn as_good_as_trying_everything() {
        for seed in 0..20 {
            let t = options(seed);
            for cap in [500u64, 700, 900, 1100] {
                let mut best = f64::INFINITY;
                for code in 0..4usize.pow(7) {
                    let picks: Vec<usize> = (0..7).map(|i| code / 4usize.pow(i) % 4).collect();
                    let (bytes, cost) = total(&t, &picks);
                    if bytes <= cap {
                        best = best.min(cost);
                    }
                }
                match solve(&t, cap) {
                    None => assert!(best.is_infinite()),
                    Some(picks) => {
                        let (bytes, cost) = total(&t, &picks);
                        assert!(bytes <= cap);
                        assert!((cost - best).abs() < 1e-12, "seed {seed} cap {cap}: {cost} {best}");
                    }
                }
            }
        }
    }

    #[test]
    fn more_bytes_never_cost_more() {
        let t = options(3);
        let mut last = f64::INFINITY;
        for cap in (400..1500).step_by(13) {
            if let Some(p) = solve(&t, cap) {
                let cost = total(&t, &p).1;
                assert!(cost <= last + 1e-12);
                last = cost;
            }
        }
    }
}
