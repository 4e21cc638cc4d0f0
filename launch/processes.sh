#!/bin/sh
# Trains in several processes (here 2) on this machine, without a launcher:
#   launch/processes.sh 2 --config=configs/digits.py --workdir=runs/digits
# For several GPUs of one machine no launcher is needed: one process uses all of them, or some of them:
#   CUDA_VISIBLE_DEVICES=0,1,2,3 python main.py --config=configs/tnt_s.py --workdir=runs/tnt_s
# On N machines, run the python command below on each machine I, with --process-id=I,
# --num-processes=N and the address of machine 0 instead of 127.0.0.1.
processes=${1:?number of processes}
port=${PORT:-8476}
shift

process=0
children=
stopping=
trap 'stopping=yes; kill -TERM $children 2>/dev/null' TERM INT # the processes save and exit; this script waits
while [ "$process" -lt "$processes" ]; do
  "${PYTHON:-.venv/bin/python}" main.py "$@" \
    --coordinator="127.0.0.1:$port" --num-processes="$processes" --process-id="$process" &
  children="$children $!"
  process=$((process + 1))
done
[ -z "$stopping" ] || kill -TERM $children 2>/dev/null # the signal came before all were started

code=0
for child in $children; do
  wait "$child"
  status=$?
  while kill -0 "$child" 2>/dev/null; do # a signal interrupted the wait
    wait "$child"
    status=$?
  done
  [ "$status" -gt "$code" ] && code=$status
done
exit "$code"
