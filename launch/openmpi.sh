#!/bin/sh
# Trains with Open MPI's launcher, here four processes:  launch/openmpi.sh 4 --config=configs/digits.py \
#     --workdir=runs/digits
# On several hosts: MPIRUN_FLAGS="--hostfile hosts --map-by node" launch/openmpi.sh 4 ...
# MPI itself is not used: JAX finds out from the environment which process this one is.
# To stop, send SIGTERM to one of the processes: that to mpirun kills before anything is saved.
processes=${1:?how many processes}
shift
# shellcheck disable=SC2086 # several flags
exec mpirun -n "$processes" ${MPIRUN_FLAGS:-} "${PYTHON:-.venv/bin/python}" main.py "$@"
