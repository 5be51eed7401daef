//! Learning on an NVIDIA GPU ([`crate::cuda`]): the same steps as on the processor.
//!
//! Passes and the products of the maps run on the device, rounding to integers by row too; block formats are rounded by the
//! processor, with the same search as on the way to a file. Rotations and scales step on the processor.

use super::LearningError;
use super::engine::Engine;
use super::fake::Fake;
use super::maps::{Line, Turn};
use super::network::{Base, HELD, held, originals, tables};
use super::values::{Values, scales_mut};
use crate::cuda::DeviceError;
use crate::cuda::buffers::{Sizes, memory};
use crate::cuda::device::{Arg, Buffer, Cuda, Kind, Ptr, Strided, at};
use crate::cuda::network::{Back, Network, Sink, Start, StreamTurn, admitted};
use crate::cuda::simulated::{Turn as Online, turned};
use crate::cuda::weights::{self, Weight};
use crate::formats::grid::Offsets;
use crate::forward::backward::layer::{Norm, Slot};
use crate::forward::{Activations, Model, interrupted};
use crate::transform::{Anatomy, Transforms};
use crate::tuning::gpu::Passes;
use crate::tuning::head::Loss;
use Arg::{I, P};

/// Scales of a map as they are now: of columns before its rotation, after it, and of rows.
type Lines = [Option<Buffer>; 3];

/// Rotations of values of a layer and the sums of their gradients, one after the other.
struct Heads {
    r: Buffer,
    gradient: Buffer,
}

/// What the weights of a layer are made from.
struct Layer {
    base: Base,
    /// The originals.
    weights: [Buffer; 7],
    lines: [Lines; 7],
    /// Of the norms that hold inverse scales.
    norms: [Option<Vec<f32>>; 2],
    heads: Option<Heads>,
}

/// The maps and their way back.
struct Maps {
    /// In f32: weights are made alike for every arithmetic of the passes.
    gpu: Cuda,
    values: Values,
    layers: Vec<Layer>,
    /// The rotation of the stream and its gradient, which are the network's.
    stream: Option<(Ptr, Ptr)>,
    /// `Z1`, `Z2` or `Z3`, `Z4`, `W'`, a gradient; each as large as the largest weight.
    z: [Buffer; 5],
    /// Sums by column or row, and room to read a weight.
    sums: Buffer,
    read: Vec<f32>,
    /// Online rotations of rows of the down matrix.
    down: Option<Online>,
}

/// The GPU.
pub struct Gpu {
    gpu: Cuda,
    /// The same, with the arithmetic of the passes that gradients come from.
    passes: Cuda,
    network: Network,
    maps: Maps,
    /// Tokens of a batch.
    span: usize,
}

/// Rows of `columns` values times `s`, where there are scales; the address of the result.
fn scaled(
    gpu: &Cuda,
    kernel: &str,
    to: Ptr,
    from: Ptr,
    s: &Option<Buffer>,
    shape: (usize, usize),
) -> Result<Ptr, DeviceError> {
    let Some(s) = s else { return Ok(from) };
    let count = shape.0 * shape.1;
    gpu.each(kernel, count, &[P(to), P(from), P(s.ptr()), I(shape.1 as i32), I(count as i32)])?;
    Ok(to)
}

impl Maps {
    /// `Z1`, `Z3`, `Z4` and `W'` of a linear (see [`super::maps`]), and its rows and columns.
    fn steps(&self, gpu: &Cuda, l: usize, slot: Slot) -> Result<([Ptr; 4], (usize, usize)), DeviceError> {
        let layer = &self.layers[l];
        let (o, weight) = (&layer.base.linears[slot as usize], &layer.weights[slot as usize]);
        let [before, after, rows] = &layer.lines[slot as usize];
        let (map, columns) = (&o.map, o.columns);
        let shape = (weight.len() / columns, columns);
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| self.z[i].ptr());
        let z1 = scaled(gpu, "scale_columns", a, weight.ptr(), before, shape)?;
        let mut z = z1;
        match (map.columns, self.stream, &layer.heads) {
            (Turn::Stream, Some((r, _)), _) => {
                gpu.product_back(b, z, r, (shape.0, columns, columns), 0.0)?;
                z = b;
            }
            (Turn::Heads, _, Some(heads)) => {
                let (head, group) = (map.head, map.group);
                for h in 0..columns / head / group {
                    let (from, r) = (h * group * head, Strided(at(heads.r.ptr(), h * head * head), head, 0));
                    let (out, z) = (Strided(at(b, from), columns, head), Strided(at(z, from), columns, head));
                    gpu.batched(Kind::Plain, (shape.0, head, head), out, z, r, 0.0, group)?;
                }
                z = b;
            }
            _ => {}
        }
        // in place: Z2 is not needed again
        let z3 = scaled(gpu, "scale_columns", b, z, after, shape)?;
        let z4 = scaled(gpu, "scale_rows", c, z3, rows, shape)?;
        z = z4;
        match (map.turned, self.stream, &layer.heads) {
            (Turn::Stream, Some((r, _)), _) => {
                gpu.cross(d, r, z, (shape.0, columns, shape.0), 0.0)?;
                z = d;
            }
            (Turn::Heads, _, Some(heads)) => {
                let (head, size) = (map.head, map.head * columns);
                let (out, r) = (Strided(d, columns, size), Strided(heads.r.ptr(), head, head * head));
                gpu.batched(
                    Kind::Cross,
                    (head, columns, head),
                    out,
                    r,
                    Strided(z, columns, size),
                    0.0,
                    shape.0 / head,
                )?;
                z = d;
            }
            _ => {}
        }
        Ok(([z1, z3, z4, z], shape))
    }

    /// Makes the weights of layer `l` and rounds them.
    fn fuse(&mut self, gpu: &Cuda, l: usize, to: &mut weights::Layer) -> Result<(), DeviceError> {
        for slot in Slot::ALL {
            let o = &self.layers[l].base.linears[slot as usize];
            let lines = [&o.map.before, &o.map.after, &o.map.rows]
                .map(|line| line.as_ref().and_then(|line| line.values(&self.values.layers[l])));
            let bias = o.bias.as_ref().map(|b| o.map.of_bias().apply(b, 1, &self.values, l));
            let fake = o.fake;
            for (buffer, values) in self.layers[l].lines[slot as usize].iter_mut().zip(&lines) {
                match (buffer, values) {
                    (Some(buffer), Some(values)) => gpu.write(buffer, values)?,
                    (buffer, Some(values)) => *buffer = Some(gpu.upload(values)?),
                    (buffer, None) => *buffer = None,
                }
            }
            let ([.., made], (rows, columns)) = self.steps(gpu, l, slot)?;
            let weight = &mut to.linears[slot as usize];
            let count = rows * columns;
            gpu.each("scaled", count, &[P(weight.w.ptr()), P(made), Arg::F(1.0), I(count as i32)])?;
            match fake {
                Some(Fake::Rows(s, down)) if s.weights < 16 => {
                    let turn = if down { &self.down } else { &None };
                    let x = (weight.w.ptr(), self.z[4].ptr());
                    turned(gpu, x, (rows, columns), turn, |x| {
                        gpu.run("symmetric", rows, (256, 1), &[P(x), I(columns as i32), I(i32::from(s.weights))])
                    })?;
                }
                Some(fake @ Fake::Type(_)) => {
                    self.read.resize(count, 0.0);
                    gpu.read(&weight.w, &mut self.read)?;
                    fake.apply(&mut self.read, columns);
                    gpu.write(&mut weight.w, &self.read)?;
                }
                _ => {}
            }
            if let (Some(to), Some(bias)) = (&mut weight.bias, bias) {
                gpu.write(to, &bias)?;
            }
        }
        let norms = held(&self.layers[l].base, &self.values, l);
        for (values, (norm, _)) in norms.iter().zip(HELD) {
            if let (Some(to), Some(values)) = (&mut to.norms[norm as usize], values) {
                gpu.write(to, values)?;
            }
        }
        self.layers[l].norms = norms;
        Ok(())
    }

    /// Adds sums by column or row to the gradients of a line's scales.
    fn line(&mut self, gpu: &Cuda, l: usize, line: &Line, count: usize) -> Result<(), DeviceError> {
        let mut sums = vec![0f32; count];
        gpu.read(&self.sums, &mut sums)?;
        let sums: Vec<f64> = sums.into_iter().map(f64::from).collect();
        line.add(&mut self.values.layers[l], &sums);
        Ok(())
    }

    fn along_columns(&self, gpu: &Cuda, g: Ptr, z: Ptr, (rows, columns): (usize, usize)) -> Result<(), DeviceError> {
        let args = [P(self.sums.ptr()), P(g), P(z), I(rows as i32), I(columns as i32)];
        gpu.run("along_columns", columns.div_ceil(32), (32, 8), &args)
    }
}

impl Sink for Maps {
    fn wants(&self, _: usize, _: Slot) -> bool {
        true
    }

    fn linear(
        &mut self,
        gpu: &Cuda,
        (l, slot): (usize, Slot),
        w: &Weight,
        gradient: Ptr,
        (dy, tokens): (Ptr, usize),
    ) -> Result<(), DeviceError> {
        let ([z1, z3, z4, made], shape) = self.steps(&self.gpu, l, slot)?;
        let (rows, columns) = shape;
        let o = &self.layers[l].base.linears[slot as usize];
        let (map, bias) = (o.map.clone(), o.bias.clone());
        if let Some((run, offsets)) = o.fake.and_then(|f| f.run(columns)) {
            let runs = rows * columns / run;
            let kind = match offsets {
                Offsets::None => 0,
                Offsets::F16 => 1,
                Offsets::Ints { .. } => 2,
            };
            let args = [P(gradient), P(made), P(w.w.ptr()), I(run as i32), I(runs as i32), I(kind)];
            gpu.run("fake_back", runs.div_ceil(8), (256, 1), &args)?;
        }
        let (mut g, mut other) = (gradient, self.z[4].ptr());
        // W' = Rᵀ Z4
        match (map.turned, self.stream, &self.layers[l].heads) {
            (Turn::Stream, Some((r, sum)), _) => {
                let of = |p: Ptr| Strided(p, columns, 0);
                gpu.batched(Kind::Transposed, (rows, rows, columns), Strided(sum, rows, 0), of(z4), of(g), 1.0, 1)?;
                gpu.product_back(other, r, g, (rows, columns, rows), 0.0)?;
                std::mem::swap(&mut g, &mut other);
            }
            (Turn::Heads, _, Some(heads)) => {
                let (head, size, square) = (map.head, map.head * columns, map.head * map.head);
                let of = |p: Ptr| Strided(p, columns, size);
                let (sum, r) = (Strided(heads.gradient.ptr(), head, square), Strided(heads.r.ptr(), head, square));
                let count = rows / head;
                gpu.batched(Kind::Transposed, (head, head, columns), sum, of(z4), of(g), 1.0, count)?;
                gpu.batched(Kind::Plain, (head, columns, head), of(other), r, of(g), 0.0, count)?;
                std::mem::swap(&mut g, &mut other);
            }
            _ => {}
        }
        // Z4 = diag(rows) Z3
        if let (Some(line), true) = (&map.rows, self.layers[l].lines[slot as usize][2].is_some()) {
            let args = [P(self.sums.ptr()), P(g), P(z4), I(columns as i32)];
            gpu.run("along_rows", rows, (256, 1), &args)?;
            self.line(gpu, l, line, rows)?;
            scaled(gpu, "scale_rows", g, g, &self.layers[l].lines[slot as usize][2], shape)?;
        }
        // Z3 = Z2 diag(after)
        if let (Some(line), true) = (&map.after, self.layers[l].lines[slot as usize][1].is_some()) {
            self.along_columns(gpu, g, z3, shape)?;
            self.line(gpu, l, line, columns)?;
            scaled(gpu, "scale_columns", g, g, &self.layers[l].lines[slot as usize][1], shape)?;
        }
        // Z2 = Z1 R
        match (map.columns, self.stream, &self.layers[l].heads) {
            (Turn::Stream, Some((r, sum)), _) => {
                gpu.cross(sum, z1, g, (columns, columns, rows), 1.0)?;
                if map.before.is_some() {
                    gpu.product(other, g, r, (rows, columns, columns))?;
                    g = other;
                }
            }
            (Turn::Heads, _, Some(heads)) => {
                let head = map.head;
                for h in 0..columns / head {
                    let place = h / map.group * head * head;
                    let of = |p: Ptr| Strided(at(p, h * head), columns, 0);
                    let (sum, r) = (at(heads.gradient.ptr(), place), at(heads.r.ptr(), place));
                    gpu.batched(Kind::Cross, (head, head, rows), Strided(sum, head, 0), of(z1), of(g), 1.0, 1)?;
                    let (out, r) = (of(other), Strided(r, head, 0));
                    gpu.batched(Kind::Transposed, (rows, head, head), out, of(g), r, 0.0, 1)?;
                }
                g = other;
            }
            _ => {}
        }
        // Z1 = W diag(before)
        if let (Some(line), true) = (&map.before, self.layers[l].lines[slot as usize][0].is_some()) {
            self.along_columns(gpu, g, z1, shape)?;
            self.line(gpu, l, line, columns)?;
        }
        if let Some(bias) = bias {
            self.along_columns(gpu, dy, 0, (tokens, rows))?;
            let mut sums = vec![0f32; rows];
            gpu.read(&self.sums, &mut sums)?;
            map.of_bias().back(&bias, 1, &sums, &mut self.values, l);
        }
        Ok(())
    }

    fn norm(
        &mut self,
        gpu: &Cuda,
        (l, norm): (usize, Norm),
        weight: &Buffer,
        gradient: &Buffer,
    ) -> Result<(), DeviceError> {
        let Some((i, (_, pair))) = HELD.into_iter().enumerate().find(|(_, (n, _))| *n == norm) else { return Ok(()) };
        let Some(own) = self.values.layers.get_mut(l) else { return Ok(()) };
        let (Some(s), Some(w)) = (scales_mut(own, pair), &self.layers[l].norms[i]) else { return Ok(()) };
        let mut d = vec![0f32; weight.len()];
        gpu.read(gradient, &mut d)?;
        // γ / S, by log S
        s.gradient.iter_mut().zip(d.iter().zip(w)).for_each(|(g, (d, w))| *g -= f64::from(d * w));
        Ok(())
    }
}

impl Gpu {
    /// Starts from `start`, as [`super::network::Network::new`] does, for windows of `length` tokens, `batch` at a time.
    pub fn new(
        model: &Model<'_>,
        anatomy: &Anatomy,
        start: &Transforms,
        fake: &(dyn Fn(&str, usize) -> Option<Fake> + Sync),
        activations: Activations,
        (length, batch): (usize, usize),
        passes: Passes,
    ) -> Result<Gpu, LearningError> {
        admitted(model)?;
        let gpu = Cuda::open()?;
        let own = model.layer_weights() * (model.spec.layers as u64 + 5);
        let sizes = Sizes::of(model, length * batch, length);
        let again = passes.computes_again(&gpu, |again| memory(model, sizes, again) + own)?;
        let (spec, values) = (&model.spec, Values::new(start, anatomy));
        let (mut layers, mut made) = (Vec::new(), Vec::new());
        for l in 0..spec.layers {
            let (mut base, mut layer) = originals(model, anatomy, &values, fake, l)?;
            let weights = base.linears.each_ref().map(|o| gpu.upload(&o.weight));
            let [a, b, c, d, e, f, g] = weights;
            let heads = match &values.layers[l].r_ov[..] {
                [] => None,
                all => {
                    let r: Vec<f32> = all.iter().flat_map(|r| r.single.iter().copied()).collect();
                    Some(Heads { r: gpu.upload(&r)?, gradient: gpu.zeros(r.len())? })
                }
            };
            // they are on the device now, where what is made of them gets its place, too
            for (slot, o) in Slot::ALL.into_iter().zip(&mut base.linears) {
                let made = layer.linear_mut(slot);
                made.weight = vec![0.0; std::mem::take(&mut o.weight).len()];
                made.bias = o.bias.clone();
            }
            layers.push(Layer {
                base,
                weights: [a?, b?, c?, d?, e?, f?, g?],
                lines: Default::default(),
                norms: [None, None],
                heads,
            });
            made.push(layer);
        }
        let n = spec.embed;
        let (embedding, output) = tables(model)?;
        let simulation = activations.simulated();
        let begin = Start {
            layers: &made,
            embedding: &embedding,
            output: output.as_deref(),
            norm: &model.output_norm()?,
            simulation,
        };
        let mut network = Network::new(&gpu, model, &begin, (length, batch), again)?;
        if let Some(r) = &values.r_res {
            network.stream = Some(StreamTurn { r: gpu.upload(&r.single)?, gradient: gpu.zeros(n * n)? });
        }
        let widest = made.iter().flat_map(|l| Slot::ALL.map(|s| l.linear(s).weight.len())).max().unwrap_or(0);
        let longest = made.iter().flat_map(|l| Slot::ALL.map(|s| l.linear(s).inputs.max(l.linear(s).outputs()))).max();
        let z = [(); 5].map(|()| gpu.zeros(widest));
        let [a, b, c, d, e] = z;
        let down = network.down();
        let maps = Maps {
            gpu: gpu.clone(),
            stream: network.stream.as_ref().map(|s| (s.r.ptr(), s.gradient.ptr())),
            z: [a?, b?, c?, d?, e?],
            sums: gpu.zeros(longest.unwrap_or(0))?,
            read: Vec::new(),
            values,
            layers,
            down,
        };
        let passes = passes.on(&gpu);
        let mut own = Gpu { gpu, passes, network, maps, span: length * batch };
        own.fuse()?;
        Ok(own)
    }

    /// Adds what the device summed up to the gradients of rotations, and begins anew.
    fn collect(&mut self) -> Result<(), DeviceError> {
        let (gpu, maps) = (&self.gpu, &mut self.maps);
        let take = |buffer: &Buffer, to: &mut dyn Iterator<Item = &mut Vec<f32>>| {
            let mut sums = vec![0f32; buffer.len()];
            gpu.read(buffer, &mut sums)?;
            let mut rest = &sums[..];
            for g in to {
                let (own, left) = rest.split_at(g.len());
                g.iter_mut().zip(own).for_each(|(g, s)| *g += s);
                rest = left;
            }
            let count = buffer.len();
            gpu.each("fill", count, &[P(buffer.ptr()), Arg::F(0.0), I(count as i32)])
        };
        if let (Some(turn), Some(r)) = (&self.network.stream, &mut maps.values.r_res) {
            take(&turn.gradient, &mut std::iter::once(&mut r.gradient))?;
        }
        for (layer, own) in maps.layers.iter().zip(&mut maps.values.layers) {
            if let Some(heads) = &layer.heads {
                take(&heads.gradient, &mut own.r_ov.iter_mut().map(|r| &mut r.gradient))?;
            }
        }
        Ok(())
    }
}

impl Engine for Gpu {
    fn divergence(&mut self, tokens: &[u32]) -> Result<f64, LearningError> {
        let mut sum = 0.0;
        for tokens in tokens.chunks(self.span) {
            interrupted()?;
            sum += self.network.loss(&self.gpu, tokens)?;
        }
        Ok(sum / tokens.len() as f64)
    }

    fn gradients(&mut self, tokens: &[u32], loss: Loss) -> Result<f64, LearningError> {
        let back = Back { loss, ..Back::default() };
        let sum = self.network.back(&self.passes, tokens, &back, &mut self.maps)?;
        self.collect()?;
        Ok(sum / tokens.len() as f64)
    }

    fn values(&mut self) -> &mut Values {
        &mut self.maps.values
    }

    fn fuse(&mut self) -> Result<(), LearningError> {
        let Gpu { gpu, network, maps, .. } = self;
        if let (Some(turn), Some(r)) = (&mut network.stream, &maps.values.r_res) {
            gpu.write(&mut turn.r, &r.single)?;
        }
        for (l, to) in network.layers.iter_mut().enumerate() {
            if let Some(heads) = &mut maps.layers[l].heads {
                let r: Vec<f32> = maps.values.layers[l].r_ov.iter().flat_map(|r| r.single.iter().copied()).collect();
                gpu.write(&mut heads.r, &r)?;
            }
            maps.fuse(gpu, l, to)?;
        }
        Ok(())
    }
}
