#!/usr/bin/env bash
# Check and timing of mmdcn's CUDA operators on a GPU machine that has torch, without network and
# without changing anything in its environment.
#
#   tools/gpu_check.sh [WHEEL] [--part correct|fast] [--out FOLDER] [--beside WHEEL] [--sections NAMES]
#
# WHEEL    a wheel of mmdcn with its CUDA library; by default the newest in dist/
# correct  are all results right? fast: how long does it take? By default one after the other; each
#          takes at most 9 minutes, and may be run by itself
# FOLDER   where gpu_check_PART.json, .md and .log go; by default $OUT, or work_dirs/gpu_check where
#          that is not set. The first two are whole after every case
# beside   another wheel of mmdcn, of another commit for example, to be timed beside this one
# NAMES    some of the sections, separated by commas: see mmdcn/benchmark/gpu/sections.py
#
# PYTHON names the interpreter (default: python3). The exit code is 0 only if every check passed.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$root/work_dirs/gpu_check}
wheel=
parts=(correct fast)
options=()

fail() {
    echo "gpu_check: $1" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
        --out | --part | --sections | --beside)
            [ $# -ge 2 ] || fail "$1 needs a value"
            case $1 in
                --out) out=$2 ;;
                --part) parts=("$2") ;;
                --sections) options+=("$1" "$2") ;;
                --beside) options+=("$1" "$(realpath "$2")") ;;
            esac
            shift 2
            ;;
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
            exit 0
            ;;
        -*) fail "unknown option $1; see tools/gpu_check.sh --help" ;;
        *)
            [ -z "$wheel" ] || fail "expected one wheel, got $wheel and $1"
            wheel=$1
            shift
            ;;
    esac
done

"$python" -c 'import torch' 2>/dev/null ||
    fail "$python has no torch; name an interpreter that has it in PYTHON"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "torch sees no CUDA device on this machine; run this where torch.cuda.is_available()"

if [ -z "$wheel" ]; then
    wheel=$(ls -t "$root"/dist/mmdcn-*.whl 2>/dev/null | head -n 1 || true)
    [ -n "$wheel" ] ||
        fail "no wheel in $root/dist; build one where nvcc is: pip wheel --no-deps -w dist ."
fi
[ -f "$wheel" ] || fail "there is no file $wheel"
contents=$("$python" -m zipfile -l "$wheel") || fail "$wheel is no wheel"
[[ $contents == *mmdcn/_cuda* ]] ||
    fail "$wheel has no CUDA library; build it where nvcc is found"

mkdir -p "$out"
out=$(cd "$out" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

echo "gpu_check: installing $(basename "$wheel") beside the environment"
"$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/site" "$wheel" ||
    fail "$wheel does not install here"
# The tests run away from the checkout, so that mmdcn is the wheel's.
mkdir "$scratch/run"
cp -r "$root/tests" "$root/pyproject.toml" "$scratch/run/"

cd "$scratch/run"
status=0
for part in "${parts[@]}"; do
    PYTHONPATH="$scratch/site" "$python" "$root/tools/gpu_check.py" --part "$part" --out "$out" \
        --tests "$scratch/run" ${options[@]+"${options[@]}"} || status=$?
done
exit "$status"
