#!/usr/bin/env bash
# Prepares ImageNet with TFDS's builder, from the two archives that https://image-net.org/download-images offers to registered
# users: ILSVRC2012_img_train.tar (138 GB) and ILSVRC2012_img_val.tar (6 GB).
# Usage: scripts/prepare_imagenet.sh MANUAL_DIR [DATA_DIR]     (needs `make setup` first, and 300 GB of space in DATA_DIR)
#   MANUAL_DIR  folder with the two archives
#   DATA_DIR    folder of the prepared data; default: TFDS's own
# To download ImageNet-v2 for evaluation:
#   .venv/bin/tfds build imagenet_v2/matched-frequency --file_format=array_record --data_dir=DATA_DIR
set -euo pipefail
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "usage: $0 MANUAL_DIR [DATA_DIR]" >&2
  exit 2
fi
python=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/python
exec "$python" -m lowrank_jax.experiment.data.prepare imagenet2012 --manual-dir="$1" ${2:+--data-dir="$2"}
