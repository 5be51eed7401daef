//! Speed of the block formats on one thread: millions of weights per second by type and instruction set, and the
//! ratio to the scalar code.
//!
//!     bench_formats [--ggml path/to/libggml-base.so] [--check ROUNDS] [TYPE ...]
//!
//! With ggml's library, its quantizers are timed in the same run, and `--check` compares random blocks of many kinds
//! with what it gives, on every instruction set, instead of timing.

use ostq_convert::formats::simd::{self, Isa};
use ostq_convert::formats::{BlockFormat, format};
use ostq_convert::gguf::GgmlType;
use std::ffi::{CString, c_int, c_void};
use std::time::Instant;

type QuantizeChunk = unsafe extern "C" fn(c_int, *const f32, *mut u8, i64, i64, i64, *const f32) -> usize;

/// `ggml_quantize_chunk` of a library.
fn load(path: &str) -> QuantizeChunk {
    let path = CString::new(path).expect("no NUL");
    // SAFETY: plain dlopen and dlsym; the symbol has this signature in llama.cpp b11434.
    unsafe {
        let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
        assert!(!library.is_null(), "cannot load {path:?}");
        let symbol = libc::dlsym(library, c"ggml_quantize_chunk".as_ptr());
        assert!(!symbol.is_null(), "no ggml_quantize_chunk in {path:?}");
        std::mem::transmute::<*mut c_void, QuantizeChunk>(symbol)
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }

    fn gauss(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }

    /// A value of one of many kinds.
    fn value(&mut self, kind: u64) -> f32 {
        match kind {
            0 | 1 => self.gauss() * 0.02,
            2 => self.gauss().powi(3) * 0.01,
            3 => self.gauss().powi(9) * 1e-3,
            4 => (self.next() % 31) as f32 * 0.5 - 7.5,
            5 => f32::from_bits((self.gauss() * 0.02).to_bits() & 0xffff_0000),
            6 => self.gauss() * 2f32.powi((self.next() % 60) as i32 - 30),
            7 => {
                if self.next().is_multiple_of(17) {
                    self.gauss()
                } else {
                    0.0
                }
            }
            8 => self.gauss() * 1e-40,
            9 => self.gauss() * 1e30,
            10 => self.gauss() * 1e-15,
            11 => 1.0 + self.gauss() * 1e-6,
            12 => -1.0 + self.gauss() * 1e-7,
            13 => self.gauss().abs() * 3e4,
            14 => {
                let v = f32::from_bits(self.next() as u32);
                if v.is_finite() { v } else { -0.0 }
            }
            15 => [0.0, -0.0, 1e-42, -1e-42, 0.25, -0.25][(self.next() % 6) as usize],
            16 => {
                if self.next().is_multiple_of(100) {
                    100.0
                } else {
                    self.gauss() * 1e-5
                }
            }
            17 => [0.0, -0.0][(self.next() % 2) as usize],
            _ => (self.next() % 3) as f32 - 1.0,
        }
    }
}

const KINDS: u64 = 19;

fn ggml(quantize: QuantizeChunk, ty: GgmlType, x: &[f32], n: usize, w: Option<&[f32]>, out: &mut [u8]) {
    let w = w.map_or(std::ptr::null(), <[f32]>::as_ptr);
    // SAFETY: the slices hold what the function reads and writes for these rows.
    unsafe { quantize(ty as c_int, x.as_ptr(), out.as_mut_ptr(), 0, (x.len() / n) as i64, n as i64, w) };
}

/// Compares with ggml; returns the number of differing encodings.
fn check(quantize: QuantizeChunk, format: &dyn BlockFormat, rounds: u64) -> usize {
    let ty = format.ggml_type();
    let mut random = Random(ty as u64);
    let mut wrong = 0;
    for round in 0..rounds {
        let kind = round % KINDS;
        let n = ty.block_len().max(32) * (1 + random.next() % 9) as usize;
        let rows = 1 + (random.next() % 20) as usize;
        // Kinds change from row to row in some rounds.
        let mixed = random.next().is_multiple_of(4);
        let x: Vec<f32> =
            (0..rows * n).map(|i| random.value(if mixed { (kind + (i / n) as u64) % KINDS } else { kind })).collect();
        let sparse = random.next().is_multiple_of(3);
        let w: Vec<f32> = (0..n)
            .map(|_| if sparse && random.next().is_multiple_of(2) { 0.0 } else { random.uniform().powi(3) * 10.0 })
            .collect();
        for w in [None, Some(&w[..])] {
            let mut want = vec![0; x.len() / ty.block_len() * ty.block_bytes()];
            ggml(quantize, ty, &x, n, w, &mut want);
            for isa in Isa::available() {
                let mut got = vec![0xa5; want.len()];
                simd::with_isa(isa, || format.encode(&x, n, w, &mut got)).expect("it encodes");
                if got != want {
                    let at = (0..got.len()).find(|&i| got[i] != want[i]).expect("they differ");
                    let (block, byte) = (at / ty.block_bytes(), at % ty.block_bytes());
                    let weighted = w.is_some();
                    eprintln!(
                        "{ty} {} kind {kind} mixed {mixed} weights {weighted} {rows} x {n}: block {block} byte {byte}",
                        isa.name()
                    );
                    wrong += 1;
                }
            }
        }
    }
    wrong
}

/// Millions of weights per second of the best of several runs.
fn speed(n: usize, mut f: impl FnMut()) -> f64 {
    let (mut best, start) = (f64::MAX, Instant::now());
    while start.elapsed().as_secs_f64() < 0.4 || best == f64::MAX {
        let run = Instant::now();
        f();
        best = best.min(run.elapsed().as_secs_f64());
    }
    n as f64 / best / 1e6
}

fn bench(quantize: Option<QuantizeChunk>, format: &dyn BlockFormat) {
    const N: usize = 2048;
    let ty = format.ggml_type();
    let mut random = Random(1);
    let x: Vec<f32> = (0..64 * N).map(|_| random.gauss() * 0.02).collect();
    let w: Vec<f32> = (0..N).map(|_| random.uniform()).collect();
    let mut out = vec![0; x.len() / ty.block_len() * ty.block_bytes()];
    for w in [None, Some(&w[..])] {
        print!("{:8} {:8}", ty.name(), if w.is_some() { "weights" } else { "" });
        let peer = quantize.map(|q| speed(x.len(), || ggml(q, ty, &x, N, w, &mut out)));
        if let Some(peer) = peer {
            print!("  ggml {peer:8.1}");
        }
        let mut scalar = 0.0;
        for isa in Isa::available() {
            let speed =
                simd::with_isa(isa, || speed(x.len(), || format.encode(&x, N, w, &mut out).expect("it encodes")));
            print!("  {} {speed:8.1}", isa.name());
            if isa == Isa::Scalar {
                scalar = speed;
            } else {
                print!(" ({:.1}x", speed / scalar);
                if let Some(peer) = peer {
                    print!(", ggml {:.1}x", speed / peer);
                }
                print!(")");
            }
        }
        println!();
    }
}

fn main() {
    let (mut quantize, mut rounds, mut types) = (None, 0, Vec::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{argument} needs a value"));
        match argument.as_str() {
            "--ggml" => quantize = Some(load(&value())),
            "--check" => rounds = value().parse().expect("a number"),
            name => types.push(GgmlType::from_name(name).unwrap_or_else(|| panic!("unknown type {name}"))),
        }
    }
    if types.is_empty() {
        use GgmlType::*;
        types = vec![F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS];
    }
    let formats = types.into_iter().filter_map(format);
    if rounds == 0 {
        formats.for_each(|format| bench(quantize, format));
        return;
    }
    let quantize = quantize.expect("--check needs --ggml");
    let wrong: usize = formats.map(|format| check(quantize, format, rounds)).sum();
    println!("{wrong} encodings differ");
    std::process::exit((wrong > 0) as i32);
}
