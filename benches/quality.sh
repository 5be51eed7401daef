#!/bin/sh
# What rounding is worth: KL divergence of our files and of llama-quantize's with an importance matrix, same types, same text.
#
#   benches/quality.sh MODEL CALIBRATION EVALUATION TYPE...
#
# MODEL is a checkpoint folder. llama.cpp's programs are in $OSTQ_PEERS/bin. Prints one line per type: bytes of both files,
# mean KL divergence of both (f32 activations, all windows of 512, positions 256..510) and their ratio. With ALLOCATE=1 also
# our file of the same size with types allocated. CHUNKS=N looks at the first N windows only; TOKENS=N
# calibrates on N tokens (ours on 131072, the importance matrix on 102400).
set -eu
model=$1 calibration=$2 evaluation=$3
shift 3
ours=${OURS:-target/release/ostq-convert}
bin=$OSTQ_PEERS/bin
export LD_LIBRARY_PATH="$bin"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$ours" "$model" "$work/bf16.gguf" --outtype bf16 --no-provenance --quiet
"$ours" calibrate "$model" -f "$calibration" --calibrate-tokens "${TOKENS:-102400}" -o "$work/imatrix.gguf" --quiet
printf '%-10s %11s %11s %9s %9s %6s %8s\n' type theirs ours KLD KLD ratio seconds
for type in "$@"; do
    "$bin/llama-quantize" --imatrix "$work/imatrix.gguf" "$work/bf16.gguf" "$work/theirs.gguf" "$type" >"$work/log" 2>&1
    start=$(date +%s)
    "$ours" "$model" "$work/ours.gguf" -t "$type" --calibrate "$calibration" ${TOKENS:+--calibrate-tokens $TOKENS} --force --quiet
    seconds=$(($(date +%s) - start))
    models="$work/theirs.gguf $work/ours.gguf"
    if [ -n "${ALLOCATE:-}" ]; then
        "$ours" "$model" "$work/allocated.gguf" -t "$type" --like "$type" --calibrate "$calibration" ${TOKENS:+--calibrate-tokens $TOKENS} \
            --force --quiet
        models="$models $work/allocated.gguf"
    fi
    # shellcheck disable=SC2086
    "$ours" check "$model" $models --text "$evaluation" ${CHUNKS:+--chunks $CHUNKS} --quiet --json >"$work/check.json"
    python3 - "$type" "$seconds" "$work/check.json" <<'PYTHON'
import json, sys
models = json.load(open(sys.argv[3]))["models"]
size = [m["file"]["size"] for m in models]
kld = [m["summary"]["kld"]["value"] for m in models]
print(f"{sys.argv[1]:10} {size[0]:11} {size[1]:11} {kld[0]:9.5f} {kld[1]:9.5f} {kld[1] / kld[0]:6.3f} {sys.argv[2]:>8}", flush=True)
if len(kld) > 2:
    print(f"  allocated {size[2]:23} {kld[2]:19.5f} {kld[2] / kld[0]:6.3f}", flush=True)
PYTHON
done
