//! ostq-convert: a Hugging Face checkpoint to a GGUF file, in one streaming pass.
//!
//! # A tour of the house
//!
//! Come in through [`cli`]: it parses, prints and turns errors into exit codes, and decides nothing. What a command line
//! says becomes a [`plan::Recipe`], the same thing that a recipe file holds; checked, it is [`plan::Options`].
//!
//! The input is opened next ([`plan::Input`]). [`checkpoint`] reads what lies in a model's folder: safetensors, their index,
//! config.json, the model card. [`arch`] says what a model class means: which tensors there are, what they are called in
//! GGUF, which shapes they have, which keys are written. [`tokenizer`] turns tokenizer files into keys. Together they give a
//! [`source::TensorSource`]: tensors under their GGUF names, whose rows can be had as f32. A GGUF file is a source too, read by
//! [`gguf`]; from here on nobody asks where weights come from. Files are maps ([`mapped`]); nothing is read before it is
//! needed, and pages are let go behind the reader.
//!
//! Then everything is decided. [`plan::Plan`] lists what will be written, tensor by tensor, with types ([`plan::mix`] follows
//! llama-quantize), offsets, keys and memory, and holds the finished header. Importance matrices ([`calibration`]) are
//! looked up here, so that a missing entry is found now and not after an hour. `plan` prints this and stops.
//!
//! [`convert`] carries it out: runs of rows, in the order in which they stand in the input, are read, rounded, encoded by
//! [`formats`] and written at their planned places by as many threads as there are. The output has another name until it is
//! complete, synced and read back ([`output`]).
//!
//! With a calibration text the codes are not the nearest ones: [`rounding`] fits them to the output of each layer and leaves
//! blocks for [`convert`] to copy, and where a size is asked for, [`allocation`] chooses the types. [`tuning`]
//! then moves what the blocks store, by gradient descent on the divergence of the predictions. Weights may come through a
//! [`transform`] that rotates and scales them; [`learning`] finds one.
//!
//! In [`formats`] each block format has a scalar definition that does what ggml's reference does, operation by
//! operation. Its folder `simd` holds the same arithmetic for several blocks at once; it may be faster, never different.
//!
//! Modules know those that come later in this tour, not earlier ones; `docs/architecture.md` has the picture, the few exceptions
//! and the habits. To add a model or a format, see `docs/adding-an-architecture.md` and `docs/adding-a-format.md`.

pub mod allocation;
pub mod arch;
pub mod calibration;
pub mod check;
pub mod checkpoint;
pub mod cli;
pub mod convert;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub mod formats;
pub mod forward;
pub mod gguf;
pub mod learning;
pub mod linalg;
pub mod mapped;
pub mod output;
pub mod plan;
pub mod resume;
pub mod rounding;
pub mod source;
pub mod table;
pub mod tokenizer;
pub mod transform;
pub mod tuning;
