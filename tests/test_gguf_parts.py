"""Models that come in several GGUF files."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_bytes import file_of, on_linux, tensor, u32
from hipquant.errors import InvalidModelFileError
from hipquant.gguf_file import GGUFFile


def parts_of(folder: Path, *tensors: tuple[bytes, ...], count: int | None = None, **more: int) -> Path:
    """A model in parts with these tensors, each of them filled with its number; the path of the first."""
    count = len(tensors) if count is None else count
    for i, names in enumerate(tensors):
        keys = [u32(b"split.no", i), u32(b"split.count", count)]
        keys += [u32(key.encode().replace(b"_", b"."), value) for key, value in more.items()]
        infos = tuple(tensor(name, offset=128 * j) for j, name in enumerate(names))
        raw = file_of(*keys, tensors=infos)
        values = np.repeat(np.arange(len(names), dtype="<f4") + 10 * i, 32)
        (folder / f"m-{i + 1:05d}-of-{count:05d}.gguf").write_bytes(raw + values.tobytes())
    return folder / f"m-00001-of-{count:05d}.gguf"


def test_parts_are_one_model(tmp_path: Path) -> None:
    path = parts_of(tmp_path, (), (b"a", b"b"), (b"c",), split_tensors_count=3)
    with GGUFFile(path) as file:
        assert {name: info.part for name, info in file.tensors.items()} == {"a": 1, "b": 1, "c": 2}
        assert [file.data(name).view("<f4")[31] for name in "abc"] == [10, 11, 20]
        file.release("c")
        file.check_scales("c")
    with pytest.raises(ValueError, match="is closed"):
        file.data("c")


def test_parts_of_another_writer(tmp_path: Path) -> None:
    values = {f"t{i}": np.full((3, 32), i, np.float32) for i in range(5)}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(tmp_path / "m-00001-of-00003.gguf") as file:
        assert file.require("general.architecture", str) == "llama"
        for name, value in values.items():
            assert np.array_equal(file.data(name).view("<f4").reshape(file.tensors[name].shape), value)


@on_linux
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p.parent / "m-00002-of-00003.gguf").unlink(), "part 2 of 3 is missing: m-00002-of-00003.gguf"),
        (
            lambda p: p.rename(p.with_name("x.gguf")),
            r"does not end in -00001-of-00003\.gguf.*llama-gguf-split --merge",
        ),
        (
            lambda p: shutil.copy(p.parent / "m-00002-of-00003.gguf", p.parent / "m-00003-of-00003.gguf"),
            "says that it is part 2 of 3, expected 3 of 3",
        ),
        (lambda p: parts_of(p.parent, (b"a",), (b"b",), (b"a",)), "tensor 'a' is in an earlier part, too"),
        (lambda p: parts_of(p.parent, (b"a",), (b"b",), (b"c",), split_tensors_count=4), "have 3 tensors, expected 4"),
        (lambda p: (p.parent / "m-00003-of-00003.gguf").write_bytes(b"GGUF"), "the file ends within the version"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    path = parts_of(tmp_path, (b"a",), (b"b",), (b"c",))
    change(path)
    with pytest.raises(InvalidModelFileError, match=message):
        GGUFFile(path if path.exists() else path.with_name("x.gguf"))
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_later_part_names_the_first(tmp_path: Path) -> None:
    parts_of(tmp_path, (b"a",), (b"b",))
    with pytest.raises(InvalidModelFileError, match=r"part 2 of a model in 2 files; .*: m-00001-of-00002\.gguf"):
        GGUFFile(tmp_path / "m-00002-of-00002.gguf")


def test_a_model_in_one_part(opened: Any) -> None:
    opened(file_of(u32(b"split.count", 1))).close()
