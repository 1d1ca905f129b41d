#!/usr/bin/env bash
# GPUs of many clouds, or of a Kubernetes cluster, through SkyPilot's managed jobs.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<TEXT
Usage: launch/sky.sh COMMAND [--settings=FILE] [--dry-run] [--yes] [-- ARGUMENTS OF THE PROGRAM]

  all      run, then logs to the end of the job
  run      launch the job; SkyPilot finds machines, installs, runs, and starts it again elsewhere
           when it is preempted or the program asks for it
  logs     follow the log
  status   the job in the queue
  down     cancel the job and give its machines back; asks first, --yes answers

Settings are in launch/sky.env, the task in launch/sky.yaml. Ctrl-C stops only this script.
--dry-run prints every command.

  launch/sky.sh all --settings=my-sky.env
  launch/sky.sh down --settings=my-sky.env
TEXT
}

submit() {
  local command=(sky jobs launch --yes --detach-run "--name=$NAME" "--workdir=$REPO"
    "--gpus=$GPUS" "--num-nodes=$NUM_NODES")
  if [[ $USE_SPOT == true ]]; then command+=(--use-spot); else command+=(--no-use-spot); fi
  if [[ -n $INFRA ]]; then command+=("--infra=$INFRA"); fi
  program
  command+=("--env=BUCKET=$BUCKET" "--env=WORKDIR=$WORKDIR" "--env=MAX_STARTS=$MAX_STARTS"
    "--env=ARGUMENTS=$(quote "${PROGRAM[@]}")" "$REPO/launch/sky.yaml")
  if ! ((DRY_RUN)); then
    attend sky jobs queue --skip-finished --output=json >"$SCRATCH/queue" || die "the queue cannot be read, see above; nothing was launched"
    if grep -qF "\"$NAME\"" "$SCRATCH/queue"; then
      die "$NAME is in the queue already: two runs in one WORKDIR spoil each other"
    fi
  fi
  run "${command[@]}" || die "not launched, see above (quota, or a setting); nothing runs"
}

follow() { run sky jobs logs "--name=$NAME" --follow; }

watch() {
  follow || die "the job did not complete: its last lines are above; sky jobs logs --controller --name=$(quote "$NAME")" \
    "has what SkyPilot did (quota, no machines, recoveries)"
  say "the run is complete"
}

parse_command_line "$@"
REQUIRED=(NAME GPUS BUCKET CONFIG WORKDIR)
OPTIONAL=(NUM_NODES=1 USE_SPOT=false INFRA= COMPILATION_CACHE_DIR= MAX_STARTS=5)
read_settings
for key in NUM_NODES MAX_STARTS; do check "$key" '[1-9][0-9]*' "a number from 1"; done
check USE_SPOT 'true|false' "true or false"
check BUCKET '[a-z0-9]+://.+' "an address such as gs://name or s3://name"
check WORKDIR '/bucket/.+' "a path below /bucket, where BUCKET is mounted"
need sky
make_scratch
AGAIN="--settings=$(quote "$SETTINGS")"
on_interrupt "interrupted: the job goes on" \
  "follow it by launch/sky.sh logs $AGAIN" "cancel it by launch/sky.sh down $AGAIN"

case $COMMAND in
  all)
    submit
    watch
    ;;
  run) submit ;;
  logs) follow ;;
  status) run sky jobs queue --skip-finished ;;
  down)
    confirm "the job $NAME with its machines (its checkpoints stay)"
    run sky jobs cancel "--name=$NAME" --yes
    ;;
  *) die "$COMMAND: no such command; see launch/sky.sh --help" ;;
esac
