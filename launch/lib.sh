# Shared by the launchers: reading settings, printing and running commands, waiting. Sourced, never run.
# shellcheck shell=bash

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash $BASH_VERSION is too old, 4.4 or later is needed (on macOS: brew install bash)" >&2
  exit 1
fi

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LAUNCHER=$(basename "$0" .sh)
# shellcheck disable=SC2034  # the launchers use it
RUN_AGAIN=75 # EX_TEMPFAIL: the program has saved and wants to be run again

# Prints a line with the launcher's name and the time to standard error; --dry-run prints only commands.
say() { if ! ((${DRY_RUN-0})); then printf '[%s %(%H:%M:%S)T] %s\n' "$LAUNCHER" -1 "$*" >&2; fi; }
die() {
  printf '[%s] error: %s\n' "$LAUNCHER" "$*" >&2
  exit 1
}

# Prints words as one line that a shell reads back as the same words.
quote() {
  local word line=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# attend PROGRAM...: runs a program in the background and waits for it. Ctrl-C ends `wait` at once; a
# program in the foreground that starts just after ctrl-C never hears it, and bash would wait for it.
attend() {
  (trap - INT && exec "$@") <&0 &
  wait "$!"
}

# Prints a command, then runs it; --dry-run only prints it. Every call of a platform's tools goes through it.
run() {
  if ((DRY_RUN)); then
    printf '$ %s\n' "$(quote "$@")"
  else
    if [[ -z ${QUIET-} ]]; then say "\$ $(quote "$@")"; fi
    attend "$@"
  fi
}

# Runs a command until it succeeds, at most RETRIES times more, and doubles the wait each time.
retry() {
  local try code=0 wait=$RETRY_SECONDS
  for ((try = 0; try <= RETRIES; try++)); do
    if ((try)); then
      say "failed with code $code; again in $wait s ($try of $RETRIES)"
      attend sleep "$wait"
      wait=$((2 * wait))
    fi
    code=0
    "$@" || code=$?
    if ((code == 0)); then return 0; fi
  done
  return "$code"
}

# Reads the command line into COMMAND, SETTINGS, DRY_RUN, YES, and the words after -- into ARGS.
parse_command_line() {
  COMMAND='' SETTINGS=$REPO/launch/$LAUNCHER.env DRY_RUN=0 YES=0 ARGS=()
  while (($#)); do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --settings=*) SETTINGS=${1#*=} ;;
      --dry-run) DRY_RUN=1 ;;
      --yes) YES=1 ;;
      --) shift && ARGS=("$@") && break ;;
      -*) die "$1: no such option; see $0 --help" ;;
      *)
        [[ -z $COMMAND ]] || die "$1: one command at a time; arguments of the program follow --"
        COMMAND=$1
        ;;
    esac
    shift
  done
  [[ -n $COMMAND ]] || { usage >&2 && exit 2; }
}

# Reads the lines KEY=value of $SETTINGS into variables. A value is taken as it is and never run.
# REQUIRED holds keys that need a value, OPTIONAL holds KEY=default. ARG= may come many times: each is
# one argument of the program, before those of the command line.
read_settings() {
  local line key value number=0 known=" ARG ${REQUIRED[*]} " arguments=()
  for key in "${REQUIRED[@]}"; do printf -v "$key" ''; done
  for line in "${OPTIONAL[@]}"; do
    printf -v "${line%%=*}" '%s' "${line#*=}"
    known+="${line%%=*} "
  done
  [[ -r $SETTINGS ]] || die "$SETTINGS: cannot be read; copy $REPO/launch/$LAUNCHER.env and fill it in"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    line=${line%$'\r'}
    if [[ $line =~ ^[[:space:]]*(#|$) ]]; then continue; fi
    [[ $line =~ ^([A-Z_]+)=(.*)$ ]] || die "$SETTINGS:$number: expected KEY=value, without spaces around ="
    key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
    [[ $known == *" $key "* ]] || die "$SETTINGS:$number: unknown key $key; the keys are$known"
    if [[ $key == ARG ]]; then
      arguments+=("$value")
      continue
    fi
    value=${value%"${value##*[![:space:]]}"}
    [[ ! $value =~ ^[\"\'] ]] || die "$SETTINGS:$number: $key: leave the quotes out, values are taken as they are"
    printf -v "$key" '%s' "$value"
  done <"$SETTINGS"
  for key in "${REQUIRED[@]}"; do
    [[ -n ${!key} ]] || die "$SETTINGS: $key has no value; the comment above it says what it is"
  done
  ARGS=("${arguments[@]}" "${ARGS[@]}")
}

# check KEY REGEX WORDS: ends the script unless the value of KEY matches; WORDS say what is allowed.
check() {
  [[ ${!1} =~ ^($2)$ ]] || die "$SETTINGS: $1=${!1}: expected $3"
}

# Puts the flags of the program into PROGRAM.
program() {
  PROGRAM=("--config=$CONFIG" "--workdir=$WORKDIR" "${ARGS[@]}")
  if [[ -n $COMPILATION_CACHE_DIR ]]; then
    PROGRAM+=("--compilation_cache_dir=$COMPILATION_CACHE_DIR")
  fi
}

# Asks before a deletion; without a terminal, only --yes answers.
confirm() {
  local answer
  if ((YES || DRY_RUN)); then return 0; fi
  [[ -t 0 ]] || die "nothing was deleted: without a terminal, say --yes to delete $1"
  read -r -p "Delete $1? [y/N] " answer
  [[ $answer == [yY] || $answer == yes ]] || die "nothing was deleted"
}

# on_interrupt LINES...: sets the lines that ctrl-C prints. It stops this script and nothing in the cloud.
on_interrupt() {
  INTERRUPTED=("$@")
  exec 8>&2 # a trap runs with the redirections of the command that it interrupts
  trap 'trap - INT; explain_interrupt 2>&8; exit 130' INT
}

explain_interrupt() {
  local line
  for line in "${INTERRUPTED[@]}"; do say "$line"; done
}

# Runs a command without printing it, for commands in the background and for polling.
quietly() { QUIET=1 "$@"; }

# in_background COMMAND...: runs it in its own process group, which ends with this script at the latest.
in_background() {
  stop_background
  set -m
  "$@" </dev/null &
  BACKGROUND=$!
  set +m
}

stop_background() {
  if [[ -n ${BACKGROUND-} ]]; then kill -TERM -- "-$BACKGROUND" 2>/dev/null || true; fi
  BACKGROUND=''
}

# Makes a temporary directory. At the end of the script, it and all running commands are removed.
make_scratch() {
  SCRATCH=$(mktemp -d)
  trap 'stop_background; stop_attended; rm -rf "$SCRATCH"' EXIT
}

stop_attended() {
  local pid
  for pid in $(jobs -pr); do kill -TERM "$pid" 2>/dev/null || true; done
}

need() {
  local tool
  for tool; do
    ((DRY_RUN)) || command -v "$tool" >/dev/null || die "$tool is not on PATH; docs/scale.md says where it comes from"
  done
}

# Packs the committed code as $SCRATCH/code.tar.gz, without data, credentials and uncommitted edits.
pack_code() {
  if ! ((DRY_RUN)) && [[ -n $(git -C "$REPO" status --porcelain 2>/dev/null) ]]; then
    say "note: what is not committed is not sent"
  fi
  run git -C "$REPO" archive --format=tar.gz --output="$SCRATCH/code.tar.gz" HEAD
}
