//! What the transforms of a layer make of each linear, and the way back: from the gradient at the made weight to those of
//! rotations and scales.
//!
//! Forward it is the arithmetic of [`crate::transform`] (`W' = B_out W B_in⁻¹`, the table in docs/transforms.md), in f32:
//!
//! ```text
//! Z1 = W diag(before)    Z2 = Z1 R    Z3 = Z2 diag(after)    Z4 = diag(rows) Z3    W' = Rᵀ Z4
//! ```
//!
//! each where the linear has it. Back, with `G` the gradient by `W'`: `dR = Z4 Gᵀ`, then `R G`; scales by logarithm are sums
//! of gradient times value; `dR = Z1ᵀ G2`.

use std::borrow::Cow;

use rayon::prelude::*;

use super::manifold::Rotation;
use super::values::{LayerValues, Values, scales, scales_mut};
use crate::forward::backward::kernels;
use crate::forward::backward::layer::Slot;
use crate::linalg::{add_cross, product, product_back};
use crate::transform::{Anatomy, Pair};

/// Scales of columns or rows: which element of a pair each has.
#[derive(Clone, Debug)]
pub(super) struct Line {
    pair: Pair,
    index: Vec<u32>,
    inverse: bool,
}

impl Line {
    pub(super) fn values(&self, l: &LayerValues) -> Option<Vec<f32>> {
        let s = &scales(l, self.pair).as_ref()?.single;
        let value = |i: &u32| if self.inverse { 1.0 / s[*i as usize] } else { s[*i as usize] };
        Some(self.index.iter().map(value).collect())
    }

    /// Adds sums of gradient times value, one for each column or row.
    pub(super) fn add(&self, l: &mut LayerValues, sums: &[f64]) {
        let Some(s) = scales_mut(l, self.pair) else { return };
        let sign = if self.inverse { -1.0 } else { 1.0 };
        self.index.iter().zip(sums).for_each(|(i, v)| s.gradient[*i as usize] += sign * v);
    }
}

/// Which rotation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Turn {
    None,
    Stream,
    Heads,
}

/// Matrices on the way to `W'` that the way back needs.
pub(super) struct Steps<'a> {
    z1: Cow<'a, [f32]>,
    /// None: as `Z1`.
    z3: Option<Vec<f32>>,
    /// None: as `Z3`.
    z4: Option<Vec<f32>>,
    /// `W'`; none: as `Z4`.
    made: Option<Vec<f32>>,
}

impl Steps<'_> {
    fn z3(&self) -> &[f32] {
        self.z3.as_deref().unwrap_or(&self.z1)
    }

    fn z4(&self) -> &[f32] {
        self.z4.as_deref().unwrap_or_else(|| self.z3())
    }

    /// `W'`.
    pub fn made(&self) -> &[f32] {
        self.made.as_deref().unwrap_or_else(|| self.z4())
    }
}

/// The map of one linear.
#[derive(Clone, Debug)]
pub struct Map {
    pub(super) before: Option<Line>,
    pub(super) columns: Turn,
    pub(super) after: Option<Line>,
    pub(super) rows: Option<Line>,
    pub(super) turned: Turn,
    /// Values of a head, query heads of a KV head.
    pub(super) head: usize,
    pub(super) group: usize,
}

impl Map {
    /// Of the linear in `slot`, of layer `layer`.
    pub fn of(slot: Slot, layer: usize, m: &Anatomy) -> Map {
        let s = &m.spec;
        let (head, group, pairs) = (s.head_dim, s.heads / s.kv_heads, s.head_dim / 2);
        let line = |pair, inverse, index: Vec<usize>| {
            Some(Line { pair, inverse, index: index.into_iter().map(|i| i as u32).collect() })
        };
        let all = |n: usize| (0..n).collect::<Vec<usize>>();
        let rotary = |heads: usize| -> Vec<usize> {
            let of = |r: usize| r / head / (heads / s.kv_heads) * pairs + m.rotary_pair(r % head);
            (0..heads * head).map(of).collect()
        };
        let expanded = || (0..s.heads * head).map(|c| c / head / group * head + c % head).collect();
        let none = Map { before: None, columns: Turn::None, after: None, rows: None, turned: Turn::None, head, group };
        let reader = |pair| Map { columns: Turn::Stream, after: line(pair, false, all(s.embed)), ..none.clone() };
        let width = m.feed_forward[layer];
        match slot {
            Slot::Q => Map { rows: line(Pair::QueryKey, true, rotary(s.heads)), ..reader(Pair::Attention) },
            Slot::K => Map { rows: line(Pair::QueryKey, false, rotary(s.kv_heads)), ..reader(Pair::Attention) },
            Slot::V => Map {
                rows: line(Pair::ValueScales, true, all(s.kv_heads * head)),
                turned: Turn::Heads,
                ..reader(Pair::Attention)
            },
            Slot::O => Map {
                before: line(Pair::ValueScales, false, expanded()),
                columns: Turn::Heads,
                turned: Turn::Stream,
                ..none
            },
            Slot::Gate => reader(Pair::FeedForward),
            Slot::Up => Map { rows: line(Pair::UpDown, true, all(width)), ..reader(Pair::FeedForward) },
            Slot::Down => Map { before: line(Pair::UpDown, false, all(width)), turned: Turn::Stream, ..none },
        }
    }

    /// That of the bias: rows alone.
    pub fn of_bias(&self) -> Map {
        Map { before: None, columns: Turn::None, after: None, ..self.clone() }
    }

    /// `W'` of `w` \[rows, columns\].
    pub fn apply(&self, w: &[f32], columns: usize, v: &Values, layer: usize) -> Vec<f32> {
        let l = &v.layers[layer];
        let mut z = Cow::Borrowed(w);
        scale(&mut z, columns, &line(&self.before, l), scale_columns);
        if let Some(turned) = self.turn_columns(&z, columns, v, l) {
            z = Cow::Owned(turned);
        }
        scale(&mut z, columns, &line(&self.after, l), scale_columns);
        scale(&mut z, columns, &line(&self.rows, l), scale_rows);
        self.turn_rows(&z, columns, v, l).unwrap_or_else(|| owned(z))
    }

    /// What the way back needs of the way to `W'`.
    pub(super) fn steps<'a>(&self, w: &'a [f32], columns: usize, v: &Values, layer: usize) -> Steps<'a> {
        let l = &v.layers[layer];
        let mut z1 = Cow::Borrowed(w);
        scale(&mut z1, columns, &line(&self.before, l), scale_columns);
        let mut z3 = self.turn_columns(&z1, columns, v, l);
        if let Some(s) = line(&self.after, l) {
            scale_columns(z3.get_or_insert_with(|| copy(&z1)), columns, &s);
        }
        let z4 = line(&self.rows, l).map(|s| {
            let mut z = copy(z3.as_deref().unwrap_or(&z1));
            scale_rows(&mut z, columns, &s);
            z
        });
        let made = self.turn_rows(z4.as_deref().or(z3.as_deref()).unwrap_or(&z1), columns, v, l);
        Steps { z1, z3, z4, made }
    }

    /// `Z R`; none where nothing turns.
    fn turn_columns(&self, z: &[f32], columns: usize, v: &Values, l: &LayerValues) -> Option<Vec<f32>> {
        match (self.columns, &v.r_res) {
            (Turn::Stream, Some(r)) => {
                let mut out = vec![0.0; z.len()];
                product_back(z, &r.single, columns, &mut out);
                Some(out)
            }
            (Turn::Heads, _) if !l.r_ov.is_empty() => {
                let mut out = vec![0.0; z.len()];
                self.each_head(columns, |h, own| {
                    let part = gather(z, columns, own.clone());
                    let mut turned = vec![0.0; part.len()];
                    product_back(&part, &l.r_ov[h].single, self.head, &mut turned);
                    scatter(&mut out, columns, own, &turned);
                });
                Some(out)
            }
            _ => None,
        }
    }

    /// `Rᵀ Z`; none where nothing turns.
    fn turn_rows(&self, z: &[f32], columns: usize, v: &Values, l: &LayerValues) -> Option<Vec<f32>> {
        match (self.turned, &v.r_res) {
            (Turn::Stream, Some(r)) => {
                let mut out = vec![0.0; z.len()];
                add_cross(&mut out, &r.single, z, r.n, columns);
                Some(out)
            }
            (Turn::Heads, _) if !l.r_ov.is_empty() => {
                let mut out = vec![0.0; z.len()];
                let size = self.head * columns;
                for ((r, z), out) in l.r_ov.iter().zip(z.chunks_exact(size)).zip(out.chunks_exact_mut(size)) {
                    add_cross(out, &r.single, z, self.head, columns);
                }
                Some(out)
            }
            _ => None,
        }
    }

    /// The query heads as runs of columns, with the number of their KV head.
    fn each_head(&self, columns: usize, mut see: impl FnMut(usize, std::ops::Range<usize>)) {
        (0..columns / self.head).for_each(|h| see(h / self.group, h * self.head..(h + 1) * self.head));
    }

    /// Adds to the gradients of `v` what `g`, the gradient at `W'` of `w`, brings.
    pub fn back(&self, w: &[f32], columns: usize, g: &[f32], v: &mut Values, layer: usize) {
        let steps = self.steps(w, columns, v, layer);
        self.back_through(&steps, columns, g.to_vec(), v, layer);
    }

    /// The same from the [`Map::steps`] of `w`.
    pub(super) fn back_through(
        &self,
        steps: &Steps<'_>,
        columns: usize,
        mut g: Vec<f32>,
        v: &mut Values,
        layer: usize,
    ) {
        let (z1, z3, z4) = (&steps.z1, steps.z3(), steps.z4());
        let Values { r_res, layers } = v;
        let l = &mut layers[layer];
        // W' = Rᵀ Z4
        match (self.turned, &mut *r_res) {
            (Turn::Stream, Some(r)) => g = turn_rows_back(r, z4, &g, columns),
            (Turn::Heads, _) => {
                let size = self.head * columns;
                for ((r, z), g) in l.r_ov.iter_mut().zip(z4.chunks_exact(size)).zip(g.chunks_exact_mut(size)) {
                    g.copy_from_slice(&turn_rows_back(r, z, g, columns));
                }
            }
            _ => {}
        }
        // Z4 = diag(rows) Z3
        if let (Some(line), Some(s)) = (&self.rows, line(&self.rows, l)) {
            let row = |(g, z): (&[f32], &[f32])| g.iter().zip(z).map(|(g, z)| f64::from(g * z)).sum::<f64>();
            let sums: Vec<f64> =
                g.par_chunks(columns).zip(z4.par_chunks(columns)).with_min_len(ROWS).map(row).collect();
            scale_rows(&mut g, columns, &s);
            line.add(l, &sums);
        }
        // Z3 = Z2 diag(after)
        if let (Some(line), Some(s)) = (&self.after, line(&self.after, l)) {
            let sums = along_columns(&g, z3, columns);
            scale_columns(&mut g, columns, &s);
            line.add(l, &sums);
        }
        // Z2 = Z1 R
        match (self.columns, &mut *r_res) {
            (Turn::Stream, Some(r)) => {
                add_cross(&mut r.gradient, z1, &g, z1.len() / columns, columns);
                if self.before.is_some() {
                    let mut out = vec![0.0; g.len()];
                    product(&g, &r.single, columns, &mut out);
                    g = out;
                }
            }
            (Turn::Heads, _) if !l.r_ov.is_empty() => self.each_head(columns, |h, own| {
                let r = &mut l.r_ov[h];
                let (z, part) = (gather(z1, columns, own.clone()), gather(&g, columns, own.clone()));
                add_cross(&mut r.gradient, &z, &part, z.len() / self.head, self.head);
                let mut out = vec![0.0; part.len()];
                product(&part, &r.single, self.head, &mut out);
                scatter(&mut g, columns, own, &out);
            }),
            _ => {}
        }
        // Z1 = W diag(before)
        if let Some(line) = &self.before {
            line.add(l, &along_columns(&g, z1, columns));
        }
    }
}

/// Back through `W = Rᵀ Z`: `dR += Z Gᵀ`, `G ← R G`.
fn turn_rows_back(r: &mut Rotation, z: &[f32], g: &[f32], columns: usize) -> Vec<f32> {
    let mut part = vec![0.0; r.n * r.n];
    product(z, g, columns, &mut part);
    r.gradient.iter_mut().zip(&part).for_each(|(g, p)| *g += p);
    let mut out = vec![0.0; g.len()];
    product_back(&r.single, g, r.n, &mut out);
    out
}

/// Rows of a task, and of a part of a sum.
const ROWS: usize = 64;

/// Σ over rows of g z, for each column.
fn along_columns(g: &[f32], z: &[f32], columns: usize) -> Vec<f64> {
    let part = |(g, z): (&[f32], &[f32])| {
        let mut sums = vec![0f64; columns];
        for (g, z) in g.chunks_exact(columns).zip(z.chunks_exact(columns)) {
            sums.iter_mut().zip(g.iter().zip(z)).for_each(|(s, (g, z))| *s += f64::from(g * z));
        }
        sums
    };
    let parts: Vec<Vec<f64>> = g.par_chunks(ROWS * columns).zip(z.par_chunks(ROWS * columns)).map(part).collect();
    let mut sums = vec![0f64; columns];
    parts.iter().for_each(|p| sums.iter_mut().zip(p).for_each(|(s, p)| *s += p));
    sums
}

/// The scales of a line as they are now.
fn line(line: &Option<Line>, l: &LayerValues) -> Option<Vec<f32>> {
    line.as_ref().and_then(|line| line.values(l))
}

/// A copy made by all threads.
fn copy(z: &[f32]) -> Vec<f32> {
    let mut out = Vec::new();
    kernels::copy(z, &mut out);
    out
}

fn owned(z: Cow<'_, [f32]>) -> Vec<f32> {
    match z {
        Cow::Borrowed(z) => copy(z),
        Cow::Owned(z) => z,
    }
}

/// Scales a matrix where there are scales.
fn scale(z: &mut Cow<'_, [f32]>, columns: usize, s: &Option<Vec<f32>>, by: fn(&mut [f32], usize, &[f32])) {
    if let Some(s) = s {
        let mut own = owned(std::mem::take(z));
        by(&mut own, columns, s);
        *z = Cow::Owned(own);
    }
}

fn scale_columns(z: &mut [f32], columns: usize, s: &[f32]) {
    z.par_chunks_mut(ROWS * columns).for_each(|z| {
        z.chunks_exact_mut(columns).for_each(|row| row.iter_mut().zip(s).for_each(|(z, s)| *z *= s));
    });
}

fn scale_rows(z: &mut [f32], columns: usize, s: &[f32]) {
    z.par_chunks_mut(ROWS * columns).zip(s.par_chunks(ROWS)).for_each(|(z, s)| {
        z.chunks_exact_mut(columns).zip(s).for_each(|(row, s)| row.iter_mut().for_each(|z| *z *= s));
    });
}

/// Some columns of a matrix.
fn gather(z: &[f32], columns: usize, own: std::ops::Range<usize>) -> Vec<f32> {
    let width = own.len();
    let mut out = vec![0.0; z.len() / columns * width];
    out.par_chunks_mut(ROWS * width).zip(z.par_chunks(ROWS * columns)).for_each(|(out, z)| {
        let rows = out.chunks_exact_mut(width).zip(z.chunks_exact(columns));
        rows.for_each(|(out, row)| out.copy_from_slice(&row[own.clone()]));
    });
    out
}

/// Puts them back.
fn scatter(z: &mut [f32], columns: usize, own: std::ops::Range<usize>, part: &[f32]) {
    let width = own.len();
    z.par_chunks_mut(ROWS * columns).zip(part.par_chunks(ROWS * width)).for_each(|(z, part)| {
        let rows = z.chunks_exact_mut(columns).zip(part.chunks_exact(width));
        rows.for_each(|(row, part)| row[own.clone()].copy_from_slice(part));
    });
}
