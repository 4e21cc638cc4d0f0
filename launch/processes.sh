#!/bin/sh
# Trains in several processes on this machine, which no launcher has to know:
#   launch/processes.sh 2 --config=configs/digits.py --workdir=runs/digits
# On several machines, start on machine I of N the one command at the end by hand, with the address
# of machine 0 instead of 127.0.0.1.
processes=${1:?how many processes}
port=${PORT:-8476}
shift

process=0
children=
told=
trap 'told=yes; kill -TERM $children 2>/dev/null' TERM INT # each saves; this script waits for them
while [ "$process" -lt "$processes" ]; do
  "${PYTHON:-.venv/bin/python}" main.py "$@" \
    --coordinator="127.0.0.1:$port" --num-processes="$processes" --process-id="$process" &
  children="$children $!"
  process=$((process + 1))
done
[ -z "$told" ] || kill -TERM $children 2>/dev/null # it came before this script knew them all

code=0
for child in $children; do
  wait "$child"
  status=$?
  while kill -0 "$child" 2>/dev/null; do # a signal to this script has interrupted the wait
    wait "$child"
    status=$?
  done
  [ "$status" -gt "$code" ] && code=$status
done
exit "$code"
