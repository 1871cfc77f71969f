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
tools=$(cd "$(dirname "$0")" && pwd)
config=$1 gpus=$2
shift 2

export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"
# A mistake is said at once, and not by every process.
[[ $gpus =~ ^([1-9][0-9]*|auto|cpu|gpu)$ ]] ||
    { echo "error: GPUS: expected a number of at least 1, got '$gpus'" >&2; exit 2; }
python "$tools/train.py" "$config" --launcher pytorch "$@" --arguments-only

exec python -m torch.distributed.run \
    --nnodes "${NNODES:-1}" \
    --node-rank "${NODE_RANK:-0}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" \
    --master-port "${PORT:-29500}" \
    --nproc-per-node "$gpus" \
    "$tools/train.py" "$config" --launcher pytorch "$@"
