#!/usr/bin/env bash
# Every GPU number of the README, in under nine minutes: `bash bench/gpu.sh [DEVICE] [PYTHON]`, default cuda python3.
# Needs torch, torchvision, OpenCV, scikit-image and tqdm, no network, no tensorboardX. `bash bench/gpu.sh cpu` rehearses
# it with few steps. The output is the record; numbers.json and gpu.log lie in $OUT, or in the working directory.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
device=${1:-cuda}
python=${2:-python3}
out=${OUT:-$PWD}

steps=1000 curve=2000 batch=64 small=16 only=()
if [ "$device" = cpu ]; then
    steps=4 curve=10 batch=2 small=2 only=(--only training --repeats 1)
fi
failed=0
part() {  # name, command...
    printf '\n== %s (at %d s)\n%s\n' "$1" "$SECONDS" "${*:2}"
    "${@:2}" || { echo "== $1 FAILED"; failed=1; }
}

{
    part "the product is right on $device" "$python" -m pytest -q -p no:cacheprovider "$root/tests/test_model.py" \
        "$root/tests/test_groupy.py" "$root/tests/test_windows.py" "$root/tests/test_devices.py"
    part "times and memory" "$python" "$root/bench/bench.py" --device "$device" --json "$out/numbers.json" "${only[@]}"
    part "the paper's training" "$python" "$root/bench/trainings.py" run --device "$device" --steps "$steps" \
        --batch_size "$batch" --compile off
    part "the same, compiled" "$python" "$root/bench/trainings.py" run --device "$device" --steps "$steps" \
        --batch_size "$batch" --compile on
    part "the same, rain drawn while training" "$python" "$root/bench/trainings.py" run --device "$device" \
        --steps "$((steps / 4 > 1 ? steps / 4 : 2))" --batch_size "$batch" --compile off --rain rain100h
    part "images in bf16" "$python" "$root/bench/trainings.py" outputs --device "$device" \
        -m "$root/models/sdsen_rain800.pth"
    part "PSNR of bf16 and float32" "$python" "$root/bench/trainings.py" curve --device "$device" --steps "$curve" \
        --batch_size "$small"
    printf '\n== done after %d s\n' "$SECONDS"
    exit $failed
} 2>&1 | tee "$out/gpu.log"
