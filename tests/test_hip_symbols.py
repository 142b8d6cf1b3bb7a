"""The HIP column of driver/gpu_symbols.py against AMD's own library and header, which need no GPU.

HIPQUANT_HIP_LIBRARY names the library; without it, the one that this system has is taken (Debian: libamdhip64-5). The
header is looked for beside it (libamdhip64-dev).
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import subprocess
import sys
from ctypes import POINTER, c_char_p, c_int, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hipquant.driver import gpu_symbols
from hipquant.driver.gpu_symbols import SYMBOLS
from hipquant.errors import DeviceNotFoundError

HIP = {row: symbol for row, symbol in SYMBOLS.items() if symbol.hip}
HEADER = "hip/hip_runtime_api.h"
BYTES = {"char": 1, "bool": 1, "short": 2, "int": 4, "float": 4, "unsigned": 4, "long": 8, "size_t": 8, "double": 8}


@pytest.fixture(scope="module")
def path() -> Path:
    """The library's file."""
    named = os.environ.get("HIPQUANT_HIP_LIBRARY")
    for name in (named,) if named else gpu_symbols.library_names("hip"):
        try:
            ctypes.CDLL(name)
        except OSError:
            assert not named, f"HIPQUANT_HIP_LIBRARY={named} cannot be loaded"
            continue
        found = next(iter(gpu_symbols._loaded_already(("libamdhip64.so",))), "")
        return Path(named or found or name).resolve()
    pytest.skip("no libamdhip64 is installed, and HIPQUANT_HIP_LIBRARY names none (Debian: libamdhip64-5)")


@pytest.fixture(scope="module")
def library(path: Path) -> gpu_symbols.Library:
    """It has every symbol that is required, or this raises."""
    return gpu_symbols.Library("hip", ctypes.CDLL(str(path)), str(path))


@pytest.fixture(scope="module")
def header(path: Path) -> Path:
    found = next((p / "include" / HEADER for p in path.parents if (p / "include" / HEADER).is_file()), None)
    if found is None:
        pytest.skip(f"no {HEADER} beside {path} (Debian: libamdhip64-dev)")
    return found


# --- the library ---


def test_it_exports_the_column(library: gpu_symbols.Library) -> None:
    missing = {symbol.hip for row, symbol in HIP.items() if row not in library.functions}
    version = library.integer("driver_version", what="asking for the version")
    assert version >= 5 * 10**7
    assert missing <= {symbol.hip for symbol in HIP.values() if not symbol.required}
    # ROCm 6 brought another structure under another name; the old name then fills in the old one, or is gone.
    chosen = next(row for row in gpu_symbols.PROPERTIES if row in library.functions)
    assert chosen == ("properties" if version < 6 * 10**7 else "properties_r0600")


def test_errors_have_names(library: gpu_symbols.Library) -> None:
    """The same numbers as the code counts on."""
    names = {gpu_symbols.OUT_OF_MEMORY: "OutOfMemory", gpu_symbols.NO_DEVICE: "NoDevice", 200: "InvalidImage"}
    names |= {gpu_symbols.NOT_FOUND: "NotFound", 719: "LaunchFailure", gpu_symbols.NOT_UPDATABLE: "GraphExecUpdateF"}
    for code, name in names.items():
        assert library.error_name(code).startswith(f"hipError{name}"), code


def test_without_a_gpu_it_says_why(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_symbols, "candidates", lambda kind: [str(path)])
    try:
        gpu_symbols.load("hip")
    except DeviceNotFoundError as error:
        said = str(error)
    else:
        pytest.skip("there is an AMD GPU")
    assert said.startswith(f"{path} finds no AMD GPU (hipError")
    assert re.search(
        r"There is no /dev/kfd: .*|No permission on .*: group \w+ gives it|may hide it|is there: the", said
    )


def test_the_command_says_why(path: Path) -> None:
    """In a process of its own, through the search that users have."""
    folder = f"{path.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")
    command = [sys.executable, "-m", "hipquant", "devices", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"LD_LIBRARY_PATH": folder}
    )
    report = json.loads(done.stdout)
    if "hip" not in report["unavailable"]:
        pytest.skip("there is an AMD GPU")
    assert re.search(r"libamdhip64\.so.* finds no AMD GPU \(hipError\w+\)\. ", report["unavailable"]["hip"])
    assert "cpu" in [device["name"] for device in report["devices"]]


# --- its header ---


class Argument(NamedTuple):
    """A C type: how many pointers deep, and the bytes of what lies at the end (0 for a structure or void)."""

    depth: int
    nbytes: int


class Header:
    """Prototypes and typedefs of a C header, as far as this test needs them."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
        text = re.sub(r"^\s*#(?:[^\n]*\\\n)*[^\n]*$", " ", text, flags=re.MULTILINE)
        text = re.sub(r"__dparm\([^()]*\)", "", text)
        prototypes = re.finditer(r"\b([\w ]+?[\w*])\s*\b(hip\w+)\s*\(([^(){};]*)\)\s*;", text)
        self.prototypes: dict[str, tuple[str, list[str]]] = {}
        for found in prototypes:  # the first of a name: those behind are C++ templates over it
            args = [a.strip() for a in found[3].split(",") if a.strip() not in ("", "void")]
            self.prototypes.setdefault(found[2], (found[1].strip(), args))
        self.typedefs = {m[2]: m[1] for m in re.finditer(r"\btypedef\s+([^(){};]+?[\s*])(\w+)\s*;", text)}
        enums = re.finditer(r"\benum\s+(\w+)\s*\{|\benum\s*\w*\s*\{[^{}]*\}\s*(\w+)\s*;", text)
        self.enums = {name for m in enums for name in m.groups() if name}

    def argument(self, declared: str) -> Argument:
        """An argument of a prototype, with its name or without."""
        declared = declared.partition("=")[0].replace("[]", "*")
        words = re.findall(r"\w+", declared)
        words = [w for w in words if w not in ("const", "struct", "enum")]
        depth = declared.count("*")
        base = words[:-1] if len(words) > 1 and words[-1] not in BYTES else words
        return self._resolve(base, depth)

    def _resolve(self, base: list[str], depth: int) -> Argument:
        name = base[-1]
        if name in self.typedefs and name not in self.enums:
            aliased = self.typedefs[name]
            words = [w for w in re.findall(r"\w+", aliased) if w not in ("const", "struct")]
            if words != base:
                return self._resolve([w for w in words if w != "enum"] or words, depth + aliased.count("*"))
        if name in self.enums or name == "hipError_t":
            return Argument(depth, 4)
        return Argument(depth, BYTES.get(name, 4 if name == "uint32_t" else 0))


def ours(kind: Any) -> Argument:
    """A ctypes type of the table."""
    if kind is c_void_p or kind is c_char_p:
        return Argument(1, 0)
    if hasattr(kind, "contents"):
        inner = ours(kind._type_)
        return Argument(inner.depth + 1, inner.nbytes)
    return Argument(0, ctypes.sizeof(kind))


def agrees(mine: Argument, theirs: Argument) -> bool:
    """As deep, where the table says how deep; and as many bytes, where both say."""
    if mine.nbytes == 0:  # void*, which stands for any pointer, or void**
        return theirs.depth >= mine.depth
    return mine == theirs


@functools.cache
def parsed(header: Path) -> Header:
    """With the header that it includes for some of its types."""
    beside = header.with_name("driver_types.h")
    return Header("".join(h.read_text(errors="replace") for h in (header, beside) if h.is_file()))


@pytest.mark.parametrize("row", HIP)
def test_arguments_agree_with_the_header(row: str, header: Path) -> None:
    symbol, known = HIP[row], parsed(header)
    if symbol.hip not in known.prototypes and not symbol.required:
        pytest.skip(f"{header} is of another generation, without {symbol.hip}")
    result, args = known.prototypes[symbol.hip]
    assert len(args) == len(symbol.args), args
    for mine, declared in zip(symbol.args, args, strict=True):
        assert agrees(ours(mine), known.argument(declared)), f"{mine} for {declared}"
    assert agrees(ours(symbol.result), known.argument(result)), result


def test_where_the_properties_lie(header: Path, tmp_path: Path) -> None:
    """As the compiler lays the structure out."""
    (tmp_path / "hip").symlink_to(header.parent)
    rows, version = gpu_symbols.PROPERTIES, (header.parent / "hip_version.h").read_text()
    major = re.search(r"HIP_VERSION_MAJOR\s+(\d+)", version)
    assert major is not None
    layout = rows["properties" if int(major[1]) < 6 else "properties_r0600"]
    fields = {"warpSize": layout.warp_size, "multiProcessorCount": layout.multiprocessors}
    fields["gcnArchName"] = layout.gcn_arch_name
    checks = [f"_Static_assert(__builtin_offsetof(hipDeviceProp_t, {f}) == {at}, {f!r});" for f, at in fields.items()]
    checks += [f"_Static_assert(sizeof(hipDeviceProp_t) <= {gpu_symbols.PROPERTIES_BYTES}, 'size');"]
    source = tmp_path / "layout.c"
    source.write_text("\n".join([f"#include <{HEADER}>", *checks, ""]).replace("'", '"'))
    command = [
        sys.executable,
        "-m",
        "ziglang",
        "cc",
        "-w",
        "-D__HIP_PLATFORM_AMD__",
        f"-I{tmp_path}",
        "-c",
        str(source),
    ]
    done = subprocess.run([*command, "-o", str(tmp_path / "layout.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_comparison_sees_what_differs() -> None:
    header = Header(
        "typedef struct s* hipThing_t; typedef enum hipMode { A, B } hipMode; /* hipError_t hipNot(int); */\n"
        "hipError_t hipDo(hipThing_t* out, size_t n, hipMode mode, const void* from, unsigned int flags __dparm(0));\n"
    )
    (prototype,) = header.prototypes.values()
    args = [header.argument(a) for a in prototype[1]]
    assert args == [(2, 0), (0, 8), (0, 4), (1, 0), (0, 4)]
    right: list[Any] = [POINTER(c_void_p), ctypes.c_size_t, c_int, c_void_p, ctypes.c_uint]
    wrong: list[Any] = [c_int, c_int, c_void_p, ctypes.c_size_t, ctypes.c_ulonglong]
    assert [agrees(ours(kind), a) for kind, a in zip(right, args, strict=True)] == [True] * 5
    assert [agrees(ours(kind), a) for kind, a in zip(wrong, args, strict=True)] == [False] * 5
