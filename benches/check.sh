#!/usr/bin/env bash
# Calibration and check side by side with llama.cpp's own tools, in one run: wall time, peak memory, and their figures.
#
#   benches/check.sh [--chunks N] [--types "q4_k_m ..."] [--threads N] MODEL TEXT EVALUATION [FOLDER]
#
# MODEL is a checkpoint folder, TEXT what importance is collected from (40 windows of 512 tokens), EVALUATION what models are
# compared on (N windows, 20), FOLDER where files go (a temporary one).
#
#   calibrate   ours on the checkpoint; llama-imatrix on its bf16 file
#   check       ours on bf16 file and model; llama-perplexity twice: base of the bf16 file, then --kl-divergence
#   figures     KL divergence and perplexity of every type, with f32 activations, with those of llama.cpp's CPU kernels, and by
#               llama-perplexity
#   crossed     Q4_K_M by real llama-quantize with our importance matrix and with llama-imatrix's; and ours with both
#
# Environment: OSTQ_PEERS (default ~/.cache/ostq-peers), OSTQ_BIN (default: target/release/ostq-convert).
set -euo pipefail
export OSTQ_QUALITY=exact # llama.cpp's bytes, for a comparison of the same work
export LC_ALL=C
cd "$(dirname "$0")/.."
chunks=20
types="q4_k_m q4_0 q3_k_s q2_k q6_k"
threads=$(nproc)
args=()
while [ $# -gt 0 ]; do
    case $1 in
        --chunks) chunks=$2; shift ;;
        --types) types=$2; shift ;;
        --threads) threads=$2; shift ;;
        -h | --help) sed -n '2,/^set -e/s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;;
        -*) echo "unknown option $1" >&2; exit 2 ;;
        *) args+=("$1") ;;
    esac
    shift
done
[ ${#args[@]} -ge 3 ] || { echo "usage: benches/check.sh [options] MODEL TEXT EVALUATION [FOLDER] (--help)" >&2; exit 2; }
model=${args[0]} text=${args[1]} evaluation=${args[2]}
peers=${OSTQ_PEERS:-$HOME/.cache/ostq-peers}/bin
bin=${OSTQ_BIN:-${CARGO_TARGET_DIR:-target}/release/ostq-convert}
dir=${args[3]:-$(mktemp -d)}
[ ${#args[@]} -ge 4 ] || trap 'rm -rf "$dir"' EXIT
mkdir -p "$dir"
log=$dir/log

# timed COMMAND...: sets seconds and peak (MiB)
timed() {
    local start=$EPOCHREALTIME
    python3 - "$dir/rss" "$@" >"$log" 2>&1 <<'PYTHON' || { tail -n 20 "$log" >&2; exit 1; }
import os, sys
pid = os.fork()
if pid == 0:
    os.execvp(sys.argv[2], sys.argv[2:])
_, status, usage = os.wait4(pid, 0)
open(sys.argv[1], "w").write(f"{usage.ru_maxrss}\n")
sys.exit(os.waitstatus_to_exitcode(status))
PYTHON
    seconds=$(awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.2f", b - a }')
    peak=$(awk '{ printf "%.0f", $1 / 1024 }' "$dir/rss")
}
ratio() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.2f", a / b }'; }
difference() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%+.2f %%", (a / b - 1) * 100 }'; }
# figure REPORT INDEX KEY: a figure of a model in our JSON
figure() { python3 -c 'import json,sys; print("%.6f" % json.load(open(sys.argv[1]))["models"][int(sys.argv[2])]["summary"][sys.argv[3]]["value"])' "$@"; }

"$bin" "$model" "$dir/bf16.gguf" --outtype bf16 --quiet --force
for t in $types; do "$bin" "$model" "$dir/$t.gguf" --type "$t" --quiet --force; done
printf '\n### %s, %s threads\n\nCPU %s; %s\n\n' "$(basename "$model")" "$threads" \
    "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)" "$("$bin" --version)"

echo "| | llama.cpp, s | ours, s | ratio | llama.cpp, MiB | ours, MiB |"
echo "|---|--:|--:|--:|--:|--:|"
rm -rf "$dir/ours.imatrix" "$dir/ours.imatrix.ostq-state"
timed "$bin" calibrate "$model" -o "$dir/ours.imatrix" -f "$text" -c 512 --chunks 40 --threads "$threads"
ours=$seconds ours_peak=$peak
timed "$peers/llama-imatrix" -m "$dir/bf16.gguf" -f "$text" -c 512 --chunks 40 -t "$threads" --no-ppl -o "$dir/theirs.imatrix.gguf"
echo "| calibrate, 40 x 512 tokens | $seconds | $ours | $(ratio "$seconds" "$ours") | $peak | $ours_peak |"
first=${types%% *}
timed "$bin" check "$dir/bf16.gguf" "$dir/$first.gguf" -f "$evaluation" -c 512 --chunks "$chunks" --threads "$threads"
ours=$seconds ours_peak=$peak
timed "$peers/llama-perplexity" -m "$dir/bf16.gguf" -f "$evaluation" -c 512 --chunks "$chunks" -t "$threads" --kl-divergence-base "$dir/base"
base=$seconds base_peak=$peak
timed "$peers/llama-perplexity" -m "$dir/$first.gguf" -f "$evaluation" -c 512 -t "$threads" --kl-divergence --kl-divergence-base "$dir/base"
both=$(awk -v a="$base" -v b="$seconds" 'BEGIN { printf "%.2f", a + b }')
echo "| check of $first, $chunks x 512 tokens | $both | $ours | $(ratio "$both" "$ours") | $((base_peak > peak ? base_peak : peak)) | $ours_peak |"

models=()
for t in $types; do models+=("$dir/$t.gguf"); done
"$bin" check "$dir/bf16.gguf" "${models[@]}" -f "$evaluation" -c 512 --chunks "$chunks" --json --quiet >"$dir/f32.json"
"$bin" check "$dir/bf16.gguf" "${models[@]}" -f "$evaluation" -c 512 --chunks "$chunks" --activations ggml --json --quiet >"$dir/ggml.json"
printf '\n| type | KLD, f32 | KLD, ggml | KLD, llama-perplexity | difference | PPL, ggml | PPL, llama-perplexity | difference |\n'
echo "|---|--:|--:|--:|--:|--:|--:|--:|"
i=0
for t in $types; do
    "$peers/llama-perplexity" -m "$dir/$t.gguf" -f "$evaluation" -c 512 -t "$threads" --kl-divergence --kl-divergence-base "$dir/base" >"$log" 2>&1
    kld=$(sed -n 's/^.*Mean *KLD: *\([0-9.]*\).*/\1/p' "$log")
    ppl=$(sed -n 's/^.*Mean PPL(Q)  *: *\([0-9.]*\).*/\1/p' "$log")
    ours=$(figure "$dir/ggml.json" $i kld) mine=$(figure "$dir/ggml.json" $i ppl)
    echo "| $t | $(figure "$dir/f32.json" $i kld) | $ours | $kld | $(difference "$ours" "$kld") | $mine | $ppl | $(difference "$mine" "$ppl") |"
    i=$((i + 1))
done

"$peers/llama-quantize" --imatrix "$dir/ours.imatrix" "$dir/bf16.gguf" "$dir/x1.gguf" Q4_K_M "$threads" >"$log" 2>&1
"$peers/llama-quantize" --imatrix "$dir/theirs.imatrix.gguf" "$dir/bf16.gguf" "$dir/x2.gguf" Q4_K_M "$threads" >"$log" 2>&1
"$bin" "$model" "$dir/x3.gguf" --type q4_k_m --imatrix "$dir/ours.imatrix" --quiet --force
"$bin" "$model" "$dir/x4.gguf" --type q4_k_m --imatrix "$dir/theirs.imatrix.gguf" --quiet --force
"$bin" check "$dir/bf16.gguf" "$dir"/x[1-4].gguf -f "$evaluation" -c 512 --chunks "$chunks" --json --quiet >"$dir/cross.json"
printf '\n| Q4_K_M by | importance by | KLD | against llama-imatrix |\n|---|---|--:|--:|\n'
b=$(figure "$dir/cross.json" 1 kld) d=$(figure "$dir/cross.json" 3 kld) a=$(figure "$dir/cross.json" 0 kld) c=$(figure "$dir/cross.json" 2 kld)
echo "| llama-quantize | ostq-convert calibrate | $a | $(difference "$a" "$b") |"
echo "| llama-quantize | llama-imatrix | $b | |"
echo "| ostq-convert | ostq-convert calibrate | $c | $(difference "$c" "$d") |"
echo "| ostq-convert | llama-imatrix | $d | |"
