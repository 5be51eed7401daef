//! Arguments of `convert` and `plan`, spelled as llama.cpp spells them, and the recipe that they add up to.

use std::path::PathBuf;

use clap::Args;

use super::{Failure, USAGE};
use crate::plan::memory::parse_size;
use crate::plan::quality::{self, Quality};
use crate::plan::{Options, Recipe};

/// Names the environment variable that says what --quality is where no flag says how weights become codes.
const DEFAULT_QUALITY: &str = "OSTQ_QUALITY";

/// What to convert, and how.
#[derive(Args, Clone, Debug)]
pub struct ConvertArgs {
    /// Checkpoint folder (config.json, *.safetensors, tokenizer files) or GGUF file.
    #[arg(required = true, value_name = "IN")]
    pub input: Option<PathBuf>,
    /// GGUF file to write.
    #[arg(value_name = "OUT.gguf")]
    pub output: Option<PathBuf>,
    /// GGUF file to write (as in convert_hf_to_gguf.py).
    #[arg(long, value_name = "FILE", conflicts_with = "output", help_heading = "Output")]
    outfile: Option<PathBuf>,

    /// What to quantize to, as llama-quantize names it, any case, or COPY; see --list-types [default: q4_k_m].
    #[arg(long, short = 't', value_name = "TYPE", help_heading = "Types")]
    r#type: Option<String>,
    /// The same by convert_hf_to_gguf.py's rules where it knows the type: f32 f16 bf16 q8_0 tq1_0 tq2_0 auto.
    #[arg(long, value_name = "TYPE", conflicts_with = "type", help_heading = "Types")]
    outtype: Option<String>,
    /// Reproduce the rounding of a two-step conversion through an f32, f16 or bf16 file [default: auto, lossless].
    #[arg(long, value_name = "TYPE", help_heading = "Types")]
    via: Option<String>,
    /// How much to do for quality: exact (llama.cpp's bytes), fast (an importance matrix and a better search of scales), balanced
    /// (types allocated at the size of the type's mix, GPTQ, rotations where they measure better) or best (balanced and tuning) [default: balanced, or what
    /// OSTQ_QUALITY says; with --calibrate, --imatrix, --rounding or --outtype: what these say].
    #[arg(long, value_name = "WORD", help_heading = "Types")]
    quality: Option<String>,
    /// Choose the quality, and how long to tune, so that the conversion takes about this long here, for instance 30m.
    #[arg(long, value_name = "TIME", help_heading = "Types", value_parser = parse_time, conflicts_with_all = ["quality", "exact", "tune"])]
    pub time_budget: Option<f64>,
    /// Byte for byte what llama.cpp writes. Rounding is then nearest, also with --calibrate.
    #[arg(long, help_heading = "Types")]
    exact: bool,
    /// Type for tensors whose name matches; the first match in the order given wins.
    #[arg(long, value_name = "REGEX=TYPE", help_heading = "Types")]
    tensor_type: Vec<String>,
    /// File of REGEX=TYPE, separated by white space.
    #[arg(long, value_name = "FILE", help_heading = "Types")]
    tensor_type_file: Option<PathBuf>,
    /// Type of output.weight.
    #[arg(long, value_name = "TYPE", help_heading = "Types")]
    output_tensor_type: Option<String>,
    /// Type of token_embd.weight.
    #[arg(long, value_name = "TYPE", help_heading = "Types")]
    token_embedding_type: Option<String>,
    /// Leave output.weight as it is.
    #[arg(long, help_heading = "Types")]
    leave_output_tensor: bool,
    /// Allocate types so that the file has at most this size, for instance 4.5GiB: which tensor gets which type is chosen for
    /// the least predicted KL divergence. Needs --calibrate.
    #[arg(long, value_name = "SIZE", help_heading = "Types", value_parser = parse_size, conflicts_with_all = ["target_bpw", "like"])]
    target_size: Option<u64>,
    /// The same for this many bits per weight.
    #[arg(long, value_name = "BITS", help_heading = "Types", conflicts_with = "like")]
    target_bpw: Option<f64>,
    /// The same for the size of this type's mix.
    #[arg(long, value_name = "TYPE", help_heading = "Types")]
    like: Option<String>,
    /// With a size: what each tensor costs is measured as well, each rounded alone and the model run from its layer on; then types
    /// are allocated once more.
    #[arg(long, help_heading = "Types", conflicts_with = "time_budget")]
    measure: bool,
    /// Types of the tensors as llama.cpp's mix has them (`stock`), which is what happens without a size.
    #[arg(long, value_name = "MIX", help_heading = "Types", conflicts_with_all = ["target_size", "target_bpw", "like"])]
    mix: Option<String>,
    /// Types that the allocation may use [default: the k-quants, iq4_xs, iq4_nl, q4_0 q4_1 q5_0 q5_1 q8_0].
    #[arg(long, value_name = "TYPE,...", value_delimiter = ',', help_heading = "Types")]
    types: Vec<String>,
    /// One type for all tensors, no mix.
    #[arg(long, help_heading = "Types")]
    pure: bool,
    /// Quantize what is already quantized (GGUF input).
    #[arg(long, help_heading = "Types")]
    allow_requantize: bool,
    /// Write infinities where a value does not fit in f16.
    #[arg(long, help_heading = "Types")]
    allow_f16_overflow: bool,
    /// fp8 weights become q8_0 (with --outtype).
    #[arg(long, help_heading = "Types")]
    fp8_as_q8: bool,

    /// Importance matrix: a GGUF or legacy .dat file of llama-imatrix.
    #[arg(long, value_name = "FILE", help_heading = "Importance")]
    imatrix: Option<PathBuf>,
    /// Make an importance matrix from this text first; several times for several texts. `builtin`: a small general corpus
    /// that ships with the program. `self`: the model writes text itself, as much as the other texts leave of
    /// --calibrate-tokens (131072).
    #[arg(long, value_name = "TEXT", conflicts_with = "imatrix", help_heading = "Importance")]
    calibrate: Vec<PathBuf>,
    /// At most so many tokens of it, in whole windows.
    #[arg(long, value_name = "N", help_heading = "Importance")]
    calibrate_tokens: Option<u64>,
    /// Tokens of a window of --calibrate and --check [default: 512].
    #[arg(long, short = 'c', visible_alias = "ctx-size", value_name = "N", help_heading = "Importance", value_parser = clap::value_parser!(u32).range(8..))]
    ctx: Option<u32>,
    /// How weights become codes: nearest (with importance, scales searched further
    /// than llama.cpp does), gptq (fitted to the output of each layer, needs --calibrate), or
    /// auto: gptq where there is a calibration [default: auto].
    #[arg(long, value_name = "HOW", help_heading = "Importance")]
    rounding: Option<String>,
    /// With gptq: take the inputs of every layer from the float model, not from what is rounded before it. Half the time.
    #[arg(long, help_heading = "Importance")]
    one_pass: bool,
    /// With gptq: one scale for each row, the same in all of its blocks, to compare with methods that have no blocks. Much worse
    /// at the same size; q4_0, q5_0, q8_0 and iq4_nl.
    #[arg(long, help_heading = "Importance")]
    row_scales: bool,
    /// After GPTQ, tune scales, minima, norms and, up to 4 bits, codes by so many steps of gradient descent on the divergence
    /// of the predictions.
    #[arg(long, value_name = "STEPS", num_args = 0..=1, default_missing_value = "600", help_heading = "Importance", value_parser = clap::value_parser!(u32).range(1..))]
    tune: Option<u32>,
    /// Tune layer by layer, each against the float layer's output, so many steps each: for models that do not fit in memory.
    #[arg(long, help_heading = "Importance")]
    tune_local: bool,
    /// Text to tune on; several times for several texts [default: that of --calibrate].
    #[arg(long, value_name = "TEXT", requires = "tune", help_heading = "Importance")]
    tune_text: Vec<PathBuf>,
    /// Windows of a step of --tune: more of them learn better from many steps [default: 8].
    #[arg(long, value_name = "N", requires = "tune", help_heading = "Importance", value_parser = clap::value_parser!(u32).range(1..=1024))]
    tune_batch: Option<u32>,
    /// What --tune runs on, and --transform spinquant or ostquant learns on: cpu, or an NVIDIA GPU (needs a program built with
    /// the feature `cuda`): cuda in f32, cuda-bf16 with products in bf16.
    #[arg(long, value_name = "DEVICE", value_enum, default_value_t, help_heading = "Run")]
    pub device: crate::tuning::run::Device,
    /// Transforms that leave the model's function as it is: none, smoothquant, awq, quarot, womi, spinquant and ostquant (these
    /// two are learned), auto (all of them tried, and the one taken that pays, or none; auto:quarot,womi: these), or a file that
    /// `transform` or `learn` wrote. All but quarot and womi need --calibrate.
    #[arg(long, value_name = "NAME|FILE", help_heading = "Transforms")]
    transform: Option<PathBuf>,
    /// How much of the differences between inputs smoothquant moves to the weights, 0 to 1 [default: 0.5].
    #[arg(long, value_name = "X", help_heading = "Transforms")]
    alpha: Option<f64>,
    /// Of the random rotations of quarot and womi [default: 0].
    #[arg(long, value_name = "N", help_heading = "Transforms")]
    seed: Option<u64>,
    /// Use only imatrix entries whose name contains this.
    #[arg(long, value_name = "PART", help_heading = "Importance")]
    include_weights: Vec<String>,
    /// Use no imatrix entry whose name contains this.
    #[arg(long, value_name = "PART", help_heading = "Importance")]
    exclude_weights: Vec<String>,

    /// Set a metadata key: int, float, bool or str.
    #[arg(long, value_name = "KEY=TYPE:VALUE", help_heading = "Metadata")]
    override_kv: Vec<String>,
    /// general.name.
    #[arg(long, value_name = "NAME", help_heading = "Metadata")]
    model_name: Option<String>,
    /// JSON file of general.* keys.
    #[arg(long, value_name = "FILE", help_heading = "Metadata")]
    metadata: Option<PathBuf>,
    /// Jinja file that replaces the model's chat template.
    #[arg(long, value_name = "FILE", help_heading = "Metadata")]
    chat_template: Option<PathBuf>,
    /// Name of the pre-tokenizer (tokenizer.ggml.pre), where detection is wrong.
    #[arg(long, value_name = "NAME", help_heading = "Metadata")]
    pre: Option<String>,
    /// After the conversion, read the file back and show the error of every tensor.
    #[arg(long, help_heading = "Check")]
    pub per_tensor: bool,
    /// After the conversion, compare the file with its source over this text: KL divergence, perplexity, errors by tensor
    /// and layer.
    #[arg(long, value_name = "TEXT", help_heading = "Check")]
    pub check: Option<PathBuf>,
    /// At most so many windows of it.
    #[arg(long, value_name = "N", requires = "check", help_heading = "Check", value_parser = clap::value_parser!(u32).range(1..))]
    pub chunks: Option<u32>,
    /// Also write what --check finds as one HTML page.
    #[arg(long, value_name = "FILE", requires = "check", help_heading = "Check")]
    pub html: Option<PathBuf>,

    /// Leave the ostq.* keys out: the file is then the very one that llama.cpp writes.
    #[arg(long, help_heading = "Metadata")]
    no_provenance: bool,

    /// Write the vocabulary and metadata only.
    #[arg(long, help_heading = "Output")]
    vocab_only: bool,
    /// Drop layers, for instance 3,17.
    #[arg(long, value_name = "N,...", value_delimiter = ',', help_heading = "Output")]
    prune_layers: Vec<u64>,
    /// One attn_qkv tensor instead of three.
    #[arg(long, help_heading = "Output")]
    fuse_qkv: bool,
    /// Write a big-endian file (f32, f16, bf16).
    #[arg(long, help_heading = "Output")]
    bigendian: bool,
    /// Replace an existing file; write inside the input folder.
    #[arg(long, short, help_heading = "Output")]
    pub force: bool,
    /// Print sha256 of the file and of every tensor, read back from disk.
    #[arg(long, help_heading = "Output")]
    pub manifest: bool,
    /// Show the plan and write nothing.
    #[arg(long, help_heading = "Output")]
    pub dry_run: bool,

    /// TOML file that says what flags say; flags are laid over it.
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    recipe: Option<PathBuf>,
    /// Print the recipe of this run (and, with --dry-run, nothing else).
    #[arg(long, help_heading = "Run")]
    pub print_recipe: bool,
    /// Worker threads [default: all processors].
    #[arg(long, value_name = "N", help_heading = "Run", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Ceiling of resident memory, for instance 512MiB: kept, or refused before work starts.
    #[arg(long, value_name = "SIZE", help_heading = "Run", value_parser = parse_size)]
    pub max_memory: Option<u64>,
    /// Keep the folder of intermediate results (OUT.gguf.ostq-state): a later run with the same output and types, say with
    /// --tune, takes its rounding from there.
    #[arg(long, help_heading = "Run")]
    pub keep_state: bool,
    /// Machine-readable report on standard output.
    #[arg(long, help_heading = "Run")]
    pub json: bool,
    /// Only errors.
    #[arg(long, short, help_heading = "Run")]
    pub quiet: bool,
}

/// Seconds of `90s`, `30m`, `2h`.
fn parse_time(text: &str) -> Result<f64, String> {
    let bad = || format!("`{text}` is no time, such as 90s, 30m or 2h");
    let (number, unit) = text.split_at(text.len() - text.chars().last().map_or(0, char::len_utf8));
    let unit = match unit {
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(bad()),
    };
    let seconds = number.parse::<f64>().map_err(|_| bad())? * unit;
    if seconds.is_finite() && seconds > 0.0 { Ok(seconds) } else { Err(bad()) }
}

/// Where a file of transforms comes from and goes to.
#[derive(Args, Clone, Debug)]
pub struct MakingArgs {
    /// Checkpoint folder or GGUF file.
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    /// Transforms file to write (safetensors).
    #[arg(long, short, value_name = "FILE", default_value = "transforms.safetensors")]
    pub output: PathBuf,
    /// Text; several times for several texts [default: a small general corpus that ships with the program].
    #[arg(long, value_name = "TEXT")]
    pub calibrate: Vec<PathBuf>,
    /// Tokens of a window.
    #[arg(long, short = 'c', visible_alias = "ctx-size", value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(8..))]
    pub ctx: u32,
    /// Of random rotations and of the order of the text.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    #[command(flatten)]
    pub resources: ResourceArgs,
    /// Replace a file that is there.
    #[arg(long)]
    pub force: bool,
    /// Only errors.
    #[arg(long, short)]
    pub quiet: bool,
}

/// What a run of a model may take.
#[derive(Args, Clone, Debug)]
pub struct ResourceArgs {
    /// Worker threads [default: all processors].
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Ceiling of resident memory: kept, or refused before work starts.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_memory: Option<u64>,
}

impl ConvertArgs {
    /// The file to write, however it was given.
    pub fn out(&self) -> Option<&PathBuf> {
        self.output.as_ref().or(self.outfile.as_ref())
    }

    /// True if `--calibrate` was given.
    pub fn calibrates(&self) -> bool {
        !self.calibrate.is_empty()
    }

    /// True if a size was asked for on the command line.
    pub fn sizes(&self) -> bool {
        self.target_size.is_some() || self.target_bpw.is_some() || self.like.is_some()
    }

    /// `--threads`, if given.
    pub fn threads(&self) -> Option<u16> {
        self.threads
    }

    /// Threads to use.
    pub fn thread_count(&self) -> usize {
        self.threads.map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), usize::from)
    }

    /// The recipe of this command line, laid over `--recipe`.
    pub fn plain_recipe(&self) -> Result<Recipe, Failure> {
        let base = match &self.recipe {
            Some(path) => Recipe::load(path).map_err(|e| Failure::new(USAGE, e))?,
            None => Recipe::default(),
        };
        let mut recipe = base.overlaid(self.recipe()?);
        if recipe.r#type.is_none() && recipe.outtype.is_none() {
            recipe.r#type = Some(crate::plan::options::DEFAULT_TYPE.name().to_lowercase());
        }
        Ok(recipe)
    }

    /// The same with its quality spelled out, checked.
    pub fn options(&self) -> Result<Options, Failure> {
        let mut recipe = self.plain_recipe()?;
        let usage = |e: String| Failure::new(USAGE, e);
        let otherwise = match std::env::var(DEFAULT_QUALITY) {
            Ok(word) => Quality::parse(&word).map_err(|e| usage(format!("{DEFAULT_QUALITY}: {e}")))?,
            Err(_) => Quality::Balanced,
        };
        if let Some(quality) = Quality::of(&recipe, otherwise).map_err(usage)? {
            recipe = quality::spelled_out(recipe, quality);
        }
        Options::resolve(recipe).map_err(usage)
    }

    fn recipe(&self) -> Result<Recipe, Failure> {
        let mut tensor_type = self.tensor_type.clone();
        if let Some(file) = &self.tensor_type_file {
            let text = std::fs::read_to_string(file)
                .map_err(|e| Failure::new(USAGE, format!("--tensor-type-file {}: {e}", file.display())))?;
            tensor_type.extend(text.split_whitespace().map(str::to_string));
        }
        Ok(Recipe {
            r#type: self.r#type.clone(),
            outtype: self.outtype.clone(),
            via: self.via.clone(),
            quality: self.quality.clone(),
            exact: self.exact,
            tensor_type,
            output_tensor_type: self.output_tensor_type.clone(),
            token_embedding_type: self.token_embedding_type.clone(),
            leave_output_tensor: self.leave_output_tensor,
            pure: self.pure,
            imatrix: self.imatrix.clone(),
            calibrate: self.calibrate.clone(),
            calibrate_tokens: self.calibrate_tokens,
            ctx: self.ctx,
            rounding: self.rounding.clone(),
            one_pass: self.one_pass,
            row_scales: self.row_scales,
            tune: self.tune,
            tune_local: self.tune_local,
            tune_text: self.tune_text.clone(),
            tune_batch: self.tune_batch,
            transform: self.transform.clone(),
            alpha: self.alpha,
            seed: self.seed,
            target_size: self.target_size,
            target_bpw: self.target_bpw,
            like: self.like.clone(),
            measure: self.measure,
            mix: self.mix.clone(),
            types: self.types.clone(),
            include_weights: self.include_weights.clone(),
            exclude_weights: self.exclude_weights.clone(),
            override_kv: self.override_kv.clone(),
            prune_layers: self.prune_layers.clone(),
            model_name: self.model_name.clone(),
            metadata: self.metadata.clone(),
            chat_template: self.chat_template.clone(),
            pre: self.pre.clone(),
            vocab_only: self.vocab_only,
            fuse_qkv: self.fuse_qkv,
            fp8_as_q8: self.fp8_as_q8,
            bigendian: self.bigendian,
            allow_requantize: self.allow_requantize,
            allow_f16_overflow: self.allow_f16_overflow,
            no_provenance: self.no_provenance,
        })
    }
}
