#!/usr/bin/env bash
# Training on several GPUs, or on the CPU with as many processes:
#   tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each.
set -euo pipefail
if [ "${1-}" = -h ] || [ "${1-}" = --help ]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 0
fi
if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG GPUS [options of tools/train.py]" >&2
    exit 2
fi
if ! command -v python >/dev/null; then
    echo "error: there is no python here: activate the environment that has torch" >&2
    exit 1
fi
tools=$(cd "$(dirname "$0")" && pwd)
config=$1 gpus=$2
shift 2

PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" exec python "$tools/dist_run.py" \
    "$gpus" "$tools/train.py" "$config" "$@"
