"""`lr.load`: files of safetensors and of timm's tensors as variables of Linen models."""

import json
import os
import pathlib
import struct
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lowrank_jax as lr
from lowrank_jax.exchange import load
from lowrank_jax.paths import named_leaves

save_file = pytest.importorskip("safetensors.numpy").save_file


class Small(nn.Module):
    """With parameters, statistics and a collection of its own."""

    classes: int = 2
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(3, (1, 1), name="conv", param_dtype=self.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        self.variable("counts", "calls", lambda: jnp.zeros((), jnp.int32))
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


MODEL, IMAGES = Small(), jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32)


def state(model=MODEL):
    rng = np.random.default_rng(0)
    shapes = named_leaves(jax.eval_shape(model.init, jax.random.key(0), IMAGES))
    return {path: np.asarray(10 * rng.standard_normal(leaf.shape)).astype(leaf.dtype) for path, leaf in shapes.items()}


def same(found, wanted):
    found = named_leaves(found)
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        assert found[path].dtype == value.dtype
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(state(), path)
    return path


def lines_of(error, *arguments, **settings):
    with pytest.raises(error) as caught:
        lr.load(*arguments, **{"images": IMAGES, **settings})
    return str(caught.value).splitlines()


@pytest.mark.parametrize("as_type", [str, pathlib.Path])
@pytest.mark.parametrize("images", [IMAGES, np.ones(IMAGES.shape, np.float32), jnp.ones(IMAGES.shape)])
def test_a_file_with_the_models_own_paths_is_read(file, as_type, images):
    found = lr.load(as_type(file), MODEL, images=images)
    same(found, state())
    assert found["counts"]["calls"].shape == ()
    assert MODEL.apply(found, np.ones(IMAGES.shape)).shape == (1, 2)


def test_images_are_of_imagenets_size_by_default(tmp_path):
    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="head")(x[:, ::112, ::112].reshape(len(x), -1))

    path = tmp_path / "w.safetensors"
    save_file({"params/head/kernel": np.ones((12, 2), np.float32), "params/head/bias": np.ones(2, np.float32)}, path)
    assert lr.load(path, Pooled())["params"]["head"]["kernel"].shape == (12, 2)


def test_metadata_and_sixteen_bits_are_read(tmp_path):
    path = tmp_path / "half.safetensors"
    halves = {name: value.astype(ml_dtypes.bfloat16) if value.dtype == np.float32 else value for name, value in state().items()}
    save_file(halves, path, metadata={"made by": "hand", "__metadata__": "no array"})
    same(lr.load(path, MODEL, images=IMAGES), {name: value.astype(state()[name].dtype) for name, value in halves.items()})
    kept = lr.load(path, Small(dtype=jnp.bfloat16), images=IMAGES)["params"]["conv"]["kernel"]
    assert kept.dtype == jnp.bfloat16 and (kept == halves["params/conv/kernel"]).all()


def test_all_that_does_not_fit_is_told_at_once(tmp_path):
    path, wrong = tmp_path / "wrong.safetensors", state()
    del wrong["params/conv/bias"]
    wrong["params/conv/biases"] = np.ones(3, np.float32)
    wrong["params/head/kernel"] = np.ones((3, 5), np.float32)
    wrong["params/head/bias"] = np.float32([1, np.nan])
    wrong["counts/calls"] = np.ones((), np.float32)
    save_file(wrong, path)
    assert lines_of(ValueError, path, MODEL) == [
        "the weights do not fit the model:",
        "  params/conv/bias: has no array",
        "  params/conv/biases: is left over; did you mean params/conv/bias?",
        "  counts/calls: is float32, not int32",
        "  params/head/bias: has values that are not finite",
        "  params/head/kernel: is [3, 5], not [3, 2]",
    ]


# --- names


def theirs(path):
    return path.replace("/", ".")


@pytest.mark.parametrize("kind", ["function", "dict", "both"])
def test_names_lead_to_paths(tmp_path, kind):
    path = tmp_path / "w.safetensors"
    ours = {theirs(name): name for name in state()}
    save_file({theirs(name) if kind != "both" or "head" in name else name: value for name, value in state().items()}, path)
    if kind == "function":
        names = lambda name: name.replace(".", "/")  # noqa: E731
    else:
        names = {name: place for name, place in ours.items() if kind == "dict" or "head" in name}
    same(lr.load(path, MODEL, images=IMAGES, names=names), state())


def test_names_that_are_wrong_are_told_at_once(file):
    names = {"params/head/bias": "params/head/kernel", "params/conv/bias": 3, "params/conv/kernal": "x", "counts/calls": None}
    first, *lines = lines_of(ValueError, file, MODEL, names=names)
    assert first == "names:"
    assert sorted(lines) == [
        "  'counts/calls' becomes None, which is no path",
        "  'params/conv/bias' becomes 3, which is no path",
        "  'params/conv/kernal' is no name in the file; did you mean params/conv/kernel?",
        "  'params/head/bias' and 'params/head/kernel' both become 'params/head/kernel'",
    ]
    assert "both become 'x'" in lines_of(ValueError, file, MODEL, names=lambda name: "x")[1]
    assert "is no name in the file" in lines_of(ValueError, file, MODEL, names={3: "x"})[1]


def test_names_of_another_kind_are_refused(file):
    for names in ("params", 3, ["a"], True):
        assert "names must be a dict, or a function" in lines_of(TypeError, file, MODEL, names=names)[0]
    assert "timm's are known" in lines_of(ValueError, "timm:resnet18=x.pth", MODEL, names={})[0]


# --- redraw


def test_another_head_is_drawn_by_the_models_own_initialiser(file):
    model, key = Small(classes=5), jax.random.key(3)
    found = lr.load(file, model, images=IMAGES, redraw="head/.*", key=key)
    drawn = model.init(key, jnp.zeros(IMAGES.shape))
    np.testing.assert_allclose(found["params"]["head"]["kernel"], drawn["params"]["head"]["kernel"], rtol=1e-6)
    assert found["params"]["head"]["kernel"].shape == (3, 5) and not found["params"]["head"]["bias"].any()
    np.testing.assert_array_equal(found["params"]["conv"]["kernel"], state()["params/conv/kernel"])
    other = lr.load(file, model, images=IMAGES, redraw="head/.*", key=jax.random.key(4))
    assert (other["params"]["head"]["kernel"] != found["params"]["head"]["kernel"]).all()


def test_redraw_needs_a_key_and_a_pattern(file):
    key = jax.random.key(0)
    assert lines_of(ValueError, file, MODEL, redraw="head/.*") == ["redraw needs key=, a key of jax.random"]
    assert "key must be a key of jax.random" in lines_of(TypeError, file, MODEL, redraw="head/.*", key=3)[0]
    assert "'hed/kernel' matches no path" in lines_of(ValueError, file, MODEL, redraw="hed/kernel", key=key)[0]
    assert "did you mean params/head/kernel?" in lines_of(ValueError, file, MODEL, redraw="params/hed/kernel", key=key)[0]
    assert "is not a regular expression" in lines_of(ValueError, file, MODEL, redraw="head(", key=key)[0]
    for redraw in (3, ["head"], True):
        assert "redraw must be a pattern of paths" in lines_of(TypeError, file, MODEL, redraw=redraw, key=key)[0]


def test_a_key_alone_changes_nothing(file):
    same(lr.load(file, MODEL, images=IMAGES, key=jax.random.key(9)), state())


# --- Arguments of other types.


def test_models_that_are_none_are_refused(file):
    assert lines_of(TypeError, file, Small) == [
        "lowrank_jax takes a flax.linen module; Small is a class: pass an instance, Small(...)"
    ]
    for model in (None, "resnet50", lambda x: x):
        assert "takes a flax.linen module" in lines_of(TypeError, file, model)[0]


@pytest.mark.parametrize("images", ["images", 224, (1, 224, 224, 3), [1.0], {"x": IMAGES}, np.array(["a"]), object()])
def test_images_that_are_none_are_refused(file, images):
    assert lines_of(TypeError, file, MODEL, images=images)[0].startswith("images: ")


def test_images_that_the_model_does_not_take_are_refused(file):
    class Fails(nn.Module):
        @nn.compact
        def __call__(self, x):
            raise RuntimeError("only squares\nplease")

    for model, images in ((MODEL, np.float32(1)), (Fails(), IMAGES), (lr.models.build("vit_s16", num_classes=2), IMAGES)):
        first = lines_of(ValueError, file, model, images=images)[0]
        assert first.startswith(f"the model cannot be initialised on images {list(images.shape)}: ")
    assert "only squares" in lines_of(ValueError, file, Fails())[0]


@pytest.mark.parametrize("source", [None, 3, b"weights.safetensors", ["weights.safetensors"], {}])
def test_sources_that_are_no_texts_are_refused(source):
    assert "source must be the name of a file" in lines_of(TypeError, source, MODEL)[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "'' must be timm:NAME=FILE, or a .safetensors file"),
        ("weights", "'weights' must be timm:NAME=FILE, or a .safetensors file"),
        ("weights.pth", "'weights.pth' must be timm:NAME=FILE, or a .safetensors file (timm:NAME=FILE)"),
        ("timm:", "'timm:' must be timm:NAME=FILE"),
        ("timm:resnet18", "'timm:resnet18' must be timm:NAME=FILE"),
        ("timm:resnet18=", "'timm:resnet18=' must be timm:NAME=FILE"),
        ("timm:=weights.pth", "'timm:=weights.pth' must be timm:NAME=FILE"),
        ("timm:resnet81=weights.pth", "no model here corresponds to timm's 'resnet81'; did you mean resnet18?"),
        ("a\0.safetensors", "embedded null byte"),
        ("timm:resnet18=a\0.pth", "embedded null byte"),
    ],
)
def test_sources_that_name_no_file_are_refused(source, message):
    assert lines_of(ValueError, source, MODEL) == [message]


# --- Files.


@pytest.mark.parametrize("source", ["{}.safetensors", "timm:resnet18={}.pth", "timm:resnet18={}.safetensors"])
def test_what_is_no_file_is_refused(tmp_path, source):
    path = tmp_path / "weights"
    with pytest.raises(FileNotFoundError, match="weights"):
        lr.load(source.format(path), MODEL)
    (tmp_path / f"folder.{source.rpartition('.')[2]}").mkdir()
    assert "is a folder" in lines_of(ValueError, source.format(tmp_path / "folder"), MODEL)[0]
    os.mkfifo(tmp_path / f"pipe.{source.rpartition('.')[2]}")
    assert "is no regular file" in lines_of(ValueError, source.format(tmp_path / "pipe"), MODEL)[0]


@pytest.mark.parametrize("name", ["weights.pth", "weights.bin", "weights.tar"])
def test_a_file_of_safetensors_with_another_name_is_refused(tmp_path, file, name):
    (tmp_path / name).write_bytes(file.read_bytes())
    assert "no file of PyTorch's" in lines_of(ValueError, f"timm:resnet18={tmp_path / name}", MODEL)[0]


def header(described, size=0):
    encoded = described if isinstance(described, bytes) else json.dumps(described).encode()
    return struct.pack("<Q", len(encoded)) + encoded + bytes(size)


def array(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04" + bytes(100),
        b"\x80\x02}q\x00.",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**30) + b"{}",
        header(b"{" * 10**6),
        header(b"[" * 10**6),
        header(b"{}}"),
        header([]),
        header({"a": array(shape=(2**62,), offsets=(0, 2**62))}, 4),
        header({"a": array(shape=(2**40, 2**40))}, 4),
        header({"a": array(offsets=(4, 0))}, 4),
        header({"a": array(offsets=(-4, 0))}, 4),
        header({"a": array(offsets=(0, 8))}, 4),
        header({"a": array(shape=(-1,))}, 4),
        header({"a": array()}, 3),
        header({"a": array()}, 5),
        header({"a": array(), "b": array()}, 4),
        header({"a": array("F7")}, 4),
        header({"a": array("F8_E4M3", (4,))}, 4),
        header({"a": array("F8_E8M0", (4,))}, 4),
        header({"a": array("F4", (8,))}, 4),
        header({"__metadata__": {"a": 3}}),
    ],
    ids=range(24),
)
def test_damaged_files_of_safetensors_are_refused(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    (first, *more) = lines_of(ValueError, path, MODEL)
    assert first.startswith(f"{path} is no file of safetensors, or it is damaged: ") or "do not fit the model" in first
    assert len(more) < 10 and len(first) < 600


def test_a_file_of_safetensors_with_one_wrong_byte_is_read_or_refused(tmp_path, file):
    whole, damaged = file.read_bytes(), tmp_path / "damaged.safetensors"
    rng, outcomes = np.random.default_rng(0), set()
    for place in rng.choice(len(whole), 400, replace=False):
        damaged.write_bytes(whole[:place])
        with pytest.raises(ValueError, match="or it is damaged"):
            load.arrays(str(damaged))
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ int(rng.integers(1, 256))]) + whole[place + 1 :])
        try:
            found: Any = load.arrays(str(damaged))
            outcomes.add(sum(value.nbytes for value in found.values()) <= len(whole))
        except ValueError as error:
            outcomes.add(str(error).partition(":")[0].endswith("or it is damaged") and None)
    assert outcomes == {True, None}


def test_without_safetensors_the_message_says_what_to_install(monkeypatch, file):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install .lowrank_jax\[weights\]"):
        lr.load(file, MODEL, images=IMAGES)
