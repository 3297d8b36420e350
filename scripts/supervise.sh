#!/usr/bin/env bash
# Restarts a command when it fails; `lowrank train` then resumes from its last checkpoint.
set -u

usage() {
  cat <<'EOF'
usage: scripts/supervise.sh [--processes=N] [--restarts=N] [--pause=SECONDS] [--grace=SECONDS] [--] COMMAND...

Runs COMMAND until it exits with status 0, or with one that a restart would only repeat: 2 (bad input), 4 (diverged), 126 or
127 (the command cannot be run). SIGTERM and Ctrl-C are passed on; after that nothing is restarted. On several hosts, run it on
each of them, with a --patience of COMMAND that is long enough for a lost host to come back.

  --processes=N      start N processes on this machine as one run; each gets --coordinator, --processes and --process
  --restarts=N       maximum number of restarts; default: 20
  --pause=SECONDS    wait before each restart; default: 10
  --grace=SECONDS    when a process has failed, time for the others to end before they are killed; default: 10

  scripts/supervise.sh lowrank train --config=configs/digits_resnet.py --workdir=runs/a
  scripts/supervise.sh --processes=4 lowrank train --config=configs/digits_resnet.py --workdir=runs/b

The exit status is that of COMMAND.
EOF
}

refuse() {
  echo "supervise: $1; see --help" >&2
  exit 2
}

whole() {  # NAME VALUE
  [[ $2 =~ ^(0|[1-9][0-9]*)$ ]] || refuse "--$1: '$2' must be a whole number"
}

processes=1 restarts=20 pause=10 grace=10
while [ $# -gt 0 ]; do
  case $1 in
    --help) usage; exit 0 ;;
    --processes=*) processes=${1#*=}; whole processes "$processes" ;;
    --restarts=*) restarts=${1#*=}; whole restarts "$restarts" ;;
    --pause=*) pause=${1#*=}; whole pause "$pause" ;;
    --grace=*) grace=${1#*=}; whole grace "$grace" ;;
    --) shift; break ;;
    --*) refuse "unknown option $1" ;;
    *) break ;;
  esac
  shift
done
[ $# -gt 0 ] || refuse "no command"
[ "$processes" -gt 0 ] || refuse "--processes: must be at least 1"

set -m  # children in groups of their own: Ctrl-C reaches them through this script alone
stopping=
declare -A running=()  # process ids as keys

pass_on() {  # SIGNAL
  stopping=yes
  for pid in "${!running[@]}"; do kill -"$1" "$pid" 2>/dev/null; done
}
trap 'pass_on TERM' TERM HUP  # HUP: the terminal was closed
trap 'pass_on INT' INT

free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 12000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

start() {
  local i port
  running=()
  if [ "$processes" -eq 1 ]; then
    "$@" &
    running[$!]=
    return
  fi
  port=$(free_port)
  for ((i = 0; i < processes; i++)); do
    "$@" --coordinator="127.0.0.1:$port" --processes="$processes" --process="$i" &
    running[$!]=
  done
}

# Statuses as in lowrank_jax/experiment/errors.py, to which a test holds this.
# The status of a round: the first failure's, but 2 and 4 before others, and 75 only where nothing failed.
note() {  # STATUS
  case $1 in
    0) ;;
    2 | 4) [[ $status =~ ^(2|4)$ ]] || status=$1 ;;
    75) [ "$status" -ne 0 ] || status=75 ;;
    *) [[ $status =~ ^(0|75)$ ]] && status=$1 ;;
  esac
}

finish() {  # waits for all; the status of a killed process does not count
  local pid code deadline='' killed=
  while [ ${#running[@]} -gt 0 ]; do
    for pid in "${!running[@]}"; do
      kill -0 "$pid" 2>/dev/null && continue
      wait "$pid"
      code=$?
      [ "$killed" ] || note "$code"
      unset "running[$pid]"
    done
    [[ $status =~ ^(0|75)$ ]] || : "${deadline:=$((SECONDS + grace))}"
    if [ "$deadline" ] && [ ! "$killed" ] && [ "$SECONDS" -gt "$deadline" ]; then
      killed=yes
      for pid in "${!running[@]}"; do kill -KILL "$pid" 2>/dev/null; done
    fi
    sleep 0.2
  done
}

for ((round = 0; ; round++)); do
  status=0
  start "$@"
  [ ! "$stopping" ] || pass_on TERM  # the signal came while they started
  finish
  if [ "$stopping" ] || [[ $status =~ ^(0|2|4|126|127)$ ]]; then exit "$status"; fi
  if [ "$round" -ge "$restarts" ]; then
    echo "supervise: exited with status $status; no restarts left ($restarts used)" >&2
    exit "$status"
  fi
  echo "supervise: exited with status $status; restart $((round + 1)) of $restarts in $pause s" >&2
  for ((waited = 0; waited < pause * 5; waited++)); do
    [ ! "$stopping" ] || exit "$status"
    sleep 0.2
  done
done
