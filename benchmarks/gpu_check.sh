#!/usr/bin/env bash
# Everything that only a GPU can confirm, in one command and under nine minutes.
#
#   bash benchmarks/gpu_check.sh [--seconds 540] [--out benchmarks/results]
#
# Builds for the device at hand, runs the tests that need one, compute-sanitizer over every kernel,
# the matrix of transforms, capture and replay, and the benchmarks as long as time is left. A step
# that fails does not stop the later ones. Writes gpu_DATE_DEVICE.json, prints the table last.
# Exit status: 0 all well, 1 a step failed, 2 no GPU. PYTHON chooses the interpreter.

PYTHON=${PYTHON:-python}
BUDGET=540  # seconds
LEAST=5     # a step is not begun with less time left
CLOSING=10  # kept for the report

remaining() { echo $((DEADLINE - $(date +%s))); }

begin() { # FOLDER: where the logs go; the clock starts
  LOGS=$1
  DEADLINE=$(($(date +%s) + BUDGET - CLOSING))
  STEPS=$LOGS/steps.tsv
  : >"$STEPS"
}

record() { # NAME STATUS SECONDS REMARK
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >>"$STEPS"
  printf '%-28s %-10s %4s s  %s\n' "$1" "$2" "$3" "$4"
}

# Runs a command for at most LIMIT seconds, or as long as the budget lasts, and records how it ended.
# With FAILURE=skipped in front, a failure is no fault of ours and does not count.
step() { # NAME LIMIT COMMAND...
  local name=$1 limit=$2 left log start status code last
  shift 2
  left=$(remaining)
  if ((left < LEAST)); then
    record "$name" "no time" 0 "the budget of $BUDGET s is spent"
    return 1
  fi
  ((limit > left)) && limit=$left
  log=$LOGS/${name//[^a-zA-Z0-9]/_}.log
  start=$(date +%s)
  timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1
  code=$?
  case $code in
    0) status=ok ;;
    124 | 137) status=${FAILURE:-"timed out"} ;;
    *) status=${FAILURE:-failed} ;;
  esac
  last=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | tr '\t' ' ' | cut -c 1-160)
  record "$name" "$status" $(($(date +%s) - start)) "$last"
  [[ $status == ok ]]
}

skip() { record "$1" skipped 0 "$2"; }

need_gpu() {
  if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo "gpu_check: no NVIDIA GPU here (nvidia-smi lists none); nothing was done" >&2
    exit 2
  fi
  if ! "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu_check: $PYTHON has no torch that sees the GPU; nothing was done" >&2
    exit 2
  fi
}

sanitize() {
  local tool limit
  if ! command -v compute-sanitizer >/dev/null; then
    skip "compute-sanitizer" "not on PATH"
    return
  fi
  # on some machines the tool is there and may not attach
  FAILURE=skipped step "sanitizer probe" 45 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$PYTHON" -c 'import torch; print(torch.ones(3, device="cuda").sum())' || {
    skip "sanitizer tools" "the probe failed: compute-sanitizer does not work on this machine"
    return
  }
  for tool in memcheck racecheck synccheck initcheck; do
    step "$tool" 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --error-exitcode 9 --kernel-regex kns=birl "$PYTHON" benchmarks/touch_kernels.py --brief
  done
}

main() {
  local out=benchmarks/results word architecture left work status
  while (($#)); do
    word=$1
    case $word in
      --seconds) BUDGET=$2 ;;
      --out) out=$2 ;;
      *)
        echo "usage: bash benchmarks/gpu_check.sh [--seconds 540] [--out DIR]" >&2
        exit 64
        ;;
    esac
    shift 2
  done
  need_gpu
  out=$(mkdir -p "$out" && cd "$out" && pwd)
  cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  begin "$work"
  architecture=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')

  step "build for sm_$architecture" 240 env BIRL_REQUIRE_EXT=1 "$PYTHON" -m pip install \
    --no-build-isolation --no-deps --disable-pip-version-check -Cbuild-dir=build/gpu \
    -Ccmake.define.BIRL_CUDA=ON "-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=$architecture" -e .
  step "compiled module loads" 60 "$PYTHON" -c \
    'from birl_ext.ops.backends import loader; import sys; sys.exit(loader.reason("cuda") or 0)'
  step "every kernel agrees" 60 "$PYTHON" benchmarks/touch_kernels.py
  step "capture and replay" 60 "$PYTHON" benchmarks/touch_kernels.py --graph --brief
  step "GPU tests" 120 "$PYTHON" -m pytest -q -m cuda -p no:cacheprovider
  step "transforms" 90 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_transforms.py
  sanitize
  left=$(remaining)
  step "benchmarks" "$left" "$PYTHON" -m birl_ext bench --device cuda \
    --seconds $((left * 6 / 10)) --out "$work/suite"
  "$PYTHON" benchmarks/gpu_report.py --steps "$STEPS" --logs "$work" --suite "$work/suite" \
    --out "$out"
  status=$?
  if ((status == 0)) && cut -f 2 "$STEPS" | grep -qvx -e ok -e skipped; then
    status=1
  fi
  exit "$status"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  main "$@"
fi
