//! The weights of one input, rounded: targets, Hessian, GPTQ, and the check on windows that none of it saw.

use std::time::Instant;

use rayon::prelude::*;

use super::run::Job;
use super::site::Site;

use super::RoundingError;
use super::matrix::{self, Form};
use super::state::Report;
use crate::calibration::stages::Stages;
use crate::forward::layer::Linear;
use crate::gguf::GgmlType;

/// Damping of the Hessian, as a part of the mean of its diagonal.
pub const DAMPING: f64 = 0.01;

/// Weights of a site, rounded.
#[derive(Default)]
pub struct Fitted {
    /// What the rounded stream goes on with, for each linear.
    pub values: Vec<Vec<f32>>,
    /// Blocks by tensor; those of parts of a fused weight stand one behind the other.
    pub blocks: Vec<(String, Vec<u8>)>,
    pub reports: Vec<Report>,
}

/// Rounds the weights `linears` of a site; `damping` of its Hessian, as a part of the mean of the diagonal.
pub fn round(
    job: &Job<'_>,
    mut site: Site,
    linears: &[&Linear],
    damping: f64,
    stages: &mut Stages,
) -> Result<Fitted, RoundingError> {
    let n = linears[0].inputs;
    let ty = |l: &Linear| job.types.get(&l.name).copied();
    let wanted: Vec<(&Linear, GgmlType)> = linears.iter().filter_map(|l| Some((*l, ty(l)?))).collect();
    let mut rounded = Vec::new();
    let (mut blocks, mut reports): (Vec<(String, Vec<u8>)>, Vec<Report>) = Default::default();
    if !wanted.is_empty() {
        stages.time("sums", || site.close())?;
        let weights: Vec<&[f32]> = wanted.iter().map(|(l, _)| &l.weight[..]).collect();
        let targets = stages.time("targets", || site.targets(&weights))?;
        let target = |i: usize| targets.as_ref().map_or(weights[i], |t| &t[i]);
        let factor = stages.time("factor", || site.factor(damping))?;
        let note = if factor.damping > damping {
            Some(format!("its Hessian needed a damping of {}", factor.damping))
        } else if site.tokens() < n as u64 {
            Some(format!("{} tokens for {n} columns", site.tokens()))
        } else {
            None
        };
        let one = |(i, (l, ty)): (usize, &(&Linear, GgmlType))| {
            matrix::round(Form { ty: *ty, row_scales: job.row_scales }, &l.weight, target(i), &factor)
        };
        let all: Vec<_> =
            stages.time("rounding", || wanted.par_iter().enumerate().map(one).collect::<Result<_, RoundingError>>())?;
        drop(targets);
        let check = Instant::now();
        for ((l, ty), mut r) in wanted.iter().zip(all) {
            let mut held_out = None;
            if site.holds_out() {
                let mut nearest = vec![0f32; l.weight.len()];
                let format = crate::formats::format(*ty).expect("the plan holds only types that can be encoded");
                let (row, bytes) = (n * 64, r.plain.len() / l.outputs() * 64);
                nearest.par_chunks_mut(row).zip(r.plain.par_chunks(bytes)).for_each(|(v, b)| format.decode(b, v));
                let [own, plain] = site.errors(&l.weight, [&r.values, &nearest]);
                if own > plain {
                    (r.bytes, r.values) = (r.plain, nearest);
                }
                held_out = Some((own, plain));
            }
            reports.push(Report {
                name: l.name.clone(),
                ty: ty.name().into(),
                error: r.error,
                nearest: r.nearest,
                held_out,
                accepted: held_out.is_none_or(|(own, nearest)| own <= nearest),
                note: note.clone(),
            });
            // parts of a fused weight stand one behind the other
            match blocks.last_mut().filter(|(name, _)| *name == l.name) {
                Some((_, bytes)) => bytes.extend(r.bytes),
                None => blocks.push((l.name.clone(), r.bytes)),
            }
            rounded.push(r.values);
        }
        stages.add("held-out check", check.elapsed());
    }
    let mut rounded = rounded.into_iter();
    let of = |l: &&Linear| ty(l).and_then(|_| rounded.next()).unwrap_or_else(|| l.weight.clone());
    let values = linears.iter().map(of).collect();
    Ok(Fitted { values, blocks, reports })
}
