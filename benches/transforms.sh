#!/bin/sh
# What transforms are worth: KL divergence of every preset in every type, rounded to nearest (with importance), with GPTQ and, if
# TUNE is above 0, with GPTQ and so many steps of tuning. One row for each preset, one column for each type and rounding.
#
#   benches/transforms.sh MODEL CALIBRATION EVALUATION [TYPE...]
#
# MODEL is a checkpoint folder. A type is one of `--list-types`, taken for all matrices (--pure); `int4` is one scale for each row,
# simulated and rounded to nearest. From the environment: PRESETS, TOKENS of calibration, STEPS of learning, CHUNKS of evaluation,
# DEVICE of tuning.
set -eu
model=$1 calibration=$2 evaluation=$3
shift 3
[ $# -gt 0 ] || set -- q4_0 iq4_nl q4_k q3_k q2_k int4
ours=${OURS:-target/release/ostq-convert}
presets=${PRESETS:-none smoothquant awq quarot womi spinquant ostquant}
tokens=${TOKENS:-131072} steps=${STEPS:-100} tune=${TUNE:-0}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# KLD of files, one line each
kld() {
    "$ours" check "$model" "$@" --text "$evaluation" ${CHUNKS:+--chunks $CHUNKS} --quiet --json |
        python3 -c 'import json, sys; [print("%.5f" % m["summary"]["kld"]["value"]) for m in json.load(sys.stdin)["models"]]'
}

# the transforms of a preset for a type, as an argument of --transform
transform() {
    case $1 in
    none) echo none && return ;;
    spinquant | ostquant)
        for_type=$2
        [ "$2" != int4 ] || for_type=w4a16
        "$ours" learn "$model" -o "$work/t" --method "$1" --for "$for_type" --steps "$steps" --calibrate "$calibration" \
            --calibrate-tokens "$tokens" --force --quiet
        ;;
    *)
        for_type=$2
        [ "$2" != int4 ] || for_type=q4_0
        "$ours" transform "$model" -o "$work/t" --preset "$1" --for "$for_type" --calibrate "$calibration" --force --quiet
        ;;
    esac
    echo "$work/t"
}

printf '| preset |' && for type in "$@"; do
    [ "$type" = int4 ] && printf ' int4, nearest |' && continue
    printf ' %s, nearest | GPTQ |' "$type"
    [ "$tune" = 0 ] || printf ' tuned |'
done
printf '\n'
for preset in $presets; do
    printf '| %s |' "$preset"
    for type in "$@"; do
        t=$(transform "$preset" "$type")
        if [ "$type" = int4 ]; then
            "$ours" "$model" "$work/f32.gguf" -t f32 --transform "$t" --force --quiet
            printf ' %s |' "$(kld "$work/f32.gguf" --activations w4a16)"
            continue
        fi
        common="-t $type --pure --transform $t --calibrate $calibration --calibrate-tokens $tokens --force --quiet"
        # shellcheck disable=SC2086
        "$ours" "$model" "$work/nearest.gguf" $common --rounding nearest
        # shellcheck disable=SC2086
        "$ours" "$model" "$work/gptq.gguf" $common --keep-state
        files="$work/nearest.gguf $work/gptq.gguf"
        if [ "$tune" != 0 ]; then
            # what the state holds is tuned on
            cp "$work/gptq.gguf" "$work/gptq-alone.gguf"
            # shellcheck disable=SC2086
            "$ours" "$model" "$work/gptq.gguf" $common --tune "$tune" ${DEVICE:+--device "$DEVICE"}
            files="$work/nearest.gguf $work/gptq-alone.gguf $work/gptq.gguf"
        fi
        rm -rf "$work/gptq.gguf.ostq-state"
        # shellcheck disable=SC2046,SC2086
        printf ' %s |' $(kld $files)
    done
    printf '\n'
done
