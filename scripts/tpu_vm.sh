#!/usr/bin/env bash
# Trains on a Cloud TPU VM or pod slice: creates or reuses it, installs this checkout there, starts `lowrank` on all workers,
# follows the log, starts again what a preemption ended.  `scripts/tpu_vm.sh --help` has examples; docs/tpu.md the whole way.
#
# What is relied on, and where it is said:
#   tpu-vm create, ssh, scp, list, delete        https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm
#   queued-resources create, list, delete        https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources
#   states of a queued resource                  https://docs.cloud.google.com/tpu/docs/queued-resources
#   states of a node (READY, PREEMPTED, ...)     https://cloud.google.com/python/docs/reference/tpu/1.12.0/google.cloud.tpu_v2.types.Node.State
#   a spot VM has to be deleted and made anew    https://docs.cloud.google.com/tpu/docs/spot
#   runtime versions by generation               https://docs.cloud.google.com/tpu/docs/runtimes
#   accelerator types (v5litepod-16 is v5e:4x4)  https://docs.cloud.google.com/tpu/docs/v5e
#   one process a host, started on all of them   https://docs.cloud.google.com/tpu/docs/jax-pods
# shellcheck disable=SC2016,SC2015 # what is in single quotes is for the workers' shell; `a && b || return` means what it says
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
poll=${TPU_VM_POLL:-15} # seconds between two looks at a TPU that is on its way

usage() {
  cat <<'USAGE'
usage: scripts/tpu_vm.sh [run] --name=NAME --type=TYPE --zone=ZONE [options] -- LOWRANK_ARGUMENTS...
       scripts/tpu_vm.sh logs|status|stop|delete --name=NAME --zone=ZONE [options]

run (the default): create the TPU unless it is there, install this checkout on every worker, start `lowrank` on all of them
  and follow the log of worker 0.  Ctrl-C ends the following alone; the same command picks it up again.  The exit status is
  that of the training: 0, or 2 and 4, which a restart would only repeat (`lowrank --help`).
logs: print the logs of all workers, each line with its worker's name; with --worker=N follow that one.
status: the state of the TPU, and on every worker whether a run is in progress.
stop: end the run on all workers; `lowrank` saves first, and the same `run` command goes on.  The TPU stays, and costs.
delete: delete the TPU and its queued resource.

  --name=NAME             of the TPU (needed)
  --zone=ZONE             such as us-west4-a (needed)
  --type=TYPE             such as v5litepod-16 (or v5e-16), v6e-8, v5p-8, v4-8, v3-8: of v5e and v6e the number counts chips,
                          of the others TensorCores, two a chip (needed by run)
  --project=PROJECT       default: the one that gcloud is set to
  --version=VERSION       of the TPU's software; default: by type, such as v2-alpha-tpuv5-lite
  --service-account=MAIL  that the VMs act as; it has to read the data and write the work directory
  --spot                  capacity that may be taken away
  --queued                ask by a queued resource and wait until it is granted
  --create-flag=FLAG      one more flag for creating, such as --create-flag=--internal-ips; may be repeated
  --setup=COMMAND         shell line to run on every worker before each start, such as mounting a disk
  --restarts=N            how often a worker starts again what ended otherwise than by 0, 2 or 4; default: 20
  --recreate=N            how often `run` starts over, with a new TPU where the old one was taken away; default: 0
  --worker=N              of logs: follow that worker
  --dry-run               print every command, ready to paste, and run none; nothing is asked of Google Cloud, so it prints
                          what happens where there is no such TPU yet
  --help

examples:
  scripts/tpu_vm.sh --name=r50 --type=v5e-16 --zone=us-west4-a --spot --queued --recreate=10 \
      -- train --config=configs/imagenet_resnet50.py --config.dataset.data_dir=gs://BUCKET/tfds --workdir=gs://BUCKET/r50
  scripts/tpu_vm.sh logs --name=r50 --zone=us-west4-a --worker=0
  scripts/tpu_vm.sh delete --name=r50 --zone=us-west4-a
USAGE
}

fail() {
  echo "tpu_vm.sh: $1" >&2
  exit 2
}

# A word as any POSIX shell reads it back; the workers' shell gets what this prints, and so does whoever pastes a dry run.
quote() {
  local mark="'" escaped="'\\''" # named, since the bash of macOS takes backslashes in a replacement for its own
  if [[ $1 =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
    printf '%s' "$1"
  else
    printf "'%s'" "${1//$mark/$escaped}"
  fi
}

quote_all() {
  local word separator=
  for word in "$@"; do
    printf '%s' "$separator"
    quote "$word"
    separator=' '
  done
}

# --- options ---

action=run name='' type='' zone='' project='' version='' service_account='' setup='' worker=''
spot='' queued='' dry_run='' restarts=20 recreate=0
create_flags=() arguments=()

read_options() {
  case ${1:-} in
    run | logs | status | stop | delete) action=$1 && shift ;;
  esac
  while [ $# -gt 0 ]; do
    case $1 in
      --name=*) name=${1#*=} ;;
      --type=*) type=${1#*=} ;;
      --zone=*) zone=${1#*=} ;;
      --project=*) project=${1#*=} ;;
      --version=*) version=${1#*=} ;;
      --service-account=*) service_account=${1#*=} ;;
      --setup=*) setup=${1#*=} ;;
      --worker=*) worker=${1#*=} ;;
      --restarts=*) restarts=${1#*=} ;;
      --recreate=*) recreate=${1#*=} ;;
      --create-flag=*) create_flags+=("${1#*=}") ;;
      --spot) spot=--spot ;;
      --queued) queued=yes ;;
      --dry-run) dry_run=yes ;;
      --help | -h) usage && exit 0 ;;
      --) shift && arguments=("$@") && return ;;
      *) fail "unknown argument $(quote "$1"); see scripts/tpu_vm.sh --help" ;;
    esac
    shift
  done
}

check_options() {
  local missing=()
  [ -n "$name" ] || missing+=(--name)
  [ -n "$zone" ] || missing+=(--zone)
  [ "$action" != run ] || [ -n "$type" ] || missing+=(--type)
  [ ${#missing[@]} -eq 0 ] || fail "$action needs ${missing[*]}"
  [[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] || fail "--name=$name: lower-case letters, digits and hyphens, a letter first"
  [[ $zone =~ ^[a-z]+(-[a-z]+)+[0-9]+-[a-z]$ ]] || fail "--zone=$zone: a zone, such as us-west4-a"
  [[ $restarts =~ ^(0|[1-9][0-9]*)$ ]] || fail "--restarts=$restarts: must be a whole number"
  [[ $recreate =~ ^(0|[1-9][0-9]*)$ ]] || fail "--recreate=$recreate: must be a whole number"
  [[ -z $worker || $worker =~ ^[0-9]+$ ]] || fail "--worker=$worker: must be the number of a worker"
  [ -z "$worker" ] || [ "$action" = logs ] || fail "--worker: only with logs"
  if [ "$action" != run ]; then
    [ ${#arguments[@]} -eq 0 ] || fail "$action takes no arguments after --"
    return
  fi
  [ ${#arguments[@]} -gt 0 ] || fail "run needs the arguments of lowrank after --, such as -- train --config=... --workdir=gs://..."
  check_type
  check_arguments
}

check_type() {
  local default
  type=${type/#v5e-/v5litepod-}
  case $type in
    v2-* | v3-* | v4-*) default=tpu-ubuntu2204-base ;;
    v5litepod-*) default=v2-alpha-tpuv5-lite ;;
    v5p-*) default=v2-alpha-tpuv5 ;;
    v6e-*) default=v2-alpha-tpuv6e ;;
    *) fail "--type=$type: unknown; such as v5litepod-16, v6e-8, v5p-8, v4-8 or v3-8 (later ones are to be had in GKE alone: lowrank sweep --emit=jobset)" ;;
  esac
  [[ $type =~ -[1-9][0-9]*$ ]] || fail "--type=$type: a number has to follow, such as ${type%%-*}-16"
  version=${version:-$default}
}

# What would only come to light on the workers, once they are paid for.
check_arguments() {
  local i word key value workdir=''
  for ((i = 0; i < ${#arguments[@]}; i++)); do
    word=${arguments[i]}
    key=${word%%=*} value=${word#*=}
    [ "$key" != "$word" ] || value=${arguments[i + 1]:-}
    case $key in
      --config) [ -f "$root/${value%%:*}" ] || fail "--config=$value: not a file of this checkout, which is what the workers get" ;;
      --workdir)
        workdir=$value
        [[ $value == gs://* ]] || fail "--workdir=$value: has to be a bucket, such as gs://BUCKET/NAME: a worker's disk is gone with it"
        ;;
    esac
  done
  case ${arguments[0]} in
    -*) fail "after -- comes the command of lowrank, such as train, and then its flags" ;;
    train) [ -n "$workdir" ] || fail "train needs --workdir=gs://..." ;;
    sweep) # a type of up to 8 is one worker, whatever it counts
      [ "${type##*-}" -le 8 ] || fail "sweep: each worker of a $type would run all of it. \`lowrank sweep ... --emit=sh\` prints the \`train\` of every trial, for a run of its own; --emit=jobset is for GKE; a --type of up to 8 has one worker, and takes a sweep"
      ;;
  esac
}

# --- gcloud ---

# Runs a command, or prints it as it would be pasted.
do_it() {
  if [ -n "$dry_run" ]; then
    quote_all "$@"
    echo
  else
    "$@"
  fi
}

note() {
  if [ -n "$dry_run" ]; then
    echo "# $1"
  else
    echo "tpu_vm.sh: $1" >&2
  fi
}

where=()

on_workers() { # WORKERS COMMAND
  do_it gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"
}

# The state of the TPU, nothing where there is none.  By list, since describe fails for a missing one as for a missing right.
node_state() {
  gcloud compute tpus tpu-vm list "${where[@]}" "--filter=name ~ /$name\$" '--format=value(state)'
}

request_state() {
  gcloud compute tpus queued-resources list "${where[@]}" "--filter=name ~ /$name\$" '--format=value(state.state)'
}

create() {
  local flags=("${where[@]}" "--accelerator-type=$type")
  [ -z "$spot" ] || flags+=(--spot)
  [ -z "$service_account" ] || flags+=("--service-account=$service_account")
  flags+=(${create_flags[@]+"${create_flags[@]}"})
  if [ -n "$queued" ]; then
    do_it gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${flags[@]}" "--runtime-version=$version"
  else
    do_it gcloud compute tpus tpu-vm create "$name" "${flags[@]}" "--version=$version"
  fi
}

delete() {
  if [ -n "$dry_run" ]; then
    note "whichever of the two there is; the first takes its TPU along"
    do_it gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
    do_it gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  elif [ -n "$(request_state)" ]; then
    gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  elif [ -n "$(node_state)" ]; then
    gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  else
    note "there is no $name in $zone"
  fi
}

# Ends with a TPU that takes commands; creates it, makes anew what was taken away, waits for what is on its way.
ensure_ready() {
  if [ -n "$dry_run" ]; then
    note "unless the TPU is there:"
    create
    [ -z "$queued" ] || note "waits until it is granted"
    return
  fi
  local state request
  while true; do
    state=$(node_state) && request=$(request_state) || return
    case ${state:-none}/${request:-none} in
      READY/*) check_reused && return ;;
      */FAILED) note "the request for $name failed; gcloud compute tpus queued-resources describe $name ${where[*]}" && exit 1 ;;
      */SUSPENDING | */DELETING | DELETING/*) note "waiting until $name is gone" ;;
      PREEMPTED/* | TERMINATED/* | */SUSPENDED) note "$name was taken away: deleting what is left" && delete || return ;;
      none/none) note "creating $name, $type" && create || return ;;
      STOPPED/*) gcloud compute tpus tpu-vm start "$name" "${where[@]}" || return ;;
      *) note "waiting for $name: ${state:-no TPU yet}${request:+, request $request}" ;;
    esac
    sleep "$poll"
  done
}

check_reused() {
  local found
  found=$(gcloud compute tpus tpu-vm list "${where[@]}" "--filter=name ~ /$name\$" '--format=value(acceleratorType.basename())') || return
  [ "$found" = "$type" ] || fail "$name is there and is a $found, not a $type; use another --name, or delete it first"
}

# --- on the workers, in the shell of the login ---

# What is there: the checkout, what it is installed in, and of the run its command, log, session and exit status.
on_vm='src=$HOME/lowrank_jax env=$HOME/lowrank_env run=$HOME/lowrank_run
busy() { [ -f "$run/pid" ] && pgrep -s "$(cat "$run/pid")" >/dev/null; }'

# Google's images bring Python 3.10, for which there is no current jax: uv brings another one.
install_command="$on_vm"'
if busy; then echo "a run is in progress: not installing"; exit 0; fi
set -e
rm -rf "$src" && mkdir -p "$src" && tar -xzf "$HOME/lowrank_jax.tar.gz" -C "$src"
python3 -m pip install --quiet --user --upgrade uv
[ -x "$env/bin/python" ] || python3 -m uv venv --quiet --python 3.11 "$env"
python3 -m uv pip install --quiet --python "$env/bin/python" -c "$src/constraints.txt" "$src[train,tpu,gcs]"'

# A stop goes to the whole session; the shell that notes the exit status has to outlive it.
start_command='set -e
mkdir -p "$run" && rm -f "$run/status" && cd "$src"
printf %s "$command" >"$run/command"
PATH="$env/bin:$PATH" nohup setsid sh -c "trap : TERM; $command"'\''; echo $? >"$0/status"'\'' "$run" >"$run/log" 2>&1 </dev/null &
echo $! >"$run/pid"'

launch_command() {
  local command
  command=$(quote_all bash scripts/supervise.sh "--restarts=$restarts" -- lowrank "${arguments[@]}")
  echo "$on_vm"
  echo "command=$(quote "$command")"
  echo 'if busy; then
  [ "$(cat "$run/command")" = "$command" ] && { echo "the run is in progress"; exit 0; }
  echo "another run is in progress here; end it first: scripts/tpu_vm.sh stop" >&2; exit 2
fi'
  [ -z "$setup" ] || echo "sh -c $(quote "$setup")"' || { echo "the setup failed" >&2; exit 2; }'
  echo "$start_command"
}

follow_command="$on_vm"'
[ -f "$run/log" ] || { echo "there is no run here" >&2; exit 2; }
tail -n +1 --pid="$(cat "$run/pid")" -F "$run/log" 2>/dev/null
[ -f "$run/status" ] && exit "$(cat "$run/status")"
echo "the run has ended without a word" >&2; exit 1'

logs_command="$on_vm"'
[ -f "$run/log" ] || { echo "$(hostname): there is no run here" >&2; exit 2; }
sed "s/^/$(hostname): /" "$run/log"'

status_command="$on_vm"'
if busy; then state="in progress"; elif [ -f "$run/status" ]; then state="ended with $(cat "$run/status")"; else state=none; fi
echo "$(hostname): run $state$([ ! -f "$run/command" ] || echo ": $(cat "$run/command")")"'

stop_command="$on_vm"'
busy || { echo "no run is in progress"; exit 0; }
pkill -TERM -s "$(cat "$run/pid")"
for second in $(seq 300); do busy || { echo stopped; exit 0; }; sleep 1; done
echo "still running after 300 s" >&2; exit 1'

# --- actions ---

# What git knows of or would add, without what it ignores.
pack() {
  local files='git ls-files -z --cached --others --exclude-standard'
  if [ -n "$dry_run" ]; then
    echo "(cd $(quote "$root") && $files | tar --ignore-failed-read --null -T - -czf $(quote "$1"))"
  else
    (cd "$root" && $files | tar --ignore-failed-read --null -T - -czf "$1")
  fi
}

install() {
  local archive=${TMPDIR:-/tmp}/lowrank_jax.tar.gz
  pack "$archive" &&
    do_it gcloud compute tpus tpu-vm scp "$archive" "$name:lowrank_jax.tar.gz" "${where[@]}" --worker=all &&
    on_workers all "$install_command"
}

# Ends with the training's exit status, or whatever kept it from being known.
attempt() {
  ensure_ready && install && on_workers all "$(launch_command)" || return
  note "following worker 0; Ctrl-C ends the following alone"
  on_workers 0 "$follow_command"
}

run() {
  local status left
  for ((left = recreate; ; left--)); do
    status=0
    attempt || status=$?
    # Done, hopeless, or stopped on purpose; all else may be a TPU that was taken away, which the next attempt will see.
    case $status in 0 | 2 | 4 | 75) exit "$status" ;; esac
    [ "$left" -gt 0 ] || exit "$status"
    note "ended with $status; trying again, $((left - 1)) more times after this"
    sleep "$poll"
  done
}

main() {
  read_options "$@"
  check_options
  where=("--zone=$zone")
  [ -z "$project" ] || where+=("--project=$project")
  [ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
  case $action in
    run) run ;;
    logs) if [ -n "$worker" ]; then on_workers "$worker" "$follow_command"; else on_workers all "$logs_command"; fi ;;
    status)
      if [ -n "$dry_run" ]; then note "after a list of its states"; else echo "$name: TPU $(node_state), request $(request_state)"; fi
      on_workers all "$status_command"
      ;;
    stop) on_workers all "$stop_command" ;;
    delete) delete ;;
  esac
}

main "$@"
