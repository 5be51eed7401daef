//! Run-time choice of instruction set and the vector kernels.
//!
//! [`isa`] detects the best instruction set once. The environment variable `OSTQ_ISA` forces one
//! (`scalar`, `avx2`, `avx512`, `neon`); [`check_env`] says whether its value can be used. Tests and benchmarks choose
//! with [`with_isa`].
//!
//! The scalar code of the formats is the definition. Kernels do the same operations in the same order with one block
//! or sub-block per lane, so that every instruction set gives the same bytes.

// Other machines have the scalar code only.
#![cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code, unused_macros, unused_imports))]

mod affine;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod chunk;
pub mod convert;
mod iq4;
#[cfg(target_arch = "x86_64")]
pub mod iq_qp;
#[cfg(target_arch = "x86_64")]
pub mod iq_scan;
#[cfg(target_arch = "x86_64")]
pub mod iq_split;
mod legacy;
#[cfg(target_arch = "aarch64")]
mod neon;
mod positive;
mod q2;
mod q3;
mod q4;
mod q6;
mod rounding;
mod symmetric;
mod vector;

use super::FormatError;
use crate::gguf::GgmlType;
use std::cell::Cell;
use std::ffi::OsStr;
use std::sync::OnceLock;

/// An instruction set that has kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// The scalar definitions.
    Scalar,
    /// AArch64 with NEON (always present there).
    Neon,
    /// x86-64 with AVX2 and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Isa {
    /// Every instruction set.
    pub const ALL: [Isa; 4] = [Isa::Scalar, Isa::Neon, Isa::Avx2, Isa::Avx512];

    /// The name that `OSTQ_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// The instruction sets of this machine, [`Isa::Scalar`] first, the best last.
    pub fn available() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available())
    }
}

/// The instruction set that `OSTQ_ISA` asks for: `None` if it is not set.
fn from_env() -> Result<Option<Isa>, String> {
    std::env::var_os("OSTQ_ISA").map(|value| parse(&value)).transpose()
}

/// The instruction set of that name, if this machine has it.
fn parse(value: &OsStr) -> Result<Isa, String> {
    let list = || Isa::available().map(Isa::name).collect::<Vec<_>>().join(", ");
    match Isa::ALL.into_iter().find(|isa| value.eq_ignore_ascii_case(isa.name())) {
        None => Err(format!("OSTQ_ISA={}: unknown; this machine has {}", value.display(), list())),
        Some(isa) if !isa.is_available() => Err(format!("OSTQ_ISA={}: this machine has only {}", isa.name(), list())),
        Some(isa) => Ok(isa),
    }
}

/// Says why `OSTQ_ISA` cannot be used. [`isa`] then goes by detection.
pub fn check_env() -> Result<(), String> {
    from_env().map(|_| ())
}

thread_local! {
    static FORCED: Cell<Option<Isa>> = const { Cell::new(None) };
}

/// The instruction set in use: that of [`with_isa`], else `OSTQ_ISA`, else the best of this machine.
pub fn isa() -> Isa {
    static DETECTED: OnceLock<Isa> = OnceLock::new();
    FORCED.get().unwrap_or_else(|| {
        *DETECTED.get_or_init(|| match from_env() {
            Ok(Some(isa)) => isa,
            _ => Isa::available().last().unwrap_or(Isa::Scalar),
        })
    })
}

/// Runs `f` with a given instruction set on this thread (for tests and benchmarks).
///
/// # Panics
/// If this machine does not have it.
pub fn with_isa<T>(isa: Isa, f: impl FnOnce() -> T) -> T {
    struct Restore(Option<Isa>);
    impl Drop for Restore {
        fn drop(&mut self) {
            FORCED.set(self.0);
        }
    }
    assert!(isa.is_available(), "this machine has no {}", isa.name());
    let _restore = Restore(FORCED.replace(Some(isa)));
    f()
}

/// Defines `encode` of an instruction set: one function per format, compiled with its features, over its vector.
macro_rules! entry_points {
    ($features:literal, $lanes:ty) => {
        /// Encodes a type that has a kernel; gives the job back for one that has none.
        ///
        /// # Safety
        /// The machine has the features of this module.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn encode<'a>(
            ty: crate::gguf::GgmlType,
            job: super::chunk::Job<'a>,
        ) -> Result<(), super::chunk::Job<'a>> {
            use crate::gguf::GgmlType::*;
            match ty {
                Q4_0 => q4_0(job),
                Q4_1 => q4_1(job),
                Q5_0 => q5_0(job),
                Q5_1 => q5_1(job),
                Q8_0 => q8_0(job),
                Q2_K => q2_k(job),
                Q3_K => q3_k(job),
                Q4_K => q4_k(job),
                Q5_K => q5_k(job),
                Q6_K => q6_k(job),
                IQ4_NL => iq4_nl(job),
                IQ4_XS => iq4_xs(job),
                _ => return Err(job),
            }
            Ok(())
        }

        super::entry_points!($features, $lanes,
            q4_0 = super::legacy::encode(&super::super::legacy::Small::Q4_0);
            q4_1 = super::legacy::encode(&super::super::legacy::Small::Q4_1);
            q5_0 = super::legacy::encode(&super::super::legacy::Small::Q5_0);
            q5_1 = super::legacy::encode(&super::super::legacy::Small::Q5_1);
            q8_0 = super::legacy::encode_q8_0();
            q2_k = super::q2::encode();
            q3_k = super::q3::encode();
            q4_k = super::q4::encode(&super::super::kquant::q4k::Nibbles::Q4_K);
            q5_k = super::q4::encode(&super::super::kquant::q4k::Nibbles::Q5_K);
            q6_k = super::q6::encode();
            iq4_nl = super::iq4::encode_nl();
            iq4_xs = super::iq4::encode_xs();
        );
    };
    ($features:literal, $lanes:ty, $($name:ident = $($path:ident)::+ ($($arg:expr),*);)*) => {
        $(#[target_feature(enable = $features)]
        fn $name(job: super::chunk::Job<'_>) {
            $($path)::+::<$lanes>($($arg,)* job);
        })*
    };
}
pub(crate) use entry_points;

/// Encodes with the kernel of a type for the instruction set in use, or with `scalar` where there is none.
///
/// Kernels work on up to sixteen blocks at a time and fill up the last ones, so rows are best given many at a time.
pub(crate) fn encode(
    ty: GgmlType,
    rows: &[f32],
    n_per_row: usize,
    weights: Option<&[f32]>,
    out: &mut [u8],
    scalar: impl FnOnce(&[f32], usize, Option<&[f32]>, &mut [u8]),
) -> Result<(), FormatError> {
    if rows.is_empty() {
        return Ok(());
    }
    let job = chunk::Job { rows, n_per_row, weights, out };
    let left: Result<(), chunk::Job<'_>> = match isa() {
        // SAFETY: `isa` gives only instruction sets that this machine has.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::encode(ty, job) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::encode(ty, job) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe { neon::encode(ty, job) },
        _ => Err(job),
    };
    if let Err(job) = left {
        scalar(job.rows, job.n_per_row, job.weights, job.out);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_choose_what_the_machine_has() {
        for isa in Isa::available() {
            assert_eq!(parse(isa.name().to_uppercase().as_ref()), Ok(isa));
        }
        for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
            assert!(parse(isa.name().as_ref()).is_err_and(|e| e.contains("only scalar")), "{}", isa.name());
        }
        assert!(
            parse("sse9".as_ref()).is_err_and(|e| e.starts_with("OSTQ_ISA=sse9: unknown; this machine has scalar"))
        );
    }
}
