# shellcheck shell=bash
# What the batch scripts of this folder share: they source it, call `begin "$@"`, then
# `train SRUN-OPTIONS -- COMMAND`.
set -euo pipefail

# launch/signals.py: the ranks have stopped with a checkpoint, and the run is to be started again.
STOPPED=75
name=${SLURM_JOB_NAME:-$(basename "$0")}
warned=''

fail() { echo "$name: error: $*" >&2; exit 2; }

# The comment at the top of a script, then what all of them take.
explain() {
    sed -n '2,/^[^#]/{/^#SBATCH/d; s/^# \{0,1\}//p}' "$0"
    cat <<'END'

sbatch's own options come before the script's name, or from the environment: SBATCH_ACCOUNT,
SBATCH_PARTITION, SBATCH_TIMELIMIT, SBATCH_SIGNAL, SBATCH_GPUS_PER_NODE, SBATCH_GPUS_PER_TASK. Also
from the environment:

  PYTHON              python that has torch and distclip   .venv/bin/python of the repository
  CONTAINER           words to run it in a container       none; "apptainer exec --nv image.sif"
  DATA                folder of text that all nodes see    Python's standard library
  OUT                 folder that all nodes share          runs/JOBNAME-JOBID
  WARNING_SECONDS     as in --signal=B:USR1@SECONDS        120
  DISTCLIP            the repository                       where sbatch was called
  MASTER_PORT         port on the first node               20000 + JOBID % 10000
  GLOO_SOCKET_IFNAME  interface between the nodes          the one that leads to the first node
  NCCL_SOCKET_IFNAME  the same for NCCL                    NCCL's choice
END
}

# The values of this site, checked; PYTHON and OUT are set where they were not.
begin() {
    if [[ ${1-} == --help ]]; then explain; exit 0; fi
    [[ -n ${SLURM_JOB_ID-} ]] ||
        fail "no SLURM variables: this is no job; sbatch slurm/$(basename "$0") (--help explains)"
    trap 'warned=USR1' USR1
    trap 'warned=TERM' TERM
    cd "$DISTCLIP"
    job=$SLURM_JOB_ID
    [[ -z ${SLURM_ARRAY_TASK_ID-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    check_time
    read -ra container <<<"${CONTAINER-}"
    export PYTHON=${PYTHON:-$DISTCLIP/.venv/bin/python}
    ((${#container[@]})) || command -v "$PYTHON" >/dev/null ||
        fail "PYTHON=$PYTHON does not exist: name a python that has torch and distclip"
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since SLURM 22.05 srun does not inherit it
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
    OUT=${OUT:-runs/$SLURM_JOB_NAME-$job}
    local start=$((${SLURM_RESTART_COUNT:-0} + 1))
    echo "$name: job $job, start $start on $SLURM_JOB_NODELIST, output in $OUT"
}

fact() { scontrol -o show job "$job" | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }

# A warning that is due before the job has begun would stop and requeue it for ever.
check_time() {
    local seconds end
    end=$(fact EndTime)
    [[ $end != Unknown ]] || return 0
    seconds=$(($(date -d "$end" +%s) - $(date -d "$(fact StartTime)" +%s)))
    ((seconds > ${WARNING_SECONDS:-120})) ||
        fail "a time limit of $seconds s, and the warning comes ${WARNING_SECONDS:-120} s before" \
            "its end: raise --time, or lower both --signal=B:USR1@SECONDS and WARNING_SECONDS"
}

# Runs the job's step, passes warnings on to it, and ends the job, or requeues it where the ranks
# have stopped for a warning.
train() {
    local step code=0 options=()
    while [[ $1 != -- ]]; do options+=("$1"); shift; done
    # Ranks that stop, or that share a mistake, leave by themselves and with one code, which
    # --kill-on-bad-exit=1 would replace by that of a kill. Any that are left 30 s after the first
    # are stuck. In the background, because the traps would wait for a command in the foreground.
    srun --kill-on-bad-exit=0 --wait=30 --input=none \
        "${options[@]}" "${container[@]}" "${@:2}" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        if [[ -n $warned ]]; then
            # Repeated, because the step may not have started yet.
            scancel --signal=USR1 "$job" 2>/dev/null || true
            sleep 2
        else
            wait "$step" || true # also ends when a trap runs
        fi
    done
    wait "$step" || code=$?
    if ((code == STOPPED)) || { [[ -n $warned ]] && ((code != 0 && code != 2)); }; then
        requeue "$code"
    fi
    echo "$name: exit code $code"
    exit "$code"
}

requeue() {
    # A job that is cancelled must not come back, and one that is pre-empted is put back by SLURM.
    [[ $(fact JobState) == RUNNING ]] || exit "$1"
    local reason=${warned:-asked by a signal to the ranks}
    echo "$name: stopped ($reason, exit code $1): back into the queue"
    trap '' TERM USR1
    scontrol requeue "$job" || exit "$1"
    sleep 60 # SLURM ends this shell
    exit "$1"
}
