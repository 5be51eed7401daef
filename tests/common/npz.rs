//! Reader of numpy's .npz files, as far as the goldens need it: local headers in order, stored or deflated.

use std::collections::HashMap;
use std::path::Path;

/// One array, flat.
pub struct Array {
    descr: String,
    data: Vec<u8>,
}

#[allow(dead_code)]
impl Array {
    pub fn floats(&self) -> Vec<f32> {
        assert_eq!(self.descr, "<f4");
        self.data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    pub fn ints(&self) -> Vec<i32> {
        assert_eq!(self.descr, "<i4");
        self.data.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect()
    }
}

/// Every array by name.
pub fn read(path: &Path) -> HashMap<String, Array> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap()) as usize;
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let mut arrays = HashMap::new();
    // the central directory: sizes there are right whatever the local headers say
    let end = bytes.windows(4).rposition(|w| w == b"PK\x05\x06").expect("a zip file");
    let (count, mut at) = (u16_at(end + 10), u32_at(end + 16));
    for _ in 0..count {
        assert_eq!(&bytes[at..at + 4], b"PK\x01\x02");
        let (method, packed) = (u16_at(at + 10), u32_at(at + 20));
        let (name_len, skip) = (u16_at(at + 28), u16_at(at + 30) + u16_at(at + 32));
        let local = u32_at(at + 42);
        let name = String::from_utf8(bytes[at + 46..at + 46 + name_len].to_vec()).unwrap();
        at += 46 + name_len + skip;
        let data = local + 30 + u16_at(local + 26) + u16_at(local + 28);
        let data = &bytes[data..data + packed];
        let npy = match method {
            0 => data.to_vec(),
            8 => miniz_oxide::inflate::decompress_to_vec(data).unwrap(),
            other => panic!("zip method {other}"),
        };
        assert_eq!(&npy[..8], b"\x93NUMPY\x01\x00");
        let header = 10 + u16::from_le_bytes([npy[8], npy[9]]) as usize;
        let text = String::from_utf8_lossy(&npy[10..header]).into_owned();
        assert!(text.contains("'fortran_order': False"));
        let descr = text.split("'descr': '").nth(1).unwrap().split('\'').next().unwrap().to_string();
        arrays.insert(name.trim_end_matches(".npy").to_string(), Array { descr, data: npy[header..].to_vec() });
    }
    arrays
}
