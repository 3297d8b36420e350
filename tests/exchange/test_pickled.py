"""Files of PyTorch: the tensors that PyTorch itself reads, and nothing that a file says is run."""

import io
import os
import pathlib
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from lowrank_jax.exchange import pickled

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])

# --- Files written by hand: instructions of pickles, and both formats around them.

END = b"."


def text(value):
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value):
    return b"\x8a\x0b" + value.to_bytes(11, "little", signed=True)


def named(name):
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def tupled(*parts):
    return b"(" + b"".join(parts) + b"t"


def storage(size, key="0", kind="torch.FloatStorage"):
    return tupled(text("storage"), named(kind), text(key), text("cpu"), number(size)) + b"Q"


def tensor(size=4, shape=(2, 2), strides=(2, 1), offset=0, key="0", kind="torch.FloatStorage"):
    parts = storage(size, key, kind), number(offset), tupled(*map(number, shape)), tupled(*map(number, strides))
    return named("torch._utils._rebuild_tensor_v2") + tupled(*parts, b"\x89", named("collections.OrderedDict") + b")R") + b"R"


def dict_of(**items):
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in items.items()) + b"u"


VALUES = np.arange(4, dtype=np.float32)


def zip_file(path, program, values=None, **others):
    """A file of PyTorch 1.6 and newer."""
    with zipfile.ZipFile(path, "w", others.pop("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr("archive/data.pkl", program + END)
        for key, value in ({"0": VALUES} if values is None else values).items():
            archive.writestr(f"archive/data/{key}", value.tobytes())
        for name, content in others.items():
            archive.writestr(f"archive/{name}", content)
    return path


def legacy_file(path, program, values=None, *, little=True, keys=None):
    """A file of the format before."""
    values = {"0": VALUES} if values is None else values
    head = [pickled._MAGIC, pickled._PROTOCOL, {"protocol_version": 1001, "little_endian": little, "type_sizes": {}}]
    with path.open("wb") as file:
        for part in head:
            pickle.dump(part, file, protocol=2)
        file.write(program + END)
        pickle.dump(list(values) if keys is None else keys, file, protocol=2)
        for value in values.values():
            file.write(struct.pack("<q", value.size) + value.tobytes())
    return path


def refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        pickled.read(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600
    assert str(caught.value).isprintable()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights.pth"


WRITERS = pytest.mark.parametrize("written", [zip_file, legacy_file])


@WRITERS
def test_a_file_written_by_hand_is_read(file, written):
    program = dict_of(a=tensor(), b=tensor(shape=(2,), strides=(2,), offset=1), c=tensor(shape=(), strides=(), offset=3))
    found = pickled.read(written(file, program))
    assert list(found) == ["a", "b", "c"]
    np.testing.assert_array_equal(found["a"], [[0, 1], [2, 3]])
    np.testing.assert_array_equal(found["b"], [1, 3])
    assert found["c"].shape == () and found["c"] == 3


@WRITERS
def test_tensors_of_one_storage_are_one_array_which_cannot_be_written(file, written):
    found = pickled.read(written(file, dict_of(a=tensor(), b=tensor())))
    assert found["a"] is found["b"]
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0, 0] = 1


@WRITERS
def test_python_2_wrote_texts_as_bytes_and_dicts_as_lists_of_items(file, written):
    name = "größe".encode()
    item = b"](U" + bytes([len(name)]) + name + tensor() + b"e"
    program = b"\x80\x02" + named("collections.OrderedDict") + b"](" + item + b"e\x85R"
    assert list(pickled.read(written(file, program))) == ["größe"]


# --- The same as PyTorch.


def states():
    base = torch.arange(24.0).reshape(4, 6)
    kinds = {
        name: torch.tensor([0, 1, 2, 100], dtype=getattr(torch, name))
        for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    }
    views = {
        "whole": base,
        "transposed": base.T,
        "rows": base[1:3],
        "steps": base[::2, 1::3],
        "expanded": base[:, :1].expand(4, 50),
        "repeated": torch.ones(()).expand(3, 2),
        "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "axes of one": base[:1, :1],
        "empty": torch.zeros(0, 3),
        "empty view": base[4:],
        "number": torch.tensor(3.5),
        "whole number": torch.tensor(-7),
        "parameter": torch.nn.Parameter(base[:, 2]),
    }
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    model[2].bias = torch.nn.Parameter(model[1].weight[:2].detach())
    return {"kinds": kinds, "views": views, "model": model.state_dict(), "tied": OrderedDict(a=base, b=base, c=base[2])}


@needs_torch
@FORMATS
@pytest.mark.parametrize("which", ["kinds", "views", "model", "tied"])
@pytest.mark.parametrize("under", [None, "state_dict", "model", "model_state_dict"])
def test_the_tensors_are_those_that_pytorch_reads(file, zipped, which, under):
    state = states()[which]
    checkpoint = state if under is None else {"epoch": 3, "best": 0.5, "arch": "resnet", "done": None, under: state}
    torch.save(checkpoint, file, _use_new_zipfile_serialization=zipped)
    read = torch.load(file, weights_only=True)
    wanted, found = read if under is None else read[under], pickled.read(file)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        value, array = value.detach(), found[name]
        if value.dtype == torch.bfloat16:
            assert array.dtype == ml_dtypes.bfloat16
            value, array = value.float(), array.astype(np.float32)
        assert array.dtype == value.numpy().dtype and array.shape == tuple(value.shape), name
        np.testing.assert_array_equal(array, value.numpy(), err_msg=name)
        assert found[name].flags.c_contiguous


@needs_torch
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@FORMATS
def test_every_protocol_of_pickle_is_read(file, protocol, zipped):
    state = {f"layer{i}.weight": torch.full((2,), i) for i in range(300)}
    torch.save(state, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert {name: value.tolist() for name, value in pickled.read(file).items()} == {
        name: value.tolist() for name, value in state.items()
    }


@needs_torch
@FORMATS
def test_a_whole_model_an_optimiser_and_complex_numbers_are_refused_by_name(file, zipped):
    model = torch.nn.Linear(2, 2)
    for value, message in (
        (model, "it holds 'torch.nn.modules.linear.Linear', and only tensors are read.*state_dict"),
        ({"weight": torch.ones(2, dtype=torch.complex64)}, "ComplexFloatStorage"),
        (torch.optim.SGD(model.parameters(), lr=0.1).state_dict(), r"'state' and 1 more is no tensor"),
        ([torch.ones(2)], "holds no dict of tensors"),
        (torch.ones(2), "holds no dict of tensors"),
        ({}, "holds no dict of tensors"),
        ({3: torch.ones(2)}, "a dict with int among its keys"),
        ({"a": torch.ones(2), "b": 3}, "'b' is no tensor"),
    ):
        torch.save(value, file, _use_new_zipfile_serialization=zipped)
        refused(file, message)


# --- Nothing is run.


class Calls:
    """Pickled, a call of whatever is wanted."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(ran):
    """Programs, without their end, that would do something."""
    told = text(f"open({str(ran)!r}, 'w').close()")
    ordered, rebuild = named("collections.OrderedDict"), named("torch._utils._rebuild_tensor_v2")
    good = text("a") + tensor()
    programs = {
        "eval": b"\x80\x02" + named("builtins.eval") + told + b"\x85R",
        "instance": b"(" + told + b"ibuiltins\nexec\n",
        "object": b"(" + named("builtins.exec") + told + b"o",
        "on the stack": b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93" + told + b"\x85R",
        "dotted": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93)R",
        "of our module": b"\x80\x02" + named("lowrank_jax.exchange.pickled.read") + told + b"\x85R",
        "of torch": b"\x80\x02" + named("torch.load") + told + b"\x85R",
        "in torch": b"\x80\x02" + named("torch.hub.load") + told + b"\x85R",
        "extension": b"\x80\x02\x82\x01",
        "a longer extension": b"\x80\x02\x84\x01\x00\x00\x00",
        "persistent text": b"P0\n",
        "persistent number": b"\x80\x02" + number(3) + b"Q",
        "persistent list": b"\x80\x02](" + text("storage") + b"eQ",
        "persistent of another kind": b"\x80\x02" + tupled(text("module"), ordered, text("0"), text("cpu"), number(4)) + b"Q",
        "persistent without a type": b"\x80\x02" + tupled(text("storage"), text("x"), text("0"), text("cpu"), number(4)) + b"Q",
        "persistent of a dict": b"\x80\x02" + tupled(text("storage"), ordered, text("0"), text("cpu"), number(4)) + b"Q",
        "state of a function": b"\x80\x02" + rebuild + b"}" + text("__defaults__") + b")sb",
        "state of a class": b"\x80\x02" + ordered + b"}" + text("get") + rebuild + b"sb",
        "slots of a function": b"\x80\x02" + rebuild + b"N}" + text("__kwdefaults__") + b"}s\x86b",
        "state of a tensor": b"\x80\x02" + tensor() + b"}" + text("shape") + number(3) + b"sb",
        "new": b"\x80\x02" + ordered + b")\x81",
        "new with names": b"\x80\x04" + ordered + b")}\x92",
        "a class that is called": b"\x80\x02" + named("torch.FloatStorage") + b")R",
        "a call of a text": b"\x80\x02" + text("eval") + b")R",
        "a call without arguments": b"\x80\x02" + rebuild + b")R",
        "arguments that are no tuple": b"\x80\x02" + ordered + b"]R",
        "a dict of a text": b"\x80\x02" + ordered + text("ab") + b"\x85R",
        "a dict of a number": b"\x80\x02" + ordered + number(3) + b"\x85R",
        "a dict of a tensor": b"\x80\x02" + ordered + tensor() + b"\x85R",
        "items of a class": b"\x80\x02" + ordered + b"(" + good + b"u",
        "items of a tensor": b"\x80\x02" + tensor() + b"(" + good + b"u",
        "appended to a tensor": b"\x80\x02" + tensor() + b"(" + good + b"e",
        "a set": b"\x80\x04\x8f(" + text("a") + b"\x90",
        "bytes": b"\x80\x04C\x03abc",
        "a parameter of nothing": dict_of(a=named("torch._utils._rebuild_parameter") + tupled(text("x"), b"\x88N") + b"R"),
        "a key that is a tensor": b"\x80\x02}" + tensor() + tensor() + b"s",
        "a key that is a tuple": b"\x80\x02})" + tensor() + b"s",
        "an item too many": b"\x80\x02}(" + good + text("b") + b"u",
        "a mark as a value": b"\x80\x02}" + text("a") + b"(s",
        "nothing": b"",
        "two values": b"\x80\x02" + good,
        "no value": b"\x80\x02" + text("a") + b"0",
        "a copy of what is not there": b"h\x07",
        "a number of a thousand digits": b"L" + b"9" * 10_000 + b"L\n",
    }
    for function in (os.system, exec, eval, subprocess.check_output):
        programs[function.__name__ + " of pickle"] = pickle.dumps(Calls(function, f"touch {ran}"), protocol=2)[:-1]
        programs[function.__name__ + " of pickle 4"] = pickle.dumps(Calls(function, f"touch {ran}"), protocol=4)[:-1]
    return programs


@WRITERS
@pytest.mark.parametrize("what", hostile(pathlib.Path("x")))
def test_no_program_is_run(tmp_path, file, written, what):
    ran, before = tmp_path / "ran", dict(sys.modules)
    program = hostile(ran)[what]
    refused(written(file, program), ".")
    if program.startswith(b"\x80"):  # also as an item of the dict of tensors
        refused(written(file, b"\x80\x02}" + text("a") + program + b"s"), ".")
    assert not ran.exists() and sys.modules.keys() == before.keys()


def test_the_programs_that_are_refused_would_have_run(tmp_path):
    """By Python's own machine."""
    for what in ("eval", "on the stack", "instance", "object", "system of pickle"):
        ran = tmp_path / what.replace(" ", "_")
        pickle.loads(hostile(ran)[what] + END)
        assert ran.exists(), what


def test_the_state_of_a_dict_is_not_kept(file):
    """PyTorch puts the versions of a model's layers there."""
    program = named("collections.OrderedDict") + b")R(" + text("a") + tensor() + b"u"
    state = b"}(" + b"".join(text(name) + named("torch._utils._rebuild_tensor") for name in ("get", "items", "_metadata"))
    found = pickled.read(zip_file(file, b"\x80\x02" + program + state + b"ub"))
    assert list(found) == ["a"] and found["a"].shape == (2, 2)


# --- Nothing is allocated, and nothing takes for ever.

HUGE = 2**62


@WRITERS
@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"size": HUGE}, "ends before its values do"),
        ({"size": 2**80 - 1}, "a storage without a size"),
        ({"size": -1}, "a storage without a size"),
        ({"size": 3, "shape": (3,), "strides": (1,)}, "lacks the values of its storage '0'"),
        ({"size": 5}, "lacks the values of its storage '0'|ends before"),
        ({"kind": "torch.DoubleStorage"}, "lacks the values of its storage '0'|ends before"),
        ({"key": "1"}, "lacks the values of its storage '1'|does not say where"),
        ({"key": "../data.pkl"}, "lacks the values of its storage|does not say where"),
        ({"offset": 1}, "'a' reaches outside of its storage"),
        ({"offset": HUGE}, "'a' reaches outside of its storage"),
        ({"offset": -1}, "a tensor without a shape"),
        ({"shape": (2, 3)}, "'a' reaches outside of its storage"),
        ({"strides": (2, 2)}, "'a' reaches outside of its storage"),
        ({"strides": (-2, 1)}, "a tensor without a shape"),
        ({"shape": (-2, 2)}, "a tensor without a shape"),
        ({"shape": (2,)}, "a tensor without a shape"),
        ({"shape": (1,) * 65, "strides": (1,) * 65}, "a tensor without a shape"),
        ({"shape": (HUGE, 2), "strides": (0, 1)}, "repeat their elements too often"),
        ({"shape": (2**40,), "strides": (0,)}, "repeat their elements too often"),
        ({"shape": (HUGE, HUGE, 0), "strides": (1, 1, 1)}, "no file of PyTorch's tensors, or it is damaged"),
    ],
)
def test_descriptions_that_are_not_true_are_refused(file, written, described, message):
    refused(written(file, dict_of(a=tensor(**described))), message)


@WRITERS
def test_axes_of_one_may_have_any_stride(file, written):
    program = dict_of(a=tensor(shape=(1, 4, 1), strides=(HUGE, 1, HUGE)))
    np.testing.assert_array_equal(pickled.read(written(file, program))["a"], VALUES.reshape(1, 4, 1))


@WRITERS
def test_a_storage_has_one_type(file, written):
    both = dict_of(a=tensor(), b=tensor(kind="torch.IntStorage"))
    refused(written(file, both), "its storage '0' is described in two ways")


def test_many_views_of_one_storage_are_not_copied_beyond_the_file(file):
    size = 2**16
    views = {f"t{i}": tensor(size, (size - i,), (1,), key="0") for i in range(1000)}  # 262 MB
    refused(zip_file(file, dict_of(**views), {"0": np.zeros(size, np.float32)}), "repeat their elements too often")


def laughs(once, depth=60):
    """A value that has itself a great many times, of which each is written once."""
    program = b"\x80\x02" + once + b"q\x00"
    for i in range(depth):
        program += b"(" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"tq" + bytes([i + 1])
    return program


@WRITERS
@pytest.mark.parametrize(
    "program",
    [
        laughs(b")"),
        b"\x80\x02}" + laughs(b")")[2:] + b"Ns",  # its hash would take 2**60 steps
        b"\x80\x02}" + b")" + b"\x85" * 2 * 10**5 + b"Ns",  # its hash would be a stack overflow
        b"\x80\x02}" + text("a") + laughs(b")")[2:] + b"s",
        b"\x80\x02" + laughs(b")")[2:] + b"Q",
        b"\x80\x02" + named("torch._utils._rebuild_tensor_v2") + laughs(b")")[2:] + b"R",
        b"]" * 10**5,
        b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1),
        b"\x80\x02}" + text("a") + b"]" * 10**5 + b"a" * (10**5 - 1) + b"s",
        b"(" * 10**5,
        b"\x80\x02]q\x00h\x00a",  # a list that has itself
        b"\x80\x02}q\x00" + text("a") + b"h\x00s",
        b"\x80\x02}q\x00" + text("state_dict") + b"h\x00s",
        b"\x80\x02Nr\xff\xff\xff\xff",  # a memo of 2**32 entries
        b"\x80\x02Nr\xff\xff\xff\x7f0",
        b"\x80\x02X\xff\xff\xff\xff",
        b"\x80\x04\x8d" + struct.pack("<Q", HUGE),
        b"\x80\x04\x95" + struct.pack("<Q", HUGE),
        b"\x80\x04\x8e" + struct.pack("<Q", HUGE),
        b"\x80\x02\x8b\xff\xff\xff\x7f",
        # A list of 10**4 items, copied 10**4 times.
        b"\x80\x02](" + (b"]" + b"(" + text("a") + b"Ne") * 10**4 + b"eq\x00"
        + (named("collections.OrderedDict") + b"h\x00\x85R0") * 10**4,
    ],
    ids=range(21),
)  # fmt: skip
def test_programs_that_never_end_are_refused(file, written, program):
    refused(written(file, program), ".")


@WRITERS
def test_sizes_of_millions_of_digits_are_refused(file, written):
    """Their product would take hours."""
    digits = b"\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6
    shape = b"(" + digits + b"q\x00" + b"h\x00" * 30 + b"t"
    parts = storage(4), number(0), shape, tupled(*[number(0)] * 31), b"\x89N"
    refused(written(file, dict_of(a=named("torch._utils._rebuild_tensor_v2") + tupled(*parts) + b"R")), "without a shape")


def test_archives_that_pytorch_does_not_write_are_refused(tmp_path, file):
    good = dict_of(a=tensor())
    bomb = {"0": np.zeros(2**22, np.float32)}
    refused(zip_file(file, dict_of(a=tensor(2**22)), bomb, compression=zipfile.ZIP_DEFLATED), "compressed or encrypted")
    refused(zip_file(file, good, byteorder=b"big"), "big-endian")
    assert pickled.read(zip_file(file, good, byteorder=b"little", version=b"3\n"))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    refused(file, "none that PyTorch wrote")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", good + END)
        archive.writestr("b/data.pkl", good + END)
    refused(file, "none that PyTorch wrote")
    with zipfile.ZipFile(file, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/data.pkl", good + END)
        archive.writestr("a/data.pkl", good + END)
    refused(file, "none that PyTorch wrote")
    refused(legacy_file(file, good, little=False), "big-endian")


def test_entries_of_an_archive_that_share_their_bytes_are_refused(file):
    """A thousand names for one entry would be a thousand times its size."""
    values = {str(i): np.full(1000 if i == 0 else 0, i, np.float32) for i in range(100)}
    zip_file(file, dict_of(**{f"t{i}": tensor(1000, (1000,), (1,), key=str(i)) for i in range(100)}), values)
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        first = archive.getinfo("archive/data/0")
    place = content.index(b"PK\x01\x02")
    while content[place : place + 4] == b"PK\x01\x02":
        length, extra, comment = struct.unpack_from("<HHH", content, place + 28)
        if content[place + 46 : place + 46 + length].startswith(b"archive/data/"):
            struct.pack_into("<III", content, place + 16, first.CRC, 4000, 4000)
        place += 46 + length + extra + comment
    file.write_bytes(content)
    refused(file, "ends before its values do")


@pytest.mark.parametrize(
    ("keys", "message"),
    [(["0", "1"], "'1' that no tensor has"), ([], "where its values are"), (["0", "0"], "twice"), ([3], "where its values")],
)
def test_values_of_the_older_format_belong_to_its_storages(file, keys, message):
    refused(legacy_file(file, dict_of(a=tensor()), {"0": VALUES, "1": VALUES}, keys=keys), message)


@pytest.mark.parametrize(
    "content",
    [b"", b"P", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n" + bytes(100), b"hello\n", b"\x80", b"\x80\x02", bytes(1000), b"\xff" * 1000,
     b"(" * 100, b"c" * 100, b"cos\nsystem\n", struct.pack("<Q", 2) + b"{}", b"PK\x05\x06" + bytes(18)],
)  # fmt: skip
def test_files_of_other_kinds_are_refused(file, content):
    file.write_bytes(content)
    refused(file, "no file of PyTorch's")


def test_what_is_no_file_is_refused(tmp_path):
    refused(tmp_path, "is a folder")
    with pytest.raises(FileNotFoundError, match=r"missing\.pth"):
        pickled.read(tmp_path / "missing.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    refused(tmp_path / "pipe.pth", "is no regular file")


def test_a_dict_of_numpy_arrays_is_refused(file):
    file.write_bytes(pickle.dumps({"a": np.ones(3)}))
    refused(file, "no file of PyTorch's")
    refused(zip_file(file, pickle.dumps({"a": np.ones(3)}, protocol=2)[:-1]), r"numpy.*only tensors are read")


def test_names_cannot_command_a_terminal(file):
    name = "a\x1b[2J\n\ud800"
    encoded = name.encode("utf-8", "surrogatepass")
    item = b"X" + struct.pack("<I", len(encoded)) + encoded
    refused(zip_file(file, b"\x80\x02}" + item + number(3) + b"s"), "is no tensor")
    refused(zip_file(file, b"\x80\x02}" + item + tensor(offset=9) + b"s"), "reaches outside")


# --- Damage.


def small(path, written):
    norm = {name: tensor(2, (2,), (1,), key=key) for name, key in (("bn.weight", "0"), ("bn.bias", "1"))}
    values = {"0": np.float32([1, 2]), "1": np.float32([3, 4])}
    return written(path, dict_of(**norm), values)


def read_or_refused(path):
    try:
        return pickled.read(path)
    except ValueError as error:
        assert str(path) in str(error) and str(error).isprintable()
        return None


@WRITERS
def test_no_truncated_file_is_read(file, written):
    whole = small(file, written).read_bytes()
    assert list(pickled.read(file)) == ["bn.weight", "bn.bias"]
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert read_or_refused(file) is None, length


@WRITERS
def test_a_file_with_one_wrong_byte_is_read_or_refused(file, written):
    """An archive has sums of its bytes: it never gives other names or values.  The older format has none."""
    whole = small(file, written).read_bytes()
    wanted = {name: value.tolist() for name, value in pickled.read(file).items()}
    rng = np.random.default_rng(0)
    outcomes = set()
    for place in range(len(whole)):
        for change in {0x80, 0xFF, int(rng.integers(1, 256))}:
            file.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
            found = read_or_refused(file)
            outcomes.add(found is None)
            if found is not None:
                assert len(found) <= 2 and all(value.nbytes < 100 for value in found.values())
                values = {name: value.tolist() for name, value in found.items()}
                assert written is legacy_file or values == wanted, (place, change)
    assert outcomes == {True, False}


@needs_torch
@FORMATS
def test_a_file_of_pytorch_with_one_wrong_byte_is_read_or_refused(file, zipped):
    model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1))
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    rng = np.random.default_rng(1)
    for place in rng.choice(len(whole), 400, replace=False):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ int(rng.integers(1, 256))]) + whole[place + 1 :])
        read_or_refused(file)
        file.write_bytes(whole[:place])
        assert read_or_refused(file) is None


@WRITERS
def test_random_programs_are_refused(file, written):
    """Instructions and arguments drawn from those that programs have."""
    rng = np.random.default_rng(2)
    parts = [op.code.encode("latin-1") for op in pickletools.opcodes if op.arg is None and op.name != "STOP"]
    parts += [
        text("a"),
        number(1),
        named("collections.OrderedDict"),
        named("torch._utils._rebuild_tensor_v2"),
        b"h\x00",
        b"q\x00",
    ]
    parts += [tensor(), storage(4), b"}", b"(", b"(", b")", b"R", b"s", b"u"]
    for _ in range(300):
        program = b"\x80\x02" + b"".join(parts[i] for i in rng.integers(0, len(parts), rng.integers(1, 30)))
        found = read_or_refused(written(file, program))
        assert found is None or all(isinstance(value, np.ndarray) for value in found.values())


def test_reading_needs_no_torch():
    """The file is read without it, and without importing what a file names."""
    code = (
        "import sys; from lowrank_jax.exchange import pickled; sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_reader_allocates_no_more_than_the_file_has():
    file = pickled._File(io.BytesIO(b"abcdef"))
    assert file.read(HUGE) == b"abcdef" and file.read(HUGE) == b"" and file.read() == b""
    with pytest.raises(ValueError, match="points outside"):
        file.seek(7)
