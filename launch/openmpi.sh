#!/bin/sh
# Trains in several processes (here 4), started by Open MPI:
#   launch/openmpi.sh 4 --config=configs/digits.py --workdir=runs/digits
# On several hosts: MPIRUN_FLAGS="--hostfile hosts --map-by node" launch/openmpi.sh 4 ...
# JAX reads the number of processes from the environment and does not use MPI.
# To stop, send SIGTERM to one of the processes: SIGTERM to mpirun kills all before they save.
processes=${1:?number of processes}
shift
# shellcheck disable=SC2086 # may hold several flags
exec mpirun -n "$processes" ${MPIRUN_FLAGS:-} "${PYTHON:-.venv/bin/python}" main.py "$@"
