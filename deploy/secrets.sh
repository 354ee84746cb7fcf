#!/usr/bin/env bash
# The secrets of a deployment: a CA, the SuperLink's certificate, one key pair for each SuperNode.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: deploy/secrets.sh certificates [HOST...]   a CA, and the SuperLink's certificate for
                                                  localhost, 127.0.0.1 and these names
       deploy/secrets.sh keys NAME...             a key pair for each SuperNode of these names

They are written to $METABLOOM_SECRETS (default: deploy/secrets, which git ignores). What is there
already is kept.

  ca.crt        every SuperNode and every user of `flwr`      ca.key        nobody: keep it offline
  server.crt    the SuperLink                                 server.key    the SuperLink alone
  NAME.pub      for `flwr supernode register`                 NAME          that SuperNode alone
TEXT
}

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SECRETS=${METABLOOM_SECRETS:-$HERE/secrets}
CA_DAYS=3650
ANEW="to make it anew, remove server.crt and server.key, and call this again"
SERVER_DAYS=397 # the longest that some TLS libraries accept

fail() {
  echo "deploy/secrets.sh: $*" >&2
  exit 1
}

needs() { command -v "$1" >/dev/null || fail "'$1' is missing: install $2"; }

private_key() {
  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out "$1" 2>/dev/null
}

# A certificate is moved into place last: after an interruption the next call makes it anew.
make_ca() {
  cat >"$1/ca.cnf" <<'TEXT'
[req]
distinguished_name = name
prompt = no
x509_extensions = ca
[name]
CN = metabloom CA
[ca]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
TEXT
  private_key "$1/ca.key"
  openssl req -x509 -new -sha384 -days "$CA_DAYS" -config "$1/ca.cnf" -key "$1/ca.key" \
    -out "$1/ca.crt"
  mv "$1/ca.key" "$SECRETS/ca.key"
  mv "$1/ca.crt" "$SECRETS/ca.crt"
  echo "made $SECRETS/ca.crt"
}

is_address() { [[ $1 == *:* || $1 =~ ^[0-9]+(\.[0-9]+){3}$ ]]; }

make_server() {
  local folder=$1 names=() host
  shift
  [[ -e $SECRETS/ca.key ]] ||
    fail "$SECRETS/ca.key signs certificates and is missing: bring it back for this call"
  for host in "$@"; do
    if is_address "$host"; then names+=("IP:$host"); else names+=("DNS:$host"); fi
  done
  cat >"$folder/server.cnf" <<TEXT
[req]
distinguished_name = name
prompt = no
[name]
CN = metabloom SuperLink
[server]
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = $(IFS=,; echo "${names[*]}")
TEXT
  private_key "$folder/server.key"
  openssl req -new -sha384 -config "$folder/server.cnf" -key "$folder/server.key" \
    -out "$folder/server.csr"
  openssl x509 -req -sha384 -days "$SERVER_DAYS" -in "$folder/server.csr" \
    -CA "$SECRETS/ca.crt" -CAkey "$SECRETS/ca.key" -set_serial "0x$(openssl rand -hex 16)" \
    -extfile "$folder/server.cnf" -extensions server -out "$folder/server.crt" 2>/dev/null
  mv "$folder/server.key" "$SECRETS/server.key"
  mv "$folder/server.crt" "$SECRETS/server.crt"
  echo "made $SECRETS/server.crt for $*"
}

check_server() {
  local host check
  openssl verify -CAfile "$SECRETS/ca.crt" "$SECRETS/server.crt" >/dev/null 2>&1 ||
    fail "$SECRETS/server.crt has expired, or is not of this CA: $ANEW"
  for host in "$@"; do
    if is_address "$host"; then check=-checkip; else check=-checkhost; fi
    openssl x509 -in "$SECRETS/server.crt" -noout "$check" "$host" | grep -q "does match" ||
      fail "$SECRETS/server.crt is not for '$host': $ANEW"
  done
  echo "kept $SECRETS/server.crt"
}

certificates() {
  needs openssl "OpenSSL"
  set -- localhost 127.0.0.1 "$@" # where a SuperLink's own ServerApps reach it
  local folder
  folder=$(mktemp -d "$SECRETS/.new.XXXXXX")
  # shellcheck disable=SC2064  # the folder's name now, not at the end
  trap "rm -rf '$folder'" EXIT
  if [[ -e $SECRETS/ca.crt ]]; then echo "kept $SECRETS/ca.crt"; else make_ca "$folder"; fi
  if [[ -e $SECRETS/server.crt ]]; then check_server "$@"; else make_server "$folder" "$@"; fi
}

keys() {
  needs ssh-keygen "OpenSSH's client"
  [[ $# -gt 0 ]] || fail "name the SuperNodes: deploy/secrets.sh keys hospital-a hospital-b"
  local name
  for name in "$@"; do
    [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9_-]*$ && ! $name =~ ^(ca|server)$ ]] ||
      fail "'$name' does not do as a name: letters, digits, - and _, but neither ca nor server"
    if [[ -e $SECRETS/$name ]]; then
      echo "kept $SECRETS/$name"
    else
      ssh-keygen -q -t ecdsa -b 384 -N "" -C "$name" -f "$SECRETS/$name"
      echo "made $SECRETS/$name"
    fi
  done
}

umask 077 # private keys are 600, the folder is 700
mkdir -p "$SECRETS"
command=${1:-}
[[ $# -gt 0 ]] && shift
case $command in
  certificates | keys) "$command" "$@" ;;
  *) usage; [[ $command == help || $command == --help ]] ;;
esac
