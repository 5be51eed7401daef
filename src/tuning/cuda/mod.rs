//! Tuning on an NVIDIA GPU: the same steps as on the processor, in f32, by cuBLAS and kernels that NVRTC compiles at run time.
//!
//! Libraries are opened when the device is asked for: the program builds and runs where there is no CUDA. Dense decoders with
//! norms before their branches (Llama, Mistral, Qwen, Granite); others are refused by name. Weights, activations of all layers
//! and parameters stay on the device; [`Engine::pull`] copies the parameters back. Sums by cuBLAS and atomic additions have no
//! fixed order: results agree with the processor's within rounding.

mod device;
mod network;

use self::device::{Arg, Buffer, Cuda, Ptr};
use self::network::Network;
use super::TuningError;
use super::blocks::{Adam, Blocks, Parameters};
use super::engine::Engine;
use super::student::Student;
use crate::forward::backward::layer::Slot;
use crate::forward::interrupted;

/// `Adam` of `kernels.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct AdamArg {
    beta1: f32,
    beta2: f32,
    correction1: f32,
    correction2: f32,
    rate: f32,
    code_rate: f32,
}

impl AdamArg {
    fn of(a: &Adam) -> AdamArg {
        let Adam { beta1, beta2, correction1, correction2, rate, code_rate } = *a;
        AdamArg { beta1, beta2, correction1, correction2, rate, code_rate }
    }
}

/// `Kind` of `kernels.cu`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct KindArg {
    value: Ptr,
    unit: Ptr,
    m: Ptr,
    v: Ptr,
}

/// `Blocks` of `kernels.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct BlocksArg {
    codes: Ptr,
    code_m: Ptr,
    code_v: Ptr,
    scales: KindArg,
    offsets: KindArg,
    d: KindArg,
    m: KindArg,
    levels: Ptr,
    lo: f32,
    hi: f32,
    spacing: f32,
    block: i32,
    sub: i32,
    scale_lo: i32,
    scale_hi: i32,
    offset_hi: i32,
    frozen: i32,
}

/// Buffers of some parameters; an address of 0 for those that are empty.
fn upload(gpu: &Cuda, values: &[&mut Vec<f32>], buffers: &mut Vec<Buffer>) -> Result<Vec<Ptr>, TuningError> {
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
    fn new(gpu: &Cuda, blocks: &mut Blocks) -> Result<DeviceBlocks, TuningError> {
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
    fn step(&self, gpu: &Cuda, g: Ptr, w: Ptr, adam: AdamArg) -> Result<(), TuningError> {
        let args = [Arg::B(self.arg), Arg::P(g), Arg::P(w), Arg::I(self.count as i32), Arg::A(adam)];
        gpu.run("step_blocks", self.count.div_ceil(8), (256, 1), &args)
    }

    /// The parameters, to where they came from.
    fn pull(&self, gpu: &Cuda, blocks: &mut Blocks) -> Result<(), TuningError> {
        let values = blocks.state().into_iter().filter(|v| !v.is_empty());
        values.zip(&self.buffers).try_for_each(|(v, b)| gpu.read(b, v))
    }

    fn push(&mut self, gpu: &Cuda, blocks: &mut Blocks) -> Result<(), TuningError> {
        let values = blocks.state().into_iter().filter(|v| !v.is_empty());
        values.zip(&mut self.buffers).try_for_each(|(v, b)| gpu.write(b, v))
    }
}

/// A norm's parameters on the device.
struct DeviceNorm {
    buffers: [Buffer; 4],
    gradient: Buffer,
    n: usize,
}

impl DeviceNorm {
    fn new(gpu: &Cuda, p: &mut Parameters) -> Result<DeviceNorm, TuningError> {
        let n = p.values.len();
        let [a, b, c, d] = p.state().map(|v| gpu.upload(v));
        Ok(DeviceNorm { buffers: [a?, b?, c?, d?], gradient: gpu.zeros(n)?, n })
    }

    fn weight(&self) -> Ptr {
        self.buffers[0].ptr()
    }

    fn step(&self, gpu: &Cuda, adam: AdamArg) -> Result<(), TuningError> {
        let [value, unit, m, v] = self.buffers.each_ref().map(|b| Arg::P(b.ptr()));
        let args = [value, unit, m, v, Arg::P(self.gradient.ptr()), Arg::I(self.n as i32), Arg::A(adam)];
        gpu.each("step_norm", self.n, &args)
    }

    fn pull(&self, gpu: &Cuda, p: &mut Parameters) -> Result<(), TuningError> {
        p.state().into_iter().zip(&self.buffers).try_for_each(|(v, b)| gpu.read(b, v))
    }

    fn push(&mut self, gpu: &Cuda, p: &mut Parameters) -> Result<(), TuningError> {
        p.state().into_iter().zip(&mut self.buffers).try_for_each(|(v, b)| gpu.write(b, v))
    }
}

/// The GPU.
pub struct Gpu<'a> {
    gpu: Cuda,
    student: Student<'a>,
    network: Network,
    /// Tokens of a batch.
    span: usize,
}

impl<'a> Gpu<'a> {
    /// For windows of `length` tokens, `batch` of them at a time.
    pub fn new(mut student: Student<'a>, length: usize, batch: usize) -> Result<Gpu<'a>, TuningError> {
        network::admitted(student.model)?;
        let gpu = Cuda::open()?;
        let network = Network::new(&gpu, &mut student, length, batch)?;
        Ok(Gpu { gpu, student, network, span: length * batch })
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.gpu.name
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
        Ok(self.network.step(&self.gpu, tokens, AdamArg::of(adam))? / tokens.len() as f64)
    }

    fn pull(&mut self) -> Result<&mut Student<'a>, TuningError> {
        let (gpu, s) = (&self.gpu, &mut self.student);
        for (table, device) in
            [(Some(&mut s.embedding), &self.network.embedding), (s.output.as_mut(), &self.network.output)]
        {
            if let (Some(table), Some(d)) = (table, device)
                && let (Some(b), Some(d)) = (&mut table.blocks, &d.blocks)
            {
                d.pull(gpu, b)?;
            }
        }
        self.network.norm.pull(gpu, &mut s.head.norm)?;
        for (tuned, layer) in s.tuned.iter_mut().zip(&self.network.layers) {
            for slot in Slot::ALL {
                if let (Some(b), Some(d)) = (&mut tuned.linears[slot as usize], &layer.linears[slot as usize].blocks) {
                    d.pull(gpu, b)?;
                }
            }
            for (p, d) in tuned.norms.0.iter_mut().zip(&layer.norms) {
                if let (Some(p), Some(d)) = (p, d) {
                    d.pull(gpu, p)?;
                }
            }
        }
        Ok(s)
    }

    fn push(&mut self) -> Result<(), TuningError> {
        let (gpu, s) = (&self.gpu, &mut self.student);
        let tables =
            [(Some(&mut s.embedding), &mut self.network.embedding), (s.output.as_mut(), &mut self.network.output)];
        for (table, device) in tables {
            if let (Some(table), Some(d)) = (table, device) {
                d.push(gpu, table.blocks.as_mut())?;
            }
        }
        self.network.norm.push(gpu, &mut s.head.norm)?;
        for (tuned, layer) in s.tuned.iter_mut().zip(&mut self.network.layers) {
            for slot in Slot::ALL {
                layer.linears[slot as usize].push(gpu, tuned.linears[slot as usize].as_mut())?;
            }
            for (p, d) in tuned.norms.0.iter_mut().zip(&mut layer.norms) {
                if let (Some(p), Some(d)) = (p, d) {
                    d.push(gpu, p)?;
                }
            }
        }
        Ok(())
    }
}
