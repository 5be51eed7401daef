//! Precisions that are simulated on the way ([`crate::forward::Simulation`]), on the device.

use std::rc::Rc;

use super::DeviceError;
use super::device::{Arg, Buffer, Cuda, Ptr};
use crate::forward::{Simulation, Spec};
use crate::linalg::hadamard::{Fast, order};
use Arg::{I, P};

/// A Hadamard rotation `H / √n` and its order.
pub type Turn = Rc<(Buffer, usize)>;

/// A simulated precision, and its rotations where they are online: of keys, of inputs and rows of the down matrix.
pub struct Simulated {
    pub of: Simulation,
    pub keys: Option<Turn>,
    pub down: Option<Turn>,
}

impl Simulated {
    pub fn new(gpu: &Cuda, of: Simulation, spec: &Spec, feed_forward: usize) -> Result<Simulated, DeviceError> {
        let turn = |n: usize, bits: u8| (of.online && bits < 16).then(|| hadamard(gpu, n)).transpose();
        let (keys, down) = (turn(spec.head_dim, of.cache)?, turn(feed_forward, of.inputs.min(of.weights))?);
        Ok(Simulated { keys, down, of })
    }

    /// Rounds rows of `columns` values behind a rotation, if there is one; `part` is as large as `x`.
    pub fn round(
        gpu: &Cuda,
        (x, part): (Ptr, Ptr),
        (rows, columns): (usize, usize),
        bits: u8,
        turn: &Option<Turn>,
    ) -> Result<(), DeviceError> {
        if bits >= 16 {
            return Ok(());
        }
        turned(gpu, (x, part), (rows, columns), turn, |x| {
            gpu.run("asymmetric", rows, (256, 1), &[P(x), I(columns as i32), I(i32::from(bits))])
        })
    }
}

/// That of the order for `n` columns.
fn hadamard(gpu: &Cuda, n: usize) -> Result<Turn, DeviceError> {
    let (m, fast) = (order(n), Fast::new(n));
    let mut h = vec![0f32; m * m];
    (0..m).for_each(|i| h[i * m + i] = 1.0);
    fast.apply(&mut h);
    Ok(Rc::new((gpu.upload(&h)?, m)))
}

/// Does something with `x` behind a rotation, and turns it back; without one, with `x` as it is.
pub fn turned(
    gpu: &Cuda,
    (x, part): (Ptr, Ptr),
    (rows, columns): (usize, usize),
    turn: &Option<Turn>,
    what: impl FnOnce(Ptr) -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    let Some((h, m)) = turn.as_deref() else { return what(x) };
    let shape = (rows * (columns / m), *m, *m);
    gpu.product_back(part, x, h.ptr(), shape, 0.0)?;
    what(part)?;
    gpu.product(x, part, h.ptr(), shape)
}
