"""A file that would run code when it is loaded is refused, and the code does not run."""

import argparse
import io
import os
import pickle
import struct

import pytest
import torch

from models.checkpoints.load import load_discriminator, load_generator
from models.errors import AssetError


class Touch:
    """A harmless payload: plain unpickling would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Evaluate(Touch):
    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({str(self.path)!r})",)


@pytest.fixture
def mark(tmp_path):
    """The file whose appearance would prove that the payload ran."""
    return tmp_path / "ran"


def test_the_payload_is_real(mark):
    pickle.loads(pickle.dumps(Touch(mark)))
    assert mark.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("payload", "name"), [(Touch, r"(posix|nt)\.mkdir"), (Evaluate, r"\w+\.eval")]
)
def test_pickle(tmp_path, mark, payload, name, protocol):
    path = tmp_path / "network.pkl"
    path.write_bytes(pickle.dumps({"G_ema": payload(mark)}, protocol=protocol))
    for load in (load_generator, load_discriminator):
        with pytest.raises(AssetError, match=f"refused to load: the pickle wants to use {name}"):
            load(path)
    assert not mark.exists()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(("payload", "name"), [(Touch, r"(posix|nt)\.mkdir"), (Evaluate, "eval")])
def test_torch_file(tmp_path, mark, payload, name, is_zip):
    path = tmp_path / "checkpoint.pt"
    torch.save({"g_ema": payload(mark)}, path, _use_new_zipfile_serialization=is_zip)
    for load in (load_generator, load_discriminator):
        with pytest.raises(AssetError, match=f"refused to load: the file wants to use {name}"):
            load(path)
    assert not mark.exists()


def test_payload_inside_the_bytes_of_a_storage(tmp_path, mark):
    """`_load_from_bytes` is on the allow-list: what it unpacks must be as inert."""
    inner = io.BytesIO()
    torch.save(Touch(mark), inner, _use_new_zipfile_serialization=False)
    data = inner.getvalue()
    path = tmp_path / "network.pkl"
    path.write_bytes(
        b"\x80\x04ctorch.storage\n_load_from_bytes\n"
        + b"B"
        + struct.pack("<I", len(data))
        + data
        + b"\x85R."
    )
    with pytest.raises(AssetError, match="mkdir"):
        load_generator(path)
    assert not mark.exists()


def test_the_source_inside_a_network_is_not_run(
    dump_nvidia, nvidia_generator, persistent, mark, monkeypatch
):
    monkeypatch.setattr(persistent, "source", f"import os\nos.mkdir({str(mark)!r})\n")
    path = dump_nvidia({"G_ema": nvidia_generator()})
    assert str(mark).encode() in path.read_bytes()
    assert load_generator(path).resolution == 16
    assert not mark.exists()


def test_what_is_handed_out_cannot_be_changed_for_the_next_file(tmp_path):
    """A pickle may set attributes on allowed objects (opcode BUILD): they die with the file."""
    path = tmp_path / "network.pkl"
    # EasyDict gets a class attribute by a BUILD with slot state on the class itself.
    path.write_bytes(b"\x80\x02cdnnlib.util\nEasyDict\n(N}X\x01\x00\x00\x00aK\x01stb.")
    with pytest.raises(AssetError):
        load_generator(path)
    from models.checkpoints.nvidia_pickle import _constructors

    assert not hasattr(_constructors()["dnnlib.util", "EasyDict"], "a")


@pytest.mark.parametrize(
    "body",
    [
        b"cbuiltins\ngetattr\n.",
        b"cbuiltins\n__import__\n.",
        b"ctorch\nload\n.",
        b"cnumpy\nload\n.",
        b"ccollections\nnamedtuple\n.",
        b"ctorch._utils\n_rebuild_device_tensor_from_numpy\n.",
        b"\x8c\x0dtorch.storage\x8c\x10_load_from_bytes.__globals__\x93.",
    ],
)
def test_neighbours_of_the_allow_list(tmp_path, body):
    path = tmp_path / "network.pkl"
    path.write_bytes(b"\x80\x04" + body)
    with pytest.raises(AssetError):
        load_generator(path)


def test_numpy_objects_are_refused(tmp_path):
    path = tmp_path / "network.pkl"
    # numpy.dtype('O8'): an array of Python objects.
    path.write_bytes(b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R.")
    with pytest.raises(AssetError, match="'O8' is not a plain number"):
        load_generator(path)


def test_a_tensor_cannot_reach_outside_its_storage(tmp_path):
    class Storage:
        def __init__(self, data):
            self.data = data

        def __reduce__(self):
            return torch.storage._load_from_bytes, (self.data,)

    class Outside:
        def __reduce__(self):
            buffer = io.BytesIO()
            storage = torch.zeros(4).untyped_storage()
            torch.save(storage, buffer, _use_new_zipfile_serialization=False)
            return torch._utils._rebuild_tensor_v2, (
                Storage(buffer.getvalue()),
                0,
                (5,),
                (1,),
                False,
                None,
            )

    path = tmp_path / "network.pkl"
    path.write_bytes(pickle.dumps(Outside(), protocol=4))
    with pytest.raises(AssetError):
        load_generator(path)


def test_namespace_is_let_through_only_while_loading(tmp_path, tiny_generator):
    path = tmp_path / "checkpoint.pt"
    state = tiny_generator.state_dict()
    torch.save({"g_ema": state, "args": argparse.Namespace(size=32)}, path)
    assert load_generator(path).resolution == 32
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


RECONSTRUCT = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"


def nested_network(name, inside):
    """The pickle of an object whose modules are put there by `inside`."""
    return (
        RECONSTRUCT
        + b"(}(X\x0a\x00\x00\x00class_nameX\x01\x00\x00\x00"
        + name
        + b"X\x05\x00\x00\x00state}X\x08\x00\x00\x00_modules"
        + inside
        + b"sutR"
    )


def shared_modules(depth):
    """Each module holds the one below it twice: 2^depth ways down."""
    data = b"\x80\x02" + nested_network(b"Z", b"}") + b"q\x00"
    for level in range(depth):
        below = b"h" + bytes([level])
        pair = b"}(X\x01\x00\x00\x00a" + below + b"X\x01\x00\x00\x00b" + below + b"u"
        data += nested_network(b"N", pair) + b"q" + bytes([level + 1])
    return data + b"."


def tuples_of_tuples(depth, end):
    """A tuple that takes 2^depth steps to hash or to print, and what is done with it."""
    data = b"\x80\x02)q\x00"
    for level in range(depth):
        below = b"h" + bytes([level])
        data += below + below + b"\x86q" + bytes([level + 1])
    return data + end + b"."


HOSTILE = {
    "shared modules": shared_modules(40),
    "a module inside itself": b"\x80\x02" + nested_network(b"Z", b"}q\x07") + b"q\x00"
    b"h\x07X\x01\x00\x00\x00ah\x00s0h\x00.",
    "a tuple as a key": tuples_of_tuples(60, b"}h\x3cK\x01s"),
    "tuples as keys": tuples_of_tuples(60, b"}(h\x3cK\x01u"),
    "a tuple in a set": tuples_of_tuples(60, b"\x8f(h\x3c\x90"),
    "a tuple in a frozen set": tuples_of_tuples(60, b"(h\x3c\x91"),
    "a tuple as an ordered key": tuples_of_tuples(
        60, b"ccollections\nOrderedDict\n(](h\x3cK\x01\x86etR"
    ),
    "a tuple as a class name": tuples_of_tuples(
        60, RECONSTRUCT + b"(}(X\x0a\x00\x00\x00class_nameh\x3cX\x05\x00\x00\x00state}utR"
    ),
    "a tuple as a type": tuples_of_tuples(60, b"cnumpy\ndtype\nh\x3c\x85R"),
    "a memo number": b"\x80\x02}r\xff\xff\xff\xff.",
    "a length": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
    "nested lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a number": b"\x80\x02X\x05\x00\x00\x00G_emaI" + b"9" * 100_000 + b"\n.",
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_small_file_takes_little_time_and_memory(tmp_path, name):
    path = tmp_path / "network.pkl"
    path.write_bytes(HOSTILE[name])
    for load in (load_generator, load_discriminator):
        with pytest.raises(AssetError, match=r"network\.pkl"):
            load(path)


@pytest.mark.parametrize(
    ("place", "wrong", "value"),
    [
        ("mapping.fc0", "bias_gain", None),
        ("synthesis.b8", "architecture", [1]),
        ("mapping.fc0", "activation", ["x"]),
        ("synthesis.b8.conv0", "conv_clamp", {}),
    ],
)
def test_settings_of_other_types(dump_nvidia, nvidia_generator, place, wrong, value):
    generator = nvidia_generator()
    generator[place].settings[wrong] = value
    with pytest.raises(AssetError):
        load_generator(dump_nvidia({"G_ema": generator}))
