//! Which model a calibration file belongs to.
//!
//! The fingerprint is a sha256 over the names and dimensions of all tensors, in the order of their names, and the values of
//! three rows of each. It reads little, whatever the size of the model, and does not depend on how the weights
//! are stored: a checkpoint and the f32 or bf16 GGUF file made from it have the same. A model that was trained on,
//! merged or quantized has another.

use sha2::{Digest, Sha256};

use super::imatrix::hex;
use crate::formats;
use crate::source::TensorSource;

/// The fingerprint of `source`, in hexadecimal.
///
/// Hashed are `ostq.fingerprint.1\n` and, for each tensor by name: the length of the name and the name, the number of
/// dimensions and the dimensions (`ne` order), then the first, the middle (`rows / 2`) and the last row, each once, as f32;
/// numbers are u64 and everything is little-endian. Types that hold no floats give the stored bytes of these rows.
pub fn fingerprint(source: &dyn TensorSource) -> String {
    let tensors = source.tensors();
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by(|&a, &b| tensors[a].name.cmp(&tensors[b].name));
    let mut hash = Sha256::new();
    hash.update(b"ostq.fingerprint.1\n");
    let mut values = Vec::new();
    for index in order {
        let t = &tensors[index];
        hash.update((t.name.len() as u64).to_le_bytes());
        hash.update(t.name.as_bytes());
        hash.update((t.dims.len() as u64).to_le_bytes());
        t.dims.iter().for_each(|d| hash.update(d.to_le_bytes()));
        let (rows, len) = (t.rows(), t.row_len() as usize);
        if rows == 0 || len == 0 {
            continue;
        }
        let mut samples = vec![0, rows / 2, rows - 1];
        samples.dedup();
        for row in samples {
            if formats::format(t.stored).is_some() {
                values.resize(len, 0f32);
                source.read_rows(index, row..row + 1, &mut values);
                values.iter().for_each(|v| hash.update(v.to_le_bytes()));
            } else if let Some(bytes) = t.stored.row_bytes(len as u64) {
                let mut stored = vec![0; bytes as usize];
                source.copy_rows(index, row..row + 1, &mut stored);
                hash.update(&stored);
            }
            source.release(index, row..row + 1);
        }
    }
    hex(&hash.finalize())
}
