//! Real llama-perplexity and our statistics: its files read, written again byte for byte, and its printed figures met.
//!
//! Logits come from `llama-logits` (f32 KV cache, no flash attention, no repacking, one window per batch); llama-perplexity
//! runs with the same settings, so that both see the same logits to the last bit. Needs the programs of `OSTQ_PEERS`; skips
//! with a line on stderr without them, or fails if `OSTQ_REQUIRE_PEERS=1`.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{peer, shared};
use ostq_convert::check::base_file::{BaseFile, Chunk};
use ostq_convert::check::base_writer::BaseWriter;
use ostq_convert::check::stats::{self, Position};
use ostq_convert::check::summary::{Estimate, Perplexity, Rules, Summary};

const N_CTX: usize = 128;
const CHUNKS: usize = 2;
const SETTINGS: &str = "-c 128 -b 128 -ub 128 -t 2 -ctk f32 -ctv f32 -fa off --no-repack";

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{text}", output.status);
    text
}

/// [`run`], until what it says ends with `last`: llama.cpp's log goes through a thread that may lose the end when the program
/// ends.
fn run_to(last: &str, command: &mut Command) -> String {
    for _ in 0..50 {
        let log = run(command);
        if log.contains(last) {
            return log;
        }
    }
    panic!("{command:?}: `{last}` was never said")
}

/// A model, f32 and quantized, and what the programs say about it.
struct Bed {
    dir: tempfile::TempDir,
    n_vocab: usize,
    bos: i32,
}

impl Bed {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Logits of the scored positions of a window, n_vocab each.
    fn logits(&self, tool: &Path, model: &str, window: &[i32]) -> Vec<f32> {
        let out = self.path("logits");
        let mut ids = window.to_vec();
        ids[0] = self.bos;
        run(Command::new(tool).arg(self.path(model)).arg(&out).args(ids.iter().map(i32::to_string)));
        let bytes = std::fs::read(&out).unwrap();
        let all: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        assert_eq!(all.len(), N_CTX * self.n_vocab);
        all[N_CTX / 2 * self.n_vocab..(N_CTX - 1) * self.n_vocab].to_vec()
    }
}

fn convert(input: &Path, out: &Path, flags: &[&str]) {
    run(Command::new(env!("CARGO_BIN_EXE_ostq-convert"))
        .env("OSTQ_QUALITY", "exact")
        .arg(input)
        .arg(out)
        .args(flags)
        .arg("--quiet"));
}

/// `NAME: VALUE ± ERROR` as printed; several spaces are one.
fn printed(log: &str) -> BTreeMap<String, (String, Option<String>)> {
    let words = |s: &str| s.split_whitespace().collect::<Vec<_>>().join(" ");
    let lines = log.lines().filter_map(|l| l.rsplit_once(": "));
    lines
        .map(|(name, rest)| {
            let (value, error) = rest.split_once('±').map_or((rest, None), |(v, e)| (v, Some(e)));
            let bare = |s: &str| s.trim().trim_end_matches('%').trim().to_string();
            (words(name), (bare(value), error.map(bare)))
        })
        .collect()
}

#[test]
fn its_files_and_its_figures() {
    let (Some(perplexity), Some(logits)) = (peer("llama-perplexity"), peer("llama-logits")) else { return };
    // figures of random weights and of texts outside the vocabulary say little: the trained model of the test bed
    let Some(shared) = shared() else { return };
    let (folder, n_vocab, bos) = (shared.join("models/tiny-llama"), 8192, 1);
    let bed = Bed { dir: tempfile::tempdir().unwrap(), n_vocab, bos };
    convert(&folder, &bed.path("f32.gguf"), &["--outtype", "f32"]);
    convert(&folder, &bed.path("q.gguf"), &["--type", "q4_k_m"]);
    let text = std::fs::read_to_string(shared.join("text/evaluation.txt")).unwrap();
    std::fs::write(bed.path("text"), text.chars().take(9000).collect::<String>()).unwrap();

    // its file
    let base = bed.path("base");
    let log = run_to(
        "Final estimate: PPL = ",
        Command::new(&perplexity)
            .arg("-m")
            .arg(bed.path("f32.gguf"))
            .arg("-f")
            .arg(bed.path("text"))
            .arg("--kl-divergence-base")
            .arg(&base)
            .args(["--chunks", &CHUNKS.to_string()])
            .args(SETTINGS.split(' ')),
    );
    let mut file = BaseFile::open(&base).unwrap();
    let windows = file.windows();
    let tokens = file.tokens().to_vec();
    assert_eq!((windows.n_ctx(), windows.n_chunks(), file.n_vocab()), (N_CTX, CHUNKS, n_vocab));

    // written by us from the logits: the same bytes, the same perplexity
    let ours = bed.path("ours");
    let mut writer = BaseWriter::create(&ours, windows, n_vocab, &tokens).unwrap();
    let mut nll = Vec::new();
    let window = |i: usize| windows.tokens(&tokens, i).unwrap().to_vec();
    let reference: Vec<Vec<f32>> = (0..CHUNKS).map(|i| bed.logits(&logits, "f32.gguf", &window(i))).collect();
    let model: Vec<Vec<f32>> = (0..CHUNKS).map(|i| bed.logits(&logits, "q.gguf", &window(i))).collect();
    for row in &reference {
        nll.extend(writer.write_chunk(row).unwrap());
    }
    writer.finish().unwrap();
    let (theirs, ours) = (std::fs::read(&base).unwrap(), std::fs::read(&ours).unwrap());
    let different = theirs.iter().zip(&ours).filter(|(a, b)| a != b).count();
    assert!(theirs == ours, "{different} of {} bytes differ", theirs.len());
    let ppl = Perplexity::of(&nll).unwrap().ppl;
    assert!(log.contains(&format!("PPL = {:.4} +/- {:.5}", ppl.value, ppl.error)), "{ppl:?}\n{log}");

    // its figures
    let log = run_to(
        "Same top p: ",
        Command::new(&perplexity)
            .arg("-m")
            .arg(bed.path("q.gguf"))
            .arg("--kl-divergence")
            .arg("--kl-divergence-base")
            .arg(&base)
            .args(SETTINGS.split(' ')),
    );
    let mut chunk = Chunk::default();
    let mut records: Vec<Position> = Vec::new();
    while file.read_chunk(&mut chunk).unwrap() {
        records.extend(chunk.compare(&model[chunk.index]).unwrap());
    }
    let s = Summary::of(&records, Rules::LlamaCpp).unwrap();
    let shown = printed(&log);
    let mut compared = 0;
    let mut same = |name: &str, value: f64, error: Option<f64>, digits: usize| {
        let (want, want_error) = shown.get(name).unwrap_or_else(|| panic!("no {name} in\n{log}"));
        // sums over threads come in another order there
        let near = |want: &str, got: f64, digits: usize| {
            let unit = 10f64.powi(-(digits as i32));
            (want.parse::<f64>().unwrap() - got).abs() <= 0.5001 * unit
        };
        assert!(near(want, value, digits), "{name}: {want} there, {value} here");
        if let Some(error) = error {
            let want = want_error.as_ref().unwrap();
            assert!(near(want, error, digits), "{name}: ± {want} there, ± {error} here");
        }
        compared += 1;
    };
    let mut estimate = |name: &str, e: Estimate, scale: f64, digits| {
        same(name, scale * e.value, Some(scale * e.error), digits);
    };
    estimate("Mean PPL(Q)", s.ppl, 1.0, 6);
    estimate("Mean PPL(base)", s.ppl_base, 1.0, 6);
    estimate("Mean ln(PPL(Q)/PPL(base))", s.ln_ppl_ratio, 1.0, 6);
    estimate("Mean PPL(Q)/PPL(base)", s.ppl_ratio, 1.0, 6);
    estimate("Mean PPL(Q)-PPL(base)", s.ppl_difference, 1.0, 6);
    estimate("Mean KLD", s.kld, 1.0, 6);
    estimate("Mean Δp", s.p_diff, 100.0, 3);
    estimate("RMS Δp", s.p_diff_rms, 100.0, 3);
    estimate("Same top p", s.same_top, 100.0, 3);
    same("Cor(ln(PPL(Q)), ln(PPL(base)))", 100.0 * s.ln_ppl_correlation.unwrap(), None, 2);
    for (what, p, scale, digits) in [("KLD", s.kld_percentiles, 1.0, 6), ("Δp", s.p_diff_percentiles, 100.0, 3)] {
        let rows = [
            ("Maximum", p.max),
            ("99.9%", p.p99_9),
            ("99.0%", p.p99),
            ("95.0%", p.p95),
            ("90.0%", p.p90),
            ("Median", p.median),
            ("10.0%", p.p10),
            ("5.0%", p.p5),
            ("1.0%", p.p1),
            ("0.1%", p.p0_1),
            ("Minimum", p.min),
        ];
        for (name, value) in rows {
            same(&format!("{name} {what}"), scale * value, None, digits);
        }
    }
    same("75.0% Δp", 100.0 * s.p_diff_percentiles.p75, None, 3);
    same("25.0% Δp", 100.0 * s.p_diff_percentiles.p25, None, 3);
    assert_eq!(compared, 34);

    // without the 16 bits: close to it, and nowhere negative
    let next = |i: usize| windows.next(&window(i)).to_vec();
    let exact: Vec<Position> =
        (0..CHUNKS).flat_map(|i| stats::compare_rows(&reference[i], &model[i], n_vocab, &next(i)).unwrap()).collect();
    for (exact, stored) in exact.iter().zip(&records) {
        // half a step of ln P, 1.2e-4, first order; and the words below e^-16
        assert!((exact.kld - stored.kld).abs() < 3e-4, "{exact:?} {stored:?}");
        assert!(exact.kld >= 0.0 && (exact.nll - stored.nll).abs() < 1e-5);
    }
    let e = Summary::of(&exact, Rules::Exact).unwrap();
    eprintln!("34 figures as printed; mean KLD {:.7} from 16 bits, {:.7} from f32", s.kld.value, e.kld.value);
    assert!((e.kld.value - s.kld.value).abs() < 2e-5);
}
