#!/bin/sh
# Trains on a slice of Cloud TPU VMs. Each host runs the same command; JAX finds the others by itself.
#   TPU=NAME ZONE=us-central2-b launch/tpu_vm.sh --config=configs/tnt_s.py \
#       --workdir=/mnt/shared/runs/tnt_s --config.data.root=/mnt/shared/imagenet
# The options of gcloud were looked up; it was never run. The slice is made with, for instance:
#   gcloud compute tpus tpu-vm create NAME --zone=us-central2-b --accelerator-type=v4-32 \
#       --version=tpu-ubuntu2204-base
# and prepared once, on every host: the checkout in ~/tnt_flax, a shared folder (Filestore, by NFS)
# in /mnt/shared, and in the checkout
#   python3 -m venv .venv && .venv/bin/pip install --editable ".[tpu]"
set -eu
command=". .venv/bin/activate && exec python main.py"
for argument in "$@"; do
  command="$command '$argument'"
done
until gcloud compute tpus tpu-vm ssh "${TPU:?name of the slice}" --zone="${ZONE:?its zone}" \
  --worker=all --command="cd tnt_flax && $command"; do
  code=$?
  case $code in
  42 | 75) ;;       # told to stop, or hung: the same command goes on
  *) exit "$code" ;; # 255: no connection, for instance because the slice was taken away
  esac
done
