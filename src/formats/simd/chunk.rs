//! Cuts rows into chunks of whole blocks that fill the lanes of a kernel, and loads their values.
//!
//! Blocks are independent, so chunks run across row borders; only the weights start over at each row. The last chunk
//! is filled up with zeros.

use super::vector::Vector;

/// Lanes of every kernel's vectors: sub-blocks, or super-blocks, that are worked on side by side.
pub(super) const LANES: usize = 16;

/// What a kernel encodes.
pub(super) struct Job<'a> {
    pub rows: &'a [f32],
    pub n_per_row: usize,
    pub weights: Option<&'a [f32]>,
    pub out: &'a mut [u8],
}

/// Values, weights and bytes of the blocks that one call of [`Kernel::encode`] works on.
pub(super) struct Chunk<'a> {
    /// Index of the first block.
    pub first: usize,
    /// Blocks that count; those after them are filling.
    pub blocks: usize,
    pub x: &'a [f32],
    /// As long as `x`; empty without weights.
    pub qw: &'a [f32],
    pub out: &'a mut [u8],
}

/// Encodes a fixed number of blocks.
pub(super) trait Kernel {
    /// Values per block.
    const BLOCK: usize;
    /// Blocks per chunk.
    const BLOCKS: usize;

    fn block_bytes(&self) -> usize;
    fn encode(&self, chunk: Chunk<'_>);
}

/// Runs a kernel over all blocks.
#[inline(always)]
pub(super) fn run<K: Kernel>(kernel: K, job: Job<'_>) {
    let Job { rows, n_per_row, weights, out } = job;
    let (values, bytes) = (K::BLOCK * K::BLOCKS, kernel.block_bytes() * K::BLOCKS);
    // The weights of a row and, so that each chunk finds its weights in one piece, as many more as a chunk has.
    let cyclic: Vec<f32> = weights.map_or(Vec::new(), |w| w.iter().copied().cycle().take(n_per_row + values).collect());
    let mut padding = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < rows.len() {
        let left = rows.len() - at;
        let out_at = at / K::BLOCK * kernel.block_bytes();
        let qw = if cyclic.is_empty() { &[][..] } else { &cyclic[at % n_per_row..][..values] };
        let whole = left >= values;
        let (x, out_here) = if whole {
            (&rows[at..at + values], &mut out[out_at..out_at + bytes])
        } else {
            padding = (rows[at..].to_vec(), vec![0; bytes]);
            padding.0.resize(values, 0.0);
            (&padding.0[..], &mut padding.1[..])
        };
        let blocks = left.min(values) / K::BLOCK;
        kernel.encode(Chunk { first: at / K::BLOCK, blocks, x, qw, out: out_here });
        if !whole {
            let rest = out.len() - out_at;
            out[out_at..].copy_from_slice(&padding.1[..rest]);
        }
        at += values;
    }
}

/// `N` columns of rows that are `stride` apart, one row per lane.
#[inline(always)]
pub(super) fn columns<V: Vector, const N: usize>(src: &[f32], stride: usize) -> [V; N] {
    let mut out = [V::zero(); N];
    let mut i = 0;
    while i < N {
        let eight = V::load_columns(&src[i..], stride);
        out[i..i + 8].copy_from_slice(&eight);
        i += 8;
    }
    out
}

/// Σ x² of rows of `n` values (a multiple of eight) that are `stride` apart, each in order.
#[inline(always)]
pub(super) fn sums_of_squares<V: Vector>(src: &[f32], stride: usize, n: usize) -> V {
    let mut sum = V::zero();
    let mut i = 0;
    while i < n {
        for x in V::load_columns(&src[i..], stride) {
            sum = sum + x * x;
        }
        i += 8;
    }
    sum
}

/// Σ w of each lane, in order.
#[inline(always)]
pub(super) fn sum<V: Vector, const N: usize>(w: &[V; N]) -> V {
    let mut sum = V::zero();
    for &w in w {
        sum = sum + w;
    }
    sum
}

/// `qw · √(σ² + x²)`.
#[inline(always)]
pub(super) fn importance<V: Vector, const N: usize>(x: &[V; N], qw: &[f32], sigma2: V) -> [V; N] {
    let mut w = columns::<V, N>(qw, N);
    let mut i = 0;
    while i < N {
        w[i] = w[i] * (sigma2 + x[i] * x[i]).sqrt();
        i += 1;
    }
    w
}

/// x².
#[inline(always)]
pub(super) fn squares<V: Vector, const N: usize>(x: &[V; N]) -> [V; N] {
    let mut w = *x;
    for w in &mut w {
        *w = *w * *w;
    }
    w
}

/// One value per block for lanes that are `LANES` consecutive sub-blocks from `first` on.
#[inline(always)]
pub(super) fn of_blocks<V: Vector>(values: &[f32], first: usize, subs_per_block: usize) -> V {
    let mut lanes = [0.0; LANES];
    for (k, lane) in lanes.iter_mut().enumerate() {
        *lane = values[(first + k) / subs_per_block];
    }
    V::load(&lanes)
}
