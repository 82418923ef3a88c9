#!/usr/bin/env bash
# Does it work on a GPU, and how fast? Everything in one call, under ten minutes, no network.
#   bash bench/gpu.sh
#   OUT=results COMMIT=$(git rev-parse HEAD) bash bench/gpu.sh --size 7b
#   bash bench/gpu.sh --device cpu --size tiny      (dry run of this script, about a minute)
# Needs python3 with torch; the package need not be installed. Each stage has its own limit, a
# failed one is recorded, the rest go on and the exit status is 1. At most 8 files go to $OUT
# (default bench/results). LIMIT bounds all of it in seconds, GPU_TESTS=0 leaves out the tests,
# ONLY="tests kernels" runs the stages whose names begin so: what one call has no time for; TUNED=1
# adds rounds with tuned tiles.
set -u
cd "$(dirname "$0")/.." || exit 2

DEVICE=cuda
SIZE=7b
while [ $# -gt 0 ]; do
  case "$1" in
    --device) DEVICE=${2:?--device needs cpu or cuda}; shift 2 ;;
    --size) SIZE=${2:?--size needs 7b, 8b, 13b, 1b, demo or tiny}; shift 2 ;;
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "gpu.sh: unknown argument $1; give --device or --size" >&2; exit 2 ;;
  esac
done

OUT=${OUT:-bench/results}
LIMIT=${LIMIT:-570} # seconds for everything
PYTHON=${PYTHON:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
SCRATCH=$(mktemp -d) || exit 2
trap 'rm -rf "$SCRATCH"' EXIT
# A cache of its own, so that the first run compiles cold and the later ones show what it saves.
export TORCHINDUCTOR_CACHE_DIR="$SCRATCH/inductor" TRITON_CACHE_DIR="$SCRATCH/triton"
mkdir -p "$OUT" || exit 2
LOG="$OUT/gpu_$DEVICE.txt"
: >"$LOG" || exit 2
STATUS="$SCRATCH/status"
: >"$STATUS"

# stage NAME SECONDS COMMAND...: run with a limit, output to the log, result recorded.
stage() {
  local name=$1 seconds=$2 left=$((LIMIT - SECONDS)) begin=$SECONDS code
  shift 2
  if [ -n "${ONLY:-}" ] && ! wanted "$name"; then return; fi
  [ "$seconds" -gt "$left" ] && seconds=$left
  echo "== $name: $*" | tee -a "$LOG"
  if [ "$seconds" -lt 15 ]; then
    code=skipped
    echo "skipped: $left s left" | tee -a "$LOG"
  else
    # The JSON line is in its own file; the log keeps tables and errors.
    timeout -k 5 "$seconds" "$@" 2>&1 | grep --line-buffered -v '^{"' | tee -a "$LOG"
    code=${PIPESTATUS[0]}
  fi
  echo "$name $code $((SECONDS - begin))" >>"$STATUS"
  echo "-- $name: exit $code after $((SECONDS - begin)) s" | tee -a "$LOG"
}

# wanted NAME: whether a word of $ONLY begins it.
wanted() {
  local word
  for word in $ONLY; do case "$1" in "$word"*) return 0 ;; esac; done
  return 1
}

importable() { "$PYTHON" -c "import $1" 2>/dev/null; }

gpu_tests() {
  if [ "${GPU_TESTS:-1}" = 0 ]; then
    echo "== tests: GPU_TESTS is 0; the GPU tests were not run" | tee -a "$LOG"
  elif ! importable pytest; then
    echo "== tests: pytest is not installed here; the GPU tests were not run" | tee -a "$LOG"
    echo "tests missing 0" >>"$STATUS"
  elif [ ! -d tests/gpu ]; then
    echo "== tests: there is no tests/gpu; nothing was run" | tee -a "$LOG"
    echo "tests missing 0" >>"$STATUS"
  else
    importable hypothesis || echo "hypothesis is not installed; tests that use it fail" | tee -a "$LOG"
    # Most of their time is compiling; several at once need an eighth of the time of one by one.
    local spread=()
    importable xdist && spread=(-n 7)
    TORCHINDUCTOR_COMPILE_THREADS=2 \
      stage tests 200 "$PYTHON" -m pytest -p no:cacheprovider "${spread[@]}" -m gpu tests/gpu
    sed -i 's/^tests 5 /tests missing /' "$STATUS" # pytest's way to say that it found none
  fi
}

rounds() { # rounds NAME SECONDS DTYPE MORE...: JSON in rounds_NAME.json
  local name=$1 seconds=$2 dtype=$3
  shift 3
  stage "rounds_$name" "$seconds" "$PYTHON" bench/rounds.py --size "$SIZE" --device "$DEVICE" \
    --dtype "$dtype" --out "$OUT/rounds_$name.json" "$@"
}

demo() { # demo SECONDS MORE...
  local seconds=$1 module
  shift
  for module in safetensors sentencepiece tokenizers huggingface_hub jinja2 tqdm; do
    if ! importable "$module"; then
      echo "== $module is not installed: random weights of the demo's shape instead" | tee -a "$LOG"
      stage rounds_demo "$seconds" "$PYTHON" bench/rounds.py --size demo --device "$DEVICE" \
        --dtype float32 --tree chain-5 --out "$OUT/rounds_demo.json"
      return
    fi
  done
  stage "demo_pair_$DEVICE" "$seconds" "$PYTHON" bench/demo_pair.py --device "$DEVICE" \
    --out "$OUT/demo_pair_$DEVICE.json" "$@"
}

kernels() { # kernels SECONDS MORE...
  local seconds=$1
  shift
  stage "kernels_$DEVICE" "$seconds" "$PYTHON" bench/kernels.py --device "$DEVICE" \
    --out "$OUT/kernels_$DEVICE.json" "$@"
}

drafters() { # drafters SECONDS MORE...: rounds of several drafters, SIMULATED acceptance
  local seconds=$1
  shift
  stage "drafters_$SIZE" "$seconds" "$PYTHON" bench/drafters.py --size "$SIZE" --device "$DEVICE" \
    --out "$OUT/drafters_$SIZE.json" "$@"
}

summary() {
  "$PYTHON" bench/summarize.py --status "$STATUS" --device "$DEVICE" --out "$OUT/gpu_summary.json" \
    "$OUT"/rounds_*.json "$OUT/demo_pair_$DEVICE.json" "$OUT/kernels_$DEVICE.json" \
    "$OUT/drafters_$SIZE.json" 2>&1 |
    tee -a "$LOG"
}

if [ "$DEVICE" = cpu ]; then
  gpu_tests
  rounds "${SIZE}_float32" 60 float32 --no-compile --repeats 3 --rounds 3 --contexts 128
  demo 60 --no-compile --prompts 1 --repeats 1 --max_new_tokens 16
  kernels 60 --shape 256x256 --repeats 2 --rounds 1 --rows 1 16 32
  drafters 60 --drafters eagle2 lookup --no-compile --repeats 2
  rounds "${SIZE}_int4" 60 bfloat16 --quantize int4 --no-compile --tree chain-3 --repeats 2 \
    --rounds 2 --contexts 64
else
  # What the project exists for comes first; an H200 took the seconds behind each line.
  nvidia-smi 2>&1 | tee -a "$LOG"
  rounds "${SIZE}_bfloat16" 200 bfloat16 --trace "$OUT/rounds_${SIZE}_trace.json.gz" # 87
  drafters 230 --dtype bfloat16 --drafters eagle_chain eagle_tree eagle2 lookup      # 146
  rounds "${SIZE}_int4" 160 bfloat16 --quantize int4 --tree chain-5 --contexts 128   # 72
  gpu_tests # 203, beside others
  kernels 110 --seconds 90
  demo 120 # 81
  # Tuned tiles turn one-row products into generated kernels, as gpt-fast does.
  if [ "${TUNED:-0}" = 1 ]; then
    TORCHINDUCTOR_COORDINATE_DESCENT_TUNING=1 \
      rounds "${SIZE}_bfloat16_tuned" 240 bfloat16 --contexts 128
  fi
fi
summary
! grep -qv -e " 0 " -e " missing " "$STATUS"
