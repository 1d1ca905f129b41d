#!/usr/bin/env bash
# Cloud TPU VMs through queued resources: one slice or several, spot or not.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<TEXT
Usage: launch/tpu.sh COMMAND [--settings=FILE] [--dry-run] [--yes] [-- ARGUMENTS OF THE PROGRAM]

  all      up, install, run and logs in one, to the end of the run: what is preempted is created
           anew (AUTO_RECREATE) and goes on from its newest checkpoint
  up       request the machines and wait for them
  install  send the committed code and install it on every worker
  run      start the program on every worker, detached
  logs     follow the log of the first worker
  status   the state of the request and of every worker
  down     delete the request and its machines; asks first, --yes answers

Settings are in launch/tpu.env. Ctrl-C stops only this script. --dry-run prints every command.

  launch/tpu.sh all --settings=my-tpu.env
  launch/tpu.sh all --settings=my-tpu.env -- --mode=evaluate --checkpoint_step=all
  launch/tpu.sh down --settings=my-tpu.env
TEXT
}

QR=(gcloud compute tpus queued-resources)
VM=(gcloud compute tpus tpu-vm)

# Puts the state of the request into STATE, ABSENT without a request, and its slices into NODES.
look() {
  local nodes
  local command=("${QR[@]}" describe "$NAME" "${PLACE[@]}"
    '--format=value[separator=" "](state.state,tpu.nodeSpec[].nodeId.list(separator=" "))')
  if ((DRY_RUN)); then
    run "${command[@]}"
    return
  fi
  if attend "${command[@]}" >"$SCRATCH/answer" 2>"$SCRATCH/error"; then
    read -r STATE nodes <"$SCRATCH/answer" || true # an empty answer
    if [[ -n $nodes ]]; then read -r -a NODES <<<"$nodes"; fi
    return
  fi
  if grep -q NOT_FOUND "$SCRATCH/error"; then
    STATE=ABSENT
    return
  fi
  cat "$SCRATCH/error" >&2
  return 1
}

read_request() {
  look || die "the request cannot be read, see above"
  say "$NAME: $STATE"
}

# Without --force, gcloud refuses to delete a request that has machines.
delete_empty_request() { run "${QR[@]}" delete "$NAME" "${PLACE[@]}" --quiet; }

create() {
  local command=("${QR[@]}" create "$NAME" "${PLACE[@]}"
    "--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION")
  if ((NUM_SLICES > 1)); then
    command+=("--node-count=$NUM_SLICES" "--node-prefix=$NAME")
  else
    command+=("--node-id=$NAME")
  fi
  if [[ $PROVISIONING != on-demand ]]; then command+=("--$PROVISIONING"); fi
  if [[ -n $SERVICE_ACCOUNT ]]; then command+=("--service-account=$SERVICE_ACCOUNT"); fi
  if run "${command[@]}" 2>"$SCRATCH/error"; then
    cat "$SCRATCH/error" >&2
  else
    cat "$SCRATCH/error" >&2
    if grep -qiE 'quota|RESOURCE_EXHAUSTED' "$SCRATCH/error"; then
      die "the quota of $PROJECT does not allow $NUM_SLICES x $ACCELERATOR_TYPE ($PROVISIONING) in $ZONE." \
        "Nothing was created. Ask for quota, or change ZONE, ACCELERATOR_TYPE or PROVISIONING"
    fi
    die "the request was not accepted, see above; nothing was created"
  fi
  CREATED=1 STATE=ACTIVE
}

# Creates the request if there is none, and waits for its machines. $1 is 1 if a request that lost its
# machines may be replaced.
bring_up() {
  local replace=$1 before='' seen=0
  retry look || die "the request cannot be read, see above"
  while :; do
    if [[ $STATE != "$before" ]]; then say "$NAME: $STATE"; fi
    before=$STATE
    case $STATE in
      ACTIVE) return ;;
      ABSENT)
        if ((seen)); then die "$NAME was deleted by someone: it is not made anew"; fi
        create
        ;;
      FAILED)
        run "${QR[@]}" describe "$NAME" "${PLACE[@]}" "--format=yaml(state)" >&2
        if ((CREATED)); then # by this call: the request never had machines
          delete_empty_request || die "the request failed and could not be removed, see above: launch/tpu.sh down $AGAIN"
          die "the request failed, see above (quota, or a setting); it was removed and nothing is left behind"
        fi
        die "the request failed, see above; remove it by launch/tpu.sh down $AGAIN"
        ;;
      SUSPENDED)
        if ! ((replace)); then
          die "$NAME was preempted and has no machines any more: launch/tpu.sh down, then up;" \
            "or launch/tpu.sh all with AUTO_RECREATE=true"
        fi
        LOST=$((LOST + 1))
        if ((LOST > MAX_STARTS)); then die "$NAME lost its machines $LOST times before the program could start (MAX_STARTS)"; fi
        say "$NAME was preempted; AUTO_RECREATE=true: the empty request is deleted and made anew"
        delete_empty_request || die "the empty request could not be deleted, see above"
        STATE=ABSENT seen=0
        continue
        ;;
    esac
    seen=1
    if ! ((DRY_RUN)); then attend sleep "$POLL_SECONDS"; fi
    retry look || die "the request cannot be read, see above"
  done
}

# on_workers COMMAND: runs it in a shell on all workers, slice by slice; on_first: on the first worker.
# `queued-resources ssh` would succeed although a slice cannot be reached.
on_workers() {
  local node code=0
  for node in "${NODES[@]}"; do
    run "${VM[@]}" ssh "$node" "${PLACE[@]}" --worker=all "--command=$1" </dev/null || code=$?
  done
  return "$code"
}
on_first() { run "${VM[@]}" ssh "${NODES[0]}" "${PLACE[@]}" --worker=0 "--command=$1" </dev/null; }
worker() { printf 'bash repulsor_jax/launch/worker.sh %s' "$(quote "$@")"; }
# The worker runs $(hostname). A new machine, with nothing installed, answers too.
# shellcheck disable=SC2016
STATUS='if [ -d repulsor_jax ]; then bash repulsor_jax/launch/worker.sh status; else echo "worker $(hostname) none"; fi'

# Both steps are retried: a machine that has just started refuses connections for a while.
install() {
  local node storage=()
  if [[ -n $BUCKET ]]; then storage=(gcsfuse "$BUCKET" "$MOUNT_POINT"); fi
  if [[ -n $NFS ]]; then storage=(nfs "$NFS" "$MOUNT_POINT"); fi
  # Once: what is started again has the code that was started first.
  [[ -f $SCRATCH/code.tar.gz ]] || pack_code || return
  for node in "${NODES[@]}"; do
    retry run "${VM[@]}" scp "$SCRATCH/code.tar.gz" "$node:repulsor_jax.tar.gz" "${PLACE[@]}" --worker=all || return
  done
  retry on_workers "mkdir -p repulsor_jax && tar -xzf repulsor_jax.tar.gz -C repulsor_jax && $(worker install tpu "${storage[@]}")"
}

start() {
  program
  PROGRAM+=(--distributed=on)
  on_first "$(worker count "$WORKDIR" "$MAX_STARTS")" || return
  retry on_workers "$(worker start "${PROGRAM[@]}")"
}

follow() { on_first "$(worker follow)"; }

# Puts the state of the run into VERDICT: running, done, again, or failed HOST CODE. The worker that
# ended first tells the reason: the others ended because of it.
judge() {
  local first code host
  VERDICT=running
  if ((DRY_RUN)); then
    on_workers "$STATUS"
    VERDICT='done'
    return
  fi
  if ! QUIET=1 on_workers "$STATUS" >"$SCRATCH/status" 2>"$SCRATCH/error" || ! grep -q '^worker ' "$SCRATCH/status"; then
    cat "$SCRATCH/error" >&2
    return 1
  fi
  first=$(awk '$1 == "worker" && $3 == "exited" && $4 != 0 { print $5, $4, $2 }' "$SCRATCH/status" | sort -n | head -n 1)
  if [[ -n $first ]]; then
    read -r _ code host <<<"$first"
    VERDICT="failed $host $code"
    if ((code == RUN_AGAIN || code >= 128)); then VERDICT=again; fi
  elif grep -q ' none$' "$SCRATCH/status"; then
    VERDICT=again
  elif ! grep -q ' running$' "$SCRATCH/status"; then
    VERDICT='done'
  fi
}

# Shows the log and waits for the end of the run; VERDICT then says how it ended.
watch() {
  local misses=0
  if ((DRY_RUN)); then
    follow
    judge
    return
  fi
  while :; do
    # Follow the log again if the connection broke, or if the first worker ended before the others.
    if [[ -z ${BACKGROUND-} ]] || ! kill -0 "$BACKGROUND" 2>/dev/null; then in_background quietly follow; fi
    attend sleep "$POLL_SECONDS"
    if judge; then
      misses=0
      if [[ $VERDICT != running ]]; then break; fi
    elif ! look; then
      say "Google Cloud does not answer, see above; looking again"
    elif [[ $STATE != ACTIVE ]]; then
      VERDICT=preempted
      break
    elif ((++misses > RETRIES)); then
      die "a worker does not answer, though the request is ACTIVE: launch/tpu.sh status $AGAIN;" \
        "if it stays away, down and all. The machines cost until then"
    fi
  done
  stop_background
}

run_to_the_end() {
  local host code
  while :; do
    bring_up "$AUTO_RECREATE"
    if ((CREATED)); then
      VERDICT=none CREATED=0
    else
      retry judge || die "the workers do not answer, see above"
    fi
    if [[ $VERDICT != running ]]; then
      # Also on machines that have it: one that was restarted has lost its mount.
      if install && start; then
        LOST=0
      elif look && [[ $STATE != ACTIVE ]]; then # the start failed because the machines were preempted
        VERDICT=preempted
      else
        die "the program was not started, see above. $COSTS"
      fi
    fi
    if [[ $VERDICT != preempted ]]; then watch; fi
    case $VERDICT in
      done)
        say "the run is complete. $COSTS"
        return
        ;;
      again)
        say "a worker has ended and the run can go on: starting it again from the newest checkpoint"
        retry on_workers "$(worker stop "$STOP_SECONDS")" || true
        ;;
      preempted)
        if [[ $STATE == ABSENT ]]; then die "$NAME was deleted by someone: it is not made anew"; fi
        say "preempted"
        ;;
      failed*)
        read -r _ host code <<<"$VERDICT"
        on_workers "$(worker tail "$host")" || true
        on_workers "$(worker stop "$STOP_SECONDS")" || true
        die "the program failed on $host with code $code and is not started again. $COSTS"
        ;;
    esac
  done
}

parse_command_line "$@"
REQUIRED=(PROJECT ZONE NAME ACCELERATOR_TYPE RUNTIME_VERSION CONFIG WORKDIR)
OPTIONAL=(NUM_SLICES=1 PROVISIONING=on-demand SERVICE_ACCOUNT= BUCKET= NFS= MOUNT_POINT=/mnt/repulsor
  COMPILATION_CACHE_DIR= AUTO_RECREATE=false MAX_STARTS=5 POLL_SECONDS=60 RETRIES=5 RETRY_SECONDS=10
  STOP_SECONDS=120)
read_settings
check NUM_SLICES '[1-9][0-9]*' "a number from 1"
check PROVISIONING 'on-demand|spot|reserved' "on-demand, spot or reserved"
check AUTO_RECREATE 'true|false' "true or false"
check MAX_STARTS '[1-9][0-9]*' "a number from 1"
for key in POLL_SECONDS RETRIES RETRY_SECONDS STOP_SECONDS; do check "$key" '[0-9]+' "a number"; done
check WORKDIR '/.*' "a path that all workers see, such as $MOUNT_POINT/runs/xl"
[[ -z $BUCKET || -z $NFS ]] || die "$SETTINGS: BUCKET and NFS: one of the two is mounted"
AUTO_RECREATE=$([[ $AUTO_RECREATE == true ]] && echo 1 || echo 0)
need gcloud git
PLACE=("--zone=$ZONE" "--project=$PROJECT")
NODES=("$NAME")
if ((NUM_SLICES > 1)); then # names by the prefix, until `look` reads the real ones
  NODES=()
  for ((i = 0; i < NUM_SLICES; i++)); do NODES+=("$NAME-$i"); done
fi
make_scratch
STATE=ABSENT CREATED=0 LOST=0 VERDICT=none
AGAIN="--settings=$(quote "$SETTINGS")"
COSTS="The machines are there and cost: launch/tpu.sh down $AGAIN deletes them"
on_interrupt "interrupted: what is in the cloud stays as it is, a run goes on and a request stays queued" \
  "follow it by launch/tpu.sh logs $AGAIN, or look after it again by all" \
  "delete it by launch/tpu.sh down $AGAIN"

case $COMMAND in
  all) run_to_the_end ;;
  up) bring_up 0 ;;
  install)
    read_request
    install || die "not installed, see above"
    ;;
  run)
    read_request
    start || die "not started, see above"
    ;;
  logs)
    read_request
    follow
    ;;
  status)
    read_request
    on_workers "$STATUS"
    ;;
  down)
    confirm "the queued resource $NAME with its machines ($NUM_SLICES x $ACCELERATOR_TYPE)"
    run "${QR[@]}" delete "$NAME" "${PLACE[@]}" --force --quiet
    ;;
  *) die "$COMMAND: no such command; see launch/tpu.sh --help" ;;
esac
