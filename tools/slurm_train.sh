#!/usr/bin/env bash
# Training on a Slurm cluster:
#   [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS="..."] \
#   tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [options of tools/train.py]
set -euo pipefail
if [ "${1-}" = -h ] || [ "${1-}" = --help ]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 0
fi
if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [options of tools/train.py]" >&2
    exit 2
fi
tools=$(cd "$(dirname "$0")" && pwd)
partition=$1 job_name=$2 config=$3 work_dir=$4
shift 4
if [ ! -f "$config" ] && [ "${config#*::}" = "$config" ]; then
    echo "error: no config file '$config'" >&2
    exit 1
fi
if ! command -v srun >/dev/null; then
    echo "error: there is no srun here: this is for the login node of a Slurm cluster" >&2
    exit 1
fi
gpus_per_node=${GPUS_PER_NODE:-8}
read -ra srun_args <<<"${SRUN_ARGS:-}"

PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}" exec srun \
    --partition "$partition" \
    --job-name "$job_name" \
    --gres "gpu:$gpus_per_node" \
    --ntasks "${GPUS:-8}" \
    --ntasks-per-node "$gpus_per_node" \
    --cpus-per-task "${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${srun_args[@]+"${srun_args[@]}"} \
    python -u "$tools/train.py" "$config" --work-dir "$work_dir" --launcher slurm "$@"
