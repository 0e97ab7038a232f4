"""A damaged or hostile checkpoint is refused with one kind of error, and no module is touched."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from etp_graph.checkpoint import MANIFEST_FILE, WEIGHTS_FILE, load, read_manifest, save
from etp_graph.checkpoint._manifest import TensorInfo
from etp_graph.errors import CheckpointError
from etp_graph.surgery import get_record
from tests.support.models.toy import Toy
from tests.support.pruned_toy import assert_same, state, trained_toy, values


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(trained_toy(1), tmp_path_factory.mktemp("good") / "m")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "m"))


def sealed(body: dict[str, Any]) -> str:
    """The manifest as a hostile author would write it: with a valid digest."""
    body.pop("digest", None)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({**body, "digest": hashlib.sha256(text.encode()).hexdigest()})


def refused(folder: Path, match: str | None = None) -> None:
    build = Toy()
    before = state(build)
    with pytest.raises(CheckpointError, match=match) as caught:
        load(folder, build=build)
    assert len(str(caught.value)) < 2000
    assert state(build) == before


def _set(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        place: Any = body
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


HOSTILE = {
    "version": (_set("format", value=2), "format 2 is unknown"),
    "version as bool": (_set("format", value=True), "format True is unknown"),
    "another key": (_set("file", value="../../etc/passwd"), "expected the keys"),
    "path in weights": (_set("weights", "path", value="/etc/passwd"), "expected the keys"),
    "larger": (_set("tensors", "conv1.weight", "shape", value=[8, 4, 3, 3]), "conv1.weight"),
    "negative": (_set("tensors", "conv1.weight", "shape", 0, value=-1), "conv1.weight"),
    "bool": (_set("tensors", "conv1.weight", "shape", 0, value=True), "conv1.weight"),
    "huge": (_set("tensors", "conv1.weight", "shape", 0, value=2**61), "bytes of tensors"),
    "dimensions": (_set("tensors", "conv1.weight", "shape", value=[1] * 1000), "1000 dimensions"),
    "dtype": (_set("tensors", "conv1.weight", "dtype", value="__class__"), "dtype"),
    "not cut": (lambda body: body["cut"].remove("conv1.weight"), r"conv1.weight is saved as \[7"),
    "cut unknown": (lambda body: body["cut"].append("../x"), "not a stored tensor"),
    "alias loop": (_set("aliases", "a", value="a"), "aliases"),
    "alias of a tensor": (_set("aliases", "conv1.weight", value="conv2.weight"), "aliases"),
    "alias unknown": (_set("aliases", "other", value="conv2.weight"), "other"),
    "edit twice": (lambda body: body["edits"].append(body["edits"][0]), "occurs twice"),
    "edit grows": (_set("edits", 0, "value", value=9), "cannot become 9"),
    "edit negative": (_set("edits", 0, "value", value=-1), "edits"),
    "edit bool": (_set("edits", 0, "value", value=True), "edits"),
    "edit another attribute": (_set("edits", 0, "name", value="padding"), "surgery writes no such attribute"),
    "edit forward": (_set("edits", 0, "name", value="forward"), "surgery writes no such attribute"),
    "edit private": (_set("edits", 0, "name", value="__class__"), "public attribute"),
    "edit absent": (_set("edits", 0, "name", value="in_features"), "surgery writes no such attribute"),
    "edit no module": (_set("edits", 0, "module", value="conv1.weight"), "no such module"),
    "edit item": (_set("edits", 0, "item", value=0), "no entry"),
    "selection": (_set("selections", 0, value='{"conv1": [1000000000000, []]}'), "selections"),
    "selection index": (_set("selections", 0, value='{"conv1": [8, [8]]}'), "selections"),
    "selection missing": (_set("selections", value=[]), "1 fingerprints for 0 selections"),
    "fingerprint": (_set("fingerprints", 0, value="../../x"), "fingerprints"),
    "checksum": (_set("weights", "sha256", value="0" * 64), "SHA-256"),
    "size": (_set("weights", "bytes", value=2**62 + 1), "weights.bytes"),
    "fewer bytes": (_set("weights", "bytes", value=3000), "weights|bytes"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_manifest_is_refused(folder: Path, case: str) -> None:
    change, match = HOSTILE[case]
    body = json.loads((folder / MANIFEST_FILE).read_text())
    change(body)
    (folder / MANIFEST_FILE).write_text(json.dumps(body))
    refused(folder)
    (folder / MANIFEST_FILE).write_text(sealed(body))
    refused(folder, match)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"format": NaN}',
        b'{"format": 1.0}',
        b'{"format": ' + b"9" * 5000 + b"}", b'{"format": 1, "format": 1}', b'{"format": 1}', b'{"format": 1e999}',
        b'"' + b"x" * 100, b'{"format": Infinity}', b'{"format": "1"}',
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(folder: Path, text: bytes) -> None:
    (folder / MANIFEST_FILE).write_bytes(text)
    refused(folder, MANIFEST_FILE)


def test_a_repeated_key_is_refused(folder: Path) -> None:
    text = (folder / MANIFEST_FILE).read_text()
    (folder / MANIFEST_FILE).write_text(text.replace('"aliases"', '"aliases": {}, "aliases"'))
    refused(folder, "occurs twice")


def test_no_depth_of_nesting_is_another_error(folder: Path) -> None:
    body = json.loads((folder / MANIFEST_FILE).read_text())
    body["libraries"] = "here"
    for depth in (*range(850, 1000), 3_000, 10_000, 100_000):
        text = json.dumps(body).replace('"here"', "[" * depth + "]" * depth)
        (folder / MANIFEST_FILE).write_text(text)
        refused(folder)


def test_links_and_devices_are_refused(folder: Path, good: Path) -> None:
    for name in (MANIFEST_FILE, WEIGHTS_FILE):
        file = folder / name
        for replace in (
            lambda f: f.symlink_to(good / f.name),
            lambda f: f.symlink_to("/dev/zero"),
            os.mkfifo,
            os.mkdir,
        ):
            file.unlink()
            replace(file)
            refused(folder, "not a regular file")
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
            shutil.copy(good / name, file)
        file.unlink()
        refused(folder, name)
        shutil.copy(good / name, file)
    assert_same(load(folder, build=Toy), trained_toy(1))
    refused(folder / "nothing", MANIFEST_FILE)
    refused(Path("\0"))


def test_a_large_manifest_is_not_read(folder: Path) -> None:
    with (folder / MANIFEST_FILE).open("ab") as stream:
        stream.truncate(2**40)  # sparse: takes no space
    refused(folder, "bytes where at most")


def test_weights_that_contradict_the_manifest_are_refused(folder: Path, tmp_path: Path) -> None:
    """The checksum is right, so that only the comparison of the header with the manifest can find it."""
    other = save(trained_toy(3), tmp_path / "other")
    data = (other / WEIGHTS_FILE).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    wrong = [
        data, data[:-1], data + b"\0", struct.pack("<Q", 2**63) + data[8:], struct.pack("<Q", length - 1) + data[8:],
        b"",
        data.replace(b"F32", b"I32"), data.replace(b"conv1", b"conv9"), data[:8] + b"\0" * length + data[8 + length :],
    ]  # fmt: skip
    for data in wrong:
        (folder / WEIGHTS_FILE).write_bytes(data)
        refused(folder, WEIGHTS_FILE + "|" + MANIFEST_FILE)
        body = json.loads((folder / MANIFEST_FILE).read_text())
        body["weights"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / MANIFEST_FILE).write_text(sealed(body))
        refused(folder)


JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 5, 6, 7, 8, 9, 24, 2**31, 2**62, 2**63, 2**64, 10**30, -(2**63), 0.5, 1.0, 1e308,
    float("nan"), float("inf"), "", "conv1", "conv1.weight", "norm.running_mean", "out_channels", "weight", "training",
    "../../etc/passwd", "/etc/passwd", "..\\x", "a\0b", "\ud800", "\u202e", "x" * 5000, "__class__", "__dict__",
    "float32", "float64", "int8", "0" * 64, [], {}, [[]], {"": {}}, [1, 2, 3], {"shape": [1], "dtype": "float32"},
    '{"conv1": [8, [0]]}', '{"conv1": [8, [0, 0]]}', '{"conv1": 1e5}', "[" * 5000, [None] * 50,
)  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from places(item)


def mutate(body: dict[str, Any], rng: random.Random) -> None:
    """One change somewhere in the JSON value."""
    holder, key = rng.choice(list(places(body)))
    kind = rng.randrange(6)
    junk = nested(200) if rng.random() < 0.03 else copy.deepcopy(rng.choice(JUNK))
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(key, junk)
    elif kind == 2 and isinstance(holder, dict):
        holder[junk if isinstance(junk, str) else str(junk)] = holder[key]
    elif kind == 3:
        other, there = rng.choice(list(places(body)))
        holder[key] = copy.deepcopy(other[there])
    elif kind == 4 and type(holder[key]) is int:
        holder[key] += rng.choice((-1, 1, 2**40))
    else:
        holder[key] = junk


def fuzzed(folder: Path, mutation: Callable[[random.Random], None], *, runs: int, sealed_again: bool = False) -> int:
    """How many of the mutations were refused. What is not refused must be the saved model."""
    want, build, count = trained_toy(1), Toy(), 0
    before = state(build)
    tensors = {name: value for name, value in values(want).items() if ":" not in name}
    for seed in range(runs):
        mutation(random.Random(seed))
        try:
            load(folder, build=build)
        except CheckpointError:
            count += 1
            assert state(build) == before, seed
            continue
        if sealed_again:  # an author may describe another model, but not other tensors
            assert {name: value for name, value in values(build).items() if ":" not in name} == tensors, seed
        else:
            assert_same(build, want)
        build = Toy()
        before = state(build)
    return count


@pytest.mark.parametrize("again", [False, True])
def test_mutated_manifests(folder: Path, again: bool) -> None:
    text = (folder / MANIFEST_FILE).read_text()

    def mutation(rng: random.Random) -> None:
        body = json.loads(text)
        for _ in range(rng.choice((1, 1, 2))):
            mutate(body, rng)
        (folder / MANIFEST_FILE).write_text(sealed(body) if again else json.dumps(body))

    assert fuzzed(folder, mutation, runs=400, sealed_again=again) > 300


@pytest.mark.parametrize("name", [MANIFEST_FILE, WEIGHTS_FILE])
def test_mutated_bytes(folder: Path, name: str) -> None:
    good = (folder / name).read_bytes()

    def mutation(rng: random.Random) -> None:
        data = bytearray(good)
        kind = rng.randrange(4)
        at = rng.randrange(len(data))
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            data[:8] = rng.randbytes(8)
        (folder / name).write_bytes(data)

    assert fuzzed(folder, mutation, runs=300) > 250


def test_manifest_is_typed_and_frozen(good: Path) -> None:
    manifest = read_manifest(good)
    assert manifest.tensors["conv1.weight"] == TensorInfo(shape=(7, 3, 3, 3), dtype="float32")
    assert manifest.n_bytes == (good / WEIGHTS_FILE).stat().st_size
    assert manifest.record == get_record(trained_toy(1))
    with pytest.raises(AttributeError):
        manifest.n_bytes = 0  # type: ignore[misc]


def test_values_that_were_not_cut_do_not_follow_the_manifest(folder: Path) -> None:
    """Every tensor of the module is the module's own: later training must not reach the next load."""
    first = load(folder, build=Toy)
    with torch.no_grad():
        first.conv1.weight.zero_()
    assert_same(load(folder, build=Toy), trained_toy(1))
