#!/usr/bin/env bash
# A production deployment on this machine alone: a SuperLink with TLS and SuperNode authentication,
# and SuperNodes, each a process of its own, on 127.0.0.1.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: deploy/local.sh up [N]              start what is not running: secrets, the SuperLink, and
                                           SuperNodes node-1 to node-N (default: 3), registered
       deploy/local.sh run [KEY=VALUE...]  run the app with these keys; goes on from the newest
                                           checkpoint, if there is one (resume=false: begins anew)
       deploy/local.sh flwr ARGUMENT...    a flwr command: list, log RUN, stop RUN, supernode list
       deploy/local.sh status              what runs
       deploy/local.sh down                stop all of it; secrets, registrations, results stay

$METABLOOM_PRIVACY pins every SuperNode's parameters of private training, from its start on, as in
METABLOOM_PRIVACY="privacy.noise-multiplier=4.0 privacy.expected-batch-size=30.0" deploy/local.sh up.

$METABLOOM_ARCHITECTURES says which of a run's architectures the SuperNodes have, node-1 first and then
in turn, as in METABLOOM_ARCHITECTURES="small small large" deploy/local.sh up.

Everything lies in $METABLOOM_LOCAL (default: deploy/local, which git ignores). Ports: the SuperLink
has $METABLOOM_PORT (default: 9443), SuperNode I the I-th after it. The Flower commands are those of
the PATH, or of the checkout's .venv. To start afresh: down, then remove the folder.
TEXT
}

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
APP=$(dirname "$HERE")
LOCAL=${METABLOOM_LOCAL:-$HERE/local}
PORT=${METABLOOM_PORT:-9443}
LINK=127.0.0.1:$PORT
[[ $LOCAL == /* ]] || LOCAL=$PWD/$LOCAL
SECRETS=$LOCAL/secrets
export PATH=$PATH:$APP/.venv/bin # what is started looks there for flower-superexec, flwr-clientapp
export FLWR_TELEMETRY_ENABLED=${FLWR_TELEMETRY_ENABLED:-0} FLWR_DISABLE_UPDATE_CHECK=1
READY_S=60
STOP_S=20
# Flower counts a SuperNode that was killed as connected for 60 s after its last heartbeat and refuses
# it for so long. A message that it lost is answered by an error only while it is away, when the
# ServerApp next asks, every 3 s: a SuperNode that came back in between would leave it unanswered.
KILLED_S=75

fail() {
  echo "deploy/local.sh: $*" >&2
  exit 1
}

needs_flower() {
  local name
  for name in flower-superlink flower-supernode flower-superexec flwr; do
    command -v "$name" >/dev/null ||
      fail "'$name' is missing: 'make demo' installs it into .venv, 'pip install .' elsewhere"
  done
}

# The process of the pid file lives, is no zombie, and is no other one with a number used again.
running() {
  [[ -s $LOCAL/$1/pid ]] || return 1
  local pid
  pid=$(<"$LOCAL/$1/pid")
  if [[ -d /proc/self ]]; then
    grep -qsaF flower-super "/proc/$pid/cmdline"
  else
    ps -o args= -p "$pid" | grep -qF flower-super
  fi
}

# start NAME COMMAND...: in its own folder and process group, with its own FLWR_HOME: processes that
# share one can read an app bundle that another is still unpacking.
start() {
  local name=$1 folder=$LOCAL/$1
  shift
  mkdir -p "$folder/flwr"
  (
    cd "$folder"
    set -m
    FLWR_HOME=$folder/flwr PYTHONUNBUFFERED=1 nohup "$@" </dev/null >"$folder/log" 2>&1 &
    echo $! >"$folder/pid"
  )
}

# await NAME COMMAND...: until the command succeeds; fail with the log where the process ends.
await() {
  local name=$1 deadline=$((SECONDS + READY_S))
  shift
  until "$@"; do
    if ! running "$name" || ((SECONDS >= deadline)); then return 1; fi
    sleep 0.3
  done
}

listens() {
  openssl s_client -connect "$LINK" -CAfile "$SECRETS/ca.crt" -verify_return_error \
    </dev/null >/dev/null 2>&1
}

connected() { grep -q "SuperNode ID" "$LOCAL/$1/log"; }

# A registered SuperNode is refused as long as the SuperLink takes it for connected.
refused() { grep -q "Failed to activate SuperNode" "$LOCAL/$1/log"; }

up_superlink() {
  if running superlink; then return; fi
  start superlink flower-superlink --host 127.0.0.1 --port "$PORT" --enable-supernode-auth \
    --ssl-ca-certfile "$SECRETS/ca.crt" --ssl-certfile "$SECRETS/server.crt" \
    --ssl-keyfile "$SECRETS/server.key" --database "$LOCAL/superlink/state.db" \
    --disable-runtime-dependency-installation
  await superlink listens || fail "the SuperLink did not start: $(cat "$LOCAL/superlink/log")"
  echo "superlink listens at $LINK"
}

register() {
  local name=$1
  if [[ -e $LOCAL/$name/registered ]]; then return; fi
  mkdir -p "$LOCAL/$name"
  flower supernode register "$SECRETS/$name.pub" local --name "$name" >/dev/null ||
    fail "$name could not be registered"
  touch "$LOCAL/$name/registered"
}

# The key of a node's configuration that says its architecture; nothing where none is given.
architecture_of() {
  local names
  read -ra names <<<"${METABLOOM_ARCHITECTURES:-}"
  ((${#names[@]} == 0)) || echo "architecture='${names[($1 - 1) % ${#names[@]}]}'"
}

start_supernode() {
  local index=$1 count=$2 folder=$LOCAL/node-$1
  start "node-$index" flower-supernode --superlink "$LINK" --root-certificates "$SECRETS/ca.crt" \
    --auth-supernode-private-key "$SECRETS/node-$index" --port "$((PORT + index))" \
    --node-config "partition-id=$((index - 1)) num-partitions=$count state-root='$folder/state' \
privacy.root='$folder/ledgers' ${METABLOOM_PRIVACY:-} $(architecture_of "$index")"
}

# SuperNodes that run know how many they are.
check_count() {
  local folder was
  was=$(cat "$LOCAL/count" 2>/dev/null || echo "$1")
  for folder in "$LOCAL"/node-*; do
    if running "$(basename "$folder")" && [[ $was != "$1" ]]; then
      fail "up $1: $was SuperNodes run, which divide the data by $was: deploy/local.sh down first"
    fi
  done
  echo "$1" >"$LOCAL/count"
}

no_supernode() { fail "node-$1 did not connect: $(cat "$LOCAL/node-$1/log")"; }

up() {
  local count=${1:-3} index names=() new=() again=()
  [[ $count =~ ^[1-9][0-9]*$ ]] || fail "up $count: the number of SuperNodes is needed"
  needs_flower
  for ((index = 1; index <= count; index++)); do names+=("node-$index"); done
  METABLOOM_SECRETS=$SECRETS "$HERE/secrets.sh" certificates
  METABLOOM_SECRETS=$SECRETS "$HERE/secrets.sh" keys "${names[@]}"
  mkdir -p "$LOCAL/flwr"
  check_count "$count"
  {
    printf '[superlink]\ndefault = "local"\n[superlink.local]\n'
    printf 'address = "%s"\nroot-certificates = "%s"\n' "$LINK" "$SECRETS/ca.crt"
  } >"$LOCAL/flwr/config.toml"
  up_superlink
  for ((index = 1; index <= count; index++)); do
    if running "node-$index"; then continue; fi
    register "node-$index"
    start_supernode "$index" "$count"
    new+=("$index")
  done
  for index in ${new[@]+"${new[@]}"}; do
    if await "node-$index" connected "node-$index"; then echo "node-$index is connected"
    elif refused "node-$index"; then again+=("$index")
    else no_supernode "$index"; fi
  done
  [[ ${#again[@]} -gt 0 ]] || return 0
  echo "refused, taken for connected if killed: ${again[*]/#/node-}; again in $KILLED_S s"
  sleep "$KILLED_S"
  for index in "${again[@]}"; do start_supernode "$index" "$count"; done
  for index in "${again[@]}"; do
    await "node-$index" connected "node-$index" || no_supernode "$index"
    echo "node-$index is connected"
  done
}

flower() { FLWR_HOME=$LOCAL/flwr flwr "$@"; }

# `flwr run --stream` ends well when the ServerApp failed, too: ask what became of the run.
run() {
  running superlink || fail "no SuperLink runs: deploy/local.sh up"
  local log=$LOCAL/run.log id
  flower run "$APP" local --stream \
    -c "out='$LOCAL/results' checkpoint-every=1 resume=true" ${@+-c "$*"} | tee "$log"
  id=$(sed -n 's/.*Successfully started run \([0-9]*\).*/\1/p' "$log")
  flower list --run-id "$id" --format json | grep -q '"finished:completed"' ||
    fail "run $id did not complete; its log once more: deploy/local.sh flwr log $id"
}

status() {
  local folder name
  for folder in "$LOCAL"/superlink "$LOCAL"/node-*; do
    [[ -e $folder/pid ]] || continue
    name=$(basename "$folder")
    if running "$name"; then echo "$name runs as process $(<"$folder/pid"), log: $folder/log"
    else echo "$name does not run, log: $folder/log"; fi
  done
}

# left_of NAME: what it started and what still runs (where there is a /proc): a ServerApp outlives a
# killed SuperLink by some seconds.
left_of() { grep -lszxF "FLWR_HOME=$LOCAL/$1/flwr" /proc/[0-9]*/environ | cut -d/ -f3 || true; }

# stop NAME...: all at once. What they started ends by itself when it sees its parent gone.
stop() {
  local name pid deadline=$((SECONDS + STOP_S))
  for name in "$@"; do
    if running "$name"; then kill -TERM "$(<"$LOCAL/$name/pid")"; fi
  done
  for name in "$@"; do
    while running "$name" && ((SECONDS < deadline)); do sleep 0.2; done
    while [[ -n $(left_of "$name") ]] && ((SECONDS < deadline)); do sleep 0.2; done
    if running "$name"; then kill -KILL "$(<"$LOCAL/$name/pid")"; fi
    for pid in $(left_of "$name"); do kill -KILL "$pid" 2>/dev/null || true; done
    rm "$LOCAL/$name/pid"
    echo "$name has stopped"
  done
}

down() {
  local folder nodes=()
  for folder in "$LOCAL"/node-*; do
    if [[ -e $folder/pid ]]; then nodes+=("$(basename "$folder")"); fi
  done
  stop ${nodes[@]+"${nodes[@]}"} # first: they take their leave from the SuperLink
  if [[ -e $LOCAL/superlink/pid ]]; then stop superlink; fi
}

umask 077
command=${1:-}
[[ $# -gt 0 ]] && shift
case $command in
  up | run | status | down) "$command" "$@" ;;
  flwr) flower "$@" ;;
  *) usage; [[ $command == help || $command == --help ]] ;;
esac
