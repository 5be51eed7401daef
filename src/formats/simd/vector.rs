//! The vector of f32 that kernels are written over, and [`Wide`], several vectors that act as one.
//!
//! Every operation rounds once, per lane, as the scalar operation does. Kernels and operations are
//! `#[inline(always)]`: they must end up inside an entry point that enables the instruction set, or each operation
//! becomes a call. For the same reason kernels contain no closures around vector operations.

use std::ops::{Add, BitAnd, Div, Mul, Sub};

/// Adding and subtracting this rounds |v| <= 4194303 to the nearest integer, ties to even.
pub(super) const ROUNDER: f32 = 12582912.0;

/// A lane-wise condition.
pub(super) trait Mask: Copy + BitAnd<Output = Self> {
    /// Some lane is set.
    fn any(self) -> bool;
    /// Every lane is set.
    fn all(self) -> bool;
}

/// A fixed number of f32 lanes.
pub(super) trait Vector:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self>
{
    const LANES: usize;
    type Mask: Mask;

    fn splat(v: f32) -> Self;
    /// The first [`Self::LANES`] values.
    fn load(src: &[f32]) -> Self;
    fn store(self, dst: &mut [f32]);
    /// Rounds to f16 (`GGML_FP32_TO_FP16`).
    fn store_f16(self, dst: &mut [u16]);
    /// Integers 0..=255 as bytes.
    fn store_bytes(self, dst: &mut [u8]);
    /// Eight columns of rows that are `stride` apart: lane k of vector i is `src[k * stride + i]`.
    fn load_columns(src: &[f32], stride: usize) -> [Self; 8];

    fn sqrt(self) -> Self;
    fn abs(self) -> Self;
    fn neg(self) -> Self;
    /// `self < other ? self : other`.
    fn min(self, other: Self) -> Self;
    /// `self > other ? self : other`.
    fn max(self, other: Self) -> Self;
    /// [`nearest_int`](super::super::search::nearest_int) as f32, for every input.
    fn nearest(self) -> Self;
    /// The low byte of an integer value, 0..=255.
    fn low_byte(self) -> Self;
    /// The value of the nearest IQ4 level (`VALUES[nearest_level(self)]`).
    fn iq4_value(self) -> Self;
    /// The nearest IQ4 level.
    fn iq4_level(self) -> Self;

    fn gt(self, other: Self) -> Self::Mask;
    /// True for NaN.
    fn ne(self, other: Self) -> Self::Mask;
    /// `set` where the mask is, `self` elsewhere.
    fn replace(self, mask: Self::Mask, set: Self) -> Self;

    /// Bit 4 of 32 levels.
    #[inline(always)]
    fn fifth_bits(levels: &[u8; 32]) -> u32 {
        super::super::legacy::fifth_bits(levels)
    }

    #[inline(always)]
    fn zero() -> Self {
        Self::splat(0.0)
    }

    /// [`Vector::nearest`] for |v| <= 4194303, two operations.
    #[inline(always)]
    fn round(self) -> Self {
        let rounder = Self::splat(ROUNDER);
        (self + rounder) - rounder
    }
}

/// `N` vectors side by side: hides latencies, and gives every instruction set the same number of lanes.
#[derive(Clone, Copy)]
pub(super) struct Wide<T, const N: usize>([T; N]);

/// `[f(0), f(1), ...]` without a closure.
macro_rules! each {
    ($first:expr, |$k:ident| $value:expr) => {{
        let mut out = [$first; N];
        let mut $k = 0;
        while $k < N {
            out[$k] = $value;
            $k += 1;
        }
        out
    }};
}

impl<M: Mask, const N: usize> Mask for Wide<M, N> {
    #[inline(always)]
    fn any(self) -> bool {
        let mut any = false;
        let mut k = 0;
        while k < N {
            any |= self.0[k].any();
            k += 1;
        }
        any
    }

    #[inline(always)]
    fn all(self) -> bool {
        let mut all = true;
        let mut k = 0;
        while k < N {
            all &= self.0[k].all();
            k += 1;
        }
        all
    }
}

impl<M: Mask, const N: usize> BitAnd for Wide<M, N> {
    type Output = Self;
    #[inline(always)]
    fn bitand(self, other: Self) -> Self {
        Wide(each!(self.0[0], |k| self.0[k] & other.0[k]))
    }
}

macro_rules! wide_operator {
    ($trait:ident, $method:ident) => {
        impl<V: Vector, const N: usize> $trait for Wide<V, N> {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                Wide(each!(self.0[0], |k| self.0[k].$method(other.0[k])))
            }
        }
    };
}

wide_operator!(Add, add);
wide_operator!(Sub, sub);
wide_operator!(Mul, mul);
wide_operator!(Div, div);

macro_rules! wide_unary {
    ($($method:ident)*) => {
        $(#[inline(always)]
        fn $method(self) -> Self {
            Wide(each!(self.0[0], |k| self.0[k].$method()))
        })*
    };
}

macro_rules! wide_binary {
    ($($method:ident -> $out:ty;)*) => {
        $(#[inline(always)]
        fn $method(self, other: Self) -> $out {
            Wide(each!(self.0[0].$method(other.0[0]), |k| self.0[k].$method(other.0[k])))
        })*
    };
}

impl<V: Vector, const N: usize> Vector for Wide<V, N> {
    const LANES: usize = V::LANES * N;
    type Mask = Wide<V::Mask, N>;

    #[inline(always)]
    fn splat(v: f32) -> Self {
        Wide([V::splat(v); N])
    }

    #[inline(always)]
    fn load(src: &[f32]) -> Self {
        Wide(each!(V::load(src), |k| V::load(&src[k * V::LANES..])))
    }

    #[inline(always)]
    fn store(self, dst: &mut [f32]) {
        let mut k = 0;
        while k < N {
            self.0[k].store(&mut dst[k * V::LANES..]);
            k += 1;
        }
    }

    #[inline(always)]
    fn fifth_bits(levels: &[u8; 32]) -> u32 {
        V::fifth_bits(levels)
    }

    #[inline(always)]
    fn store_f16(self, dst: &mut [u16]) {
        let mut k = 0;
        while k < N {
            self.0[k].store_f16(&mut dst[k * V::LANES..]);
            k += 1;
        }
    }

    #[inline(always)]
    fn store_bytes(self, dst: &mut [u8]) {
        let mut k = 0;
        while k < N {
            self.0[k].store_bytes(&mut dst[k * V::LANES..]);
            k += 1;
        }
    }

    #[inline(always)]
    fn load_columns(src: &[f32], stride: usize) -> [Self; 8] {
        let mut out = [Self::zero(); 8];
        let mut k = 0;
        while k < N {
            let part = V::load_columns(&src[k * V::LANES * stride..], stride);
            let mut i = 0;
            while i < 8 {
                out[i].0[k] = part[i];
                i += 1;
            }
            k += 1;
        }
        out
    }

    wide_unary!(sqrt abs neg nearest low_byte iq4_value iq4_level);
    wide_binary!(min -> Self; max -> Self; gt -> Self::Mask; ne -> Self::Mask;);

    #[inline(always)]
    fn replace(self, mask: Self::Mask, set: Self) -> Self {
        Wide(each!(self.0[0], |k| self.0[k].replace(mask.0[k], set.0[k])))
    }
}
