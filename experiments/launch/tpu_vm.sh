#!/usr/bin/env bash
# Trains on every worker of a Cloud TPU slice, made beforehand by `gcloud compute tpus tpu-vm create`:
#
#   TPU=my-slice ZONE=us-east5-a experiments/launch/tpu_vm.sh \
#     --config configs/grin_tiny.py --workdir /mnt/runs/grin --set mesh.data=16
#
# Copies this working tree to each worker, makes .venv there once, and starts experiments.train with
# what follows the script's name. Workers find one another from the TPU's metadata. --workdir must be
# a folder that all workers share (Filestore, or a bucket mounted by gcsfuse). A worker that ends
# with an error ends the command; run it again to go on from the last checkpoint.
set -euo pipefail
: "${TPU:?name the slice: TPU=...}" "${ZONE:?name its zone: ZONE=...}"
cd "$(dirname "$0")/../.."

ssh_all() { gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"; }

tree=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$tree"' EXIT
git ls-files -z | tar --null --files-from=- -czf "$tree"
gcloud compute tpus tpu-vm scp "$tree" "$TPU:moejax.tar.gz" --zone "$ZONE" --worker=all

quoted=$(printf ' %q' "$@")
ssh_all "set -e; mkdir -p moejax; tar -xzf moejax.tar.gz -C moejax; cd moejax
  make PYTHON=\${PYTHON:-python3} VENV=.venv .venv/.installed
  .venv/bin/python -m pip install --quiet -r requirements.txt 'jax[tpu]'
  .venv/bin/python -m experiments.train$quoted"
