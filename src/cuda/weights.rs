//! The weights of a layer on the device.

use super::DeviceError;
use super::device::{Arg, Buffer, Cuda, Ptr};
use crate::forward::backward::layer::{LayerBack, Norm, Slot};
use Arg::{I, P};

/// The weight of a linear \[rows, columns\], and its bias.
pub struct Weight {
    pub w: Buffer,
    pub rows: usize,
    pub columns: usize,
    pub bias: Option<Buffer>,
}

impl Weight {
    pub fn new(gpu: &Cuda, w: &[f32], columns: usize, bias: Option<&[f32]>) -> Result<Weight, DeviceError> {
        let bias = bias.map(|b| gpu.upload(b)).transpose()?;
        Ok(Weight { w: gpu.upload(w)?, rows: w.len() / columns, columns, bias })
    }

    /// `out = x Wᵀ + b` for `rows` rows.
    pub fn forward(&self, gpu: &Cuda, out: Ptr, x: Ptr, rows: usize) -> Result<(), DeviceError> {
        gpu.product(out, x, self.w.ptr(), (rows, self.rows, self.columns))?;
        match &self.bias {
            Some(b) => {
                let count = rows * self.rows;
                gpu.each("add_bias", count, &[P(out), P(b.ptr()), I(self.rows as i32), I(count as i32)])
            }
            None => Ok(()),
        }
    }

    /// `dx = dy W + beta dx`.
    pub fn back(&self, gpu: &Cuda, dx: Ptr, dy: Ptr, rows: usize, beta: f32) -> Result<(), DeviceError> {
        gpu.product_back(dx, dy, self.w.ptr(), (rows, self.columns, self.rows), beta)
    }
}

/// A layer of either model.
pub struct Layer {
    pub linears: [Weight; 7],
    pub norms: [Option<Buffer>; 6],
    pub rotates: bool,
}

impl Layer {
    /// The weights of `layer`.
    pub fn new(gpu: &Cuda, layer: &LayerBack, rotates: bool) -> Result<Layer, DeviceError> {
        let weight = |slot| {
            let linear = layer.linear(slot);
            Weight::new(gpu, &linear.weight, linear.inputs, linear.bias.as_deref())
        };
        let linears = Slot::ALL.into_iter().map(weight).collect::<Result<Vec<_>, _>>()?;
        let [a, b, c, d, e, f] = layer.norms().map(|w| w.map(|w| gpu.upload(w)).transpose());
        let linears = linears.try_into().unwrap_or_else(|_| unreachable!("seven linears"));
        Ok(Layer { linears, norms: [a?, b?, c?, d?, e?, f?], rotates })
    }

    pub fn of(&self, slot: Slot) -> &Weight {
        &self.linears[slot as usize]
    }

    pub fn norm(&self, norm: Norm) -> Option<Ptr> {
        self.norms[norm as usize].as_ref().map(Buffer::ptr)
    }
}
