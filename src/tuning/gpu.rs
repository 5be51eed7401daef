//! Tuning on an NVIDIA GPU: the same steps as on the processor ([`crate::cuda`]).
//!
//! Parameters stay on the device; [`Engine::pull`] copies them back.

use super::TuningError;
use super::blocks::{Adam, Blocks, Parameters};
use super::engine::Engine;
use super::head::Loss;
use super::student::Student;
use crate::cuda::DeviceError;
use crate::cuda::buffers::{Sizes, memory};
use crate::cuda::device::{Arg, BlocksArg, Buffer, Cuda, KindArg, Ptr};
use crate::cuda::network::{Back, Network, Sink, Start, admitted};
use crate::cuda::weights::Weight;
use crate::forward::backward::layer::{Norm, Slot};
use crate::forward::interrupted;

/// How passes are computed on the device.
#[derive(Clone, Copy, Debug, Default)]
pub struct Passes {
    /// Products of the passes that gradients come from, of both models, may round their factors to bf16. Losses of windows held
    /// out stay in f32, and so do the weights that learning makes.
    pub bf16: bool,
    /// Compute each layer again on the way back, even where there is room for what all layers leave.
    pub again: bool,
}

impl Passes {
    /// The device, with the arithmetic of the passes that gradients come from.
    pub(crate) fn on(self, gpu: &Cuda) -> Cuda {
        if self.bf16 { gpu.bf16() } else { gpu.clone() }
    }

    /// Whether layers are computed again; `memory`: bytes of the device if they are not or are.
    pub(crate) fn computes_again(self, gpu: &Cuda, memory: impl Fn(bool) -> u64) -> Result<bool, DeviceError> {
        Ok(!gpu.room(memory(false), memory(true))? || self.again)
    }
}

/// Buffers of some parameters; an address of 0 for those that are empty.
fn upload(gpu: &Cuda, values: &[&mut Vec<f32>], buffers: &mut Vec<Buffer>) -> Result<Vec<Ptr>, DeviceError> {
    let mut all = Vec::new();
    for v in values {
        if v.is_empty() {
            all.push(0);
        } else {
            buffers.push(gpu.upload(v)?);
            all.push(buffers.last().expect("just pushed").ptr());
        }
    }
    Ok(all)
}

/// A tensor's parameters on the device.
struct DeviceBlocks {
    arg: BlocksArg,
    /// Blocks of the format.
    count: usize,
    buffers: Vec<Buffer>,
}

impl DeviceBlocks {
    fn new(gpu: &Cuda, blocks: &mut Blocks) -> Result<DeviceBlocks, DeviceError> {
        let shape = blocks.shape();
        let mut buffers = Vec::new();
        let p = upload(gpu, &blocks.state(), &mut buffers)?;
        let kind = |i: usize| KindArg { value: p[i], unit: p[i + 1], m: p[i + 2], v: p[i + 3] };
        let levels = match &shape.table {
            Some(t) => {
                buffers.push(gpu.upload(t)?);
                buffers.last().expect("just pushed").ptr()
            }
            None => 0,
        };
        let arg = BlocksArg {
            codes: p[0],
            code_m: p[1],
            code_v: p[2],
            scales: kind(3),
            offsets: kind(7),
            d: kind(11),
            m: kind(15),
            levels,
            lo: shape.ends.0,
            hi: shape.ends.1,
            spacing: shape.spacing,
            beyond: shape.beyond,
            block: shape.block as i32,
            sub: shape.sub as i32,
            scale_lo: shape.scales.0,
            scale_hi: shape.scales.1,
            offset_hi: shape.offset_hi,
            frozen: i32::from(shape.frozen),
        };
        Ok(DeviceBlocks { arg, count: shape.count, buffers })
    }

    /// A step by the gradient `g` (0: none), and the values to `w`.
    fn step(&self, gpu: &Cuda, g: Ptr, w: Ptr, adam: Adam) -> Result<(), DeviceError> {
        let args = [Arg::B(self.arg), Arg::P(g), Arg::P(w), Arg::I(self.count as i32), Arg::A(adam)];
        gpu.run("step_blocks", self.count.div_ceil(8), (256, 1), &args)
    }

    /// The parameters, to where they came from.
    fn pull(&self, gpu: &Cuda, blocks: &mut Blocks) -> Result<(), DeviceError> {
        let values = blocks.state().into_iter().filter(|v| !v.is_empty());
        values.zip(&self.buffers).try_for_each(|(v, b)| gpu.read(b, v))
    }

    fn push(&mut self, gpu: &Cuda, blocks: &mut Blocks) -> Result<(), DeviceError> {
        let values = blocks.state().into_iter().filter(|v| !v.is_empty());
        values.zip(&mut self.buffers).try_for_each(|(v, b)| gpu.write(b, v))
    }
}

/// What a norm's weight is moved with; the weight itself is the network's.
struct DeviceNorm {
    /// Units and moments.
    buffers: [Buffer; 3],
}

impl DeviceNorm {
    fn new(gpu: &Cuda, p: &mut Parameters) -> Result<DeviceNorm, DeviceError> {
        let [_, a, b, c] = p.state().map(|v| gpu.upload(v));
        Ok(DeviceNorm { buffers: [a?, b?, c?] })
    }

    fn step(&self, gpu: &Cuda, weight: &Buffer, gradient: &Buffer, n: usize, adam: Adam) -> Result<(), DeviceError> {
        let [unit, m, v] = self.buffers.each_ref().map(|b| Arg::P(b.ptr()));
        let args = [Arg::P(weight.ptr()), unit, m, v, Arg::P(gradient.ptr()), Arg::I(n as i32), Arg::A(adam)];
        gpu.each("step_norm", n, &args)
    }

    fn pull(&self, gpu: &Cuda, weight: &Buffer, p: &mut Parameters) -> Result<(), DeviceError> {
        let [values, rest @ ..] = p.state();
        gpu.read(weight, values)?;
        rest.into_iter().zip(&self.buffers).try_for_each(|(v, b)| gpu.read(b, v))
    }

    fn push(&mut self, gpu: &Cuda, weight: &mut Buffer, p: &mut Parameters) -> Result<(), DeviceError> {
        let [values, rest @ ..] = p.state();
        gpu.write(weight, values)?;
        rest.into_iter().zip(&mut self.buffers).try_for_each(|(v, b)| gpu.write(b, v))
    }
}

/// What of a layer is tuned.
struct Layer {
    linears: [Option<DeviceBlocks>; 7],
    norms: [Option<DeviceNorm>; 6],
}

/// A table that is tuned, and the sum of its gradients.
struct Table {
    blocks: DeviceBlocks,
    gradient: Buffer,
    size: usize,
}

impl Table {
    fn new(gpu: &Cuda, t: &mut super::student::Table) -> Result<Option<Table>, DeviceError> {
        let size = t.weight.len();
        let new = |b| Ok(Table { blocks: DeviceBlocks::new(gpu, b)?, gradient: gpu.zeros(size)?, size });
        t.blocks.as_mut().map(new).transpose()
    }

    fn step(&self, gpu: &Cuda, w: &Weight, adam: Adam) -> Result<(), DeviceError> {
        let g = self.gradient.ptr();
        self.blocks.step(gpu, g, w.w.ptr(), adam)?;
        gpu.each("fill", self.size, &[Arg::P(g), Arg::F(0.0), Arg::I(self.size as i32)])
    }
}

/// Everything that is tuned.
struct Tuned {
    layers: Vec<Layer>,
    norm: DeviceNorm,
    embedding: Option<Table>,
    output: Option<Table>,
}

/// A step in work.
struct Step<'a> {
    tuned: &'a Tuned,
    adam: Adam,
}

impl Sink for Step<'_> {
    fn wants(&self, layer: usize, slot: Slot) -> bool {
        self.tuned.layers[layer].linears[slot as usize].is_some()
    }

    fn linear(
        &mut self,
        gpu: &Cuda,
        (layer, slot): (usize, Slot),
        w: &Weight,
        gradient: Ptr,
        _: (Ptr, usize),
    ) -> Result<(), DeviceError> {
        let Some(blocks) = &self.tuned.layers[layer].linears[slot as usize] else { return Ok(()) };
        blocks.step(gpu, gradient, w.w.ptr(), self.adam)
    }

    fn norm(
        &mut self,
        gpu: &Cuda,
        (layer, norm): (usize, Norm),
        weight: &Buffer,
        gradient: &Buffer,
    ) -> Result<(), DeviceError> {
        let own = match self.tuned.layers.get(layer) {
            Some(l) => l.norms[norm as usize].as_ref(),
            None => Some(&self.tuned.norm),
        };
        own.map_or(Ok(()), |p| p.step(gpu, weight, gradient, weight.len(), self.adam))
    }
}

/// What is done with one kind of parameters: on the device, the weight there, and here.
type Each<'f, D, W, P> = &'f mut dyn FnMut(&Cuda, &mut D, &mut W, &mut P) -> Result<(), DeviceError>;

/// The GPU.
pub struct Gpu<'a> {
    gpu: Cuda,
    /// The same, with the arithmetic of the passes that gradients come from.
    passes: Cuda,
    student: Student<'a>,
    network: Network,
    tuned: Tuned,
    /// Tokens of a batch.
    span: usize,
}

/// Bytes of everything that steps move and what they move it by.
fn parameters(s: &mut Student<'_>) -> u64 {
    let of = |b: &mut Blocks| b.state().iter().map(|v| v.len()).sum::<usize>();
    let linears = s.tuned.iter_mut().flat_map(|t| t.linears.iter_mut().flatten()).map(of).sum::<usize>();
    let tables = std::iter::once(&mut s.embedding).chain(&mut s.output);
    let tables = tables.filter_map(|t| Some(of(t.blocks.as_mut()?) + t.weight.len())).sum::<usize>();
    4 * (linears + tables) as u64
}

impl<'a> Gpu<'a> {
    /// For windows of `length` tokens, `batch` of them at a time.
    pub fn new(
        mut student: Student<'a>,
        (length, batch): (usize, usize),
        passes: Passes,
    ) -> Result<Gpu<'a>, TuningError> {
        admitted(student.model)?;
        let gpu = Cuda::open()?;
        let s = &mut student;
        let own = parameters(s);
        let sizes = Sizes::of(s.model, length * batch, length);
        let again = passes.computes_again(&gpu, |again| memory(s.model, sizes, again) + own)?;
        let start = Start {
            layers: &s.layers,
            embedding: &s.embedding.weight,
            output: s.output.as_ref().map(|o| &o.weight[..]),
            norm: &s.head.norm.values,
            simulation: None,
        };
        let network = Network::new(&gpu, s.model, &start, (length, batch), again)?;
        let layer = |t: &mut super::layer::Tuned| {
            let blocks = t.linears.each_mut().map(|b| b.as_mut().map(|b| DeviceBlocks::new(&gpu, b)).transpose());
            let norms = t.norms.0.each_mut().map(|p| p.as_mut().map(|p| DeviceNorm::new(&gpu, p)).transpose());
            let ([a, b, c, d, e, f, g], [n, o, p, q, r, s]) = (blocks, norms);
            Ok::<_, DeviceError>(Layer { linears: [a?, b?, c?, d?, e?, f?, g?], norms: [n?, o?, p?, q?, r?, s?] })
        };
        let tuned = Tuned {
            layers: s.tuned.iter_mut().map(layer).collect::<Result<_, _>>()?,
            norm: DeviceNorm::new(&gpu, &mut s.head.norm)?,
            embedding: Table::new(&gpu, &mut s.embedding)?,
            output: s.output.as_mut().map(|t| Table::new(&gpu, t)).transpose()?.flatten(),
        };
        let passes = passes.on(&gpu);
        Ok(Gpu { gpu, passes, student, network, tuned, span: length * batch })
    }

    /// Parameters one by one, with what they are on the device.
    fn each(
        &mut self,
        blocks: Each<'_, DeviceBlocks, Weight, Blocks>,
        norms: Each<'_, DeviceNorm, Buffer, Parameters>,
    ) -> Result<(), DeviceError> {
        let Gpu { gpu, student: s, network, tuned, .. } = self;
        if let (Some(d), Some(b)) = (&mut tuned.embedding, &mut s.embedding.blocks) {
            blocks(gpu, &mut d.blocks, &mut network.embedding, b)?;
        }
        if let (Some(d), Some(w), Some(b)) =
            (&mut tuned.output, &mut network.output, s.output.as_mut().and_then(|o| o.blocks.as_mut()))
        {
            blocks(gpu, &mut d.blocks, w, b)?;
        }
        norms(gpu, &mut tuned.norm, &mut network.norm, &mut s.head.norm)?;
        for ((own, device), layer) in s.tuned.iter_mut().zip(&mut tuned.layers).zip(&mut network.layers) {
            for ((b, d), w) in own.linears.iter_mut().zip(&mut device.linears).zip(&mut layer.linears) {
                if let (Some(b), Some(d)) = (b, d) {
                    blocks(gpu, d, w, b)?;
                }
            }
            for ((p, d), w) in own.norms.0.iter_mut().zip(&mut device.norms).zip(&mut layer.norms) {
                if let (Some(p), Some(d), Some(w)) = (p, d, w) {
                    norms(gpu, d, w, p)?;
                }
            }
        }
        Ok(())
    }
}

impl<'a> Engine<'a> for Gpu<'a> {
    fn loss(&mut self, tokens: &[u32]) -> Result<f64, TuningError> {
        let mut sum = 0.0;
        for tokens in tokens.chunks(self.span) {
            interrupted()?;
            sum += self.network.loss(&self.gpu, tokens)?;
        }
        Ok(sum / tokens.len() as f64)
    }

    fn step(&mut self, tokens: &[u32], adam: &Adam) -> Result<f64, TuningError> {
        let Gpu { gpu, passes, network, tuned, .. } = self;
        let adam = *adam;
        let (embedding, output) = (tuned.embedding.as_ref(), tuned.output.as_ref());
        let head = if network.output.is_some() { output } else { embedding };
        let gradient = |t: Option<&'_ Table>| t.map(|t| t.gradient.ptr());
        let back = Back { loss: Loss::Kl, head: gradient(head), embedding: gradient(embedding) };
        let loss = network.back(passes, tokens, &back, &mut Step { tuned, adam })?;
        if let (Some(t), Some(w)) = (output, &network.output) {
            t.step(gpu, w, adam)?;
        }
        if let Some(t) = embedding {
            t.step(gpu, &network.embedding, adam)?;
        }
        Ok(loss / tokens.len() as f64)
    }

    fn pull(&mut self) -> Result<&mut Student<'a>, TuningError> {
        self.each(&mut |gpu, d, _, b| d.pull(gpu, b), &mut |gpu, d, w, p| d.pull(gpu, w, p))?;
        Ok(&mut self.student)
    }

    fn push(&mut self) -> Result<(), TuningError> {
        let none = Adam { beta1: 0.0, beta2: 0.0, correction1: 1.0, correction2: 1.0, rate: 0.0, code_rate: 0.0 };
        let blocks = &mut |gpu: &Cuda, d: &mut DeviceBlocks, w: &mut Weight, b: &mut Blocks| {
            d.push(gpu, b)?;
            d.step(gpu, 0, w.w.ptr(), none)
        };
        Ok(self.each(blocks, &mut |gpu, d, w, p| d.push(gpu, w, p))?)
    }
}
