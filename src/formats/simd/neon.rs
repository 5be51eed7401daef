//! NEON: four lanes.

use super::super::iq4::{VALUES, nearest_level};
use super::super::search::to_f16_bits;
use super::vector::{Mask, ROUNDER, Vector, Wide};
use std::arch::aarch64::*;
use std::ops::{Add, BitAnd, Div, Mul, Sub};

/// Sixteen lanes, as on the other instruction sets.
type Lanes = Wide<Neon, 4>;

super::entry_points!("neon", Lanes);

/// Four lanes. Values exist only inside the entry points, which enable NEON.
#[derive(Clone, Copy)]
pub(super) struct Neon(float32x4_t);

/// All bits of a lane are set or none.
#[derive(Clone, Copy)]
pub(super) struct NeonMask(uint32x4_t);

/// Evaluates intrinsics that touch registers only.
macro_rules! neon {
    ($e:expr) => {{
        // SAFETY: the intrinsics need NEON, and vectors of this module are used only by its entry points, which run
        // after NEON was detected.
        #[allow(unused_unsafe)]
        unsafe {
            $e
        }
    }};
}

impl BitAnd for NeonMask {
    type Output = Self;
    #[inline(always)]
    fn bitand(self, other: Self) -> Self {
        NeonMask(neon!(vandq_u32(self.0, other.0)))
    }
}

impl Mask for NeonMask {
    #[inline(always)]
    fn any(self) -> bool {
        neon!(vmaxvq_u32(self.0)) != 0
    }

    #[inline(always)]
    fn all(self) -> bool {
        neon!(vminvq_u32(self.0)) != 0
    }
}

macro_rules! operator {
    ($trait:ident, $method:ident, $intrinsic:ident) => {
        impl $trait for Neon {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                Neon(neon!($intrinsic(self.0, other.0)))
            }
        }
    };
}

operator!(Add, add, vaddq_f32);
operator!(Sub, sub, vsubq_f32);
operator!(Mul, mul, vmulq_f32);
operator!(Div, div, vdivq_f32);

impl Vector for Neon {
    const LANES: usize = 4;
    type Mask = NeonMask;

    #[inline(always)]
    fn splat(v: f32) -> Self {
        Neon(neon!(vdupq_n_f32(v)))
    }

    #[inline(always)]
    fn load(src: &[f32]) -> Self {
        let src = &src[..4];
        // SAFETY: NEON as in `neon!`; the slice holds four values.
        Neon(unsafe { vld1q_f32(src.as_ptr()) })
    }

    #[inline(always)]
    fn store(self, dst: &mut [f32]) {
        let dst = &mut dst[..4];
        // SAFETY: NEON as in `neon!`; the slice holds four values.
        unsafe { vst1q_f32(dst.as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    fn store_f16(self, dst: &mut [u16]) {
        let mut lanes = [0.0; 4];
        self.store(&mut lanes);
        for (dst, v) in dst[..4].iter_mut().zip(lanes) {
            *dst = to_f16_bits(v);
        }
    }

    #[inline(always)]
    fn store_bytes(self, dst: &mut [u8]) {
        let mut lanes = [0.0; 4];
        self.store(&mut lanes);
        for (dst, v) in dst[..4].iter_mut().zip(lanes) {
            *dst = v as u8;
        }
    }

    #[inline(always)]
    fn load_columns(src: &[f32], stride: usize) -> [Self; 8] {
        let mut out = [Self::zero(); 8];
        let mut i = 0;
        while i < 8 {
            out[i] = Self::load(&[src[i], src[stride + i], src[2 * stride + i], src[3 * stride + i]]);
            i += 1;
        }
        out
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        Neon(neon!(vsqrtq_f32(self.0)))
    }

    #[inline(always)]
    fn abs(self) -> Self {
        Neon(neon!(vabsq_f32(self.0)))
    }

    #[inline(always)]
    fn neg(self) -> Self {
        Neon(neon!(vnegq_f32(self.0)))
    }

    /// By comparison: the instructions for minimum and maximum treat NaN and zeros differently.
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Neon(neon!(vbslq_f32(vcltq_f32(self.0, other.0), self.0, other.0)))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Neon(neon!(vbslq_f32(vcgtq_f32(self.0, other.0), self.0, other.0)))
    }

    #[inline(always)]
    fn nearest(self) -> Self {
        neon!({
            let bits = vreinterpretq_s32_f32(vaddq_f32(self.0, vdupq_n_f32(ROUNDER)));
            let mantissa = vandq_s32(bits, vdupq_n_s32(0x007f_ffff));
            Neon(vcvtq_f32_s32(vsubq_s32(mantissa, vdupq_n_s32(0x0040_0000))))
        })
    }

    #[inline(always)]
    fn low_byte(self) -> Self {
        Neon(neon!(vcvtq_f32_s32(vandq_s32(vcvtq_s32_f32(self.0), vdupq_n_s32(0xff)))))
    }

    #[inline(always)]
    fn iq4_value(self) -> Self {
        let mut lanes = [0.0; 4];
        self.store(&mut lanes);
        for v in &mut lanes {
            *v = VALUES[nearest_level(*v) as usize] as f32;
        }
        Self::load(&lanes)
    }

    #[inline(always)]
    fn iq4_level(self) -> Self {
        let mut lanes = [0.0; 4];
        self.store(&mut lanes);
        for v in &mut lanes {
            *v = nearest_level(*v) as f32;
        }
        Self::load(&lanes)
    }

    #[inline(always)]
    fn gt(self, other: Self) -> NeonMask {
        NeonMask(neon!(vcgtq_f32(self.0, other.0)))
    }

    #[inline(always)]
    fn ne(self, other: Self) -> NeonMask {
        NeonMask(neon!(vmvnq_u32(vceqq_f32(self.0, other.0))))
    }

    #[inline(always)]
    fn replace(self, mask: NeonMask, set: Self) -> Self {
        Neon(neon!(vbslq_f32(mask.0, set.0, self.0)))
    }
}
