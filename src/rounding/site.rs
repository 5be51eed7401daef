//! The inputs of the linears that share one: sums of both paths, and some windows that the sums do not see.

use super::{RoundingError, factor, target};
use crate::calibration::moments::{Moments, MomentsError};
use crate::linalg::product;

/// One window of this many is held out.
const HELD_OUT_EVERY: usize = 16;
/// Most tokens that are held out.
const HELD_OUT_MOST: usize = 8192;

/// Tokens of them that the damping is chosen on.
const CHOICE_MOST: usize = 4096;

/// Whether window `w` of `windows` is held out of the sums.
pub fn is_held_out(w: usize, windows: usize, length: usize) -> bool {
    let every = HELD_OUT_EVERY.max((windows * length).div_ceil(HELD_OUT_MOST));
    windows >= HELD_OUT_EVERY && w % every == every / 2
}

/// Sums over the input of a site.
pub struct Site {
    n: usize,
    moments: Moments,
    /// Σ (x − x̂) x̂ᵀ; none in one pass.
    cross: Option<Vec<f32>>,
    /// Held-out inputs in the float model.
    pub float: Vec<f32>,
    /// And in the rounded one; empty in one pass.
    pub rounded: Vec<f32>,
}

impl Site {
    pub fn new(n: usize, two_paths: bool) -> Result<Site, MomentsError> {
        let moments = Moments::new(n, true)?;
        let cross = two_paths.then(|| vec![0f32; n * n]);
        Ok(Site { n, moments, cross, float: Vec::new(), rounded: Vec::new() })
    }

    /// Adds one window of `x` and, on two paths, `x̂`; without its first token, which has no context (it is BOS, whose
    /// activations are like no others).
    pub fn add(&mut self, x: &[f32], rounded: Option<&[f32]>, held_out: bool) -> Result<(), MomentsError> {
        let (x, rounded) = (&x[self.n..], rounded.map(|r| &r[self.n..]));
        let tokens = x.len() / self.n;
        match (rounded, &mut self.cross) {
            _ if held_out => {
                self.float.extend_from_slice(x);
                self.rounded.extend_from_slice(rounded.unwrap_or_default());
            }
            (Some(r), Some(cross)) => {
                self.moments.add(r, tokens)?;
                let difference: Vec<f32> = x.iter().zip(r).map(|(x, r)| x - r).collect();
                crate::linalg::add_cross(cross, &difference, r, tokens, self.n);
            }
            _ => self.moments.add(x, tokens)?,
        }
        Ok(())
    }

    /// Tokens in the sums.
    pub fn tokens(&self) -> u64 {
        self.moments.count()
    }

    /// The mean second moment, and with two paths what corrects targets.
    pub fn finish(&mut self) -> Result<(Vec<f64>, Option<Correction>), RoundingError> {
        let par = crate::linalg::all_threads();
        let h = factor::mean_second(&self.moments).ok_or_else(|| RoundingError::Hessian("it saw no token".into()))?;
        let count = self.moments.count() as f32;
        self.moments = Moments::new(0, false).expect("nothing");
        let correction = match self.cross.take() {
            None => None,
            Some(mut c) => {
                c.iter_mut().for_each(|v| *v /= count);
                let dampings = if self.float.is_empty() { &target::DAMPINGS[1..2] } else { &target::DAMPINGS[..] };
                let factors = dampings.iter().map(|d| target::factor(&h, self.n, *d, par)).collect::<Result<_, _>>()?;
                Some(Correction { factors, c, n: self.n })
            }
        };
        Ok((h, correction))
    }
}

/// Corrects the targets of a site's weights ([`target`]).
pub struct Correction {
    c: Vec<f32>,
    /// One for each damping that is tried.
    factors: Vec<Vec<f64>>,
    n: usize,
}

impl Correction {
    /// The target of `w` \[m, n\]: of those that are tried, the one whose outputs from the rounded inputs are nearest to the
    /// float ones on the held-out windows.
    pub fn of(&self, w: &[f32], site: &Site) -> Vec<f32> {
        let par = crate::linalg::all_threads();
        let mut targets = self.factors.iter().map(|l| target::corrected(w, &self.c, l, self.n, par));
        if self.factors.len() == 1 {
            return targets.next().expect("one");
        }
        let rows = (site.float.len() / self.n).min(CHOICE_MOST);
        let outputs = w.len() / self.n;
        let (float, rounded) = (&site.float[..rows * self.n], &site.rounded[..rows * self.n]);
        let (mut want, mut got) = (vec![0f32; rows * outputs], vec![0f32; rows * outputs]);
        product(float, w, self.n, &mut want);
        let mut best: Option<(f64, Vec<f32>)> = None;
        for target in targets {
            product(rounded, &target, self.n, &mut got);
            let error: f64 = want.iter().zip(&got).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            if best.as_ref().is_none_or(|b| error < b.0) {
                best = Some((error, target));
            }
        }
        best.expect("some were tried").1
    }
}
