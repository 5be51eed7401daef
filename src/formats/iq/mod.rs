//! Codebook formats: IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ1_S, IQ1_M; 256 elements per block.
//!
//! Groups of eight (IQ2, IQ1) or four (IQ3) elements are points of a fixed grid ([`grids`]); a sub-block of 16 or 32
//! elements has a scale of three or four bits, a block an f16. Encoding is a search for the scale of each sub-block
//! ([`search`] for IQ2 and IQ3, [`split`] for IQ1) in which points off the grid go to the best of their near grid points
//! ([`neighbours`]). Sources: `quantize_row_iq*_impl` and `dequantize_row_iq*` in ggml-quants.c, llama.cpp b11434.

pub mod codebook;
pub mod grids;
mod iq1;
mod iq2;
mod iq3;
pub mod neighbours;
pub mod qp;
pub mod search;
mod signs;
pub mod split;
mod util;

pub use iq1::{Iq1M, Iq1S};
pub use iq2::{Iq2S, Iq2Xs, Iq2Xxs};
pub use iq3::{Iq3S, Iq3Xxs};
