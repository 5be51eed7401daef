//! What is known of the activations: importance per input column, read from imatrix files.

pub mod imatrix;
