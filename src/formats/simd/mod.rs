//! Run-time choice of instruction set and the vector kernels.
