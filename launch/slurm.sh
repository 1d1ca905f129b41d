#!/usr/bin/env bash
# NVIDIA GPUs under Slurm: one process for each GPU. Run it on the cluster, in a checkout of this
# repository on a file system that all nodes see.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<TEXT
Usage: launch/slurm.sh COMMAND [--settings=FILE] [--dry-run] [--yes] [-- ARGUMENTS OF THE PROGRAM]

  all      run, and the log to the end of the job
  install  make the environment in .venv of this checkout
  run      submit the job; Slurm queues it again when it is preempted, a node fails, its time is up
           or the program asks for it, and it goes on from its newest checkpoint
  logs     follow the log
  status   the job in the queue
  down     cancel the job; asks first, --yes answers

Settings are in launch/slurm.env. Ctrl-C stops only this script. --dry-run prints every command.

  launch/slurm.sh install
  launch/slurm.sh all --settings=my-slurm.env
  launch/slurm.sh run --settings=my-slurm.env -- --mode=evaluate
TEXT
}

# Numbers of the jobs of this name that are queued or running, in JOBS.
look() {
  attend squeue --me "--name=$NAME" --noheader --format=%i >"$SCRATCH/jobs" || return
  JOBS=$(<"$SCRATCH/jobs")
}

submit() {
  local command=(sbatch --parsable "--job-name=$NAME" "--chdir=$REPO"
    "--nodes=$NODES" "--ntasks-per-node=$GPUS_PER_NODE" "--gpus-per-node=$GPUS_PER_NODE"
    "--cpus-per-task=$CPUS_PER_TASK" "--time=$TIME"
    --requeue "--signal=B:USR1@$GRACE_SECONDS" --open-mode=append "--output=$LOG")
  if [[ -n $PARTITION ]]; then command+=("--partition=$PARTITION"); fi
  if [[ -n $ACCOUNT ]]; then command+=("--account=$ACCOUNT"); fi
  if [[ -n $CONSTRAINT ]]; then command+=("--constraint=$CONSTRAINT"); fi
  program
  PROGRAM+=(--distributed=on)
  command+=("$REPO/launch/slurm.sbatch" "$WORKDIR" "$MAX_STARTS" "${PROGRAM[@]}")
  if ! ((DRY_RUN)); then
    look || die "the queue cannot be read, see above; nothing was submitted"
    [[ -z $JOBS ]] || die "$NAME is in the queue already (job $JOBS): two runs in one WORKDIR spoil each other"
  fi
  run mkdir -p "$WORKDIR"
  run "${command[@]}" || die "not submitted, see above (a limit of the account, or a setting); nothing is in the queue"
}

follow() { run tail -n 50 -F "$LOG"; }

# Shows the log until the job has left the queue for good.
watch() {
  if ((DRY_RUN)); then
    follow
    return
  fi
  touch "$LOG" # empty while the job waits
  in_background tail -n 50 -F "$LOG"
  while :; do
    attend sleep "$POLL_SECONDS"
    if look && [[ -z $JOBS ]]; then break; fi
  done
  attend sleep 1 # for the last lines
  [[ $(tail -n 1 "$LOG") == *"the run is complete"* ]] || die "the job ended before the run was complete: see the end of $LOG"
}

parse_command_line "$@"
if [[ $COMMAND == install ]]; then # needs no settings
  run bash "$REPO/launch/worker.sh" install cuda
  exit
fi
REQUIRED=(NAME NODES GPUS_PER_NODE TIME CONFIG WORKDIR)
OPTIONAL=(CPUS_PER_TASK=8 PARTITION= ACCOUNT= CONSTRAINT= COMPILATION_CACHE_DIR= MAX_STARTS=5 GRACE_SECONDS=300
  POLL_SECONDS=60)
read_settings
for key in NODES GPUS_PER_NODE CPUS_PER_TASK MAX_STARTS GRACE_SECONDS; do check "$key" '[1-9][0-9]*' "a number from 1"; done
check WORKDIR '/.*' "a path that all nodes see"
check POLL_SECONDS '[0-9]+' "a number"
need sbatch squeue scancel
LOG=$WORKDIR/slurm.log
make_scratch
AGAIN="--settings=$(quote "$SETTINGS")"
on_interrupt "interrupted: the job stays in the queue or goes on" \
  "follow it by launch/slurm.sh logs $AGAIN" "cancel it by launch/slurm.sh down $AGAIN"

case $COMMAND in
  all)
    submit
    watch
    ;;
  run) submit ;;
  logs) follow ;;
  status) run squeue --me "--name=$NAME" --long ;;
  down)
    confirm "the job $NAME (its checkpoints stay)"
    run scancel --me "--name=$NAME"
    ;;
  *) die "$COMMAND: no such command; see launch/slurm.sh --help" ;;
esac
