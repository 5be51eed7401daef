//! NVIDIA GPUs: the passes of tuning ([`crate::tuning::gpu`]) and of learning ([`crate::learning::gpu`]) in f32, with products
//! in bf16 if asked, by cuBLAS and kernels that NVRTC compiles at run time.
//!
//! Libraries are opened when the device is asked for: the program builds and runs where there is no CUDA. Dense decoders with
//! norms before their branches (Llama, Mistral, Qwen, Granite); others are refused by name. Weights stay on the device, and the
//! activations of all layers where there is room; otherwise only the streams between layers do, and the backward pass computes
//! each layer once more. Sums by cuBLAS and atomic additions have no fixed order: results agree with the processor's
//! within rounding.

pub mod buffers;
pub mod device;
pub mod network;
pub mod simulated;
pub mod weights;

use crate::forward::ForwardError;

/// Why the device cannot do it.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error(transparent)]
    Forward(#[from] ForwardError),
    #[error("the GPU: {0}")]
    Device(String),
}
