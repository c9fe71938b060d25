#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one and maybe no package index:
#
#     bash bench/gpu_check.sh [versions|build|smoke|values|kernels|steps|iteration|sanitize|profile|all]...
#
# "all", the default, is all but the profile, in this order. Steps go on after one that failed; the last lines of the
# output say what each one came to, and the exit status is not 0 when one failed. What takes longer than DEADLINE is cut
# off: what was measured until then is in the JSON. A call for each step fits a machine that is lent for minutes:
#
#     DEADLINE=300 bash bench/gpu_check.sh build smoke
#
# A log a kind, gpu-<section>.json and gpu.md go to $OUT; kernels that Triton compiled stay in $TRITON_CACHE_DIR. Environment:
# DEADLINE=3600 (seconds of the whole call), OUT=gpu_check, PYTHON=python3, TESTS (for pytest, such as "-x -k graph"),
# WORKERS=14 (processes of the value tests), TOOLS (of compute-sanitizer), COMMIT (where the tree is a copy without its
# history), and DRY_RUN=1: on a machine without a GPU, tiny benches on the CPU, a few tests, no tool of NVIDIA's.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
OUT=${OUT:-gpu_check} PYTHON=${PYTHON:-python3} DEADLINE=${DEADLINE:-3600} TESTS=${TESTS:-} WORKERS=${WORKERS:-14}
DRY_RUN=${DRY_RUN:-} TOOLS=${TOOLS:-memcheck racecheck synccheck initcheck}
mkdir -p "$OUT" || exit 2
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
summary=() failures=0

# run NAME LOG COMMAND...: append the output to $OUT/LOG, show its last lines, note how it ended.
run() {
    local name=$1 log=$OUT/$2 start=$SECONDS left=$((DEADLINE - SECONDS)) code word=ok
    shift 2
    if ((left < 5)); then summary+=("skipped $name: no time is left") failures=$((failures + 1)) && return; fi
    printf '\n== %s: %s\n' "$name" "$*" | tee -a "$log"
    timeout --kill-after=5 "$left" "$@" 2>&1 | tee -a "$log" | tail -n 25 | cut -c1-300
    code=${PIPESTATUS[0]}
    # pytest's 5: no test was selected.
    if ((code == 5)); then word=skipped; elif ((code)); then word=FAILED failures=$((failures + 1)); fi
    summary+=("$(printf '%-8s%s: exit status %s, %s s, see %s' "$word" "$name" "$code" $((SECONDS - start)) "$log")")
}

# tool NAME LOG COMMAND...: where the command is there, and a GPU.
tool() {
    if [[ -z $DRY_RUN ]] && command -v "$3" >/dev/null; then run "$@"; else summary+=("skipped $1"); fi
}

versions() {
    tool nvidia-smi build.log nvidia-smi
    tool nvcc build.log nvcc --version
    run versions build.log "$PYTHON" -m torch.utils.collect_env
}

build() { # for the GPU that is here and no other: minutes less
    local arch
    arch=$("$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))' 2>/dev/null)
    tool "build for $arch" build.log env SHARPKERN_CUDA=1 TORCH_CUDA_ARCH_LIST="$arch" \
        "$PYTHON" setup.py build_ext --inplace
    run "what was built" build.log "$PYTHON" -m sharpkern info
}

# shellcheck disable=SC2086  # TESTS and TOOLS are lists of words
tests() { # tests LOG PROCESSES ARGUMENTS...; one thread each is what the tests are written for
    local many=()
    if [[ -z $DRY_RUN ]] && "$PYTHON" -c 'import xdist' 2>/dev/null; then many=(-n "$2" --dist worksteal); fi
    OMP_NUM_THREADS=1 run "pytest ${*:3}" "$1" "$PYTHON" -m pytest -q -p no:cacheprovider "${many[@]}" "${@:3}" $TESTS
}

smoke() { # launches, graphs, streams: what no other machine shows
    tests test.log 4 tests/test_gpu.py tests/test_analysis.py -m gpu -k "not values"
}

values() { # the other files' tests, on the device, a process a file; or a few here
    if [[ -z $DRY_RUN ]]; then tests test.log "$WORKERS" tests/test_gpu.py -m gpu -k values
    else tests test.log 1 tests/test_policy.py; fi
}

sanitize() { # the caching allocator hides what lies outside a tensor
    for name in $TOOLS; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 tool "$name" sanitize.log compute-sanitizer --tool "$name" \
            --error-exitcode 9 --print-limit 20 --target-processes all \
            "$PYTHON" -m pytest -q -x -p no:cacheprovider tests -m "gpu and sanitize"
    done
}

bench() { # bench SECTIONS: each into a file of its own, all of which are rendered
    run "bench $1" bench.log "$PYTHON" -m bench --device cuda ${DRY_RUN:+--dry-run} --out "$OUT/gpu-$1.json" --sections "$1"
    for results in "$OUT"/gpu-*.json; do
        [[ ! -f $results ]] || "$PYTHON" -m bench.render "$results"
    done | tee "$OUT/gpu.md"
}

profile() { # the program starts the profiler itself, once everything is warm
    tool profile profile.log ncu --profile-from-start off --clock-control none --set full --force-overwrite \
        --export "$OUT/profile" "$PYTHON" -m bench.ops
    tool profile.csv profile.csv ncu --import "$OUT/profile.ncu-rep" --page details --csv
}

[[ $# -gt 0 ]] || set -- all
[[ $* != all ]] || set -- versions build smoke values kernels steps iteration sanitize
for step in "$@"; do
    case $step in
        versions | build | smoke | values | sanitize | profile) "$step" ;;
        kernels | steps | iteration) bench "$step" ;;
        *) echo "usage: see the top of bench/gpu_check.sh" >&2 && exit 2 ;;
    esac
done
printf '\n== summary, logs in %s\n' "$OUT"
printf '%s\n' "${summary[@]}" "$failures failed"
((failures == 0))
