#!/usr/bin/env bash
# One benchmark on a Slurm array: task 0 starts a Ray cluster and the run, the other tasks join it as they start.
#
#     sbatch --array 0-7 docs/slurm.sh benchmark.yaml runs/benchmark
#
# It follows the manuals of Slurm and Ray and is untested on Slurm. The run folder, data and weights must have the same
# paths on all nodes. If nodes have no network, download first with `rvaudit validate benchmark.yaml`. The same sbatch
# command resumes a run that the time limit ended.
#SBATCH --job-name=rvaudit
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-task=1
#SBATCH --ntasks=1
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120

set -euo pipefail
config=${1:?usage: sbatch --array 0-7 docs/slurm.sh BENCHMARK RUN_FOLDER}
folder=${2:?usage: sbatch --array 0-7 docs/slurm.sh BENCHMARK RUN_FOLDER}
cpus=${SLURM_CPUS_PER_TASK:-1}
gpus=${SLURM_GPUS_ON_NODE:-0}
share=$(awk -v gpus="$gpus" -v cells="${CELLS_PER_GPU:-4}" 'BEGIN { print gpus > 0 ? 1 / cells : 0 }')
job=${SLURM_ARRAY_JOB_ID:?give --array}
meeting="$folder/ray-$job.address"

if [ "${SLURM_ARRAY_TASK_ID}" != 0 ]; then
    until [ -s "$meeting" ]; do sleep 5; done
    # ends by itself some time after the cluster's head has gone
    exec ray start --address="$(cat "$meeting")" --num-cpus="$cpus" --num-gpus="$gpus" --block
fi

host=$(hostname --ip-address | awk '{ print $1 }')
port=$((20000 + job % 20000))
mkdir -p "$folder"
ray start --head --node-ip-address="$host" --port="$port" --num-cpus="$cpus" --num-gpus="$gpus"
trap 'rm -f "$meeting"; ray stop' EXIT
echo "$host:$port" > "$meeting.new"
mv "$meeting.new" "$meeting"

# In the background, so that Slurm's signal can be handed on: the run then ends within seconds, its cells kept.
rvaudit run "$config" --out "$folder" --offline --executor ray --address "$host:$port" --gpus-per-cell "$share" &
run=$!
trap 'kill -TERM "$run"' TERM
code=0
wait "$run" || code=$?
if kill -0 "$run" 2> /dev/null; then # the signal came while waiting
    code=0
    wait "$run" || code=$?
fi
exit "$code"
