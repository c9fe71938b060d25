#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one and maybe no package index:
#
#     bash bench/gpu_check.sh [versions|build|gpu|test|sanitize|bench|profile|all]...
#
# "all", the default, is all but the profile. Steps go on after one that failed; the last lines of the output say
# what each one came to, and the exit status is not 0 when one failed. Logs and results go to $OUT.
#
#   OUT=gpu_check      folder for logs, gpu.json and gpu.md
#   PYTHON=python3     interpreter that has torch
#   LIMIT=540          seconds that one command may take
#   SECTIONS=          of the benches, such as kernels,steps; default: all of them
#   TESTS=             more arguments for pytest, such as "-x -k graph"
#   TOOLS=             of compute-sanitizer; default: memcheck racecheck synccheck initcheck
#   COMMIT=            for the results, where the tree is a copy without its history
#   DRY_RUN=1          on a machine without a GPU: tiny benches on the CPU, a few tests, no tool of NVIDIA's
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

OUT=${OUT:-gpu_check}
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-540}
SECTIONS=${SECTIONS:-}
TESTS=${TESTS:-}
TOOLS=${TOOLS:-memcheck racecheck synccheck initcheck}
DRY_RUN=${DRY_RUN:-}
mkdir -p "$OUT" || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

summary=()
failures=0

note() { # note WORD WHAT: a line of the summary
    summary+=("$(printf '%-9s %s' "$1" "$2")")
    printf '== %s: %s\n' "$1" "$2"
}

# run NAME LOG COMMAND...: append the output to $OUT/LOG, show its last lines, note how it ended.
run() {
    local name=$1 log=$OUT/$2 start=$SECONDS code seen
    shift 2
    printf '\n== %s: %s\n' "$name" "$*" | tee -a "$log"
    seen=$(wc -l <"$log")
    timeout --kill-after=20 "$LIMIT" "$@" >>"$log" 2>&1
    code=$?
    tail -n "+$((seen + 1))" "$log" | tail -n "${LINES_SHOWN:-25}" | cut -c1-300
    case $code in
        0) note ok "$name, $((SECONDS - start)) s" ;;
        124 | 137) note FAILED "$name: stopped after $LIMIT s, see $log" ;;
        *) note FAILED "$name: exit status $code, $((SECONDS - start)) s, see $log" ;;
    esac
    ((code == 0)) || failures=$((failures + 1))
    return "$code"
}

# have TOOL: whether it can be run; says so where it cannot.
have() {
    if [[ -n $DRY_RUN ]]; then
        note skipped "$1 (dry run)"
    elif command -v "$1" >/dev/null; then
        return 0
    else
        note skipped "$1 not found"
    fi
    return 1
}

pytest_() { # pytest_ NAME LOG ARGUMENTS...: no test selected is no failure, but is said
    local code
    # shellcheck disable=SC2086  # TESTS is a list of words
    run "$1" "$2" "$PYTHON" -m pytest -q -p no:cacheprovider "${@:3}" $TESTS
    code=$?
    if ((code == 5)); then
        failures=$((failures - 1))
        unset 'summary[-1]'
        note skipped "$1: no test was selected"
    fi
}

versions() {
    if have nvidia-smi; then
        run nvidia-smi versions.log nvidia-smi \
            --query-gpu=name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,temperature.gpu --format=csv
    fi
    if have nvcc; then run nvcc versions.log nvcc --version; fi
    run versions versions.log "$PYTHON" - <<'PYTHON'
import importlib.metadata, platform, torch
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
for name in ("triton", "pybind11", "ninja", "setuptools", "pytest", "pytest-benchmark", "pytorch_optimizer"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "not found")
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
PYTHON
}

build() {
    if [[ -n $DRY_RUN ]]; then
        note skipped "build (dry run)"
        return
    fi
    # For the GPU that is here and no other: minutes less.
    local arch
    arch=$("$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') || arch=
    if [[ -z $arch ]]; then
        note FAILED "build: no CUDA device"
        failures=$((failures + 1))
        return
    fi
    SHARPKERN_CUDA=1 TORCH_CUDA_ARCH_LIST=$arch run "build for $arch" build.log \
        "$PYTHON" setup.py build_ext --inplace
    run "what was built" build.log "$PYTHON" -c \
        'import sharpkern as sk; print(sk.build_info()); print("cuda:", sk.available_backends("cuda"))'
}

gpu() {
    if [[ -n $DRY_RUN ]]; then
        pytest_ "tests that need a GPU, dry" test-gpu.log tests/test_gpu.py -m gpu
        return
    fi
    pytest_ "tests that need a GPU" test-gpu.log tests -m gpu
}

tests() {
    if [[ -n $DRY_RUN ]]; then
        TRITON_INTERPRET=1 pytest_ "tests, dry" test.log tests/test_bench.py -k "totals or small_tensors or bytes"
        return
    fi
    # On the CPU's cores beside the GPU: one thread each is what the tests are written for.
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} pytest_ "all tests" test.log tests -m "not gpu"
}

sanitize() {
    local tool
    have compute-sanitizer || return
    for tool in $TOOLS; do
        # The caching allocator hides what lies outside a tensor; pytest's own exit status comes through.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 LINES_SHOWN=15 run "$tool" sanitize.log \
            compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 --target-processes all \
            "$PYTHON" -m pytest -q -x -p no:cacheprovider tests -m "gpu and sanitize"
        if (($? == 5)); then
            failures=$((failures - 1))
            unset 'summary[-1]'
            note skipped "sanitize: no test is marked gpu and sanitize"
            return
        fi
    done
}

bench() {
    local options=(--device cuda --out "$OUT/gpu.json")
    [[ -z $SECTIONS ]] || options+=(--sections "$SECTIONS")
    [[ -z $DRY_RUN ]] || options+=(--dry-run)
    [[ -z $DRY_RUN ]] || export TRITON_INTERPRET=${TRITON_INTERPRET:-1}
    # What was measured before a time limit is in the JSON, and is rendered.
    LINES_SHOWN=5 run bench bench.log "$PYTHON" -m bench "${options[@]}"
    if [[ -f $OUT/gpu.json ]]; then
        "$PYTHON" -m bench.render "$OUT/gpu.json" >"$OUT/gpu.md" && cat "$OUT/gpu.md"
    fi
}

profile() {
    have ncu || return
    # The program starts the profiler itself, once everything is warm.
    run ncu profile.log ncu --profile-from-start off --clock-control none --set full --force-overwrite \
        --export "$OUT/profile" "$PYTHON" -m bench.gpu.profile
    if [[ -f $OUT/profile.ncu-rep ]]; then
        ncu --import "$OUT/profile.ncu-rep" --page details --csv >"$OUT/profile.csv" || note FAILED "profile.csv"
    fi
}

[[ $# -gt 0 ]] || set -- all
for step in "$@"; do
    case $step in
        versions | build | gpu | sanitize | bench | profile) "$step" ;;
        test) tests ;;
        all)
            versions
            build
            gpu
            tests
            sanitize
            bench
            ;;
        *)
            echo "usage: bash bench/gpu_check.sh [versions|build|gpu|test|sanitize|bench|profile|all]..." >&2
            exit 2
            ;;
    esac
done

printf '\n== summary, logs in %s\n' "$OUT"
printf '%s\n' "${summary[@]}"
printf '%s failed\n' "$failures"
((failures == 0))
