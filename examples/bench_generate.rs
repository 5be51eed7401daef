//! Rate of writing text, against that of one large product (docs/performance.md). Rates of a core are by processor time, which
//! other programs do not take.
//!
//! `cargo run --release --example bench_generate -- MODEL [TOKENS [WINDOWS [THREADS]]]`: one batch of windows of TOKENS (512) tokens.

use std::path::Path;
use std::time::Instant;

use ostq_convert::forward::generate::{Generator, Joints, batch, memory};
use ostq_convert::forward::{Model, attention, gemm};
use ostq_convert::plan::{Input, Options, Recipe};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let path = Path::new(args.first().expect("a model folder or GGUF file"));
    let number = |i: usize| args.get(i).map(|n| n.parse::<usize>().expect("a number"));
    let length = number(1).unwrap_or(512);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(number(3).unwrap_or(0)).build().expect("threads");
    let options = Options::resolve(Recipe { r#type: Some("COPY".into()), ..Recipe::default() }).expect("a recipe");
    let input = Input::open(path, &options).expect("a model");
    let model = Model::new(path, &*input.source, &input.metadata).expect("a model that can be run");
    let windows = number(2).unwrap_or_else(|| batch(&model, length, 256));
    let joints = Joints { first: 1, ends: Vec::new(), next: None };
    pool.install(|| {
        let peak = product_rate(2048);
        let mut generator = Generator::new(&model, length, windows, None).expect("weights");
        let (start, busy) = (Instant::now(), processor_time());
        let tokens = generator.write(0..windows, &joints, 1, &mut |_, _| {}).expect("text");
        let (seconds, busy) = (start.elapsed().as_secs_f64(), processor_time() - busy);
        let each = model.linear_flops() + 2 * (model.vocab * model.spec.embed) as u64;
        let flops = (each * tokens.len() as u64
            + attention::flops(&model.spec, length) * (model.spec.layers * windows) as u64) as f64;
        println!(
            "{} threads, {windows} windows of {length} tokens, {} MB: {seconds:.1} s, {:.0} tokens/s; {busy:.1} s of processor \
             time, {:.0} tokens/s and {:.1} GFLOP/s a core, product of 2048 x 2048 x 2048 {:.1}, ratio {:.2}",
            rayon::current_num_threads(),
            memory(&model, length, windows) >> 20,
            tokens.len() as f64 / seconds,
            tokens.len() as f64 / busy,
            flops / busy * 1e-9,
            peak * 1e-9,
            flops / busy / peak
        );
    });
}

/// Seconds that all threads of this process have run.
fn processor_time() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, f)| f).split_whitespace();
    // utime and stime, in ticks of 10 ms
    fields.skip(11).take(2).filter_map(|f| f.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Operations per second of processor time of a square product, the best of three.
fn product_rate(n: usize) -> f64 {
    let a: Vec<f32> = (0..n * n).map(|i| (i % 17) as f32 * 0.1).collect();
    let mut out = vec![0.0; n * n];
    let once = |out: &mut [f32]| {
        let busy = processor_time();
        (0..4).for_each(|_| gemm::product(&a, &a, n, out));
        8.0 * (n as f64).powi(3) / (processor_time() - busy)
    };
    (0..3).map(|_| once(&mut out)).fold(0.0, f64::max)
}
