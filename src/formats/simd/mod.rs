//! Run-time choice of instruction set and the vector kernels.
#[cfg(target_arch = "x86_64")]
pub mod iq_qp;
#[cfg(target_arch = "x86_64")]
pub mod iq_scan;
#[cfg(target_arch = "x86_64")]
pub mod iq_split;
