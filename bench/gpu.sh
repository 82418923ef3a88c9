#!/usr/bin/env bash
# Does it work on a GPU, and how fast? Everything in one call, under ten minutes, no network.
#   bash bench/gpu.sh
#   OUT=results COMMIT=$(git rev-parse HEAD) bash bench/gpu.sh --size 7b
#   bash bench/gpu.sh --device cpu --size tiny      (dry run of this script, about a minute)
# Needs python3 with torch; the package need not be installed. Each stage has its own limit, a
# failed one is recorded, the rest go on and the exit status is 1. At most 8 files go to $OUT
# (default bench/results). LIMIT bounds all of it in seconds, GPU_TESTS=0 leaves out the tests.
# ONLY="speed kernels" runs the stages whose names begin so, MORE=1 adds those that one call has no
# time for: drafters, kernels, demo_pair, scaling; TUNED=1 to them speed.py's with tuned tiles.
set -u
cd "$(dirname "$0")/.." || exit 2

DEVICE=cuda
SIZE=7b
while [ $# -gt 0 ]; do
  case "$1" in
    --device) DEVICE=${2:-}; shift $(($# > 1 ? 2 : 1)) ;;
    --size) SIZE=${2:-}; shift $(($# > 1 ? 2 : 1)) ;;
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "gpu.sh: unknown argument $1; give --device or --size" >&2; exit 2 ;;
  esac
done

case "$DEVICE" in
  cpu | cuda) ;;
  *) echo "gpu.sh: --device is '$DEVICE'; give cpu or cuda" >&2; exit 2 ;;
esac
case "$SIZE" in
  7b | 8b | 13b | 1b | demo | tiny) ;;
  *) echo "gpu.sh: --size is '$SIZE'; give 7b, 8b, 13b, 1b, demo or tiny" >&2; exit 2 ;;
esac

OUT=${OUT:-bench/results}
LIMIT=${LIMIT:-570} # seconds for everything
PYTHON=${PYTHON:-python3}
ACCEPT=0.76,0.69,0.67,0.68,0.68 # by depth: arXiv 2401.15077, table 2, LLaMA2-chat 7B
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

more() { [ "${MORE:-0}" = 1 ] || [ -n "${ONLY:-}" ]; }

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
    # -vv undoes pyproject's -q and names each, so that a run that is stopped tells how far it came.
    # Most of their time is compiling; several at once need an eighth of the time of one by one.
    local spread=()
    importable xdist && spread=(-n 7)
    TORCHINDUCTOR_COMPILE_THREADS=2 \
      stage tests 200 "$PYTHON" -m pytest -vv -p no:cacheprovider "${spread[@]}" -m gpu tests/gpu
    sed -i 's/^tests 5 /tests missing /' "$STATUS" # pytest's way to say that it found none
  fi
}

speed() { # speed SECONDS PRECISION MORE...: plain and EAGLE, random weights, SIMULATED acceptance
  local seconds=$1 precision=$2
  shift 2
  local name=speed_${SIZE}_$precision${SUFFIX:-}
  stage "$name" "$seconds" "$PYTHON" bench/speed.py --size "$SIZE" --device "$DEVICE" \
    --precisions "$precision" --accept "$ACCEPT" --out "$OUT/$name.json" "$@"
}

need_package() { # what loads a checkpoint; without it the embedded pair cannot be measured
  local module
  for module in safetensors sentencepiece tokenizers huggingface_hub jinja2 tqdm; do
    if ! importable "$module"; then
      echo "== $module is not installed: the embedded pair was not measured" | tee -a "$LOG"
      echo "embedded_pair missing 0" >>"$STATUS"
      return 1
    fi
  done
}

measure() { # measure SCRIPT SECONDS MORE...: bench/SCRIPT.py on the device
  local script=$1 seconds=$2
  shift 2
  stage "${script}_$DEVICE" "$seconds" "$PYTHON" "bench/$script.py" --device "$DEVICE" \
    --out "$OUT/${script}_$DEVICE.json" "$@"
}

acceptance() { need_package && measure acceptance "$@"; } # the embedded pair's, real
demo() { need_package && measure demo_pair "$@"; }
attention() { measure attention "$@"; }
kernels() { measure kernels "$@"; }
scaling() { measure scaling "$@"; }

drafters() { # drafters SECONDS MORE...: rounds of several drafters, SIMULATED acceptance
  local seconds=$1
  shift
  stage "drafters_$SIZE" "$seconds" "$PYTHON" bench/drafters.py --size "$SIZE" --device "$DEVICE" \
    --out "$OUT/drafters_$SIZE.json" "$@"
}

summary() {
  "$PYTHON" bench/summarize.py --status "$STATUS" --device "$DEVICE" --out "$OUT/gpu_summary.json" \
    "$OUT"/speed_*.json "$OUT"/{acceptance,attention,scaling,demo_pair,kernels}_"$DEVICE".json \
    "$OUT/drafters_$SIZE.json" 2>&1 |
    tee -a "$LOG"
}

if [ "$DEVICE" = cpu ]; then
  gpu_tests
  speed 60 float32 --no-compile --repeats 2 --max_new_tokens 24
  speed 60 int4 --no-compile --repeats 2 --max_new_tokens 24
  acceptance 60 --prompts 1 --max_new_tokens 24
  scaling 60 --size tiny --sizes --contexts 64 --rows 1 8 --batches 1 2 --repeats 2
  attention 60 --models tiny --rows 1 6 --slots 64 --repeats 2
  if more; then
    demo 60 --no-compile --prompts 1 --repeats 1 --max_new_tokens 16
    kernels 60 --shape 256x256 --repeats 2 --rounds 1 --rows 1 16 32
    drafters 60 --drafters eagle2 lookup --no-compile --repeats 2
  fi
else
  # What the project exists for comes first. The limits add up to LIMIT.
  nvidia-smi 2>&1 | tee -a "$LOG"
  speed 150 bfloat16 --prompt_lengths 64 --trace "$OUT/speed_${SIZE}_trace.json.gz"
  speed 100 int4 --tree chain-5 --prompt_lengths 64
  gpu_tests # 200 at most
  acceptance 40 --dtype float32
  attention 80 --slots 512 2048 --rows 1 6 26 64
  # Calls of their own: ONLY="drafters kernels demo scaling". An H200 took the seconds behind some.
  if more; then
    scaling 240 --size 1b --sizes --contexts 128 2048 --rows 1 26 64 --batches 1 8 --seconds 180
    drafters 230 --dtype bfloat16 --drafters eagle_chain eagle_tree eagle2 lookup # 146
    kernels 110 --seconds 90
    demo 120 # 81
    # Tuned tiles turn one-row products into generated kernels, as gpt-fast does.
    if [ "${TUNED:-0}" = 1 ]; then
      TORCHINDUCTOR_COORDINATE_DESCENT_TUNING=1 SUFFIX=_tuned \
        speed 240 bfloat16 --prompt_lengths 64
    fi
  fi
fi
summary
! grep -qv -e " 0 " -e " missing " "$STATUS"
