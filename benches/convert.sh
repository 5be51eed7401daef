#!/usr/bin/env bash
# Conversion side by side with llama.cpp's own tools, in one run: wall time and peak resident memory.
#
#   benches/convert.sh [--quick] [--types "q4_0 q8_0 ..."] [--reps N] [--threads N] MODEL TARGET [TARGET...]
#
# MODEL is a checkpoint folder, TARGET a folder to write to, for instance on a tmpfs and on a disk. For each target:
#
#   two steps   convert_hf_to_gguf.py --outtype bf16, then llama-quantize from that file
#   quantize    llama-quantize alone
#   ours        ostq-convert from the checkpoint; includes what the others leave out: sha256 of the input, fsync,
#               reading the header back
#   cp          the checkpoint's weights copied
#
# Repetitions are interleaved; before each run its input is read once, so that all read from the page cache, its old
# output is removed, and free memory is touched, so that none waits for the host of a virtual machine to give it back.
# The columns "+sync" add `sync FILE` after the peer. Figures are medians. Rates are bytes read and written together, by time. Tensors of the last repetition are compared (sha256 of each).
#
# Environment: OSTQ_PEERS (default ~/.cache/ostq-peers; without its Python side the two steps are left out), OSTQ_BIN
# (default: target/release/ostq-convert). Needs /usr/bin/time or python3 for the memory.
set -euo pipefail
export OSTQ_QUALITY=exact # llama.cpp's bytes, for a comparison of the same work
export LC_ALL=C
cd "$(dirname "$0")/.."

types="q4_0 q8_0 q4_k_m q5_k_m q6_k q3_k_m iq4_xs"
reps=3
threads=$(nproc)
args=()
while [ $# -gt 0 ]; do
    case $1 in
        --quick) types="q4_0 q4_k_m" reps=1 ;;
        --types) types=$2; shift ;;
        --reps) reps=$2; shift ;;
        --threads) threads=$2; shift ;;
        -h | --help) sed -n '2,/^set -e/s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;;
        -*) echo "unknown option $1" >&2; exit 2 ;;
        *) args+=("$1") ;;
    esac
    shift
done
[ ${#args[@]} -ge 2 ] || { echo "usage: benches/convert.sh [options] MODEL TARGET [TARGET...] (--help)" >&2; exit 2; }
model=${args[0]}
targets=("${args[@]:1}")
peers=${OSTQ_PEERS:-$HOME/.cache/ostq-peers}
bin=${OSTQ_BIN:-${CARGO_TARGET_DIR:-target}/release/ostq-convert}
quantize=$peers/bin/llama-quantize
converter=$peers/bin/convert-peer
[ -x "$bin" ] || { echo "no $bin: cargo build --release" >&2; exit 1; }
[ -x "$quantize" ] || { echo "no $quantize: just peers" >&2; exit 1; }
[ -x "$converter" ] || { echo "no $converter: the two steps are left out (just peers)" >&2; converter=; }

logs=$(mktemp -d)
made=()
trap 'rm -rf "$logs" ${made[@]+"${made[@]}"}' EXIT
trap 'exit 130' INT TERM

# Touches and frees memory. A host takes free pages back from a virtual machine (free page reporting), and the first to touch them
# again waits: 2 GiB took 5.8 s in place of 1.1 s on one, whatever program it was.
touch_memory() {
    python3 - $((3 * input)) <<'PYTHON'
import mmap, sys
free = next(int(l.split()[1]) << 10 for l in open("/proc/meminfo") if l.startswith("MemFree"))
mmap.mmap(-1, max(min(int(sys.argv[1]), free * 9 // 10), 4096), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
PYTHON
}

# timed NAME COMMAND...: appends "seconds MiB" to $logs/NAME
timed() {
    local name=$1 start end
    shift
    touch_memory 2>"$logs/touch" || true # needs Python 3.10
    start=$EPOCHREALTIME
    if [ -x /usr/bin/time ]; then
        /usr/bin/time -o "$logs/rss" -f %M "$@" >"$logs/out" 2>&1 || { cat "$logs/out" >&2; exit 1; }
    else
        python3 - "$logs/rss" "$@" >"$logs/out" 2>&1 <<'PYTHON' || { cat "$logs/out" >&2; exit 1; }
import os, sys
pid = os.fork()
if pid == 0:
    os.execvp(sys.argv[2], sys.argv[2:])
_, status, usage = os.wait4(pid, 0)
open(sys.argv[1], "w").write(f"{usage.ru_maxrss}\n")
sys.exit(os.waitstatus_to_exitcode(status))
PYTHON
    fi
    end=$EPOCHREALTIME
    awk -v a="$start" -v b="$end" -v k="$(tail -n 1 "$logs/rss")" 'BEGIN { printf "%.4f %.1f\n", b - a, k / 1024 }' >>"$logs/$name"
}

# synced NAME FILE...: makes the files durable and appends the time that the last run of NAME took together with this
synced() {
    local name=$1 start
    shift
    start=$EPOCHREALTIME
    sync "$@"
    awk -v a="$start" -v b="$EPOCHREALTIME" -v t="$(tail -n 1 "$logs/$name" | cut -d' ' -f1)" \
        'BEGIN { printf "%.4f\n", t + b - a }' >>"$logs/$name+sync"
}

warm() { cat "$@" >/dev/null; sync; }
median() { sort -g | awk '{ v[NR] = $1 } END { if (NR) printf "%.4f", NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'; }
seconds() { [ ! -f "$logs/$1" ] || cut -d' ' -f1 "$logs/$1" | median; }
memory() { [ ! -f "$logs/$1" ] || cut -d' ' -f2 "$logs/$1" | sort -g | tail -n 1; } # the largest
calc() { awk "BEGIN { printf \"$1\", $2 }"; }
bytes() { du -cbL "$@" | tail -n 1 | cut -f1; }
tensors() { "$bin" inspect "$1" --sha256 | grep -E '  [0-9a-f]{64}$' | awk '{ print $1, $2, $NF }' | sort; }

weights=("$model"/*.safetensors)
input=$(bytes "${weights[@]}")
rate_of_bytes() { calc "%.0f" "$1 / $2 / 1048576"; } # bytes, seconds -> MiB/s

bench() { # TARGET
    local dir rep t out base theirs same q two steps two_sync q_sync o copy copy_sync
    dir=$(mktemp -d "$1/ostq-bench.XXXXXX")
    made+=("$dir")
    rm -f "$logs"/*
    base=$dir/bf16.gguf theirs=$dir/theirs.gguf out=$dir/ours.gguf
    [ -n "$converter" ] || "$bin" "$model" "$base" --outtype bf16 --quiet
    : >"$logs/same"
    for rep in $(seq "$reps"); do
        rm -f "$dir"/copy.*
        warm "${weights[@]}"
        mkdir "$dir/copy.d"
        timed cp cp "${weights[@]}" "$dir/copy.d"
        synced cp "$dir"/copy.d/*
        rm -rf "$dir/copy.d"
        if [ -n "$converter" ]; then
            rm -f "$base"
            warm "${weights[@]}"
            timed convert "$converter" "$model" --outtype bf16 --outfile "$base"
            synced convert "$base"
        fi
        for t in bf16 $types; do
            rm -f "$out"
            warm "${weights[@]}"
            timed "ours-$t" "$bin" "$model" "$out" --type "$t" --threads "$threads" --quiet
            bytes "$out" >"$logs/size-$t"
            if [ "$t" = bf16 ] || [ "$t" = q8_0 ]; then
                rm -f "$out"
                warm "${weights[@]}"
                timed "ours-$t-bare" "$bin" "$model" "$out" --type "$t" --threads "$threads" --quiet --no-provenance
            fi
            if [ "$t" != bf16 ]; then
                rm -f "$theirs"
                warm "$base"
                timed "quantize-$t" "$quantize" "$base" "$theirs" "$t" "$threads"
                synced "quantize-$t" "$theirs"
                if [ "$rep" = "$reps" ]; then
                    same=different
                    ! cmp -s <(tensors "$out") <(tensors "$theirs") || same=same
                    echo "$t $same" >>"$logs/same"
                fi
                rm -f "$theirs"
            fi
            rm -f "$out"
        done
    done

    printf '\n### %s on %s, %s threads, %s repetitions\n\n' "$(basename "$model")" "$(stat -f -c %T "$1")" "$threads" "$reps"
    printf 'CPU %s; weights %s MiB; %s\n\n' "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)" "$((input >> 20))" "$("$bin" --version)"
    echo "| type | two steps, s | quantize, s | ours, s | two steps / ours | quantize / ours | +sync: two steps / ours | quantize / ours | tensors |"
    echo "|---|--:|--:|--:|--:|--:|--:|--:|---|"
    for t in $types; do
        o=$(seconds "ours-$t") q=$(seconds "quantize-$t") q_sync=$(seconds "quantize-$t+sync")
        two=- steps=- two_sync=-
        if [ -n "$converter" ]; then
            two=$(calc "%.2f" "$(seconds convert) + $q")
            steps=$(calc "%.2f" "$two / $o")
            two_sync=$(calc "%.2f" "($(seconds convert+sync) + $q_sync) / $o")
        fi
        printf '| %s | %s | %.2f | %.2f | %s | %s | %s | %s | %s |\n' "$t" "$two" "$q" "$o" "$steps" \
            "$(calc "%.2f" "$q / $o")" "$two_sync" "$(calc "%.2f" "$q_sync / $o")" "$(sed -n "s/^$t //p" "$logs/same")"
    done

    printf '\n| peak memory, MiB (largest) | convert | quantize | ours |\n|---|--:|--:|--:|\n'
    for t in $types; do
        printf '| %s | %s | %s | %s |\n' "$t" "$(memory convert)" "$(memory "quantize-$t")" "$(memory "ours-$t")"
    done

    copy=$(rate_of_bytes $((2 * input)) "$(seconds cp)") copy_sync=$(rate_of_bytes $((2 * input)) "$(seconds cp+sync)")
    printf '\n| read + written | MiB | s | MiB/s | of cp | of cp +sync |\n|---|--:|--:|--:|--:|--:|\n'
    printf '| cp | %s | %.2f | %s | 1.00 | |\n' $((2 * input >> 20)) "$(seconds cp)" "$copy"
    printf '| cp +sync | %s | %.2f | %s | | 1.00 |\n' $((2 * input >> 20)) "$(seconds cp+sync)" "$copy_sync"
    for t in bf16 bf16-bare q8_0 q8_0-bare; do
        [ -f "$logs/ours-$t" ] || continue
        steps=$((input + $(cat "$logs/size-${t%-bare}"))) o=$(seconds "ours-$t")
        q=$(rate_of_bytes "$steps" "$o")
        printf '| ours, %s | %s | %.2f | %s | %s | %s |\n' "${t/-bare/ --no-provenance}" $((steps >> 20)) "$o" "$q" \
            "$(calc "%.2f" "$q / $copy")" "$(calc "%.2f" "$q / $copy_sync")"
    done
    rm -rf "$dir"
    ! grep -q different "$logs/same" || { echo "tensors differ" >&2; exit 1; }
}

for target in "${targets[@]}"; do
    bench "$target"
done
