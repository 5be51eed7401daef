//! How long a conversion will take on this machine, from the work that its plan holds and a short measurement.

use std::path::Path;
use std::time::Instant;

use super::args::ConvertArgs;
use super::calibrate::pool;
use super::round::windows;
use super::{Failure, choose, print};
use crate::forward::{Model, Spec};
use crate::plan::quality::{Quality, implies_transform, spelled_out};
use crate::plan::{Input, OWN, Options, Plan, Recipe};
use crate::transform::{Anatomy, Preset};
use crate::tuning::run::Device;

/// Seconds by stage.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Estimate {
    /// Text that the model writes.
    pub text: f64,
    /// Candidates of `--transform auto`, and none.
    pub transforms: f64,
    pub allocation: f64,
    pub rounding: f64,
    /// On the processor.
    pub tuning: f64,
}

impl Estimate {
    pub fn total(&self) -> f64 {
        self.text + self.transforms + self.allocation + self.rounding + self.tuning
    }
}

/// Multiplications and additions a second, in products of f32, of the threads of `pool` together.
fn rate(pool: &rayon::ThreadPool) -> f64 {
    const N: usize = 960;
    let (a, b) = (vec![0.5f32; N * N], vec![0.25f32; N * N]);
    let mut out = vec![0f32; N * N];
    let mut best = f64::INFINITY;
    // the first wakes the threads
    for _ in 0..4 {
        let start = Instant::now();
        pool.install(|| crate::linalg::product(&a, &b, N, &mut out));
        best = best.min(start.elapsed().as_secs_f64());
    }
    2.0 * (N * N * N) as f64 / best.max(1e-9)
}

/// What the stages are made of; the factors are measured (docs/performance.md says on what).
struct Work {
    /// Weights of the layers' matrices, of the head, of the embedding.
    layers: f64,
    /// All of the layers' weights, of experts that a token does not see too.
    weights: f64,
    head: f64,
    /// Σ n² over the inputs of the layers.
    squares: f64,
    /// Multiplications of attention for one token of a window.
    attention: f64,
    /// Of products. Searches of scales take the time of so many of its operations: they vary with the processor as products do.
    rate: f64,
}

impl Work {
    fn new(model: &Model<'_>, length: usize, rate: f64) -> Work {
        let s: &Spec = &model.spec;
        let square = |n: usize| (n * n) as f64;
        let all = model.source().tensors().iter();
        let matrices = all.filter(|t| t.name.starts_with("blk.") && t.dims.len() > 1);
        let squares = 2.0 * square(s.embed) + square(s.heads * s.head_dim) + square(model.feed_forward());
        Work {
            layers: model.linear_flops() as f64 / 2.0,
            weights: matrices.map(|t| t.elements() as f64).sum(),
            head: (model.vocab * s.embed) as f64,
            squares: squares * s.layers as f64,
            attention: (s.layers * s.heads * s.head_dim * length) as f64,
            rate,
        }
    }

    /// A pass of one token through the layers.
    fn pass(&self) -> f64 {
        2.0 * (self.layers + self.attention)
    }

    fn text(&self, tokens: f64) -> f64 {
        tokens * 2.0 * (self.layers + self.head + 2.0 * self.attention) / (0.55 * self.rate)
    }

    /// Of gradients of 32 windows.
    fn backward(&self) -> f64 {
        16_384.0 * (4.0 * self.pass() + 6.0 * self.head) / (0.6 * self.rate)
    }

    fn allocation(&self, types: f64) -> f64 {
        // 64 windows forward; every type of every tensor is rounded once
        let flops = 32_768.0 * (self.pass() + self.squares);
        let rounded = types * (self.weights + 2.0 * self.head);
        flops / (0.6 * self.rate) + self.backward() + rounded * 9e3 / self.rate
    }

    /// Half of the layers, and the head for both models, for each tensor.
    fn measuring(&self, spec: &Spec) -> f64 {
        let (tensors, tokens) = (7.0 * spec.layers as f64, super::allocate::MEASURED as f64 * 512.0);
        tensors * tokens * (0.5 * self.pass() + 4.0 * self.head) / (0.75 * self.rate)
    }

    fn rounding(&self, tokens: f64, paths: f64) -> f64 {
        let flops = tokens * (paths * self.pass() + (2.0 * paths - 1.0) * self.squares);
        flops / (0.75 * self.rate) + (self.weights + self.head) * 2.5e5 / self.rate
    }

    fn tuning(&self, steps: f64, tokens: f64) -> f64 {
        steps * tokens * (5.0 * self.pass() + 8.0 * self.head) / (0.6 * self.rate)
    }
}

/// Presets that `recipe` has measured on this model: in closed form, and learned.
pub fn tried(args: &ConvertArgs, recipe: &Recipe, model: &Model<'_>, input: &Input) -> (usize, usize) {
    let word = recipe.transform.as_deref().and_then(Path::to_str);
    let Some(word) = word.filter(|w| Preset::parse(w) == Some(Preset::Auto)) else { return (0, 0) };
    let path = args.input.as_deref().expect("required by the parser");
    let Ok(anatomy) = Anatomy::new(path, &*input.source, &input.metadata) else { return (0, 0) };
    if anatomy.spec.experts > 0
        || input.transform.is_some()
        || choose::memory(model, recipe, args.thread_count()) > super::round::room(args.max_memory)
    {
        return (0, 0);
    }
    let presets = Preset::candidates(word).unwrap_or_default();
    let (learned, closed): (Vec<Preset>, Vec<Preset>) =
        presets.into_iter().filter(|&p| choose::unfit(p, &anatomy).is_none()).partition(|p| p.learns());
    (closed.len(), learned.len())
}

/// The time that what a recipe asks for will take, where products run at `rate`.
fn estimate(args: &ConvertArgs, recipe: &Recipe, model: &Model<'_>, input: &Input, rate: f64) -> Estimate {
    let allocates = recipe.like.is_some() || recipe.target_size.is_some() || recipe.target_bpw.is_some();
    let length = recipe.ctx.unwrap_or(512) as usize;
    let work = Work::new(model, length, rate);
    let tokens = (windows(recipe) * length) as f64;
    let own = super::tune::own(&recipe.calibrate);
    let given = recipe.calibrate.iter().filter(|w| w.as_os_str() != OWN);
    // four bytes a token, roughly
    let bytes: u64 = given.map(|p| std::fs::metadata(p).map_or(170_000, |m| m.len())).sum();
    let missing = (tokens - bytes as f64 / 4.0).max(0.0);
    let paths = if recipe.one_pass { 1.0 } else { 2.0 };
    // tuning wants more of it
    let more = match recipe.tune.filter(|_| own && recipe.tune_text.is_empty()) {
        Some(steps) => (super::tune::windows_of(recipe, steps) * length) as f64 - bytes as f64 / 4.0,
        None => 0.0,
    };
    // an embedding that is the head as well is weighed by gradients
    let rounding = |tokens: f64| work.rounding(tokens, paths) + if model.tied() { work.backward() } else { 0.0 };
    let allocation = if allocates { work.allocation(7.0) } else { 0.0 };
    let tuning = |steps: f64, batch: usize| match args.device {
        Device::Cpu => work.tuning(steps, (batch * length) as f64),
        _ => 0.0,
    };
    let learning = tuning(super::learn::STEPS.into(), super::learn::settings(Preset::OstQuant, 1, 0).batch);
    let transforms = match tried(args, recipe, model, input) {
        (0, 0) => 0.0,
        // what is taken is allocated once
        (closed, learned) => {
            let (count, tokens) = ((closed + learned) as f64, tokens.min(choose::tokens(length) as f64));
            (count + 1.0) * rounding(tokens) + count * allocation + learned as f64 * learning
        }
    };
    Estimate {
        transforms,
        text: if own { work.text(missing) + if more > missing { work.text(more) } else { 0.0 } } else { 0.0 },
        allocation: allocation + if recipe.measure { work.measuring(&model.spec) } else { 0.0 },
        rounding: rounding(tokens),
        tuning: recipe.tune.map_or(0.0, |steps| tuning(steps.into(), super::tune::batch(recipe))),
    }
}

/// A time, in words.
pub fn words(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{:.0} s", s.max(1.0)),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

/// Says before it starts what a conversion will do, and about how long it takes.
pub fn announce(args: &ConvertArgs, options: &Options, input: &Input, plan: &Plan) -> Result<(), Failure> {
    if args.quiet {
        return Ok(());
    }
    let path = args.input.as_deref().expect("required by the parser");
    let recipe = &options.recipe;
    let model = Model::new(path, &*input.source, &input.metadata)?;
    let e = estimate(args, recipe, &model, input, rate(&pool(args.threads())?));
    let stages = [
        (e.text, "text from the model itself"),
        (e.transforms, "transforms measured"),
        (e.allocation, "types allocated at a size"),
        (e.rounding, "GPTQ with corrected targets"),
        (e.tuning, "tuning"),
    ];
    let mut stages: Vec<String> =
        stages.iter().filter(|(t, _)| *t > 0.0).map(|(t, what)| format!("{what} ({})", words(*t))).collect();
    if recipe.tune.is_some() && args.device != Device::Cpu {
        stages.push("tuning on a GPU (not counted)".into());
    }
    print::stderr(&format!("{}: {}; about {} in all", plan.type_name, stages.join(", "), words(e.total())));
    if e.total() > 3600.0 {
        let faster = match Quality::of_word(recipe) {
            Some(Quality::Best) => "--quality balanced, fast or exact",
            _ => "--quality fast or exact",
        };
        print::stderr(&format!("that is long: {faster} and --one-pass are faster"));
    }
    Ok(())
}

/// What a command line says, `recipe`, with the best word that `budget` seconds allow spelled out, and the tuning that fits; at
/// least `fast`. Measuring transforms is the first that is left out.
pub fn within(args: &ConvertArgs, recipe: &Recipe, input: &Input, budget: f64) -> Result<Recipe, Failure> {
    let path = args.input.as_deref().expect("required by the parser");
    let fast = spelled_out(recipe.clone(), Quality::Fast);
    let Ok(model) = Model::new(path, &*input.source, &input.metadata) else { return Ok(fast) };
    let balanced = spelled_out(recipe.clone(), Quality::Balanced);
    let mut unmeasured = balanced.clone();
    if implies_transform(&balanced) {
        unmeasured.transform = Some("none".into());
    }
    // fewer steps than the last are not worth their text
    let steps = [2000, 1400, 1000, 700, 500, 350, 250, 180, 120, 80, 50];
    let best = spelled_out(recipe.clone(), Quality::Best);
    let tuned = steps.map(|n| Recipe { tune: best.tune.map(|_| n), ..best.clone() });
    let rate = rate(&pool(args.threads())?);
    for candidate in tuned.into_iter().chain([balanced, unmeasured]) {
        if estimate(args, &candidate, &model, input, rate).total() <= budget {
            return Ok(candidate);
        }
    }
    Ok(fast)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_said_in_the_unit_that_fits() {
        assert_eq!((words(0.2), words(89.0)), ("1 s".into(), "89 s".into()));
        assert_eq!((words(600.0), words(7200.0)), ("10 min".into(), "2.0 h".into()));
    }

    #[test]
    fn more_work_takes_longer() {
        let work = |rate: f64| Work { layers: 1e8, weights: 1e8, head: 3e7, squares: 1e8, attention: 1e7, rate };
        let (slow, fast) = (work(1e11), work(2e11));
        assert!(slow.rounding(1e5, 2.0) > fast.rounding(1e5, 2.0));
        assert!(slow.rounding(1e5, 2.0) > slow.rounding(1e5, 1.0));
        assert!(slow.tuning(100.0, 4096.0) > slow.tuning(50.0, 4096.0));
        assert!(slow.text(1e5) > 0.0 && slow.allocation(7.0) > slow.allocation(1.0));
    }
}
