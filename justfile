# What contributors type. `just` alone lists the recipes.

# the test bed: tools that build llama.cpp's programs, models, goldens
shared := env("OSTQ_SHARED", justfile_directory() / "../shared")
# where llama.cpp's own programs are, or will be
export OSTQ_PEERS := env("OSTQ_PEERS", env("HOME") / ".cache/ostq-peers")
# where the larger test models are, or will be
export OSTQ_MODELS := env("OSTQ_MODELS", justfile_directory() / "models")

[private]
default:
    @just --list --unsorted

# Convert IN to OUT, with further flags
convert IN OUT *FLAGS:
    cargo run --release -- {{ IN }} {{ OUT }} {{ FLAGS }}

# All tests; those that need llama.cpp or the test bed say so when they skip
test *ARGS:
    cargo test --release {{ ARGS }}

# Formatting and warnings, as CI demands them
lint:
    cargo fmt --check
    cargo clippy --release --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps

# Everything that must pass before a merge
ci:
    .ci/run

# Build llama.cpp's programs into $OSTQ_PEERS (--without-python leaves its converter out)
peers *FLAGS:
    {{ shared }}/tools/setup-peers.sh {{ FLAGS }}

# Make the larger test models in $OSTQ_MODELS: smollm2-135m, or with --bench 1.1b and --bench 8b random weights of that shape
models *FLAGS:
    #!/bin/sh
    set -eu
    python="$OSTQ_PEERS/venv/bin/python"
    [ -x "$python" ] || python=python3 # with numpy
    mkdir -p "$OSTQ_MODELS"
    exec "$python" {{ shared }}/tools/make-models.py "$OSTQ_MODELS" {{ FLAGS }}

# Our files in real llama.cpp: same bytes, same text, split and merged, same token ids
interop:
    OSTQ_REQUIRE_PEERS=1 OSTQ_SHARED={{ shared }} cargo test --release --test interop --test tokenizer_interop --test calibrate --test gradients --test check --test check_peers --test forward --test token_ids -- --nocapture

# Compare with llama.cpp side by side: time and memory; e.g. `just bench-convert models/bench-1.1b /dev/shm /var/tmp`
bench-convert *ARGS:
    cargo build --release
    benches/convert.sh {{ ARGS }}

# Calibration and check next to llama.cpp's: time, memory, figures; e.g. `just bench-check models/smollm2-135m`
bench-check MODEL *ARGS:
    cargo build --release
    benches/check.sh {{ ARGS }} {{ MODEL }} {{ shared }}/text/calibration.txt {{ shared }}/text/evaluation.txt

# KL divergence of our files and of llama-quantize's with an importance matrix; e.g. `just quality models/smollm2-135m q4_k_m`
quality MODEL *TYPES:
    cargo build --release
    benches/quality.sh {{ MODEL }} {{ shared }}/text/calibration.txt {{ shared }}/text/evaluation.txt {{ TYPES }}

# What transforms are worth: every preset in every type, rounded in every way; long
quality-transforms MODEL *TYPES:
    cargo build --release
    benches/transforms.sh {{ MODEL }} {{ shared }}/text/calibration.txt {{ shared }}/text/evaluation.txt {{ TYPES }}

# Rate of the forward pass next to that of one large product
bench-forward *ARGS:
    cargo run --release --example bench_forward -- {{ ARGS }}

# Rate of GPTQ next to that of one large product; `block`: time and memory of one block of a large model
bench-rounding *ARGS:
    cargo run --release --example bench_rounding -- {{ ARGS }}

# Speed of the block formats on one thread, by instruction set, next to ggml's
bench-formats *ARGS:
    cargo run --release --example bench_formats -- --ggml $OSTQ_PEERS/bin/libggml-base.so {{ ARGS }}

# Random blocks of many kinds, ours against ggml's, for ROUNDS rounds
fuzz-formats ROUNDS="200" *ARGS:
    cargo run --release --example bench_formats -- --ggml $OSTQ_PEERS/bin/libggml-base.so --check {{ ROUNDS }} {{ ARGS }}

# Compare a file with a golden: `just manifest OUT.gguf random-qwen2 quantize-Q4_K_M-imatrix`
manifest FILE MODEL VARIANT *FLAGS:
    python3 {{ shared }}/tools/gguf-manifest.py {{ FILE }} --against {{ shared }}/goldens/{{ MODEL }}.json --variant {{ VARIANT }} {{ FLAGS }}
