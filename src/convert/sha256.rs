//! sha256 of two pieces side by side.
//!
//! The instructions for sha256 (x86 SHA extensions) start every second cycle and take four: one stream leaves half of them
//! unused, and what comes next hangs on what came before. Two streams, instruction by instruction in turn, use them all.
//! Rounds and message schedule as in FIPS 180-4, 6.2.2, with the instructions as Intel's "Intel SHA Extensions" describes them.

/// Digests of two messages of the same length, a multiple of 64 bytes.
pub struct Pair {
    states: [[u32; 8]; 2],
    bytes: u64,
}

/// H⁽⁰⁾ of FIPS 180-4, 5.3.3.
const START: [u32; 8] =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];

impl Pair {
    /// None where the processor has no instructions for it.
    pub fn new() -> Option<Pair> {
        available().then_some(Pair { states: [START; 2], bytes: 0 })
    }

    /// Goes on with the next bytes of both.
    ///
    /// # Panics
    /// If the lengths differ or are no multiple of 64.
    pub fn update(&mut self, data: [&[u8]; 2]) {
        let n = data[0].len();
        assert!(n == data[1].len() && n.is_multiple_of(64), "whole blocks of both");
        self.bytes += n as u64;
        // SAFETY: `new` made sure that the processor has the instructions.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            x86::compress(&mut self.states, data)
        }
    }

    /// The digests.
    pub fn finish(mut self) -> [[u8; 32]; 2] {
        let mut end = [0u8; 64];
        end[0] = 0x80;
        end[56..].copy_from_slice(&(8 * self.bytes).to_be_bytes());
        self.update([&end, &end]);
        self.states.map(|s| {
            let mut out = [0u8; 32];
            out.chunks_exact_mut(4).zip(s).for_each(|(o, s)| o.copy_from_slice(&s.to_be_bytes()));
            out
        })
    }
}

fn available() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("sha") && is_x86_feature_detected!("ssse3") && is_x86_feature_detected!("sse4.1");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// K of FIPS 180-4, 4.2.2: the first 32 bits of the fractional parts of the cube roots of the first 64 primes.
    #[rustfmt::skip]
    const K: [[u32; 4]; 16] = [
        [0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5], [0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5],
        [0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3], [0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174],
        [0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc], [0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da],
        [0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7], [0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967],
        [0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13], [0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85],
        [0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3], [0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070],
        [0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5], [0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3],
        [0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208], [0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2],
    ];

    /// `data` of the same length, whole blocks, into `states`.
    #[target_feature(enable = "sha,ssse3,sse4.1")]
    pub fn compress(states: &mut [[u32; 8]; 2], data: [&[u8]; 2]) {
        let load = |bytes: *const u8| {
            // SAFETY: callers point at sixteen bytes.
            unsafe { _mm_loadu_si128(bytes.cast()) }
        };
        // the instructions want (a, b, e, f) and (c, d, g, h)
        let (mut abef, mut cdgh) = ([_mm_setzero_si128(); 2], [_mm_setzero_si128(); 2]);
        for s in 0..2 {
            let dcba = _mm_shuffle_epi32(load(states[s][..4].as_ptr().cast()), 0xb1);
            let hgfe = _mm_shuffle_epi32(load(states[s][4..].as_ptr().cast()), 0x1b);
            abef[s] = _mm_alignr_epi8(dcba, hgfe, 8);
            cdgh[s] = _mm_blend_epi16(hgfe, dcba, 0xf0);
        }
        let swap = _mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
        let blocks = data.map(|d| d.as_chunks::<64>().0);
        for (one, two) in blocks[0].iter().zip(blocks[1]) {
            let before = (abef, cdgh);
            let mut w = [[_mm_setzero_si128(); 2]; 4];
            for (i, w) in w.iter_mut().enumerate() {
                *w = [one, two].map(|b| _mm_shuffle_epi8(load(b[16 * i..].as_ptr()), swap));
            }
            for group in 0..4 {
                for i in 0..4 {
                    let k = load(K[4 * group + i].as_ptr().cast());
                    let mut sum = [_mm_setzero_si128(); 2];
                    for s in 0..2 {
                        if group > 0 {
                            let [w0, w1, w2, w3] = std::array::from_fn(|j| w[(i + j) % 4][s]);
                            let next = _mm_add_epi32(_mm_sha256msg1_epu32(w0, w1), _mm_alignr_epi8(w3, w2, 4));
                            w[i][s] = _mm_sha256msg2_epu32(next, w3);
                        }
                        sum[s] = _mm_add_epi32(w[i][s], k);
                    }
                    for s in 0..2 {
                        cdgh[s] = _mm_sha256rnds2_epu32(cdgh[s], abef[s], sum[s]);
                    }
                    for s in 0..2 {
                        abef[s] = _mm_sha256rnds2_epu32(abef[s], cdgh[s], _mm_shuffle_epi32(sum[s], 0x0e));
                    }
                }
            }
            for s in 0..2 {
                abef[s] = _mm_add_epi32(abef[s], before.0[s]);
                cdgh[s] = _mm_add_epi32(cdgh[s], before.1[s]);
            }
        }
        for s in 0..2 {
            let feba = _mm_shuffle_epi32(abef[s], 0x1b);
            let dchg = _mm_shuffle_epi32(cdgh[s], 0xb1);
            let halves = [_mm_blend_epi16(feba, dchg, 0xf0), _mm_alignr_epi8(dchg, feba, 8)];
            for (half, out) in halves.into_iter().zip(states[s].chunks_exact_mut(4)) {
                // SAFETY: four numbers of four bytes.
                unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), half) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sha2::{Digest, Sha256};

    #[test]
    fn digests_are_those_of_one_stream() {
        let Some(_) = Pair::new() else {
            eprintln!("this processor has no instructions for sha256");
            return;
        };
        let bytes =
            |n: usize, seed: usize| (0..n).map(|i| (((i + seed) * 2_654_435_761) >> 11) as u8).collect::<Vec<u8>>();
        for n in [0, 64, 128, 64 * 77, 1 << 16] {
            let (a, b) = (bytes(n, 1), bytes(n, 99));
            let mut pair = Pair::new().unwrap();
            for (a, b) in a.chunks(4096).zip(b.chunks(4096)) {
                pair.update([a, b]);
            }
            let wanted: [[u8; 32]; 2] = [Sha256::digest(&a).into(), Sha256::digest(&b).into()];
            assert_eq!(pair.finish(), wanted, "{n} bytes");
        }
    }
}
