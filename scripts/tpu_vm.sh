#!/usr/bin/env bash
# Trains on a Cloud TPU VM or pod slice: creates or reuses it, installs this checkout there, starts `lowrank` on all workers,
# follows the log, and restarts after a preemption.  `scripts/tpu_vm.sh --help` has examples; docs/tpu.md is the guide.
#
# What it relies on, with sources:
#   tpu-vm create, ssh, scp, list, delete        https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm
#   queued-resources create, list, delete        https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources
#   states of a queued resource                  https://docs.cloud.google.com/tpu/docs/queued-resources
#   states of a node (READY, PREEMPTED, ...)     https://cloud.google.com/python/docs/reference/tpu/1.12.0/google.cloud.tpu_v2.types.Node.State
#   a spot VM has to be deleted and recreated    https://docs.cloud.google.com/tpu/docs/spot
#   runtime versions by generation               https://docs.cloud.google.com/tpu/docs/runtimes
#   accelerator types (v5litepod-16 is v5e:4x4)  https://docs.cloud.google.com/tpu/docs/v5e
#   one process per host, on all of them         https://docs.cloud.google.com/tpu/docs/jax-pods
# shellcheck disable=SC2016,SC2015 # single quotes: for the workers' shell; `a && b || return` is meant
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
poll=${TPU_VM_POLL:-15} # seconds between polls of a TPU that is being created

usage() {
  cat <<'USAGE'
usage: scripts/tpu_vm.sh [run] --name=NAME --type=TYPE --zone=ZONE [options] -- LOWRANK_ARGUMENTS...
       scripts/tpu_vm.sh logs|status|stop|delete --name=NAME --zone=ZONE [options]

run (default): create the TPU if it does not exist, install this checkout on every worker, start `lowrank` on all of them and
  follow the log of worker 0.  Ctrl-C stops following, not the run; the same command follows it again.  The exit status is
  that of the training.  2 and 4 are final: a restart would only repeat them (`lowrank --help`).
logs: print the logs of all workers, each line prefixed with its worker's name; with --worker=N, follow that worker's log.
status: print the state of the TPU, and for every worker whether a run is in progress.
stop: stop the run on all workers; `lowrank` saves first, and the same `run` command resumes.  The TPU stays and is billed.
delete: delete the TPU and its queued resource.

  --name=NAME             name of the TPU (required)
  --zone=ZONE             zone, e.g. us-west4-a (required)
  --type=TYPE             accelerator type, e.g. v5litepod-16 (or v5e-16), v6e-8, v5p-8, v4-8, v3-8; the number counts chips
                          for v5e and v6e, TensorCores (two per chip) for the others (required by run)
  --project=PROJECT       default: gcloud's current project
  --version=VERSION       TPU software version; default: depends on the type, e.g. v2-alpha-tpuv5-lite
  --service-account=MAIL  service account of the VMs; must be able to read the data and write the work directory
  --spot                  use spot capacity, which may be preempted
  --queued                request a queued resource and wait until it is granted
  --create-flag=FLAG      extra flag for the create command, e.g. --create-flag=--internal-ips; may be repeated
  --setup=COMMAND         shell command to run on every worker before each start, e.g. to mount a disk
  --restarts=N            maximum number of restarts on a worker, unless the status is 0, 2 or 4; default: 20
  --recreate=N            maximum number of times to start over, with a new TPU if the old one was preempted; default: 0
  --worker=N              with logs: follow this worker
  --dry-run               print every command, ready to paste, and run none; does not contact Google Cloud, so it assumes
                          that the TPU does not exist yet
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

# Quotes a word for any POSIX shell: the workers' shell, or that of whoever pastes a dry run.
quote() {
  local mark="'" escaped="'\\''" # in variables: macOS's bash treats backslashes in a replacement as escapes
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
  [ ${#missing[@]} -eq 0 ] || fail "$action requires ${missing[*]}"
  [[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] || fail "--name=$name: must be lower-case letters, digits and hyphens, starting with a letter"
  [[ $zone =~ ^[a-z]+(-[a-z]+)+[0-9]+-[a-z]$ ]] || fail "--zone=$zone: must be a zone, e.g. us-west4-a"
  [[ $restarts =~ ^(0|[1-9][0-9]*)$ ]] || fail "--restarts=$restarts: must be a whole number"
  [[ $recreate =~ ^(0|[1-9][0-9]*)$ ]] || fail "--recreate=$recreate: must be a whole number"
  [[ -z $worker || $worker =~ ^[0-9]+$ ]] || fail "--worker=$worker: must be a worker number"
  [ -z "$worker" ] || [ "$action" = logs ] || fail "--worker: only with logs"
  if [ "$action" != run ]; then
    [ ${#arguments[@]} -eq 0 ] || fail "$action takes no arguments after --"
    return
  fi
  [ ${#arguments[@]} -gt 0 ] || fail "run requires the arguments of lowrank after --, e.g. -- train --config=... --workdir=gs://..."
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
    *) fail "--type=$type: unknown; known: v5litepod-16, v6e-8, v5p-8, v4-8, v3-8 and other sizes of these (newer types are only available in GKE: lowrank sweep --emit=jobset)" ;;
  esac
  [[ $type =~ -[1-9][0-9]*$ ]] || fail "--type=$type: must end in a number, e.g. ${type%%-*}-16"
  version=${version:-$default}
}

# Mistakes that would otherwise only show on the workers, once they are paid for.
check_arguments() {
  local i word key value workdir=''
  for ((i = 0; i < ${#arguments[@]}; i++)); do
    word=${arguments[i]}
    key=${word%%=*} value=${word#*=}
    [ "$key" != "$word" ] || value=${arguments[i + 1]:-}
    case $key in
      --config) [ -f "$root/${value%%:*}" ] || fail "--config=$value: not a file of this checkout, which is what is installed on the workers" ;;
      --workdir)
        workdir=$value
        [[ $value == gs://* ]] || fail "--workdir=$value: must be in a bucket, e.g. gs://BUCKET/NAME; a worker's disk is lost with the worker"
        ;;
    esac
  done
  case ${arguments[0]} in
    -*) fail "after -- the command of lowrank comes first, e.g. train, then its flags" ;;
    train) [ -n "$workdir" ] || fail "train requires --workdir=gs://..." ;;
    sweep) # a type of up to 8 is one worker, whatever it counts
      [ "${type##*-}" -le 8 ] || fail "sweep: every worker of a $type would run the whole sweep. Use a --type of up to 8, which has one worker; or \`lowrank sweep ... --emit=sh\`, which prints one \`train\` command per trial; or --emit=jobset on GKE"
      ;;
  esac
}

# --- gcloud ---

# Runs a command; in a dry run prints it, ready to paste.
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

# The state of the TPU; nothing if there is none.  By list: describe fails the same way for a missing TPU and a missing permission.
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
    note "the first one if it exists (with its TPU), else the second one:"
    do_it gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
    do_it gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  elif [ -n "$(request_state)" ]; then
    gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  elif [ -n "$(node_state)" ]; then
    gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  else
    note "$name does not exist in $zone"
  fi
}

# Returns once the TPU accepts commands; creates it, recreates it after a preemption, waits while it is created.
ensure_ready() {
  if [ -n "$dry_run" ]; then
    note "if the TPU does not exist:"
    create
    [ -z "$queued" ] || note "then waits until it is granted"
    return
  fi
  local state request
  while true; do
    state=$(node_state) && request=$(request_state) || return
    case ${state:-none}/${request:-none} in
      READY/*) check_reused && return ;;
      */FAILED) note "the request for $name failed; gcloud compute tpus queued-resources describe $name ${where[*]}" && exit 1 ;;
      */SUSPENDING | */DELETING | DELETING/*) note "waiting until $name is deleted" ;;
      PREEMPTED/* | TERMINATED/* | */SUSPENDED) note "$name was preempted: deleting what is left" && delete || return ;;
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
  [ "$found" = "$type" ] || fail "$name exists and is a $found, not a $type; use another --name, or delete it first"
}

# --- on the workers, in the login shell ---

# src: the checkout; env: its virtual environment; run: command, log, session id and exit status of the run.
on_vm='src=$HOME/lowrank_jax env=$HOME/lowrank_env run=$HOME/lowrank_run
busy() { [ -f "$run/pid" ] && pgrep -s "$(cat "$run/pid")" >/dev/null; }'

# Google's images have Python 3.10, which is too old for jax: uv installs a newer one.
install_command="$on_vm"'
if busy; then echo "a run is in progress: not installing"; exit 0; fi
set -e
rm -rf "$src" && mkdir -p "$src" && tar -xzf "$HOME/lowrank_jax.tar.gz" -C "$src"
python3 -m pip install --quiet --user --upgrade uv
[ -x "$env/bin/python" ] || python3 -m uv venv --quiet --python 3.11 "$env"
python3 -m uv pip install --quiet --python "$env/bin/python" -c "$src/constraints.txt" "$src[train,tpu,gcs]"'

# stop signals the whole session; the shell that records the exit status has to survive that.
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
  echo "another run is in progress here; stop it first: scripts/tpu_vm.sh stop" >&2; exit 2
fi'
  [ -z "$setup" ] || echo "sh -c $(quote "$setup")"' || { echo "the setup failed" >&2; exit 2; }'
  echo "$start_command"
}

follow_command="$on_vm"'
[ -f "$run/log" ] || { echo "no run has been started here" >&2; exit 2; }
tail -n +1 --pid="$(cat "$run/pid")" -F "$run/log" 2>/dev/null
[ -f "$run/status" ] && exit "$(cat "$run/status")"
echo "the run ended without an exit status" >&2; exit 1'

logs_command="$on_vm"'
[ -f "$run/log" ] || { echo "$(hostname): no run has been started here" >&2; exit 2; }
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

# Packs tracked and untracked files, without ignored ones.
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

# Returns the training's exit status, or that of what failed before it.
attempt() {
  ensure_ready && install && on_workers all "$(launch_command)" || return
  note "following worker 0; Ctrl-C stops following, not the run"
  on_workers 0 "$follow_command"
}

run() {
  local status left
  for ((left = recreate; ; left--)); do
    status=0
    attempt || status=$?
    # Done, final, or stopped on purpose; anything else may be a preempted TPU, which the next attempt will find out.
    case $status in 0 | 2 | 4 | 75) exit "$status" ;; esac
    [ "$left" -gt 0 ] || exit "$status"
    note "ended with status $status; retrying ($((left - 1)) retries left)"
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
      if [ -n "$dry_run" ]; then note "prints the states of the TPU and its request, then:"; else echo "$name: TPU $(node_state), request $(request_state)"; fi
      on_workers all "$status_command"
      ;;
    stop) on_workers all "$stop_command" ;;
    delete) delete ;;
  esac
}

main "$@"
