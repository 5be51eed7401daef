//! The numbers of a rounded tensor as parameters: what a block stores, latent, and the blocks that come of it.
//!
//! A value is `d · s · level(t) − m · o` ([`Grid`]). Latent are the codes `t` (in units of levels), the integers `s` and `o`
//! of the sub-blocks and the f16 numbers `d` and `m` of the blocks. The forward pass sees them rounded to what is stored;
//! gradients pass the rounding as if it were not there (straight-through, Bengio et al. 2013). So nothing is lost when the
//! blocks are written. Each parameter has its Adam (Kingma and Ba 2015); steps of scales and offsets are relative to the
//! size that they started from.

use rayon::prelude::*;

use crate::formats::grid::{self, Grid, Offsets, Parts, Scales};
use crate::formats::search::{from_f16_bits, to_f16_bits};
use crate::formats::unpack::{OwnedParts, unpack};
use crate::forward::kernels::vectorized;
use crate::gguf::GgmlType;
use crate::rounding::levels::{AnyLevels, LANES, Levels, total};

/// A latent code starts at most so far from its level, as a part of the way to where the next one begins; those at the ends stay within
/// this, too.
const INSIDE: f32 = 0.9;

/// One step of Adam; on a GPU it is passed as it lies here.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Adam {
    pub beta1: f32,
    pub beta2: f32,
    /// 1 - beta^step.
    pub correction1: f32,
    pub correction2: f32,
    /// Relative step of scales, offsets and norms.
    pub rate: f32,
    /// Step of codes, in levels; 0: codes stay.
    pub code_rate: f32,
}

/// Kept from dividing by zero; gradients of single weights are about 1e-6.
const EPSILON: f32 = 1e-12;

impl Adam {
    /// The `step`-th step, from 1 on, at rates `rate` and `code_rate`; beta 0.9 and 0.95.
    pub fn new(step: usize, rate: f32, code_rate: f32) -> Adam {
        let (beta1, beta2) = (0.9f32, 0.95f32);
        let left = |beta: f32| (1.0 - f64::from(beta).powi(step as i32)) as f32;
        Adam { beta1, beta2, correction1: left(beta1), correction2: left(beta2), rate, code_rate }
    }

    /// How far to go for the gradient `g`, in units of the rate.
    #[inline(always)]
    pub fn direction(&self, g: f32, m: &mut f32, v: &mut f32) -> f32 {
        *m = self.beta1 * *m + (1.0 - self.beta1) * g;
        *v = self.beta2 * *v + (1.0 - self.beta2) * g * g;
        (*m / self.correction1) / ((*v / self.correction2).sqrt() + EPSILON)
    }
}

/// A kind of parameter: values, the sizes that steps are relative to, Adam's moments.
#[derive(Clone, Debug, Default)]
pub struct Parameters {
    pub values: Vec<f32>,
    unit: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
}

impl Parameters {
    /// Steps relative to the size of each value, but at least `floor`.
    pub fn relative(values: Vec<f32>, floor: f32) -> Parameters {
        let n = values.len();
        let unit = values.iter().map(|v| v.abs().max(floor)).collect();
        Parameters { values, unit, m: vec![0.0; n], v: vec![0.0; n] }
    }

    /// What a run must keep to go on.
    pub fn state(&mut self) -> [&mut Vec<f32>; 4] {
        [&mut self.values, &mut self.unit, &mut self.m, &mut self.v]
    }

    /// Moves value `i` by the gradient `g`.
    #[inline(always)]
    pub fn step(&mut self, i: usize, g: f32, a: &Adam) {
        self.values[i] -= a.rate * self.unit[i] * a.direction(g, &mut self.m[i], &mut self.v[i]);
    }
}

/// A rounded tensor, or some of its rows.
#[derive(Clone, Debug)]
pub struct Blocks {
    grid: Grid,
    levels: AnyLevels,
    /// Values of a row.
    columns: usize,
    /// Distance of neighbouring levels, in levels' units (the mean of a table).
    spacing: f32,
    /// Latent codes `[rows, columns]` and their moments; of fixed codes only the levels.
    codes: Vec<f32>,
    code_m: Vec<f32>,
    code_v: Vec<f32>,
    /// Integers by sub-block; empty where there are none.
    scales: Parameters,
    offsets: Parameters,
    /// f16 numbers by block.
    d: Parameters,
    m: Parameters,
}

/// The grid of a [`Blocks`], in numbers.
#[cfg(feature = "cuda")]
pub struct Shape {
    /// Blocks of the format.
    pub count: usize,
    pub block: usize,
    pub sub: usize,
    /// The lowest level and the highest.
    pub ends: (f32, f32),
    pub spacing: f32,
    /// How far latent codes go beyond the ends.
    pub beyond: f32,
    /// Sixteen levels, the last repeated; none: integers.
    pub table: Option<Vec<f32>>,
    /// Integer scales from, to.
    pub scales: (i32, i32),
    /// The largest integer offset; 0: f16, -1: none.
    pub offset_hi: i32,
    pub frozen: bool,
}

/// The part of a [`Blocks`] that one row is.
pub struct Row<'a> {
    codes: &'a mut [f32],
    code_m: &'a mut [f32],
    code_v: &'a mut [f32],
    /// value, unit, m, v of each kind
    scales: [&'a mut [f32]; 4],
    offsets: [&'a mut [f32]; 4],
    d: [&'a mut [f32]; 4],
    m: [&'a mut [f32]; 4],
}

impl Blocks {
    /// Takes `bytes` of type `ty` apart, rows of `columns` values. With `target` (`[rows, columns]`) codes are latent and
    /// start from where the target is in or beside their cells. None if the type has no grid.
    pub fn new(ty: GgmlType, bytes: &[u8], columns: usize, target: Option<&[f32]>) -> Option<Blocks> {
        let grid = Grid::of(ty)?;
        let count = bytes.len() / ty.block_bytes();
        let mut parts = OwnedParts::new(&grid);
        let (mut codes, mut scales, mut offsets) = (Vec::with_capacity(count * grid.block), Vec::new(), Vec::new());
        let (mut d, mut m) = (Vec::with_capacity(count), Vec::new());
        let levels = AnyLevels::of(grid.levels);
        let (lo, hi) = levels.ends();
        let spacing = (hi - lo) / (levels.count() - 1) as f32;
        for (b, block) in bytes.chunks_exact(ty.block_bytes()).enumerate() {
            unpack(ty, block, &mut parts);
            let (scale, base) = (grid.scale_of(parts.d), from_f16_bits(parts.m));
            d.push(scale);
            if grid.offsets != Offsets::None {
                m.push(base);
            }
            if matches!(grid.scales, Scales::Ints { .. }) {
                scales.extend(parts.scales.iter().map(|&s| f32::from(s)));
            }
            if matches!(grid.offsets, Offsets::Ints { .. }) {
                offsets.extend(parts.offsets.iter().map(|&o| f32::from(o)));
            }
            for (i, &c) in parts.codes.iter().enumerate() {
                let level = grid.level(c);
                let residual = target.map_or(0.0, |t| {
                    let (s, o) = (scale * f32::from(parts.scales[i / grid.sub]), parts.offsets[i / grid.sub]);
                    let offset = match grid.offsets {
                        Offsets::None => 0.0,
                        Offsets::F16 => base,
                        Offsets::Ints { .. } => -base * f32::from(o),
                    };
                    if s == 0.0 { 0.0 } else { (t[b * grid.block + i] - offset) / s - level }
                });
                let (below, above) = levels.reach(level);
                codes.push(level + residual.clamp(-INSIDE * below, INSIDE * above));
            }
        }
        let moments = if target.is_some() { codes.len() } else { 0 };
        // rows that have one scale keep the one that they have
        let by_row = columns > grid.block && d.chunks(columns / grid.block).all(|d| d.iter().all(|v| *v == d[0]));
        let grid = if by_row { grid.by_row().unwrap_or(grid) } else { grid };
        Some(Blocks {
            levels,
            columns,
            spacing,
            codes,
            code_m: vec![0.0; moments],
            code_v: vec![0.0; moments],
            scales: Parameters::relative(scales, 0.0),
            offsets: Parameters::relative(offsets, 0.0),
            d: Parameters::relative(d, 0.0),
            m: Parameters::relative(m, 0.0),
            grid,
        })
    }

    /// What a device must know.
    #[cfg(feature = "cuda")]
    pub fn shape(&self) -> Shape {
        let table = match self.grid.levels {
            grid::Levels::Range { .. } => None,
            grid::Levels::Table(t) => Some((0..16).map(|i| f32::from(t[i.min(t.len() - 1)])).collect()),
        };
        let scales = if let Scales::Ints { lo, hi } = self.grid.scales { (lo, hi) } else { (1, 1) };
        let offset_hi = match self.grid.offsets {
            Offsets::None => -1,
            Offsets::F16 => 0,
            Offsets::Ints { hi } => hi,
        };
        Shape {
            count: self.d.values.len(),
            block: self.grid.block,
            sub: self.grid.sub,
            ends: self.levels.ends(),
            spacing: self.spacing,
            beyond: INSIDE * 0.5 * self.spacing,
            table,
            scales,
            offset_hi,
            frozen: self.grid.scales == Scales::E8M0 || self.grid.row,
        }
    }

    pub fn ty(&self) -> GgmlType {
        self.grid.ty
    }

    /// Bytes of memory that a tensor of `elements` values takes, with latent codes or fixed ones.
    pub fn memory(elements: u64, latent: bool) -> u64 {
        elements * if latent { 14 } else { 6 }
    }

    /// Moves all parameters by the gradient `g` of the values, and writes the new values to `w`; both `[rows, columns]`.
    pub fn step(&mut self, g: &[f32], w: &mut [f32], a: &Adam) {
        let (grid, levels, spacing, n) = (self.grid, self.levels, self.spacing, self.columns);
        let rows: Vec<Row<'_>> = self.rows();
        rows.into_par_iter().zip(g.par_chunks(n)).zip(w.par_chunks_mut(n)).for_each(|((mut row, g), w)| {
            step_row(&grid, &levels, spacing, &mut row, g, w, a);
        });
    }

    /// The values that the blocks stand for now.
    pub fn values(&mut self, w: &mut [f32]) {
        let (grid, levels, n) = (self.grid, self.levels, self.columns);
        let rows: Vec<Row<'_>> = self.rows();
        rows.into_par_iter().zip(w.par_chunks_mut(n)).for_each(|(row, w)| values_of_row(&grid, &levels, &row, w));
    }

    /// The blocks as they are written.
    pub fn bytes(&self) -> Vec<u8> {
        let g = &self.grid;
        let (subs, size) = (g.subs(), g.ty.block_bytes());
        let mut out = vec![0u8; self.d.values.len() * size];
        out.par_chunks_mut(size).enumerate().for_each(|(b, out)| {
            let ints = |p: &Parameters, lo: i32, hi: i32| -> Vec<i16> {
                p.values[b * subs..][..subs].iter().map(|v| stored_int(*v, lo, hi) as i16).collect()
            };
            let scales = match g.scales {
                Scales::Ints { lo, hi } => ints(&self.scales, lo, hi),
                _ => vec![1; subs],
            };
            let offsets = match g.offsets {
                Offsets::Ints { hi } => ints(&self.offsets, 0, hi),
                _ => vec![0; subs],
            };
            let codes: Vec<u8> =
                self.codes[b * g.block..][..g.block].iter().map(|t| self.levels.nearest(*t).1).collect();
            let d = match g.scales {
                // a power of two, half of 2^(e - 127); the two smallest are denormal
                Scales::E8M0 => (0..=254u16).find(|&e| g.scale_of(e) == self.d.values[b]).unwrap_or(0),
                _ => to_f16_bits(self.d.values[b]),
            };
            let m = self.m.values.get(b).map_or(0, |m| to_f16_bits(*m));
            grid::pack(g.ty, &Parts { d, m, scales: &scales, offsets: &offsets, codes: &codes }, out);
        });
        out
    }

    /// What a run must keep to go on.
    pub fn state(&mut self) -> Vec<&mut Vec<f32>> {
        let kinds = [&mut self.scales, &mut self.offsets, &mut self.d, &mut self.m];
        let own = [&mut self.codes, &mut self.code_m, &mut self.code_v];
        own.into_iter().chain(kinds.into_iter().flat_map(Parameters::state)).collect()
    }

    fn rows(&mut self) -> Vec<Row<'_>> {
        let (n, g) = (self.columns, self.grid);
        let count = self.codes.len() / n;
        let mut codes = Pieces::new(&mut self.codes, count);
        let mut code_m = Pieces::new(&mut self.code_m, count);
        let mut code_v = Pieces::new(&mut self.code_v, count);
        let mut kinds = [&mut self.scales, &mut self.offsets, &mut self.d, &mut self.m]
            .map(|p| p.state().map(|v| Pieces::new(v, count)));
        debug_assert!(n.is_multiple_of(g.block));
        let mut next = move || {
            let [scales, offsets, d, m] = kinds.each_mut().map(|k| k.each_mut().map(Pieces::next));
            Row { codes: codes.next(), code_m: code_m.next(), code_v: code_v.next(), scales, offsets, d, m }
        };
        (0..count).map(|_| next()).collect()
    }
}

/// A slice in equal pieces.
struct Pieces<'a> {
    rest: &'a mut [f32],
    size: usize,
}

impl<'a> Pieces<'a> {
    fn new(all: &'a mut [f32], count: usize) -> Pieces<'a> {
        let size = all.len() / count.max(1);
        Pieces { rest: all, size }
    }

    fn next(&mut self) -> &'a mut [f32] {
        let (piece, rest) = std::mem::take(&mut self.rest).split_at_mut(self.size);
        self.rest = rest;
        piece
    }
}

/// The integer that is stored for a latent one.
#[inline(always)]
fn stored_int(v: f32, lo: i32, hi: i32) -> i32 {
    (v.round_ties_even() as i32).clamp(lo, hi)
}

/// The f16 number that is stored for a latent one.
#[inline(always)]
fn stored_f16(v: f32) -> f32 {
    from_f16_bits(to_f16_bits(v.clamp(-65504.0, 65504.0)))
}

/// Scale and offset of a sub-block, and the parts that they are made of: `d · s` and `-(m · o)`.
struct Line {
    d: f32,
    s: f32,
    m: f32,
    o: f32,
}

impl Line {
    #[inline(always)]
    fn of(g: &Grid, row: &Row<'_>, b: usize, sub: usize) -> Line {
        let at = b * g.subs() + sub;
        let d = if g.scales == Scales::E8M0 { row.d[0][b] } else { stored_f16(row.d[0][b]) };
        let s = match g.scales {
            Scales::Ints { lo, hi } => stored_int(row.scales[0][at], lo, hi) as f32,
            _ => 1.0,
        };
        let (m, o) = match g.offsets {
            Offsets::None => (0.0, 0.0),
            Offsets::F16 => (stored_f16(row.m[0][b]), -1.0),
            Offsets::Ints { hi } => (stored_f16(row.m[0][b]), stored_int(row.offsets[0][at], 0, hi) as f32),
        };
        Line { d, s, m, o }
    }
}

vectorized! {
    /// The values of a row.
    pub fn values_of_row(g: &Grid, levels: &AnyLevels, row: &Row<'_>, w: &mut [f32]) {
        match *levels {
            AnyLevels::Range(l) => values(g, l, row, w),
            AnyLevels::Table(l) => values(g, l, row, w),
        }
    }
}

#[inline(always)]
fn values<L: Levels>(g: &Grid, l: L, row: &Row<'_>, w: &mut [f32]) {
    for (i, w) in w.chunks_exact_mut(g.sub).enumerate() {
        let line = Line::of(g, row, i / g.subs(), i % g.subs());
        let (scale, offset) = (line.d * line.s, -(line.m * line.o));
        for (w, t) in w.iter_mut().zip(&row.codes[i * g.sub..]) {
            *w = scale * l.level(*t) + offset;
        }
    }
}

vectorized! {
    /// One step of a row's parameters, and its values after it.
    pub fn step_row(
        g: &Grid,
        levels: &AnyLevels,
        spacing: f32,
        row: &mut Row<'_>,
        dw: &[f32],
        w: &mut [f32],
        a: &Adam,
    ) {
        match *levels {
            AnyLevels::Range(l) => step(g, l, spacing, row, dw, w, a),
            AnyLevels::Table(l) => step(g, l, spacing, row, dw, w, a),
        }
    }
}

#[inline(always)]
fn step<L: Levels>(g: &Grid, l: L, spacing: f32, row: &mut Row<'_>, dw: &[f32], w: &mut [f32], a: &Adam) {
    let (lo, hi) = l.ends();
    let beyond = INSIDE * 0.5 * spacing;
    let (lo, hi) = (lo - beyond, hi + beyond);
    for b in 0..row.d[0].len() {
        let (mut slope_d, mut slope_m) = (0.0f32, 0.0f32);
        for sub in 0..g.subs() {
            let at = b * g.subs() + sub;
            let line = Line::of(g, row, b, sub);
            let scale = line.d * line.s;
            let from = at * g.sub;
            let codes = &mut row.codes[from..][..g.sub];
            let dw = &dw[from..][..g.sub];
            let (mut along, mut all) = ([0f32; LANES], [0f32; LANES]);
            for (t, dw) in codes.as_chunks::<LANES>().0.iter().zip(dw.as_chunks::<LANES>().0) {
                for i in 0..LANES {
                    along[i] += dw[i] * l.level(t[i]);
                    all[i] += dw[i];
                }
            }
            let (along, all) = (total(along), total(all));
            if a.code_rate > 0.0 && !row.code_m.is_empty() {
                let (m, v) = (&mut row.code_m[from..][..g.sub], &mut row.code_v[from..][..g.sub]);
                let rate = a.code_rate * spacing;
                for (((t, dw), m), v) in codes.iter_mut().zip(dw).zip(m).zip(v) {
                    *t = (*t - rate * a.direction(dw * scale, m, v)).max(lo).min(hi);
                }
            }
            slope_d += line.s * along;
            slope_m -= line.o * all;
            if !row.scales[0].is_empty() {
                move_one(&mut row.scales, at, line.d * along, a);
            }
            if !row.offsets[0].is_empty() {
                move_one(&mut row.offsets, at, -line.m * all, a);
            }
        }
        if g.scales != Scales::E8M0 && !g.row {
            move_one(&mut row.d, b, slope_d, a);
        }
        if !row.m[0].is_empty() {
            move_one(&mut row.m, b, slope_m, a);
        }
    }
    values(g, l, row, w);
}

/// As [`Parameters::step`], of a row's part.
#[inline(always)]
fn move_one([value, unit, m, v]: &mut [&mut [f32]; 4], i: usize, g: f32, a: &Adam) {
    value[i] -= a.rate * unit[i] * a.direction(g, &mut m[i], &mut v[i]);
}
