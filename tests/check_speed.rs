//! How fast logits are scored, next to how fast memory is read. A measurement, not a test:
//! `cargo test --release --test check_speed -- --ignored --nocapture`.

use ostq_convert::check::base_row::{self, BaseRow};
use ostq_convert::check::stats;

const N_VOCAB: usize = 49152;
const POSITIONS: usize = 255;
const ROUNDS: usize = 5;

/// Seconds of CPU time that this thread has had; wall time says little on a machine that others use.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux");
    text.split(' ').next().and_then(|ns| ns.parse::<f64>().ok()).expect("nanoseconds") * 1e-9
}

/// GB/s of the best of some rounds.
fn best(what: &str, bytes: usize, mut work: impl FnMut() -> f64) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        // the clock goes in steps of milliseconds
        let (start, mut runs) = (cpu_seconds(), 0);
        while cpu_seconds() - start < 0.2 {
            assert!(std::hint::black_box(work()).is_finite());
            runs += 1;
        }
        best = best.min((cpu_seconds() - start) / f64::from(runs));
    }
    let speed = bytes as f64 / best / 1e9;
    println!("{what:<40} {speed:6.2} GB/s, {:.3} ms for a position", 1e3 * best / POSITIONS as f64);
    speed
}

#[test]
#[ignore = "a measurement"]
fn logits_per_second() {
    let mut state = 1u32;
    let mut unit = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / 16777216.0
    };
    let a: Vec<f32> = (0..N_VOCAB * POSITIONS).map(|_| 30.0 * unit() - 20.0).collect();
    let b: Vec<f32> = a.iter().map(|v| v + 0.2 * unit()).collect();
    let rows = || a.chunks_exact(N_VOCAB).zip(b.chunks_exact(N_VOCAB)).enumerate();
    let bytes = 4 * a.len();
    let read = best("reading both", 2 * bytes, || {
        let mut lanes = [0u64; 32];
        for row in [&a, &b] {
            for eight in row.as_chunks::<64>().0 {
                for k in 0..32 {
                    lanes[k] = lanes[k].wrapping_add(u64::from(eight[k].to_bits() ^ eight[k + 32].to_bits()));
                }
            }
        }
        lanes.iter().fold(0, |s: u64, v| s.wrapping_add(*v)) as f64
    });
    let compared =
        best("comparing both", 2 * bytes, || rows().map(|(i, (a, b))| stats::compare(a, b, i).unwrap().kld).sum());
    best("-ln p of one", bytes, || rows().map(|(i, (a, _))| stats::nll(a, i).unwrap()).sum());
    let mut row = vec![0; base_row::units(N_VOCAB).unwrap()];
    best("writing rows of a base file", bytes, || {
        rows().map(|(i, (a, _))| base_row::encode(a, i, &mut row).unwrap()).sum()
    });
    let base = BaseRow::new(&row, N_VOCAB).unwrap();
    best("scoring against a row of a base file", bytes, || {
        rows().map(|(i, (_, b))| base_row::compare(base, b, i).unwrap().kld).sum()
    });
    println!("comparing has {:.2} of the speed of reading", compared / read);
}
