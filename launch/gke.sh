#!/usr/bin/env bash
# TPU slices on Google Kubernetes Engine through xpk.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<TEXT
Usage: launch/gke.sh COMMAND [--settings=FILE] [--dry-run] [--yes] [-- ARGUMENTS OF THE PROGRAM]

  all      run, and the log to the end of the workload
  up       create the cluster with its slices, and attach the bucket
  run      put the committed code in an image and submit the workload; Kubernetes starts it again
           when a machine is preempted or the program asks for it
  logs     follow the log of the first worker
  status   the workload and its place in the queue
  down     delete the workload; asks first, --yes answers
  down-cluster   delete the cluster, all that runs on it, and its machines; asks first

Settings are in launch/gke.env. Ctrl-C stops only this script. --dry-run prints every command.

  launch/gke.sh up --settings=my-gke.env
  launch/gke.sh all --settings=my-gke.env
  launch/gke.sh down-cluster --settings=my-gke.env
TEXT
}

create_cluster() {
  local command=(xpk cluster create "${PLACE[@]}" "--tpu-type=$TPU_TYPE" "--num-slices=$NUM_SLICES")
  case $PROVISIONING in
    on-demand | spot | flex) command+=("--$PROVISIONING") ;;
    *) command+=("--reservation=$PROVISIONING") ;;
  esac
  if [[ -n $BUCKET ]]; then command+=(--enable-gcsfuse-csi-driver); fi
  run "${command[@]}" || die "the cluster was not created as asked, see above (quota, or a setting)." \
    "Parts of it may be there and cost: launch/gke.sh status $AGAIN shows them, down-cluster deletes them"
  if [[ -n $BUCKET ]]; then
    run xpk storage attach "$NAME-storage" "${PLACE[@]}" --type=gcsfuse "--bucket=$BUCKET" \
      "--mount-point=$MOUNT_POINT" --readonly=false --auto-mount=true --size=1000 \
      --mount-options=implicit-dirs,metadata-cache:ttl-secs:0 ||
      die "the bucket was not attached, see above; the cluster is there and costs: launch/gke.sh down-cluster $AGAIN"
  fi
}

# A workload of this name stays in the list when it has ended. xpk offers to overwrite it.
refuse_a_second() {
  if ((DRY_RUN)); then return; fi
  if ! attend xpk workload list "${PLACE[@]}" "--filter-by-job=$NAME" >"$SCRATCH/workloads"; then
    cat "$SCRATCH/workloads" >&2 # where xpk writes its errors
    die "the workloads cannot be read, see above; nothing was submitted"
  fi
  if awk -v name="$NAME" '$1 == name { found = 1 } END { exit !found }' "$SCRATCH/workloads"; then
    die "the workload $NAME is there, running or ended: launch/gke.sh down $AGAIN deletes it (its checkpoints stay);" \
      "or give another NAME"
  fi
}

submit() {
  local command count
  refuse_a_second
  program
  PROGRAM+=(--distributed=on)
  # The first worker counts the start. exec lets SIGTERM reach the program.
  count="if [ \"\${TPU_WORKER_ID:-0}\${MEGASCALE_SLICE_ID:-0}\" = 00 ]; then bash launch/worker.sh count $(quote "$WORKDIR" "$MAX_STARTS"); fi"
  command="bash launch/worker.sh install tpu && $count && exec .venv/bin/python -m repulsor_jax.main $(quote "${PROGRAM[@]}")"
  pack_code
  run mkdir "$SCRATCH/code"
  run tar -xzf "$SCRATCH/code.tar.gz" -C "$SCRATCH/code"
  run xpk workload create "${PLACE[@]}" "--workload=$NAME" "--tpu-type=$TPU_TYPE" "--num-slices=$NUM_SLICES" \
    "--base-docker-image=$BASE_IMAGE" "--script-dir=$SCRATCH/code" "--max-restarts=$MAX_RESTARTS" \
    "--restart-on-exit-codes=$RUN_AGAIN" "--termination-grace-period-seconds=$GRACE_SECONDS" \
    "--command=$command" || die "the workload was not accepted, see above"
}

# Every command of xpk points kubectl at the cluster.
follow() {
  run kubectl logs --follow --tail=50 --container=jax-tpu \
    "--selector=jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

# Follows the log again after a restart of the workload, whose pods are new.
follow_all() {
  while :; do
    quietly follow || true
    sleep "$POLL_SECONDS"
  done
}

watch() {
  local code=0
  if ((DRY_RUN)); then follow; else in_background follow_all; fi
  run xpk workload list "${PLACE[@]}" "--wait-for-job-completion=$NAME" || code=$?
  while ((code == 124)); do # xpk waits for a week at most
    code=0
    QUIET=1 run xpk workload list "${PLACE[@]}" "--wait-for-job-completion=$NAME" || code=$?
  done
  stop_background
  ((code == 0)) || die "the workload did not complete (xpk: code $code): its last lines are above, or in launch/gke.sh logs $AGAIN"
  say "the run is complete; the cluster is there and costs: launch/gke.sh down-cluster $AGAIN deletes it"
}

parse_command_line "$@"
REQUIRED=(PROJECT ZONE CLUSTER NAME TPU_TYPE CONFIG WORKDIR)
OPTIONAL=(NUM_SLICES=1 PROVISIONING=on-demand BUCKET= MOUNT_POINT=/mnt/repulsor BASE_IMAGE=python:3.12
  COMPILATION_CACHE_DIR= MAX_RESTARTS=100 MAX_STARTS=5 GRACE_SECONDS=30 POLL_SECONDS=30)
read_settings
check NUM_SLICES '[1-9][0-9]*' "a number from 1"
check MAX_STARTS '[1-9][0-9]*' "a number from 1"
for key in MAX_RESTARTS GRACE_SECONDS POLL_SECONDS; do check "$key" '[0-9]+' "a number"; done
check NAME '[a-z][a-z0-9-]{0,27}' "at most 28 lower-case letters, digits and hyphens"
check WORKDIR '/.*' "a path that all workers see, such as $MOUNT_POINT/runs/xl"
need xpk kubectl gcloud git
PLACE=("--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE")
AGAIN="--settings=$(quote "$SETTINGS")"
make_scratch
on_interrupt "interrupted: what is in the cloud stays as it is, a workload goes on" \
  "follow it by launch/gke.sh logs $AGAIN" \
  "delete it by launch/gke.sh down $AGAIN, the cluster by down-cluster"

case $COMMAND in
  all)
    submit
    watch
    ;;
  up) create_cluster ;;
  run) submit ;;
  logs) follow ;;
  status)
    run xpk cluster describe "${PLACE[@]}"
    run xpk workload list "${PLACE[@]}" "--filter-by-job=$NAME"
    ;;
  down)
    confirm "the workload $NAME (its checkpoints stay)"
    run xpk workload delete "${PLACE[@]}" "--workload=$NAME" --force
    ;;
  down-cluster)
    confirm "the cluster $CLUSTER, all that runs on it, and its machines"
    run xpk cluster delete "${PLACE[@]}" --force
    ;;
  *) die "$COMMAND: no such command; see launch/gke.sh --help" ;;
esac
