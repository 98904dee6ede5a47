#!/usr/bin/env bash
# torchrun with its options taken from the environment; prints in one line what it took. Runs in
# the root of the repository.
#
#   launch/torchrun.sh -m launch.train --out runs/main
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 launch/torchrun.sh ...     the first of two machines
#   srun --ntasks-per-node=1 launch/torchrun.sh ...                   in a job: slurm/train.sbatch
#
#   NPROC_PER_NODE      ranks on this machine             its GPUs; without any, 1
#   NNODES, NODE_RANK   machines, and which this is       SLURM_NNODES, SLURM_NODEID; else 1 and 0
#   MASTER_ADDR         the machine with NODE_RANK 0      the first of SLURM_JOB_NODELIST
#   MASTER_PORT         its port for the rendezvous       20000 + SLURM_JOB_ID % 10000; else 29400
#   RDZV_ID             name of this start of the run     SLURM_JOB_ID.SLURM_RESTART_COUNT; else run
#   MAX_RESTARTS        times that ranks start again      0
#   GLOO_SOCKET_IFNAME  interface between machines        the one that leads to MASTER_ADDR
#   PYTHON              python of the environment         .venv/bin/python of the repository, else
#                                                         python3
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Of the launchers that one srun has started only the first prints: all have the same to print.
say() { ((${SLURM_PROCID:-0} > 0)) || echo "torchrun.sh: $*" >&2; }

fail() {
    say "error: $*"
    ((${SLURM_PROCID:-0} == 0)) || sleep 1 # srun ends the first one with the others
    exit 2
}

number() { # number NAME VALUE MINIMUM
    if ! [[ $2 =~ ^[0-9]+$ ]] || (($2 < $3)); then
        fail "$1=$2: a whole number, at least $3"
    fi
}

num_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

# The interface with the head's own address; on other machines, that of the route to the head.
interface_to() {
    command -v ip >/dev/null || return 0
    local address own
    address=$(getent ahostsv4 "$1" | awk 'NR == 1 { print $1 }')
    [[ -n $address ]] || return 0
    own=$(ip -o -4 address |
        awk -v own="$address" '{ split($4, a, "/") } a[1] == own { print $2; exit }')
    echo "${own:-$(ip -o -4 route get "$address" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p')}"
}

[[ $# -gt 0 ]] || fail "a module or script to run: launch/torchrun.sh -m launch.train ..."
# Python finds the modules of launch/ in the working directory.
[[ $PWD -ef $root ]] || fail "$PWD is not the repository: cd $root"
gpus=$(num_gpus)
ranks=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
nodes=${NNODES:-${SLURM_NNODES:-1}} node=${NODE_RANK:-${SLURM_NODEID:-0}}
number NPROC_PER_NODE "$ranks" 1
number NNODES "$nodes" 1
number NODE_RANK "$node" 0
number MAX_RESTARTS "${MAX_RESTARTS:-0}" 0
if [[ -n ${SLURM_NNODES-} ]] && ((nodes > SLURM_NNODES)); then
    fail "NNODES=$nodes and this job has $SLURM_NNODES: sbatch --nodes=$nodes, or unset NNODES"
fi
if [[ -n ${SLURM_STEP_ID-} ]] && ((SLURM_NTASKS > SLURM_NNODES)); then
    fail "$SLURM_NTASKS launchers on $SLURM_NNODES nodes: srun --ntasks-per-node=1;" \
        "NPROC_PER_NODE sets the ranks of each"
fi
((node < nodes)) || fail "NODE_RANK=$node of NNODES=$nodes: they count from 0"
backend=gloo
((gpus >= ranks)) && backend=nccl

if ((nodes == 1)); then
    where=(--standalone) said="one machine"
else
    head=${MASTER_ADDR:-}
    if [[ -z $head && -n ${SLURM_JOB_NODELIST-} ]]; then
        head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    fi
    [[ -n $head ]] || fail "NNODES=$nodes: MASTER_ADDR has to name the machine with NODE_RANK 0"
    port=29400 id=run
    if [[ -n ${SLURM_JOB_ID-} ]]; then
        port=$((20000 + SLURM_JOB_ID % 10000)) id=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    fi
    port=${MASTER_PORT:-$port} id=${RDZV_ID:-$id}
    where=(--nnodes="$nodes" --node-rank="$node")
    where+=(--rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$id")
    interface=${GLOO_SOCKET_IFNAME:-$(interface_to "$head")}
    [[ -z $interface ]] || export GLOO_SOCKET_IFNAME=$interface
    # Rank 0 sends the others its address: its name often means 127.0.1.1 on the machine itself.
    own=$(ip -o -4 address show dev "$interface" 2>/dev/null |
        awk '{ split($4, a, "/"); print a[1]; exit }' || true)
    [[ -z $own || $own == 127.* ]] || where+=(--local-addr="$own")
    said="machine $node of $nodes, rendezvous $id at $head:$port"
    said+=", interface ${interface:-left to the backend}"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python=${PYTHON:-$root/.venv/bin/python}
[[ -n ${PYTHON-} || -x $python ]] || python=python3
say "$ranks ranks here ($gpus GPUs, $backend), $said, ${MAX_RESTARTS:-0} restarts"
exec "$python" -m launch.run --nproc-per-node="$ranks" --max-restarts="${MAX_RESTARTS:-0}" \
    "${where[@]}" "$@"
