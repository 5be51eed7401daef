//! A CUDA device: one stream, cuBLAS, and the kernels of `kernels.cu`, all loaded at run time.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::cublas::sys::cublasComputeType_t as Compute;
use cudarc::cublas::sys::cublasGemmAlgo_t::CUBLAS_GEMM_DFALT;
use cudarc::cublas::sys::cublasOperation_t::{CUBLAS_OP_N as N, CUBLAS_OP_T as T};
use cudarc::cublas::sys::cudaDataType::CUDA_R_32F;
use cudarc::cublas::{CudaBlas, result as blas};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg,
};

use super::DeviceError;
use crate::plan::memory::human;
use crate::tuning::blocks::Adam;

/// An address on the device, of f32 unless said otherwise.
pub type Ptr = u64;

/// Bytes of one f32.
const F32: u64 = 4;

/// A place in a buffer, `elements` further.
pub fn at(p: Ptr, elements: usize) -> Ptr {
    p + elements as u64 * F32
}

/// An argument of a kernel.
#[derive(Clone, Copy)]
pub enum Arg {
    P(Ptr),
    I(i32),
    F(f32),
    B(BlocksArg),
    A(Adam),
}

/// `Kind` of `kernels.cu`: parameters of one kind.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct KindArg {
    pub value: Ptr,
    pub unit: Ptr,
    pub m: Ptr,
    pub v: Ptr,
}

/// `Blocks` of `kernels.cu`: those of [`crate::tuning::blocks::Blocks`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct BlocksArg {
    pub codes: Ptr,
    pub code_m: Ptr,
    pub code_v: Ptr,
    pub scales: KindArg,
    pub offsets: KindArg,
    pub d: KindArg,
    pub m: KindArg,
    pub levels: Ptr,
    pub lo: f32,
    pub hi: f32,
    pub spacing: f32,
    pub beyond: f32,
    pub block: i32,
    pub sub: i32,
    pub scale_lo: i32,
    pub scale_hi: i32,
    pub offset_hi: i32,
    pub frozen: i32,
}

// SAFETY: plain data, laid out as in `kernels.cu`.
unsafe impl DeviceRepr for BlocksArg {}
// SAFETY: as above.
unsafe impl DeviceRepr for Adam {}

/// f32 values on the device.
pub struct Buffer {
    slice: CudaSlice<f32>,
    ptr: Ptr,
    len: usize,
}

impl Buffer {
    pub fn ptr(&self) -> Ptr {
        self.ptr
    }

    /// Values in it.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }
}

/// The device.
#[derive(Clone)]
pub struct Cuda {
    stream: Arc<CudaStream>,
    blas: Arc<CudaBlas>,
    functions: Arc<HashMap<&'static str, CudaFunction>>,
    /// Arithmetic of products.
    compute: Compute,
}

const KERNELS: &[&str] = &[
    "embed",
    "scatter",
    "rms_norm",
    "rms_norm_back",
    "norm_gradient",
    "rope",
    "softmax",
    "softmax_back",
    "silu_mul",
    "silu_mul_back",
    "add",
    "scaled",
    "add_bias",
    "divergence",
    "top_divergence",
    "surprise",
    "step_norm",
    "step_blocks",
    "fill",
    "scale_columns",
    "scale_rows",
    "along_columns",
    "along_rows",
    "asymmetric",
    "symmetric",
    "fake_back",
];

fn failed(what: &str, e: impl std::fmt::Debug) -> DeviceError {
    DeviceError::Device(format!("{what}: {e:?}"))
}

impl Cuda {
    /// The first device. Libraries that are missing are named.
    pub fn open() -> Result<Cuda, DeviceError> {
        // SAFETY: these only try to open a library.
        let (driver, nvrtc, cublas) = unsafe {
            (
                cudarc::driver::sys::is_culib_present(),
                cudarc::nvrtc::sys::is_culib_present(),
                cudarc::cublas::sys::is_culib_present(),
            )
        };
        for (there, name) in [(driver, "libcuda (the driver)"), (nvrtc, "libnvrtc"), (cublas, "libcublas")] {
            if !there {
                return Err(DeviceError::Device(format!("{name} was not found; take --device cpu")));
            }
        }
        let context = CudaContext::new(0).map_err(|e| failed("no device can be used", e))?;
        // SAFETY: all work is on one stream.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(|e| failed("no stream", e))?;
        let blas = CudaBlas::new(stream.clone()).map_err(|e| failed("cuBLAS", e))?;
        let ptx = cudarc::nvrtc::compile_ptx(include_str!("kernels.cu")).map_err(|e| failed("NVRTC", e))?;
        let module = context.load_module(ptx).map_err(|e| failed("kernels", e))?;
        let mut functions = HashMap::new();
        for &name in KERNELS {
            functions.insert(name, module.load_function(name).map_err(|e| failed(name, e))?);
        }
        let (blas, functions) = (Arc::new(blas), Arc::new(functions));
        Ok(Cuda { stream, blas, functions, compute: Compute::CUBLAS_COMPUTE_32F })
    }

    /// The same device with products whose factors cuBLAS may round to bf16, for tensor cores; their sums stay f32.
    pub fn bf16(&self) -> Cuda {
        Cuda { compute: Compute::CUBLAS_COMPUTE_32F_FAST_16BF, ..self.clone() }
    }

    /// Whether `most` bytes are free on the device; refuses where `least` are not.
    pub fn room(&self, most: u64, least: u64) -> Result<bool, DeviceError> {
        let (free, _) = self.stream.context().mem_get_info().map_err(|e| failed("its memory", e))?;
        if least > free as u64 {
            let (least, free) = (human(least), human(free as u64));
            return Err(DeviceError::Device(format!(
                "{least} of its memory are needed, {free} are free; take --device cpu"
            )));
        }
        Ok(most <= free as u64)
    }

    pub fn zeros(&self, n: usize) -> Result<Buffer, DeviceError> {
        let slice = self.stream.alloc_zeros::<f32>(n.max(1)).map_err(|e| failed("memory of the device", e))?;
        let ptr = slice.device_ptr(&self.stream).0;
        Ok(Buffer { slice, ptr, len: n })
    }

    pub fn upload(&self, values: &[f32]) -> Result<Buffer, DeviceError> {
        let mut buffer = self.zeros(values.len())?;
        self.write(&mut buffer, values)?;
        Ok(buffer)
    }

    /// Copies to the start of a buffer, which is as large at least.
    pub fn write(&self, buffer: &mut Buffer, values: &[f32]) -> Result<(), DeviceError> {
        if values.is_empty() {
            return Ok(());
        }
        self.stream.memcpy_htod(values, &mut buffer.slice).map_err(|e| failed("copy to the device", e))
    }

    /// Token ids, as bit patterns of i32.
    pub fn tokens(&self, buffer: &mut Buffer, tokens: &[u32]) -> Result<(), DeviceError> {
        self.write(buffer, bytemuck::cast_slice(tokens))
    }

    pub fn read(&self, buffer: &Buffer, out: &mut [f32]) -> Result<(), DeviceError> {
        if out.is_empty() {
            return Ok(());
        }
        let view = buffer.slice.slice(0..out.len());
        self.stream.memcpy_dtoh(&view, out).map_err(|e| failed("copy from the device", e))?;
        self.stream.synchronize().map_err(|e| failed("the device", e))
    }

    /// f64 values that a kernel left in a buffer.
    pub fn read_f64(&self, buffer: &Buffer, n: usize) -> Result<Vec<f64>, DeviceError> {
        let mut words = vec![0f32; 2 * n];
        self.read(buffer, &mut words)?;
        let (pairs, _) = words.as_chunks::<2>();
        let word = |f: f32| u64::from(f.to_bits());
        Ok(pairs.iter().map(|[low, high]| f64::from_bits(word(*low) | word(*high) << 32)).collect())
    }

    /// Runs a kernel on `grid` blocks of `block` threads.
    pub fn run(&self, name: &str, grid: usize, block: (u32, u32), args: &[Arg]) -> Result<(), DeviceError> {
        if grid == 0 {
            return Ok(());
        }
        let mut launch = self.stream.launch_builder(&self.functions[name]);
        for a in args {
            match a {
                Arg::P(v) => launch.arg(v),
                Arg::I(v) => launch.arg(v),
                Arg::F(v) => launch.arg(v),
                Arg::B(v) => launch.arg(v),
                Arg::A(v) => launch.arg(v),
            };
        }
        let config =
            LaunchConfig { grid_dim: (grid as u32, 1, 1), block_dim: (block.0, block.1, 1), shared_mem_bytes: 0 };
        // SAFETY: the callers in this crate give each kernel its arguments in its order, with buffers that are large enough.
        unsafe { launch.launch(config) }.map_err(|e| failed(name, e))?;
        Ok(())
    }

    /// Runs a kernel with one thread per element.
    pub fn each(&self, name: &str, count: usize, args: &[Arg]) -> Result<(), DeviceError> {
        self.run(name, count.div_ceil(256), (256, 1), args)
    }

    /// `out[m, n] = a[m, k] b[n, k]ᵀ`, row-major.
    pub fn product(&self, out: Ptr, a: Ptr, b: Ptr, (m, n, k): (usize, usize, usize)) -> Result<(), DeviceError> {
        self.gemm((T, N), (n, m, k), 1.0, (b, k), (a, k), 0.0, (out, n))
    }

    /// `out[m, n] = a[m, k] w[k, n] + beta out`.
    pub fn product_back(
        &self,
        out: Ptr,
        a: Ptr,
        w: Ptr,
        (m, n, k): (usize, usize, usize),
        beta: f32,
    ) -> Result<(), DeviceError> {
        self.gemm((N, N), (n, m, k), 1.0, (w, n), (a, k), beta, (out, n))
    }

    /// `out[m, n] = a[t, m]ᵀ b[t, n] + beta out`.
    pub fn cross(
        &self,
        out: Ptr,
        a: Ptr,
        b: Ptr,
        (m, n, t): (usize, usize, usize),
        beta: f32,
    ) -> Result<(), DeviceError> {
        self.gemm((N, T), (n, m, t), 1.0, (b, n), (a, m), beta, (out, n))
    }

    /// cuBLAS's column-major product.
    #[allow(clippy::too_many_arguments)]
    fn gemm(
        &self,
        (ta, tb): (cudarc::cublas::sys::cublasOperation_t, cudarc::cublas::sys::cublasOperation_t),
        (m, n, k): (usize, usize, usize),
        alpha: f32,
        (a, lda): (Ptr, usize),
        (b, ldb): (Ptr, usize),
        beta: f32,
        (c, ldc): (Ptr, usize),
    ) -> Result<(), DeviceError> {
        let i = |v: usize| v as i32;
        // SAFETY: the shapes are those of the buffers, which the callers in this crate made for them.
        unsafe {
            blas::gemm_ex(
                *self.blas.handle(),
                ta,
                tb,
                i(m),
                i(n),
                i(k),
                (&raw const alpha).cast(),
                a as *const _,
                CUDA_R_32F,
                i(lda),
                b as *const _,
                CUDA_R_32F,
                i(ldb),
                (&raw const beta).cast(),
                c as *mut _,
                CUDA_R_32F,
                i(ldc),
                self.compute,
                CUBLAS_GEMM_DFALT,
            )
        }
        .map_err(|e| failed("cuBLAS", e))
    }

    /// As the three above, for `count` matrices each: an address, the length of a row, the distance to the next matrix.
    #[allow(clippy::too_many_arguments)]
    pub fn batched(
        &self,
        kind: Kind,
        (m, n, k): (usize, usize, usize),
        out: Strided,
        a: Strided,
        b: Strided,
        beta: f32,
        count: usize,
    ) -> Result<(), DeviceError> {
        let (ta, tb) = match kind {
            Kind::Transposed => (T, N),
            Kind::Plain => (N, N),
            Kind::Cross => (N, T),
        };
        let (i, l, alpha) = (|v: usize| v as i32, |v: usize| v as i64, 1.0f32);
        // SAFETY: as above.
        unsafe {
            blas::gemm_strided_batched_ex(
                *self.blas.handle(),
                ta,
                tb,
                i(n),
                i(m),
                i(k),
                (&raw const alpha).cast(),
                b.0 as *const _,
                CUDA_R_32F,
                i(b.1),
                l(b.2),
                a.0 as *const _,
                CUDA_R_32F,
                i(a.1),
                l(a.2),
                (&raw const beta).cast(),
                out.0 as *mut _,
                CUDA_R_32F,
                i(out.1),
                l(out.2),
                i(count),
                self.compute,
                CUBLAS_GEMM_DFALT,
            )
        }
        .map_err(|e| failed("cuBLAS", e))
    }
}

/// A matrix in a batch: address, length of a row, distance to the next matrix, in elements.
#[derive(Clone, Copy)]
pub struct Strided(pub Ptr, pub usize, pub usize);

/// Which product: `a bᵀ`, `a b`, `aᵀ b`.
#[derive(Clone, Copy)]
pub enum Kind {
    Transposed,
    Plain,
    Cross,
}
