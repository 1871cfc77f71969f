#!/usr/bin/env bash
# Evaluation on several GPUs, or on the CPU with as many processes:
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each.
set -euo pipefail
if [ "${1-}" = -h ] || [ "${1-}" = --help ]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 0
fi
if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [options of tools/test.py]" >&2
    exit 2
fi
if ! command -v python >/dev/null; then
    echo "error: there is no python here: activate the environment that has torch" >&2
    exit 1
fi
tools=$(cd "$(dirname "$0")" && pwd)
config=$1 checkpoint=$2 gpus=$3
shift 3

PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" exec python "$tools/dist_run.py" \
    "$gpus" "$tools/test.py" "$config" "$checkpoint" "$@"
