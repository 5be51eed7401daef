#!/bin/sh
# What transforms are worth: KL divergence of every preset in every type, rounded to nearest (with importance and our search of
# scales), with GPTQ and, if TUNE is above 0, with GPTQ and so many steps of tuning. One row for each preset, one column for each
# type and rounding.
#
#   benches/transforms.sh MODEL CALIBRATION EVALUATION [TYPE...]
#
# MODEL is a checkpoint folder. A type is one of `--list-types`, taken for all matrices (--pure); `int4` is one scale for each row
# of the layers' matrices (Q4_0 with --row-scales), embedding and head in F16.
#
# From the environment: PRESETS; TOKENS of calibration; STEPS of learning, of BATCH windows; CHUNKS of evaluation; TUNE steps, DEVICE
# of learning and tuning; JOBS cells side by side, each with THREADS; RESULTS, a file that cells are added to: those that are in it are not made
# again.
set -eu
ours=${OURS:-target/release/ostq-convert}
export OURS="$ours" TOKENS="${TOKENS:-131072}" STEPS="${STEPS:-100}" BATCH="${BATCH:-8}" TUNE="${TUNE:-0}" THREADS="${THREADS:-$(nproc)}"
export CHUNKS="${CHUNKS:-}" DEVICE="${DEVICE:-cpu}" RESULTS="${RESULTS:-}"

# the transforms of a preset for a type, as an argument of --transform
transform() {
    case $1 in
    none) echo none && return ;;
    spinquant | ostquant)
        for_type=$2
        [ "$2" != int4 ] || for_type=w4a16
        "$ours" learn "$MODEL" -o "$work/t" --method "$1" --for "$for_type" --steps "$STEPS" --batch "$BATCH" --calibrate "$CALIBRATION" \
            --calibrate-tokens "$TOKENS" --threads "$THREADS" --device "$DEVICE" --force --quiet
        ;;
    *)
        for_type=$2
        [ "$2" != int4 ] || for_type=q4_0
        "$ours" transform "$MODEL" -o "$work/t" --preset "$1" --for "$for_type" --calibrate "$CALIBRATION" --threads "$THREADS" --force --quiet
        ;;
    esac
    echo "$work/t"
}

# one preset in one type: a line of RESULTS
cell() {
    preset=$1 type=$2
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    t=$(transform "$preset" "$type")
    as=$type
    [ "$type" != int4 ] || as="q4_0 --row-scales --token-embedding-type f16 --output-tensor-type f16"
    common="-t $as --pure --transform $t --calibrate $CALIBRATION --calibrate-tokens $TOKENS --threads $THREADS --force --quiet"
    # shellcheck disable=SC2086
    "$ours" "$MODEL" "$work/nearest.gguf" $common --rounding nearest
    # shellcheck disable=SC2086
    "$ours" "$MODEL" "$work/gptq.gguf" $common --keep-state
    files="$work/nearest.gguf $work/gptq.gguf"
    if [ "$TUNE" != 0 ]; then
        # what the state holds is tuned on
        cp "$work/gptq.gguf" "$work/gptq-alone.gguf"
        # shellcheck disable=SC2086
        "$ours" "$MODEL" "$work/gptq.gguf" $common --tune "$TUNE" --device "$DEVICE"
        files="$work/nearest.gguf $work/gptq-alone.gguf $work/gptq.gguf"
    fi
    # shellcheck disable=SC2086
    "$ours" check "$MODEL" $files --text "$EVALUATION" ${CHUNKS:+--chunks $CHUNKS} --threads "$THREADS" --quiet --json >"$work/check.json"
    python3 - "$preset" "$type" "$work/check.json" >>"$RESULTS" <<'PYTHON'
import json, sys
klds = ("%.5f" % m["summary"]["kld"]["value"] for m in json.load(open(sys.argv[3]))["models"])
print(*sys.argv[1:3], *klds)
PYTHON
}

if [ "$1" = --cell ]; then
    cell "$2" "$3"
    exit
fi
export MODEL="$1" CALIBRATION="$2" EVALUATION="$3"
shift 3
[ $# -gt 0 ] || set -- q4_0 iq4_nl q4_k q3_k q2_k int4
presets=${PRESETS:-none smoothquant awq quarot womi spinquant ostquant}
if [ -z "$RESULTS" ]; then
    RESULTS=$(mktemp)
    trap 'rm -f "$RESULTS"' EXIT
fi
touch "$RESULTS"
failed=0
for type in "$@"; do
    for preset in $presets; do
        grep -q "^$preset $type " "$RESULTS" || echo "$preset $type"
    done
done | xargs -r -P "${JOBS:-1}" -L 1 "$0" --cell || failed=1

printf '| preset |' && printf ' %s |' "$@" && printf '\n|---|' && printf -- '---|%.0s' "$@" && printf '\n'
for preset in $presets; do
    printf '| %s |' "$preset"
    for type in "$@"; do
        printf ' %s |' "$(sed -n "s/^$preset $type //p" "$RESULTS" | head -n 1 | sed 's/ /, /g')"
    done
    printf '\n'
done
[ "$failed" = 0 ] || { echo "some cells were not made" >&2; exit 1; }
