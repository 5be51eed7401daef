//! The moments of all weights of a model, in the order of its GGUF file, filled by a forward pass.
//!
//! The forward pass shows the input of every linear layer under the name of its weight, for experts with the index of the
//! expert and just the tokens that were routed to it. Weights that have the very same input (q, k and v; gate and
//! up) can be declared so: the sums are kept once, under the first of them, and only the numbers of tokens are compared.

use std::collections::HashMap;
use std::fmt::Write;

use super::moments::{self, Moments, MomentsError};

/// A weight whose input is to be summed.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightSpec {
    /// GGUF name, for example `blk.0.ffn_down.weight`.
    pub name: String,
    /// Input features: `ne[0]` of the weight.
    pub columns: usize,
    /// Experts of a stacked weight (`ne[2]`); `None` for a dense one.
    pub experts: Option<usize>,
    /// Whether Σxxᵀ is kept.
    pub second: bool,
    /// An earlier weight with the very same input.
    pub same_as: Option<String>,
}

/// What a collector refuses: the weight and why.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("weight `{weight}`{}: {reason}", expert.map(|e| format!(", expert {e}")).unwrap_or_default())]
pub struct CollectError {
    pub weight: String,
    pub expert: Option<usize>,
    pub reason: CollectFault,
}

/// Why.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CollectFault {
    #[error("{0}")]
    Moments(#[from] MomentsError),
    #[error("is not one of the weights to collect")]
    Unknown,
    #[error("appears twice")]
    Twice,
    #[error("has no columns or no experts")]
    Empty,
    #[error("is said to have the input of `{0}`, which does not come before it or has other columns or experts")]
    SameAs(String),
    #[error("is not stacked by expert")]
    Dense,
    #[error("is stacked by expert: say which")]
    Stacked,
    #[error("there are {0} experts")]
    NoExpert(usize),
    #[error("saw {own} tokens, `{other}` with the same input saw {theirs}: the forward pass shows only one of them")]
    Tokens { own: u64, other: String, theirs: u64 },
    #[error("the other collection has other weights")]
    Other,
}

#[derive(Clone, Debug)]
struct Weight {
    spec: WeightSpec,
    /// Where the sums are: itself, or the weight it shares them with.
    owner: usize,
    /// One for a dense weight, one for each expert of a stacked one; none where they are shared.
    moments: Vec<Moments>,
    /// Tokens shown, by expert; for weights that share.
    shown: Vec<u64>,
}

/// Moments by weight.
#[derive(Clone, Debug)]
pub struct Collector {
    weights: Vec<Weight>,
    index: HashMap<String, usize>,
}

fn fault(weight: &str, expert: Option<usize>, reason: impl Into<CollectFault>) -> CollectError {
    CollectError { weight: weight.to_string(), expert, reason: reason.into() }
}

/// Bytes that the sums of `specs` take in memory; `None` on overflow. To be asked before [`Collector::new`] takes them.
pub fn bytes(specs: &[WeightSpec]) -> Option<usize> {
    specs.iter().filter(|s| s.same_as.is_none()).try_fold(0usize, |all, s| {
        let second = if s.second { moments::second_bytes(s.columns)? } else { 0 };
        let own = s.columns.checked_mul(2 * size_of::<f64>())?.checked_add(second)?;
        all.checked_add(own.checked_mul(s.experts.unwrap_or(1))?)
    })
}

impl Collector {
    /// Reserves memory for `specs`, in their order.
    pub fn new(specs: Vec<WeightSpec>) -> Result<Collector, CollectError> {
        let mut this = Collector { weights: Vec::with_capacity(specs.len()), index: HashMap::new() };
        for (at, spec) in specs.into_iter().enumerate() {
            let n = spec.experts.unwrap_or(1);
            if n == 0 || spec.columns == 0 {
                return Err(fault(&spec.name, None, CollectFault::Empty));
            }
            let owner = match &spec.same_as {
                None => at,
                Some(other) => *(this.index.get(other))
                    .filter(|&&i| {
                        let other = &this.weights[i];
                        other.owner == i
                            && (other.spec.columns, other.spec.experts) == (spec.columns, spec.experts)
                            && other.spec.second == spec.second
                    })
                    .ok_or_else(|| fault(&spec.name, None, CollectFault::SameAs(other.clone())))?,
            };
            let own = if owner == at { n } else { 0 };
            let moments = (0..own).map(|_| Moments::new(spec.columns, spec.second));
            let moments = moments.collect::<Result<_, _>>().map_err(|e| fault(&spec.name, None, e))?;
            if this.index.insert(spec.name.clone(), at).is_some() {
                return Err(fault(&spec.name, None, CollectFault::Twice));
            }
            let shown = if owner == at { Vec::new() } else { vec![0; n] };
            this.weights.push(Weight { spec, owner, moments, shown });
        }
        Ok(this)
    }

    /// Adds the input of `weight`: `x` row-major \[tokens, columns\], of `expert` where the weight is stacked.
    pub fn add(&mut self, weight: &str, expert: Option<usize>, x: &[f32], tokens: usize) -> Result<(), CollectError> {
        let fail = |reason: CollectFault| CollectError { weight: weight.to_string(), expert, reason };
        let at = *self.index.get(weight).ok_or_else(|| fail(CollectFault::Unknown))?;
        let w = &mut self.weights[at];
        let slot = match (w.spec.experts, expert) {
            (None, None) => 0,
            (Some(n), Some(e)) if e < n => e,
            (Some(n), Some(_)) => return Err(fail(CollectFault::NoExpert(n))),
            (None, Some(_)) => return Err(fail(CollectFault::Dense)),
            (Some(_), None) => return Err(fail(CollectFault::Stacked)),
        };
        if w.owner == at {
            return w.moments[slot].add(x, tokens).map_err(|e| fail(e.into()));
        }
        if tokens.checked_mul(w.spec.columns) != Some(x.len()) {
            let shape = MomentsError::Shape { values: x.len(), tokens, columns: w.spec.columns };
            return Err(fail(shape.into()));
        }
        w.shown[slot] += tokens as u64;
        Ok(())
    }

    /// The weights, in order.
    pub fn weights(&self) -> impl Iterator<Item = &WeightSpec> {
        self.weights.iter().map(|w| &w.spec)
    }

    /// Input features of `weight`.
    pub fn columns(&self, weight: &str) -> Option<usize> {
        self.index.get(weight).map(|&at| self.weights[at].spec.columns)
    }

    /// The moments of `weight`: one for a dense weight, one per expert for a stacked one.
    pub fn moments(&self, weight: &str) -> Option<&[Moments]> {
        self.index.get(weight).map(|&at| &self.weights[self.weights[at].owner].moments[..])
    }

    /// Replaces the moments of every stacked weight by those with a prior of `tokens` tokens ([`moments::with_prior`]).
    pub fn apply_prior(&mut self, tokens: u64) -> Result<(), CollectError> {
        for w in self.weights.iter_mut().filter(|w| w.spec.experts.is_some() && !w.moments.is_empty()) {
            w.moments = moments::with_prior(&w.moments, tokens).map_err(|e| fault(&w.spec.name, None, e))?;
        }
        Ok(())
    }

    /// Adds what another pass over the same model has collected.
    pub fn merge(&mut self, other: &Collector) -> Result<(), CollectError> {
        if let Some((a, _)) = self.weights.iter().zip(&other.weights).find(|(a, b)| a.spec != b.spec) {
            return Err(fault(&a.spec.name, None, CollectFault::Other));
        }
        if self.weights.len() != other.weights.len() {
            let longer = if self.weights.len() > other.weights.len() { &self.weights } else { &other.weights };
            let first = &longer[self.weights.len().min(other.weights.len())].spec.name;
            return Err(fault(first, None, CollectFault::Other));
        }
        for (a, b) in self.weights.iter_mut().zip(&other.weights) {
            for (e, (into, from)) in a.moments.iter_mut().zip(&b.moments).enumerate() {
                into.merge(from).map_err(|err| fault(&a.spec.name, a.spec.experts.map(|_| e), err))?;
            }
            a.shown.iter_mut().zip(&b.shown).for_each(|(into, from)| *into += from);
        }
        Ok(())
    }

    /// Weights that share an input must have been shown the same tokens. To be asked after a pass and before
    /// [`Collector::apply_prior`].
    pub fn check_shared(&self) -> Result<(), CollectError> {
        for w in self.weights.iter().filter(|w| !w.shown.is_empty()) {
            let owner = &self.weights[w.owner];
            for (e, (&own, m)) in w.shown.iter().zip(&owner.moments).enumerate() {
                if own != m.count() {
                    let reason = CollectFault::Tokens { own, other: owner.spec.name.clone(), theirs: m.count() };
                    return Err(fault(&w.spec.name, w.spec.experts.map(|_| e), reason));
                }
            }
        }
        Ok(())
    }

    /// How many tokens each expert of each stacked weight saw, in order.
    pub fn coverage(&self) -> Vec<Coverage> {
        let stacked = self.weights.iter().filter(|w| w.spec.experts.is_some());
        let of = |w: &Weight| Coverage {
            weight: w.spec.name.clone(),
            tokens: self.weights[w.owner].moments.iter().map(Moments::count).collect(),
        };
        stacked.map(of).collect()
    }

    /// Bytes that the sums take.
    pub fn bytes(&self) -> usize {
        self.weights.iter().flat_map(|w| &w.moments).map(Moments::bytes).sum()
    }
}

/// The tokens that the experts of one stacked weight saw.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Coverage {
    pub weight: String,
    /// By expert.
    pub tokens: Vec<u64>,
}

impl Coverage {
    /// Experts that saw no token.
    pub fn unseen(&self) -> usize {
        self.tokens.iter().filter(|&&n| n == 0).count()
    }

    /// Share of the experts that saw no token, 0 to 1.
    pub fn unseen_share(&self) -> f64 {
        self.unseen() as f64 / self.tokens.len().max(1) as f64
    }

    /// The least, the (lower) middle and the largest number of tokens of an expert.
    pub fn spread(&self) -> (u64, u64, u64) {
        let mut sorted = self.tokens.clone();
        sorted.sort_unstable();
        let at = |i: usize| sorted.get(i).copied().unwrap_or(0);
        let last = sorted.len().saturating_sub(1);
        (at(0), at(last / 2), at(last))
    }
}

/// Coverage as a table for people: a line for each stacked weight.
pub fn coverage_table(coverage: &[Coverage]) -> String {
    let width = coverage.iter().map(|c| c.weight.len()).max().unwrap_or(0).max("weight".len());
    let mut out = format!("{:width$}  experts  unseen           least  median    most tokens\n", "weight");
    for c in coverage {
        let (least, middle, most) = c.spread();
        let (n, unseen, share) = (c.tokens.len(), c.unseen(), 100.0 * c.unseen_share());
        // writing to a string cannot fail
        let _ = writeln!(out, "{:width$} {n:8} {unseen:7} {share:5.1} % {least:7} {middle:7} {most:7}", c.weight);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, experts: Option<usize>, same_as: Option<&str>) -> WeightSpec {
        let same_as = same_as.map(str::to_string);
        WeightSpec { name: name.into(), columns: 2, experts, second: true, same_as }
    }

    fn model() -> Vec<WeightSpec> {
        vec![spec("q", None, None), spec("k", None, Some("q")), spec("up_exps", Some(4), None)]
    }

    #[test]
    fn sums_go_to_their_weight_and_expert() {
        assert_eq!(bytes(&model()), Some(5 * (2 * 16 + 24)));
        let mut c = Collector::new(model()).unwrap();
        assert_eq!(c.bytes(), 5 * (2 * 16 + 24));
        c.add("q", None, &[1.0, 2.0], 1).unwrap();
        assert!(c.check_shared().unwrap_err().to_string().contains("`k`: saw 0 tokens, `q` with the same input saw 1"));
        c.add("k", None, &[1.0, 2.0], 1).unwrap();
        c.check_shared().unwrap();
        c.add("up_exps", Some(2), &[1.0, 0.0, 3.0, 0.0], 2).unwrap();
        c.add("up_exps", Some(3), &[5.0, 0.0], 1).unwrap();
        assert_eq!(c.moments("k").unwrap()[0].second().unwrap(), [1.0, 2.0, 4.0]);
        assert_eq!(c.moments("up_exps").unwrap()[2].sum2(), [10.0, 0.0]);
        assert_eq!(c.moments("v"), None);
        assert_eq!(c.weights().map(|w| w.name.as_str()).collect::<Vec<_>>(), ["q", "k", "up_exps"]);

        let coverage = c.coverage();
        assert_eq!(coverage, [Coverage { weight: "up_exps".into(), tokens: vec![0, 0, 2, 1] }]);
        assert_eq!((coverage[0].unseen(), coverage[0].unseen_share(), coverage[0].spread()), (2, 0.5, (0, 0, 2)));
        let table = coverage_table(&coverage);
        assert_eq!(table.lines().last(), Some("up_exps        4       2  50.0 %       0       0       2"));

        let mut twice = c.clone();
        twice.merge(&c).unwrap();
        assert_eq!(twice.coverage()[0].tokens, [0, 0, 4, 2]);
        twice.check_shared().unwrap();
        c.apply_prior(6).unwrap();
        // (1 + 9 + 25) / 3 tokens
        let unseen = c.moments("up_exps").unwrap()[0].mean_square().unwrap();
        assert!((unseen[0] - 35.0 / 3.0).abs() < 1e-12 && unseen[1] == 0.0);
        assert_eq!(c.moments("q").unwrap()[0].count(), 1);
    }

    #[test]
    fn faults_name_the_weight() {
        let mut c = Collector::new(model()).unwrap();
        let mut says = |weight: &str, expert, x: &[f32], text: &str| {
            let error = c.add(weight, expert, x, 1).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        };
        says("v", None, &[1.0, 1.0], "weight `v`: is not one of the weights");
        says("q", Some(0), &[1.0, 1.0], "`q`, expert 0: is not stacked");
        says("up_exps", None, &[1.0, 1.0], "`up_exps`: is stacked by expert");
        says("up_exps", Some(4), &[1.0, 1.0], "expert 4: there are 4 experts");
        says("up_exps", Some(1), &[1.0, f32::NAN], "`up_exps`, expert 1: the activation of token 0 is NaN at column 1");
        says("k", None, &[1.0], "`k`: 1 values are not 1 tokens of 2 columns");
        assert_eq!(bytes(&[WeightSpec { columns: usize::MAX / 8, ..spec("q", None, None) }]), None);
        let fails = |specs: Vec<WeightSpec>| Collector::new(specs).unwrap_err().reason;
        assert_eq!(fails(vec![spec("q", None, None), spec("q", None, None)]), CollectFault::Twice);
        assert_eq!(fails(vec![spec("q", Some(0), None)]), CollectFault::Empty);
        assert_eq!(fails(vec![spec("k", None, Some("q"))]), CollectFault::SameAs("q".into()));
        let other = Collector::new(model()[..1].to_vec()).unwrap();
        assert_eq!(c.merge(&other).unwrap_err(), fault("k", None, CollectFault::Other));
    }
}
