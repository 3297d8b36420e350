"""Prepares a TFDS data set from files that are already on this machine.

python -m lowrank_jax.data.prepare fashion_mnist --manual-dir=/usr/share/datasets/fashion-mnist --data-dir=data
python -m lowrank_jax.data.prepare imagenet2012 --manual-dir=/downloads --data-dir=data
"""

import argparse
import pathlib
import struct
import tarfile
import tempfile

# Debian repacks the four files without the name and time that their publisher's gzip wrote.  With both put back they are
# byte for byte the files whose checksums TFDS knows, so its own builder takes them.
_GZIP_TIME = {"train": 1504176606, "t10k": 1504176627}
_FILES = {
    "fashion_mnist": [f"{part}-{kind}-ubyte.gz" for part in _GZIP_TIME for kind in ("images-idx3", "labels-idx1")],
    "imagenet2012": ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"],
}
_SOURCE = {"imagenet2012": "; https://image-net.org/download-images has them, after registration"}


def restore_gzip_header(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a gzip file, with the original name, time and flags in its header.

    Raises:
      SystemExit: it is not a gzip file.
    """
    data = source.read_bytes()
    if data[:2] != b"\x1f\x8b":
        raise SystemExit(f"{source} is not a gzip file")
    if data[3]:  # it has a name already: it is the publisher's own
        target.write_bytes(data)
        return
    header = data[:3] + b"\x08" + struct.pack("<I", _GZIP_TIME[source.name.split("-")[0]]) + b"\x00\x03"
    target.write_bytes(header + source.name.removesuffix(".gz").encode() + b"\0" + data[10:])


def prepare(name: str, manual_dir: pathlib.Path, data_dir: str | None) -> None:
    """Runs TFDS's builder on local files.

    Raises:
      SystemExit: they are not there, or not what the builder expects.
    """
    missing = [file for file in _FILES[name] if not (manual_dir / file).exists()]
    if missing:
        raise SystemExit(f"{manual_dir} lacks {', '.join(missing)}{_SOURCE.get(name, '')}")
    with tempfile.TemporaryDirectory() as folder:
        if name == "fashion_mnist":
            for file in _FILES[name]:
                restore_gzip_header(manual_dir / file, pathlib.Path(folder) / file)
            manual_dir = pathlib.Path(folder)
        path = _build(name, manual_dir, data_dir)
    print(f"{name} is ready in {path}")


def _build(name: str, manual_dir: pathlib.Path, data_dir: str | None) -> str:
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(manual_dir)))
    except (tarfile.TarError, KeyError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SystemExit(f"{name}: the files in {manual_dir} are not the published ones ({reason})") from error
    except OSError as error:  # no permission, no space left
        raise SystemExit(f"{name}: {error.filename or 'input or output'}: {error.strerror or error}") from error
    return str(builder.data_path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*_FILES])
    parser.add_argument("--manual-dir", type=pathlib.Path, required=True, help="where the downloaded files are")
    parser.add_argument("--data-dir", help="where TFDS keeps its data; default: TFDS's own")
    args = parser.parse_args()
    prepare(args.name, args.manual_dir, args.data_dir)


if __name__ == "__main__":
    main()
