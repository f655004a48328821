#!/usr/bin/env bash
# All GPU numbers of docs/SPEED.md, in under four minutes on an H200: `bash bench/gpu.sh [DEVICE] [PYTHON]`, by default
# cuda and python3. `bash bench/gpu.sh cpu` rehearses it with tiny sizes and few steps. A part that fails, or exceeds the
# time limit, does not stop the others; the exit status is 1 then.
# Needs torch, torchvision, OpenCV, scikit-image, tqdm and pytest, no network. Ends with the table of targets; writes
# numbers.json and gpu.log to $OUT, or to the working directory.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
device=${1:-cuda}
python=${2:-python3}
out=${OUT:-$PWD}
numbers=$out/numbers.json

limit=230 tests=cuda bench=() paper=(--steps 200) outputs=() curve=(-p sdsen_s2 --steps 400 --batch_size 16)
if [ "$device" = cpu ]; then
    small=(--batch_size 2 -p sdsen_s2 --val_images 1)
    limit=600 tests="groupys and cpu" bench=(--rehearse --repeats 1) paper=(--steps 4 "${small[@]}")
    outputs=(--images 1) curve=(--steps 10 "${small[@]}")
fi
failed=0
part() {  # name, command...
    printf '\n== %s (at %d s)\n%s\n' "$1" "$SECONDS" "${*:2}"
    timeout --kill-after=5 "$((SECONDS < limit ? limit - SECONDS : 1))" "${@:2}" || {
        echo "== $1 FAILED"
        failed=1
    }
}
trainings() {  # name, arguments...
    part "$1" "$python" "$root/bench/trainings.py" "${@:2}" --device "$device" --json "$numbers"
}

rm -f "$numbers"
{
    part "tests on $device" "$python" -m pytest -q -o addopts= -p no:cacheprovider -k "$tests" "$root/tests"
    part "times and memory" "$python" "$root/bench/bench.py" --device "$device" --json "$numbers" \
        --only inference images training data convolutions steps "${bench[@]}"
    trainings "the paper's training" run "${paper[@]}"
    trainings "images in 16 bits" outputs -m "$root/models/rain800.pth" "${outputs[@]}"
    trainings "PSNR of bf16 and float32" curve "${curve[@]}"
    printf '\n== done after %d s\n\n' "$SECONDS"
    "$python" "$root/bench/report.py" "$numbers"
    exit $failed
} 2>&1 | tee "$out/gpu.log"
