#!/usr/bin/env bash
# Prepares Fashion-MNIST for TFDS from Debian's package dataset-fashion-mnist, without a download from the publisher.
# Usage: scripts/prepare_fashion_mnist.sh [DATA_DIR]        (on Debian or Ubuntu; needs `make setup` first)
set -euo pipefail
cd "$(dirname "$0")/.."
data_dir=${1:-}
files=/usr/share/datasets/fashion-mnist
if [ ! -d "$files" ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  (cd "$work" && apt-get download -q dataset-fashion-mnist) || {
    echo "could not download Debian's package dataset-fashion-mnist; run 'apt-get update', or install the package by hand" >&2
    exit 1
  }
  dpkg -x "$work"/dataset-fashion-mnist_*.deb "$work"
  files=$work$files
fi
.venv/bin/python -m lowrank_jax.experiment.data.prepare fashion_mnist --manual-dir="$files" ${data_dir:+--data-dir="$data_dir"}
