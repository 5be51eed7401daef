//! Scale searches (`make_qx_quants`, `make_qkx2_quants`, ...), scalar definitions.
