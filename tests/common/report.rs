//! A report of made-up figures: five models of thirty layers, names that try to be markup, a model that is the reference.

use ostq_convert::check::report::{BlockRow, FORMAT, FileFacts, ModelReport, Report, RunFacts, TensorRow, TextFacts};
use ostq_convert::check::stats::Position;
use ostq_convert::check::summary::{Perplexity, Rules};
use ostq_convert::check::windows::Windows;

/// Between 0 and 1, the same on every machine.
struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// About normal, of deviation 1.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }
}

const LAYERS: u32 = 30;
const KINDS: [(&str, u64); 9] = [
    ("attn_norm", 576),
    ("attn_q", 576 * 576),
    ("attn_k", 576 * 192),
    ("attn_v", 576 * 192),
    ("attn_output", 576 * 576),
    ("ffn_norm", 576),
    ("ffn_gate", 576 * 1536),
    ("ffn_up", 576 * 1536),
    ("ffn_down", 576 * 1536),
];

fn model(name: &str, ty: &str, bits: f64, noise: f64, windows: Windows) -> ModelReport {
    let mut random = Random(name.len() as u64 + bits.to_bits());
    let mut records = Vec::new();
    for _ in 0..windows.n_chunks() {
        for k in 0..windows.scored() {
            let spread = (1.0 + 0.4 * k as f64 / windows.scored() as f64) * noise;
            let kld = 0.5 * spread * spread * (1.1 * random.normal()).exp();
            let nll_base = (2.8 + 2.0 * random.normal()).abs();
            let nll = (nll_base + spread * 0.4 * random.normal() + kld).max(0.0);
            let same_top = noise == 0.0 || random.unit() > 0.35 * noise;
            records.push(Position { nll, nll_base, kld, p_diff: (-nll).exp() - (-nll_base).exp(), same_top });
        }
    }
    let weights = 134_515_008u64;
    let size = (weights as f64 * bits / 8.0) as u64 + 2_000_000;
    let file = FileFacts { name: name.into(), size, type_name: ty.into(), bits_per_weight: bits, weights };
    let mut m = ModelReport::new(file, &records, Rules::Exact, windows).unwrap();
    let mut tensor = |name: String, weights: u64, at: f64| {
        let (kind, layer) = TensorRow::kind_and_layer(&name);
        let exact = noise == 0.0 || kind.ends_with("norm");
        let error = if exact { 0.0 } else { 0.02 * noise * noise * at * (0.3 * random.normal()).exp() };
        TensorRow {
            name,
            kind,
            layer,
            type_name: if exact { "F32".into() } else { ty.to_lowercase() },
            bits_per_weight: if exact { 32.0 } else { bits },
            weights,
            relative_error: error,
            weighted_error: (!exact).then_some(error * 0.7),
        }
    };
    let mut rows =
        vec![tensor("token_embd.weight".into(), 49152 * 576, 0.5), tensor("output_norm.weight".into(), 576, 1.0)];
    for layer in 0..LAYERS {
        for (k, (kind, weights)) in KINDS.iter().enumerate() {
            let at = 0.5 + 0.25 * k as f64 + f64::from(layer) / 30.0;
            rows.push(tensor(format!("blk.{layer}.{kind}.weight"), *weights, at));
        }
    }
    m.tensors = rows;
    m.blocks = (0..LAYERS)
        .map(|layer| BlockRow { layer, relative_difference: 0.01 * noise * noise * (1.0 + f64::from(layer)).powf(1.2) })
        .collect();
    m
}

/// The whole report; with `models` of its models at most.
pub fn synthetic(models: usize) -> Report {
    let windows = Windows::new(40 * 512, 512, None).unwrap();
    let mut all = vec![
        model("smollm2-135m-q8_0.gguf", "Q8_0", 8.5, 0.03, windows),
        model("smollm2-135m-q4_k_m.gguf", "Q4_K_M", 4.9, 0.22, windows),
        model("smollm2-135m-q4_0.gguf", "Q4_0", 4.6, 0.34, windows),
        model("smollm2-135m-iq3_xs.gguf", "IQ3_XS", 3.6, 0.5, windows),
        model("smollm2-135m-iq2_xxs.gguf", "IQ2_XXS", 2.3, 1.3, windows),
        model("</style><script>console.error('x')</script>\"'&<b>copy</b>.gguf", "BF16<i>", 16.0, 0.0, windows),
    ];
    all.truncate(models);
    let nll: Vec<f64> = (0..windows.positions()).map(|i| 2.0 + (i % 17) as f64 * 0.1).collect();
    let reference = FileFacts {
        name: "SmolLM2-135M-Instruct".into(),
        size: 269_060_552,
        type_name: "BF16".into(),
        bits_per_weight: 16.0,
        weights: 134_515_008,
    };
    Report {
        format: FORMAT,
        program: "ostq-convert 0.1.0".into(),
        run: RunFacts {
            reference,
            reference_perplexity: Perplexity::of(&nll),
            from_base_file: false,
            text: TextFacts { name: "evaluation.txt".into(), size: 399_537, sha256: "0123456789abcdef".repeat(4) },
            n_ctx: windows.n_ctx(),
            n_chunks: windows.n_chunks(),
            positions: windows.positions(),
            n_vocab: 49152,
            activations: "f32".into(),
            notes: vec!["Made-up figures, for tests. <script>console.error('note')</script>".into()],
        },
        models: all,
    }
}
