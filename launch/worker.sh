#!/usr/bin/env bash
# The launchers run this on the machines of a job. The state of the run is in ~/repulsor_run.
#
#   install EXTRA [KIND SOURCE MOUNT_POINT]  makes the environment; KIND gcsfuse or nfs mounts SOURCE
#   count WORKDIR MAX      counts this start; fails after MAX starts without a new checkpoint
#   start ARGUMENTS...     runs the program detached, unless it runs already
#   status                 prints "worker HOST none|running|exited CODE TIME"
#   follow, tail [HOST]    prints the log as it grows, or its end
#   stop SECONDS           ends the program, by force after SECONDS
#   task DIR ARGUMENTS...  runs the program in the foreground and notes in DIR how it ended (Slurm)
set -euo pipefail

CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${REPULSOR_PYTHON:-$CODE/.venv/bin/python}
RUN=${REPULSOR_RUN:-$HOME/repulsor_run}
PINS=3.12 # the Python of the environment, with tested versions in constraints/

install() {
  local extra=$1
  export PATH=$HOME/.local/bin:$PATH
  # The image's own Python may be too old; uv brings its own.
  if ! command -v uv >/dev/null; then curl -LsSf https://astral.sh/uv/install.sh | sh; fi
  cd "$CODE"
  uv venv --quiet --allow-existing --python "$PINS" .venv
  uv pip install --quiet --python .venv/bin/python -c "constraints/py$PINS.txt" -e ".[$extra]"
  if (($# > 1)); then mount_storage "$2" "$3" "$4"; fi
}

mount_storage() {
  local kind=$1 source=$2 point=$3
  if mountpoint -q "$point"; then return; fi
  sudo mkdir -p "$point"
  if [[ $kind == nfs ]]; then
    sudo apt-get install -y -q nfs-common
    sudo mount -t nfs "$source" "$point"
    return
  fi
  if ! command -v gcsfuse >/dev/null; then
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg |
      sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -q
    sudo apt-get install -y -q gcsfuse
  fi
  sudo chown "$(id -u):$(id -g)" "$point"
  # Without cached metadata, every machine sees at once the files that another has written.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 "$source" "$point"
}

newest_checkpoint() {
  local path newest=none
  for path in "$1"/checkpoints/*; do
    path=${path##*/}
    if [[ $path =~ ^[0-9]+$ ]] && [[ $newest == none || $path -gt $newest ]]; then newest=$path; fi
  done
  echo "$newest"
}

# The one limit on restarts. It holds for every launcher, and for every way in which a run ended.
count() {
  local workdir=$1 max=$2 step starts=0 last=
  mkdir -p "$workdir"
  step=$(newest_checkpoint "$workdir")
  if [[ -f $workdir/.starts ]]; then read -r last starts <"$workdir/.starts" || true; fi
  if [[ $last != "$step" ]]; then starts=0; fi
  if ((starts >= max)); then
    rm -f "$workdir/.starts" # a person who has read the log may start it again
    echo "error: $starts starts in $workdir without a new checkpoint in $workdir/checkpoints (the newest is $step): not started again." \
      "Read the log; MAX_STARTS is the limit" >&2
    return 1
  fi
  echo "$step $((starts + 1))" >"$workdir/.starts"
}

is_running() { [[ -f $RUN/pid ]] && kill -0 "$(<"$RUN/pid")" 2>/dev/null; }

start() {
  if is_running; then
    echo "$(hostname): runs already"
    return
  fi
  mkdir -p "$RUN"
  rm -f "$RUN/exit"
  setsid bash "${BASH_SOURCE[0]}" supervise "$@" </dev/null >>"$RUN/log" 2>&1 &
  echo $! >"$RUN/pid"
}

# run_program pass|keep ARGUMENTS...: returns the program's code. SIGTERM asks the program to save. It
# is passed on, or kept if the program gets it too: Slurm signals all processes of a task.
run_program() {
  local how=$1 child code=0 signalled=0
  shift
  cd "$CODE"
  "$PYTHON" -m repulsor_jax.main "$@" &
  child=$!
  trap 'signalled=1; if [[ $how == pass ]]; then kill -TERM "$child" 2>/dev/null || true; fi' TERM
  wait "$child" || code=$?
  while ((signalled)); do # the signal ended `wait`; the program may still run
    signalled=0 code=0
    wait "$child" || code=$?
  done
  return "$code"
}

supervise() {
  local code=0
  echo "--- $(date -u +%FT%TZ) $(hostname): start"
  run_program pass "$@" || code=$?
  echo "--- $(date -u +%FT%TZ) $(hostname): exit code $code"
  echo "$code $(date +%s.%N)" >"$RUN/exit"
}

status() {
  local how=none
  if is_running; then
    how=running
  elif [[ -f $RUN/exit ]]; then
    how="exited $(<"$RUN/exit")"
  elif [[ -f $RUN/pid ]]; then
    how="exited 137 0" # it left no exit code: killed, or the machine was restarted
  fi
  echo "worker $(hostname) $how"
}

follow() {
  if [[ -f $RUN/pid ]]; then tail -n 20 -F --pid="$(<"$RUN/pid")" "$RUN/log" 2>/dev/null; fi
}

last_lines() {
  if [[ -z ${1-} || $1 == "$(hostname)" ]]; then
    echo "--- last lines of the log on $(hostname)"
    tail -n 30 "$RUN/log" 2>/dev/null || echo "no log"
  fi
}

stop() {
  local second
  for ((second = 0; second < $1; second++)); do
    if ! is_running; then return; fi
    if ((second == 0)); then kill -TERM "$(<"$RUN/pid")" 2>/dev/null || true; fi
    sleep 1
  done
  if is_running; then
    kill -KILL -- "-$(<"$RUN/pid")" 2>/dev/null || true # the group that setsid made
    echo "137 $(date +%s.%N)" >"$RUN/exit"
  fi
}

# srun --kill-on-bad-exit ends the other tasks at once if this one returns a code other than 0. The code
# of "saved, run me again" becomes 0: the other tasks may still be writing.
task() {
  local marks=$1 code=0
  shift
  run_program keep "$@" || code=$?
  if ((code == 75)); then
    touch "$marks/again"
    code=0
  elif ((code > 0 && code < 128)); then # codes from 128 are signals, which srun reports
    echo "task ${SLURM_PROCID:-0} on $(hostname): exit code $code" >>"$marks/failed"
  fi
  return "$code"
}

case ${1-} in
  install | count | start | supervise | status | follow | stop | task) "$@" ;;
  tail) last_lines "${@:2}" ;;
  *)
    echo "usage: worker.sh install|count|start|status|follow|tail|stop|task" >&2
    exit 2
    ;;
esac
