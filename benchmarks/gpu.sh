#!/bin/sh
# All that a machine with a GPU is wanted for, in half an hour: benchmarks/gpu.sh [FOLDER [STAGE ...]]
#
# FOLDER (default: gpu-run) gets a log of every stage, gpu.json, GPU.md and profiles. Stages, in this
# order unless they are named; none of them stops those after it, and each ends in time:
#
#   setup     1 min   the device, versions, and klfast installed from this checkout
#   smoke     2 min   every measure, with gradients, of two small shapes, without peers
#   test      7 min   pytest -m gpu
#   sanitize  7 min   memory errors and races, on calls that launch every kernel in each of its ways
#   bench     9 min   benchmarks/gpu.py: klfast at every shape, then its peers while there is time
#   profile   3 min   ncu on one launch of each kernel that reads rows
#
# Where a command may not take longer than ten minutes: setup smoke; test; sanitize; bench; profile.
# PYTHON=... names another interpreter.

cd "$(dirname "$0")/.." || exit 1
folder=$(mkdir -p "${1:-gpu-run}" && cd "${1:-gpu-run}" && pwd) || exit 1
[ $# -gt 0 ] && shift
python=${PYTHON:-python3}
failed=""
export PYTHONUNBUFFERED=1

# run NAME SECONDS COMMAND ...: with a log, and its end on the screen.
run() {
    name=$1
    seconds=$2
    shift 2
    echo "--- $name"
    begin=$(date +%s)
    timeout -k 10 "$seconds" "$@" > "$folder/$name.log" 2>&1
    status=$?
    tail -n 25 "$folder/$name.log"
    echo "--- $name: exit status $status after $(($(date +%s) - begin)) s"
    [ $status -eq 0 ] || failed="$failed $name"
    return $status
}

setup() {
    run device 30 nvidia-smi
    "$python" -c "import klfast.kernels.cuda" 2> /dev/null ||
        run install 120 "$python" -m pip install --no-index --no-build-isolation --no-deps -e .
    run backends 60 "$python" -c "
import klfast
from klfast.kernels import cuda
print(klfast.backends())
print(cuda.info())
assert klfast.backends()['cuda']
"
}

smoke() {
    run smoke 150 "$python" benchmarks/gpu.py --quick --peers klfast --out "$folder/smoke"
}

# Warnings of what is installed here are none of klfast's; kernels compile in several processes.
test_all() {
    workers=""
    "$python" -c "import xdist" 2> /dev/null && workers="-n 8"
    # shellcheck disable=SC2086
    run test 420 "$python" -m pytest -m gpu -q -W default --maxfail 30 --durations 15 $workers
}

sanitize() {
    if ! command -v compute-sanitizer > /dev/null; then
        echo "--- sanitize: no compute-sanitizer on the path"
        return
    fi
    run every_kernel 150 "$python" tests/cuda/every_kernel.py # compiles
    for tool in memcheck racecheck synccheck; do
        run "$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            --target-processes application-only "$python" tests/cuda/every_kernel.py
    done
}

bench() {
    run bench 570 "$python" benchmarks/gpu.py --minutes 8 --out "$folder"
}

profile() {
    if ! command -v ncu > /dev/null; then
        echo "--- profile: no ncu on the path"
        return
    fi
    cat > "$folder/calls.py" <<'EOF'
import torch
import klfast

torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    p = 2.5 * torch.randn(2048, 128256, device="cuda")
    q = (p + 0.1 * torch.randn_like(p)).to(dtype)
    p = p.to(dtype)
    klfast.kl_divergence(p, q)
    klfast.js_divergence(p, q)
    klfast.compare(p, q)
    klfast.entropy(p)
    klfast.value_and_grad("kl", p, q)
    klfast.value_and_grad("js", p, q, wrt="both")
torch.cuda.synchronize()
EOF
    run calls 60 "$python" "$folder/calls.py" # compiles
    run profile 150 ncu --clock-control none --section SpeedOfLight --section LaunchStats \
        --section Occupancy --section MemoryWorkloadAnalysis --section WarpStateStats \
        --kernel-name "regex:^(one_pass|two_phase|single_pass|gradients)$" \
        "$python" "$folder/calls.py"
}

[ $# -gt 0 ] || set -- setup smoke test sanitize bench profile
for stage in "$@"; do
    case $stage in
    test) test_all ;;
    setup | smoke | sanitize | bench | profile) "$stage" ;;
    *)
        echo "benchmarks/gpu.sh: no stage $stage" >&2
        exit 2
        ;;
    esac
done
if [ -n "$failed" ]; then
    echo "failed:$failed"
    exit 1
fi
