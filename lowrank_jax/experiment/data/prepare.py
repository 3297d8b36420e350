"""Prepares a TFDS data set from files on this machine.

python -m lowrank_jax.experiment.data.prepare fashion_mnist --manual-dir=/usr/share/datasets/fashion-mnist --data-dir=data
python -m lowrank_jax.experiment.data.prepare imagenet2012 --manual-dir=/downloads --data-dir=data
"""

import argparse
import json
import pathlib
import shlex
import struct
import sys
import tarfile
import tempfile
from typing import Any

from lowrank_jax.experiment.data import datasets
from lowrank_jax.experiment.data.sources import tfds_folder
from lowrank_jax.text import first_line

# Debian repacks the four files without the name and time that their publisher's gzip wrote.  With both restored they are
# byte for byte the files whose checksums TFDS knows, so its own builder accepts them.
_GZIP_TIME = {"train": 1504176606, "t10k": 1504176627}
_FILES = {
    "fashion_mnist": [f"{part}-{kind}-ubyte.gz" for part in _GZIP_TIME for kind in ("images-idx3", "labels-idx1")],
    "imagenet2012": ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"],
}
_SOURCE = {"imagenet2012": "; download them from https://image-net.org/download-images after registration"}


def restore_gzip_header(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a gzip file with the original name, time and flags in its header.

    Raises:
      SystemExit: it is not a gzip file.
    """
    data = source.read_bytes()
    if data[:2] != b"\x1f\x8b":
        raise SystemExit(f"{source} is not a gzip file")
    if data[3]:  # with a name it is the publisher's own
        target.write_bytes(data)
        return
    header = data[:3] + b"\x08" + struct.pack("<I", _GZIP_TIME[source.name.split("-")[0]]) + b"\x00\x03"
    target.write_bytes(header + source.name.removesuffix(".gz").encode() + b"\0" + data[10:])


def prepare(name: str, manual_dir: pathlib.Path, data_dir: str | None) -> None:
    """Runs TFDS's builder on local files.

    Raises:
      SystemExit: the files are missing or not what the builder expects, or an earlier preparation left damaged data.
    """
    builder = _open(name, data_dir)
    missing = [file for file in _FILES[name] if not (manual_dir / file).exists()]
    if missing:
        raise SystemExit(f"{manual_dir} does not contain {', '.join(missing)}{_SOURCE.get(name, '')}")
    with tempfile.TemporaryDirectory() as folder:
        if name == "fashion_mnist":
            for file in _FILES[name]:
                restore_gzip_header(manual_dir / file, pathlib.Path(folder) / file)
            manual_dir = pathlib.Path(folder)
        _build(builder, manual_dir)
    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    print(f"{name} is ready in {builder.data_path}: {_listed(sizes)}")
    _warn_of_other_sizes(name, sizes, builder.data_path)


def _open(name: str, data_dir: str | None) -> Any:
    """TFDS's builder.  It builds nothing if the folder exists, whatever is in it; so an existing one must be complete."""
    _, path = tfds_folder.folder(name, data_dir)
    try:
        builder = tfds_folder.open_builder(name, data_dir, path)
        if builder.is_prepared():
            tfds_folder.check_all(builder)
        return builder
    except tfds_folder.Damaged as error:
        raise SystemExit(f"{error}; delete {shlex.quote(str(path))}, then run this command again") from None
    except PermissionError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}; this user needs permission to read it") from None
    except tfds_folder.OtherFormat:
        raise SystemExit(f"{path} contains {name} in another format than array_record; choose another --data-dir") from None


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{size:,} examples of {split}" for split, size in sizes.items())


def _warn_of_other_sizes(name: str, sizes: dict[str, int], path: Any) -> None:
    """Warns of missing examples: an archive that ends between two of its files looks complete."""
    expected = datasets.describe(name, {})
    if sizes == expected.sizes:
        return
    options = json.dumps({f"{split}_size": size for split, size in sizes.items()})
    subset = f" If the subset is meant, set dataset.kwargs to {options}." if expected.partial else ""
    print(
        f"warning: {name} should have {_listed(expected.sizes)}. If the files were cut short, download them again, delete"
        f" {shlex.quote(str(path))} and run this command again.{subset}",
        file=sys.stderr,
    )


def _build(builder: Any, manual_dir: pathlib.Path) -> None:
    import tensorflow as tf
    import tensorflow_datasets as tfds

    name = builder.name
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(manual_dir)))
    except (tarfile.TarError, KeyError, ValueError, EOFError, tf.errors.OutOfRangeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise SystemExit(f"{name}: the files in {manual_dir} are not the published ones ({reason})") from error
    except OSError as error:  # no permission, no space left
        raise SystemExit(f"{name}: {error.filename or 'input or output'}: {error.strerror or error}") from error
    except tf.errors.OpError as error:  # the same, where TensorFlow does the reading
        raise SystemExit(f"{name}: {error.message}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*_FILES])
    parser.add_argument("--manual-dir", type=pathlib.Path, required=True, help="folder of the downloaded files")
    parser.add_argument("--data-dir", help="TFDS's data folder; default: TFDS's own")
    args = parser.parse_args()
    prepare(args.name, args.manual_dir, args.data_dir)


if __name__ == "__main__":
    main()
