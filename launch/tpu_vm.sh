#!/bin/sh
# Trains on a slice of Cloud TPU VMs. Each host runs the same command; JAX detects the others.
#   TPU=NAME ZONE=us-central2-b launch/tpu_vm.sh --config=configs/tnt_s.py \
#       --workdir=/mnt/shared/runs/tnt_s --config.data.root=/mnt/shared/imagenet
# Never run; the options are from the documentation of gcloud. Create the slice with, for instance:
#   gcloud compute tpus tpu-vm create NAME --zone=us-central2-b --accelerator-type=v4-32 \
#       --version=tpu-ubuntu2204-base
# Prepare every host once: the checkout in ~/tnt_flax, a shared folder (Filestore over NFS) mounted at
# /mnt/shared, and in the checkout
#   python3 -m venv .venv && .venv/bin/pip install --editable ".[train,tfds,tpu]"
set -eu
command=". .venv/bin/activate && exec python main.py"
for argument in "$@"; do
  command="$command '$argument'"
done
until gcloud compute tpus tpu-vm ssh "${TPU:?name of the slice}" --zone="${ZONE:?its zone}" \
  --worker=all --command="cd tnt_flax && $command"; do
  code=$?
  case $code in
  42 | 75) ;;       # a signal or a hang: the same command resumes
  *) exit "$code" ;; # 255: no connection, for instance because the slice was preempted
  esac
done
