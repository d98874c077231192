#!/bin/bash
# One run on Slurm: a Ray node on each node of the job, and the driver beside the head, on the first one.
#
#   sbatch deploy/slurm.sh MANIFEST OUTPUT --model MODEL --gpus-per-worker 1 --num-workers 8
#
# The arguments are those of `vcf-batch generate`. Submit it with the environment active that has vcf-batch: the nodes see
# this environment, manifest, model and output under the same names. Fill in what your cluster asks for, such as a
# partition and an account. docs/slurm.md tells the rest.
#SBATCH --job-name=vcf-batch
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
# Two minutes before the time is over this script gets USR1: it ends the run in order and puts the job back into the queue.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

max_restarts=100 # after which a job is not queued again
head_seconds=300 # in which the head has to start

# Users of these nodes reach the ports of Ray: a token of the job's own keeps them out.
RAY_AUTH_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

# Other Ray clusters may be on these nodes: each port is one that is free (docs/ray-cluster.md lists the fixed ones).
ip=${HEAD_IP:-$(hostname --ip-address)}
ip=${ip%% *}
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ] && [ "${ip#127.}" != "$ip" ] && [ -z "${HEAD_IP:-}" ]; then
    echo "this node calls itself $ip, where no other node reaches it: set HEAD_IP in this script to its address" >&2
    exit 1
fi
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
port=$(free_port)
client_port=$(free_port)

ray_nodes() { # in the background: COUNT, an option of srun that chooses the nodes, options of `ray start`
    # A node that is busy may start Ray too late, and the next time in time.
    exec srun --nodes="$1" --ntasks="$1" "$2" --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 \
        bash -c 'for try in 1 2 3; do
            ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
                --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 "$@" && exit
        done; exit 1' ray-nodes "${@:3}"
}

driver= # its process
drained= # whether the time is over
interrupted=

finish() { # CODE of the driver
    if [ "$1" = 6 ] || { [ "$1" = 143 ] && [ -n "$drained" ]; }; then
        if [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_restarts" ]; then
            echo "not queued again: the job was restarted $max_restarts times; sbatch with the same arguments goes on" >&2
        else
            scontrol requeue "$SLURM_JOB_ID"
        fi
    fi
    exit "$1"
}

# USR1 comes to this script alone. TERM, as `scancel` sends it, comes to the driver too, which a second one would end at once.
trap 'interrupted=1; drained=1; [ -n "$driver" ] || finish 143; kill -TERM "$driver" 2>/dev/null || :' USR1
trap 'interrupted=1; [ -n "$driver" ] || exit 143' TERM
trap 'kill $(jobs -p) 2>/dev/null || :' EXIT

ray_nodes 1 --nodelist="$SLURMD_NODENAME" --head --node-ip-address="$ip" --port="$port" \
    --ray-client-server-port="$client_port" --include-dashboard=false --temp-dir="/tmp/ray-$SLURM_JOB_ID" &
head=$!
until ray health-check --address="$ip:$port" 2>/dev/null; do
    kill -0 "$head" 2>/dev/null || { echo "the Ray head on $SLURMD_NODENAME did not start at $ip:$port" >&2; exit 1; }
    if [ "$SECONDS" -gt "$head_seconds" ]; then
        echo "the Ray head on $SLURMD_NODENAME did not start at $ip:$port within $head_seconds seconds" >&2
        exit 1
    fi
    sleep 1
done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    ray_nodes "$((SLURM_JOB_NUM_NODES - 1))" --exclude="$SLURMD_NODENAME" --address="$ip:$port" &
fi

RAY_ADDRESS="$ip:$port" vcf-batch generate "$@" &
driver=$!
code=
until [ -n "$code" ] && [ -z "$interrupted" ]; do # a signal interrupts `wait`, which then has no code of the driver
    interrupted=
    wait "$driver" && code=0 || code=$?
done
finish "$code"
