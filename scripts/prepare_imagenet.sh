#!/usr/bin/env bash
# Prepares ImageNet for TFDS, by its own builder, from the two archives that https://image-net.org/download-images gives to
# whoever registers: ILSVRC2012_img_train.tar (138 GB) and ILSVRC2012_img_val.tar (6 GB).
# Usage: scripts/prepare_imagenet.sh MANUAL_DIR [DATA_DIR]     (needs `make setup` first, and 300 GB where DATA_DIR is)
#   MANUAL_DIR  where the two archives are
#   DATA_DIR    where TFDS keeps its data; default: TFDS's own
# ImageNet-v2, to evaluate on, is downloaded by:
#   .venv/bin/tfds build imagenet_v2/matched-frequency --file_format=array_record --data_dir=DATA_DIR
set -euo pipefail
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "usage: $0 MANUAL_DIR [DATA_DIR]" >&2
  exit 2
fi
python=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/python
exec "$python" -m lowrank_jax.experiment.data.prepare imagenet2012 --manual-dir="$1" ${2:+--data-dir="$2"}
