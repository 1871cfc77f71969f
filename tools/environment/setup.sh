#!/usr/bin/env bash
# Set-up of the environment for `make demo` and `make test`: a virtual environment with torch,
# the toolbox with its compiled operators, and the test tools. The Makefile calls it.
#
# usage: tools/environment/setup.sh VENV PYTHON TOOLBOX
set -euo pipefail
if [ "${1-}" = -h ] || [ "${1-}" = --help ] || [ $# -lt 3 ]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
  [ $# -eq 1 ] && exit 0 || exit 2
fi
venv=$1 python=$2 toolbox=$3
here=$(cd "$(dirname "$0")" && pwd)

fail() {
  echo "error: $*" >&2
  exit 1
}
step() { printf '\n==> %s\n' "$*"; }

[ -f "$here/$toolbox.txt" ] || fail "TOOLBOX=$toolbox: expected openmmlab or onedl"
command -v "$python" >/dev/null ||
  fail "no $python: install Python 3.10 or newer, or name one, as in \`make PYTHON=python3.12\`"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$("$python" --version) is too old: name Python 3.10 or newer, as in \`make PYTHON=python3.12\`"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python has no venv module: install it (Debian or Ubuntu: apt-get install python3-venv)"
compiler=${CXX:-g++}
command -v ${compiler%% *} >/dev/null ||
  fail "no C++ compiler: install one (Debian or Ubuntu: apt-get install g++), or name it in CXX"

step "virtual environment in $venv ($("$python" --version), toolbox $toolbox)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
export PIP_CONSTRAINT=$here/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
pip=("$venv/bin/python" -m pip install --quiet)
"${pip[@]}" setuptools wheel ninja psutil

step "torch (a download of up to a few gigabytes where it comes with CUDA)"
"$venv/bin/python" -m pip install torch numpy | grep -vE '^(Requirement already|Looking in)' || true
"$venv/bin/python" -c 'import torch'

mmcv=$(grep mmcv== "$here/$toolbox.txt")
step "$mmcv with its compiled operators (3 minutes on 2 cores the first time)"
if ! "$venv/bin/python" -c 'import mmcv.ops' 2>/dev/null; then
  # Without nvcc, mmcv would try to compile for the GPU that torch sees, and fail.
  command -v nvcc >/dev/null || export CUDA_VISIBLE_DEVICES=
  "${pip[@]}" $(grep mmengine== "$here/$toolbox.txt")
  PRECOMPILED=$(mktemp -d)
  trap 'rm -rf "$PRECOMPILED"' EXIT
  # Torch's headers are parsed once, and nobody debugs mmcv here: both save time, not speed.
  PRECOMPILED=$PRECOMPILED PRECOMPILED_CXX=$compiler CXX=$here/precompiled_cxx.sh \
    CFLAGS="${CFLAGS-} -g0" MAX_JOBS=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)} MMCV_WITH_OPS=1 \
    "$venv/bin/python" -m pip install -v --no-build-isolation "$mmcv" 2>&1 |
    "$venv/bin/python" "$here/progress.py" mmcv "$venv/mmcv.log" || true
  "$venv/bin/python" -c 'import mmcv.ops' ||
    fail "mmcv's operators did not compile or do not load: see $venv/mmcv.log; to try again," \
      "\`$venv/bin/pip uninstall $mmcv\`, \`pip cache remove '*mmcv*'\`, then make again"
fi

step "mmdet and the test tools"
"${pip[@]}" --no-build-isolation -r "$here/$toolbox.txt" -r "$here/development.txt"
