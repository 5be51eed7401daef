//! Q6_K: lanes are the sixteen sub-blocks of a super-block.

use super::super::kquant::q6k::finish;
use super::super::kquant::{QK_K, symmetric_levels};
use super::chunk::{Chunk, Job, Kernel, LANES, columns, run, squares};
use super::rounding::Lanewise;
use super::symmetric;
use super::vector::Vector;
use crate::gguf::GgmlType;
use std::marker::PhantomData;

const SUB: usize = 16;

/// Encodes Q6_K.
#[inline(always)]
pub(super) fn encode<V: Vector>(job: Job<'_>) {
    run(Q6::<V>(PhantomData), job);
}

struct Q6<V>(PhantomData<V>);

impl<V: Vector> Kernel for Q6<V> {
    const BLOCK: usize = QK_K;
    const BLOCKS: usize = LANES * SUB / QK_K;

    #[inline(always)]
    fn block_bytes(&self) -> usize {
        GgmlType::Q6_K.block_bytes()
    }

    #[inline(always)]
    fn encode(&self, Chunk { x, qw, out, .. }: Chunk<'_>) {
        let values = columns::<V, SUB>(x, SUB);
        let w = if qw.is_empty() { squares(&values) } else { columns::<V, SUB>(qw, SUB) };
        let (mut scales, mut iscales) = ([0.0f32; LANES], [0.0f32; LANES]);
        let (scale, iscale) = symmetric::search::<V, SUB, true>(32, &values, &w);
        scale.store(&mut scales);
        iscale.store(&mut iscales);
        let x = x.first_chunk().expect("a super-block");
        finish::<Lanewise<V>>(x, &scales, |j, l| symmetric_levels(32, &x[SUB * j..], iscales[j], l), out);
    }
}
