//! Rate of GPTQ's inner loop against that of one large product, and the cost of a block of a large model
//! (docs/performance.md).
//!
//! `cargo run --release --example bench_rounding -- [loop [THREADS]]`: columns, errors and their products with scales that are
//! there, rows x n² operations; and once more with the search of the scales.
//!
//! `... -- sums [THREADS]`: sums of both paths over a run of 1024 inputs of so many columns, 3 n² operations a token.
//!
//! `... -- block [TOKENS [THREADS [WIDTH FEED_FORWARD BLOCKS]]]`: one block of 4096 (WIDTH) by 14336 with random weights and
//! correlated inputs, rounded to Q4_K (Q5_0 where rows are no whole super-blocks); time by stage, peak memory, and what 32
//! (BLOCKS) of them would take.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use ostq_convert::calibration::run::Watch;
use ostq_convert::calibration::stages::Stages;
use ostq_convert::formats::grid::Grid;
use ostq_convert::forward::{Model, gemm};
use ostq_convert::gguf::{GgmlType, Value};
use ostq_convert::linalg;
use ostq_convert::mapped::MappedFile;
use ostq_convert::rounding::gptq::{Tile, gptq_tile};
use ostq_convert::rounding::levels::AnyLevels;
use ostq_convert::rounding::run::{self, Job};
use ostq_convert::rounding::{Factor, matrix};
use ostq_convert::source::{SourceTensor, TensorSource};
use rayon::prelude::*;

/// Tokens that a run takes where the user says nothing.
const DEFAULT_TOKENS: usize = 139_264;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default: usize| args.get(i).map_or(default, |n| n.parse().expect("a number"));
    let block = args.first().is_some_and(|a| a == "block");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(number(1 + block as usize, 0)).build().expect("threads");
    pool.install(|| match block {
        true => one_block(number(1, 8192), (number(3, 4096), number(4, 14336)), number(5, 32)),
        false if args.first().is_some_and(|a| a == "sums") => sums(),
        false => inner_loop(),
    });
}

/// Values about as Gaussian as four uniform ones make them, by seed and place.
fn noise(seed: u64, out: &mut [f32]) {
    let mut s = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..8).for_each(|_| _ = next());
    out.iter_mut().for_each(|v| *v = next() + next() + next() + next());
}

/// A Hessian of correlated columns.
fn factor(n: usize) -> Factor {
    let tokens = 1024;
    let mut x = vec![0f32; tokens * n];
    x.par_chunks_mut(n).enumerate().for_each(|(t, row)| {
        noise(t as u64 + 1, row);
        (1..n).for_each(|j| row[j] += 0.7 * row[j - 1]);
    });
    let mut second = vec![0f64; linalg::packed_len(n).expect("small")];
    linalg::add_sums(&mut second, None, &x, tokens, n);
    Factor::new(&second, tokens as u64, n, 0.01).expect("a factor")
}

fn inner_loop() {
    let threads = rayon::current_num_threads();
    println!("GFLOP/s of rows x n^2 operations on {threads} threads; on one by its own processor time");
    for n in [576, 1536, 2048, 4096] {
        let f = factor(n);
        for ty in [GgmlType::Q4_0, GgmlType::Q4_K, GgmlType::Q2_K] {
            if !n.is_multiple_of(ty.block_len()) {
                continue;
            }
            let g = Grid::of(ty).expect("a grid");
            let levels = AnyLevels::of(g.levels);
            // a processor's time is told in ticks of some milliseconds
            let mut tiles: Vec<(Vec<f32>, Tile)> = (0..((8 << 20) / (n * n)).clamp(1, 8) * 4 * threads)
                .map(|i| {
                    let mut w = vec![0f32; matrix::ROWS * n];
                    noise(i as u64 + 77, &mut w);
                    let t = Tile::new(&g, &w, n);
                    (t.w.clone(), t)
                })
                .collect();
            let operations = (tiles.len() * matrix::ROWS * n * n) as f64;
            let mut timed = |search: bool| {
                tiles.iter_mut().for_each(|(w, t)| t.w.copy_from_slice(w));
                let start = now();
                tiles.par_iter_mut().with_max_len(1).for_each(|(_, t)| gptq_tile(&g, &levels, &f, t, search));
                operations / (now() - start)
            };
            let searched = timed(true);
            let (mut peak, mut rate) = (0f64, 0f64);
            for _ in 0..5 {
                peak = peak.max(product_rate(1536));
                rate = rate.max(timed(false));
            }
            println!(
                "n {n:5} {:6}: inner loop {:7.1}, product {:7.1}, ratio {:.2}; with the search {:6.1}",
                ty.name(),
                rate * 1e-9,
                peak * 1e-9,
                rate / peak,
                searched * 1e-9
            );
        }
    }
}

fn sums() {
    let tokens = 1024;
    for n in [576, 1536, 2048, 4096, 14336] {
        let (mut r, mut d) = (vec![0f32; tokens * n], vec![0f32; tokens * n]);
        noise(3, &mut r);
        noise(4, &mut d);
        let mut second = vec![0f64; linalg::packed_len(n).expect("small")];
        let mut cross = vec![0f32; n * n];
        let (mut peak, mut rate) = (0f64, 0f64);
        for _ in 0..2 {
            peak = peak.max(product_rate(2048));
            let start = now();
            linalg::add_sums(&mut second, Some((&mut cross, &d)), &r, tokens, n);
            rate = rate.max(3.0 * (tokens * n * n) as f64 / (now() - start));
        }
        println!("n {n:5}: sums {:7.1} GFLOP/s, product {:7.1}, ratio {:.2}", rate * 1e-9, peak * 1e-9, rate / peak);
    }
}

/// Seconds: on one thread those that it ran on a processor, so that other work beside it does not count; otherwise of a clock.
fn now() -> f64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    let ran = || {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
        Some(text.split_whitespace().next()?.parse::<f64>().ok()? * 1e-9)
    };
    let one = rayon::current_num_threads() == 1;
    one.then(ran).flatten().unwrap_or_else(|| START.elapsed().as_secs_f64())
}

/// Operations per second of a square product, the best of two.
fn product_rate(n: usize) -> f64 {
    let a: Vec<f32> = (0..n * n).map(|i| (i % 17) as f32 * 0.1).collect();
    let mut out = vec![0.0; n * n];
    let once = |out: &mut [f32]| {
        let start = now();
        gemm::product(&a, &a, n, out);
        2.0 * (n as f64).powi(3) / (now() - start)
    };
    (0..2).map(|_| once(&mut out)).fold(0.0, f64::max)
}

/// A model of one block with random weights, made when they are asked for.
struct Random {
    tensors: Vec<SourceTensor>,
}

impl TensorSource for Random {
    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn files(&self) -> &[MappedFile] {
        &[]
    }

    fn read_rows(&self, index: usize, rows: Range<u64>, out: &mut [f32]) {
        let t = &self.tensors[index];
        let n = t.row_len() as usize;
        for (row, out) in rows.zip(out.chunks_exact_mut(n)) {
            noise((index as u64) << 32 | (row + 1), out);
            if t.dims.len() == 1 {
                out.fill(1.0);
            } else if t.name == "token_embd.weight" {
                // columns that depend on each other
                (1..n).for_each(|j| out[j] += 0.7 * out[j - 1]);
            } else {
                out.iter_mut().for_each(|v| *v *= 0.9 / (n as f32).sqrt());
            }
        }
    }

    fn copy_rows(&self, _: usize, _: Range<u64>, _: &mut [u8]) {
        unreachable!("nothing is copied")
    }

    fn release(&self, _: usize, _: Range<u64>) {}
}

#[derive(Default)]
struct Seen(Stages);

impl Watch for Seen {
    fn layer(&mut self, _: usize) {}
    fn resumed(&mut self, _: usize) {}
    fn stages(&mut self, stages: &Stages) {
        self.0 = stages.clone();
    }
}

fn one_block(tokens: usize, (width, feed_forward): (usize, usize), blocks: usize) {
    let head = if width < 1024 { 64 } else { 128 };
    let heads = width / head;
    let kv_heads = (1..=heads.div_ceil(3)).rev().find(|k| heads.is_multiple_of(*k)).expect("1 divides it");
    let (vocab, kv) = (512, kv_heads * head);
    let shapes: [(&str, &[usize]); 11] = [
        ("token_embd.weight", &[width, vocab]),
        ("output_norm.weight", &[width]),
        ("blk.0.attn_norm.weight", &[width]),
        ("blk.0.attn_q.weight", &[width, width]),
        ("blk.0.attn_k.weight", &[width, kv]),
        ("blk.0.attn_v.weight", &[width, kv]),
        ("blk.0.attn_output.weight", &[width, width]),
        ("blk.0.ffn_norm.weight", &[width]),
        ("blk.0.ffn_gate.weight", &[width, feed_forward]),
        ("blk.0.ffn_up.weight", &[width, feed_forward]),
        ("blk.0.ffn_down.weight", &[feed_forward, width]),
    ];
    let tensor = |(i, (name, dims)): (usize, &(&str, &[usize]))| SourceTensor {
        name: name.to_string(),
        dims: dims.iter().map(|d| *d as u64).collect(),
        stored: GgmlType::F32,
        origin: name.to_string(),
        file: None,
        position: i,
        stored_bytes: 4 * dims.iter().product::<usize>() as u64,
        is_fp8: false,
        row_group: 1,
    };
    let source = Random { tensors: shapes.iter().enumerate().map(tensor).collect() };
    let int = |k: &str, n: usize| (format!("llama.{k}"), Value::U32(n as u32));
    let metadata = vec![
        ("general.architecture".to_string(), Value::Str("llama".into())),
        int("block_count", 1),
        int("embedding_length", width),
        int("attention.head_count", heads),
        int("attention.head_count_kv", kv_heads),
        int("context_length", 8192),
        ("llama.attention.layer_norm_rms_epsilon".to_string(), Value::F32(1e-5)),
    ];
    let model = Model::new(Path::new("a random block"), &source, &metadata).expect("a model");
    let length = 512;
    let tokens = (tokens / length).max(1) * length;
    let ids: Vec<u32> = (0..tokens as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) % vocab as u32).collect();
    let matrices = source.tensors.iter().filter(|t| t.dims.len() == 2 && t.name.starts_with("blk."));
    let ty = |t: &SourceTensor| if t.row_len().is_multiple_of(256) { GgmlType::Q4_K } else { GgmlType::Q5_0 };
    let types: BTreeMap<_, _> = matrices.map(|t| (t.name.clone(), ty(t))).collect();
    let state = std::env::temp_dir().join(format!("ostq-bench-{}", std::process::id()));
    let batch = 16.min(tokens / length);
    let job = Job {
        model: &model,
        tokens: &ids,
        length,
        types,
        fingerprint: String::new(),
        text: String::new(),
        one_pass: false,
        row_scales: false,
        batch,
        backward: 0,
        keep: false,
        state: &state,
    };
    let peak = product_rate(2048);
    let mut seen = Seen::default();
    let start = Instant::now();
    let reports = run::run(&job, &mut seen).expect("a run");
    let all = start.elapsed();
    ostq_convert::rounding::state::forget(&state);
    let threads = rayon::current_num_threads();
    println!("{threads} threads, block of {width} by {feed_forward}, {tokens} tokens, {} matrices:", reports.len());
    // what grows with tokens, and what does not
    let per_token = ["forward", "sums", "keeping inputs", "saving"];
    let (mut scaled, mut fixed) = (Duration::ZERO, Duration::ZERO);
    for (name, took) in seen.0.iter() {
        println!("  {name:16} {:8.2} s", took.as_secs_f64());
        *if per_token.contains(&name) { &mut scaled } else { &mut fixed } += took;
    }
    let stated = run::memory(&model, length, batch, threads, false);
    println!(
        "  all              {:8.2} s; product {:.1} GFLOP/s; peak memory {:.0} MiB, {:.0} MiB stated",
        all.as_secs_f64(),
        peak * 1e-9,
        peak_memory(),
        stated as f64 / f64::from(1 << 20)
    );
    let block = scaled.as_secs_f64() * DEFAULT_TOKENS as f64 / tokens as f64 + fixed.as_secs_f64();
    println!(
        "extrapolated (times of forward, sums and files by tokens, the rest as it is; no head, no embedding): a block with \
         {DEFAULT_TOKENS} tokens {:.1} s, {blocks} blocks {:.2} h",
        block,
        blocks as f64 * block / 3600.0
    );
}

/// Peak resident memory of this process in MiB, where the system says it.
fn peak_memory() -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()).map_or(f64::NAN, |kb| kb / 1024.0)
}
