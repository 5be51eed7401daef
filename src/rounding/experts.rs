//! The feed-forward branch of a mixture: every expert is rounded on the tokens that are routed to it.
//!
//! Tokens are routed as the rounded model routes them; from the same tokens of the float stream come the targets, as for any
//! other linear. An expert that sees few tokens is damped more, one that sees hardly any is rounded to nearest with the
//! importance of all tokens; its tensor's report says how many there were. One expert at a time is in memory, besides the
//! inputs of the branch (in memory or in files, as the streams are) and the blocks of the layer.

use super::RoundingError;
use super::fit::{self, DAMPING, Fitted};
use super::matrix::Form;
use super::run::Work;
use super::site::{Site, is_held_out};
use super::state::Report;
use super::streams::Pair;
use super::weighted;
use crate::formats;
use crate::forward::layer::{Experts, FeedForward, Layer, Linear, gated};
use crate::forward::rounding::Rounding;
use crate::forward::{Activations, ForwardError, Hidden, interrupted};
use crate::gguf::GgmlType;

/// Tokens below which an expert has no Hessian worth the name.
const FEW: usize = 64;
/// Rows that are gathered at a time.
const ROWS: usize = 2048;
/// Most that damping grows to for an expert with fewer tokens than columns.
const DAMPED: f64 = 0.1;

/// Rounded experts of a layer, decoded when their turn comes.
struct Blocks {
    parts: [Part; 3],
}

/// One stacked tensor.
struct Part {
    name: String,
    ty: GgmlType,
    bytes: Vec<u8>,
    inputs: usize,
    outputs: usize,
}

impl Experts for Blocks {
    fn expert(&self, e: usize) -> Result<[Linear; 3], ForwardError> {
        let one = |p: &Part| {
            let size = p.outputs * p.inputs;
            let bytes = size / p.ty.block_len() * p.ty.block_bytes();
            let mut weight = vec![0f32; size];
            formats::format(p.ty).expect("it was rounded to it").decode(&p.bytes[e * bytes..][..bytes], &mut weight);
            Linear { name: p.name.clone(), weight, inputs: p.inputs, bias: None, rounding: Rounding::None }
        };
        let [gate, up, down] = &self.parts;
        Ok([one(gate), one(up), one(down)])
    }
}

/// Inputs of the branch on both paths, and the experts of every token.
struct Inputs {
    pair: Pair,
    /// `experts_used` for each token.
    routes: Vec<usize>,
    /// E\[x²\] over all tokens.
    importance: Vec<f32>,
}

impl Work<'_> {
    /// Rounds the experts of layer `l` and leads both streams through the branch.
    pub(super) fn experts(
        &mut self,
        l: usize,
        float: &Layer,
        mut rounded: Option<&mut Layer>,
        to: &mut Pair,
    ) -> Result<(), RoundingError> {
        let job = self.job;
        let names = ["gate", "up", "down"].map(|part| format!("blk.{l}.ffn_{part}_exps.weight"));
        if names.iter().any(|n| job.types.contains_key(n)) {
            let inputs = self.inputs(float, rounded.as_deref(), to)?;
            let mut parts = names.clone().map(|name| {
                let ty = job.types.get(&name).copied().unwrap_or(GgmlType::F32);
                Part { name, ty, bytes: Vec::new(), inputs: 0, outputs: 0 }
            });
            let mut reports = Vec::new();
            for e in 0..job.model.spec.experts {
                interrupted()?;
                let linears = job.model.expert(l, e, Activations::F32)?;
                let (fitted, seen) = self.expert(&linears, e, rounded.is_some(), &inputs)?;
                let mut blocks = fitted.blocks.into_iter();
                for (part, linear) in parts.iter_mut().zip(&linears) {
                    (part.inputs, part.outputs) = (linear.inputs, linear.outputs());
                    match job.types.contains_key(&part.name) {
                        true => part.bytes.extend(blocks.next().expect("one for each that is rounded").1),
                        false => part.bytes.extend_from_slice(bytemuck::cast_slice(&linear.weight)),
                    }
                }
                reports.push((fitted.reports, seen, linears[0].inputs));
            }
            let done = parts.iter().filter(|p| job.types.contains_key(&p.name));
            self.done(done.map(|p| (p.name.clone(), p.bytes.clone())).collect(), joined(&reports))?;
            if let Some(Layer { ffn: FeedForward::Experts { rounded, .. }, .. }) = rounded.as_deref_mut() {
                *rounded = Some(Box::new(Blocks { parts }));
            }
        }
        self.advance_experts(float, rounded.as_deref(), to)
    }

    /// The inputs of the branch.
    fn inputs(&mut self, float: &Layer, rounded: Option<&Layer>, stream: &Pair) -> Result<Inputs, RoundingError> {
        let job = self.job;
        let n = job.model.spec.embed;
        let mut pair = match job.keep {
            true => Pair::in_memory(job, n),
            false => Pair::in_files(job, "experts", n)?,
        };
        let (mut routes, mut sums, mut buffer) = (Vec::new(), vec![0f64; n], Vec::new());
        for (at, tokens) in self.batches() {
            interrupted()?;
            let paths = [(Some(float), Some(&stream.float)), (rounded, stream.rounded.as_ref())];
            for (i, (layer, from)) in paths.into_iter().enumerate() {
                let (Some(layer), Some(from)) = (layer, from) else { continue };
                let x = from.part(at * n, tokens * n, &mut buffer)?;
                // the rounded path decides, where there is one
                let decides = i == 1 || rounded.is_none();
                let (input, chosen) = self.runner.pass(|pass, s| {
                    let input = layer.feed_forward_input(pass, x, s);
                    let chosen = if decides { layer.routes(pass, &input, s) } else { Vec::new() };
                    (input, chosen)
                });
                if decides {
                    routes.extend(chosen.iter().map(|(e, _)| *e));
                    for row in input.chunks_exact(n) {
                        sums.iter_mut().zip(row).for_each(|(s, x)| *s += f64::from(*x) * f64::from(*x));
                    }
                }
                match (i, &mut pair.rounded) {
                    (0, _) => pair.float.write(at * n, &input)?,
                    (_, Some(kept)) => kept.write(at * n, &input)?,
                    _ => {}
                }
                self.runner.pass(|_, s| s.normed = input);
            }
        }
        let importance = sums.iter().map(|s| (s / job.tokens.len() as f64) as f32).collect();
        Ok(Inputs { pair, routes, importance })
    }

    /// Gate, up and down of one expert, rounded, and the tokens that it saw.
    fn expert(
        &mut self,
        linears: &[Linear; 3],
        e: usize,
        two_paths: bool,
        inputs: &Inputs,
    ) -> Result<(Fitted, usize), RoundingError> {
        let job = self.job;
        let [gate, up, down] = linears;
        let used = job.model.spec.experts_used;
        let windows = job.tokens.len() / job.length;
        let mine = inputs.routes.chunks_exact(used).enumerate().filter(|(_, r)| r.contains(&e)).map(|(t, _)| t);
        // not the first token of a window, as everywhere
        let mine: Vec<usize> = mine.filter(|t| t % job.length > 0).collect();
        let (held_out, seen): (Vec<usize>, Vec<usize>) =
            mine.into_iter().partition(|t| is_held_out(t / job.length, windows, job.length));
        if seen.len() < FEW {
            return Ok((plain(job, linears, &inputs.importance)?, seen.len()));
        }
        let damping = |n: usize| (DAMPING * n as f64 / seen.len() as f64).clamp(DAMPING, DAMPED);
        let mut site = Site::new(gate.inputs, two_paths, seen.len())?;
        for (tokens, held) in [(&seen, false), (&held_out, true)] {
            for tokens in tokens.chunks(ROWS) {
                let x = gather(&inputs.pair.float, tokens, gate.inputs)?;
                let r = inputs.pair.rounded.as_ref().map(|r| gather(r, tokens, gate.inputs)).transpose()?;
                site.add_rows(&x, r.as_deref(), held)?;
            }
        }
        let mut fitted = fit::round(job, site, &[gate, up], damping(gate.inputs), &mut self.stages)?;
        let [own_gate, own_up] = [(gate, 0), (up, 1)].map(|(l, i)| Linear {
            name: l.name.clone(),
            weight: std::mem::take(&mut fitted.values[i]),
            inputs: l.inputs,
            bias: None,
            rounding: Rounding::None,
        });
        let mut site = Site::new(down.inputs, two_paths, seen.len())?;
        for (tokens, held) in [(&seen, false), (&held_out, true)] {
            for tokens in tokens.chunks(ROWS) {
                let mut hidden = |from: &Hidden, pair: (&Linear, &Linear)| -> Result<Vec<f32>, RoundingError> {
                    let x = gather(from, tokens, gate.inputs)?;
                    Ok(self.runner.pass(|pass, s| {
                        gated(pass, pair, &x, s);
                        s.gate.clone()
                    }))
                };
                let x = hidden(&inputs.pair.float, (gate, up))?;
                let r = inputs.pair.rounded.as_ref().map(|r| hidden(r, (&own_gate, &own_up))).transpose()?;
                site.add_rows(&x, r.as_deref(), held)?;
            }
        }
        let last = fit::round(job, site, &[down], damping(down.inputs), &mut self.stages)?;
        fitted.blocks.extend(last.blocks);
        fitted.reports.extend(last.reports);
        Ok((fitted, seen.len()))
    }

    /// Both streams, through the branch.
    fn advance_experts(&mut self, float: &Layer, rounded: Option<&Layer>, to: &mut Pair) -> Result<(), RoundingError> {
        let n = self.job.model.spec.embed;
        let mut x = Vec::new();
        for (at, tokens) in self.batches() {
            interrupted()?;
            for (layer, to) in [(Some(float), Some(&mut to.float)), (rounded, to.rounded.as_mut())] {
                let (Some(layer), Some(to)) = (layer, to) else { continue };
                x.resize(tokens * n, 0.0);
                to.read(at * n, &mut x)?;
                self.runner.pass(|pass, s| layer.add_feed_forward(pass, &mut x, s))?;
                to.write(at * n, &x)?;
            }
        }
        Ok(())
    }
}

/// The rows of `tokens`, `n` values each.
fn gather(from: &Hidden, tokens: &[usize], n: usize) -> Result<Vec<f32>, RoundingError> {
    let mut rows = vec![0f32; tokens.len() * n];
    for (row, t) in rows.chunks_exact_mut(n).zip(tokens) {
        from.read(t * n, row)?;
    }
    Ok(rows)
}

/// Nearest, weighted by the inputs of all experts.
fn plain(job: &super::run::Job<'_>, linears: &[Linear; 3], importance: &[f32]) -> Result<Fitted, RoundingError> {
    let mut fitted = Fitted::default();
    for l in linears {
        let Some(&ty) = job.types.get(&l.name) else { continue };
        // what comes into down is not known
        let ones = vec![1f32; l.inputs];
        let weights = if importance.len() == l.inputs && !l.name.contains("ffn_down") { importance } else { &ones };
        let mut bytes = vec![0u8; l.weight.len() / ty.block_len() * ty.block_bytes()];
        weighted::nearest(
            Form { ty, row_scales: job.row_scales },
            &l.weight,
            l.inputs,
            Some(weights),
            true,
            &mut bytes,
        )?;
        fitted.blocks.push((l.name.clone(), bytes));
    }
    Ok(fitted)
}

/// One report for each tensor; `all`: of every expert, with the tokens that it saw and the columns of its gate.
fn joined(all: &[(Vec<Report>, usize, usize)]) -> Vec<Report> {
    let mut joined: Vec<Report> = Vec::new();
    let (count, mut worse) = (all.len(), Vec::new());
    for report in all.iter().flat_map(|(reports, ..)| reports) {
        let at = joined.iter().position(|j| j.name == report.name).unwrap_or_else(|| {
            joined.push(Report {
                error: 0.0,
                nearest: 0.0,
                held_out: None,
                accepted: true,
                note: None,
                ..report.clone()
            });
            worse.push(0);
            joined.len() - 1
        });
        let j = &mut joined[at];
        j.error += report.error;
        j.nearest += report.nearest;
        if let Some((own, nearest)) = report.held_out {
            let (a, b) = j.held_out.unwrap_or((0.0, 0.0));
            // what is used is what counts
            j.held_out = Some((a + own.min(nearest), b + nearest));
        }
        worse[at] += usize::from(!report.accepted);
    }
    let few = all.iter().filter(|(_, seen, _)| *seen < FEW).count();
    let short = all.iter().filter(|(_, seen, n)| *seen >= FEW && seen < n).count();
    for (j, worse) in joined.iter_mut().zip(worse) {
        let says = [
            (few, "saw hardly a token and are rounded to nearest"),
            (short, "saw fewer tokens than they have columns"),
            (worse, "are rounded to nearest: GPTQ was worse on windows held out"),
        ];
        let says: Vec<String> =
            says.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} of {count} experts {what}")).collect();
        j.note = (!says.is_empty()).then(|| says.join("; "));
    }
    joined
}
