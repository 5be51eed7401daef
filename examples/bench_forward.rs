//! Rate of the forward pass against that of one large product, in the same run (docs/performance.md).
//!
//! `cargo run --release --example bench_forward -- MODEL [TOKENS [THREADS]]`: windows of TOKENS (512) tokens through every layer.

use std::path::Path;
use std::time::Instant;

use ostq_convert::forward::{Activations, Hidden, Model, Runner, attention, gemm};
use ostq_convert::plan::{Input, Options, Recipe};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let path = Path::new(args.first().expect("a model folder or GGUF file"));
    let length: usize = args.get(1).map_or(512, |n| n.parse().expect("a number of tokens"));
    let threads: usize = args.get(2).map_or(0, |n| n.parse().expect("a number of threads"));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    let options = Options::resolve(Recipe { r#type: Some("COPY".into()), ..Recipe::default() }).expect("a recipe");
    let input = Input::open(path, &options).expect("a model");
    let model = Model::new(path, &*input.source, &input.metadata).expect("a model that can be run");
    let windows = 4;
    let tokens: Vec<u32> = (0..(windows * length) as u32).map(|i| i * 7919 % model.vocab as u32).collect();
    let flops = (model.linear_flops() * tokens.len() as u64
        + attention::flops(&model.spec, length) * (model.spec.layers * windows) as u64) as f64;
    pool.install(|| {
        let (mut peak, mut rate) = (0.0f64, 0.0f64);
        for round in 0..4 {
            peak = peak.max(product_rate(2048));
            let mut runner = Runner::new(&model, length, Activations::F32).expect("tables");
            let mut hidden = Hidden::Memory(vec![0.0; tokens.len() * model.spec.embed]);
            runner.embed(&tokens, &mut hidden).expect("embeddings");
            let start = Instant::now();
            for l in 0..model.spec.layers {
                runner.layer_in_place(l, &mut hidden, tokens.len(), windows, &mut ()).expect("a layer");
            }
            let this = flops / start.elapsed().as_secs_f64();
            rate = rate.max(this);
            eprintln!("round {round}: product {:.1}, forward {:.1} GFLOP/s", peak * 1e-9, this * 1e-9);
        }
        println!(
            "{} threads, {windows} windows of {length} tokens: forward with reading of weights {:.1} GFLOP/s, product of \
             2048 x 2048 x 2048 {:.1} GFLOP/s, ratio {:.2}",
            rayon::current_num_threads(),
            rate * 1e-9,
            peak * 1e-9,
            rate / peak
        );
    });
}

/// Operations per second of a square product, the best of four.
fn product_rate(n: usize) -> f64 {
    let a: Vec<f32> = (0..n * n).map(|i| (i % 17) as f32 * 0.1).collect();
    let mut out = vec![0.0; n * n];
    let once = |out: &mut [f32]| {
        let start = Instant::now();
        gemm::product(&a, &a, n, out);
        2.0 * (n as f64).powi(3) / start.elapsed().as_secs_f64()
    };
    (0..4).map(|_| once(&mut out)).fold(0.0, f64::max)
}
