"""The build: the same bytes everywhere, nothing compiled twice, and what an installation embeds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import command_line
from code_objects import names, names_by_target
from hipquant import codeobjects, wiring
from hipquant.codeobjects import QUANTIZED, CodeObjects, bundle
from hipquant.targets import AMD_TARGETS, CPU_TARGETS, GPU_TARGETS, GpuTarget, gpu_target, select
from hipquant.toolchain import compile as compiling
from hipquant.toolchain import cpu, gpu, zig
from hipquant.toolchain.build import build, plan
from hipquant.toolchain.compile import FACTS, MANIFEST, OUTPUT, PARTS

call = partial(command_line.call, "build")


FAMILIES = ("quantize.hip", "get_rows.hip")  # two that compile quickly
ENGINE_KERNELS = ("ones", "quantize")  # the second as a family of the frameworks' is called


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Makes a folder of two families, and lets the build take it for the package's kernels."""

    def use(folder: Path) -> Path:
        shutil.copytree(gpu_sources, folder, ignore=shutil.ignore_patterns("*.hip"))
        for name in FAMILIES:
            shutil.copy(gpu_sources / name, folder)
        (folder / "quantized.hip").write_text("".join(f'#include "{name}"\n' for name in FAMILIES))
        monkeypatch.setattr(gpu, "SOURCES", folder)
        monkeypatch.setattr(gpu, "UMBRELLA", folder / "quantized.hip")
        return folder

    gpu_sources = gpu.SOURCES
    return use


@pytest.fixture
def small_engine(small, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """The same with an engine of two kernels, one a family; gives the engine's folder."""

    def use(folder: Path) -> Path:
        engine = small(folder) / "engine"
        shutil.rmtree(engine, ignore_errors=True)
        engine.mkdir()
        (engine / "own.h").write_text("#define ONE 1\n")
        for name in ENGINE_KERNELS:
            text = f"HQ_KERNEL(32) {name}(int* x) {{ x[thread_x()] = ONE; }}\n"
            (engine / f"{name}.hip").write_text(f'#include "device.h"\n#include "own.h"\n{text}')
        (engine / "engine.hip").write_text("".join(f'#include "{name}.hip"\n' for name in ENGINE_KERNELS))
        monkeypatch.setattr(gpu, "ENGINE", engine)
        monkeypatch.setattr(gpu, "ENGINE_UMBRELLA", engine / "engine.hip")
        return engine

    return use


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the compiler was called for, in words."""
    said: list[str] = []
    clang = zig.clang

    def record(arguments, what):
        said.append(what)
        return clang(arguments, what)

    monkeypatch.setattr(zig, "clang", record)
    return said


def compiles(compiled: list[str]) -> list[str]:
    found = sorted(m[1] for what in compiled if (m := re.match(r"compiling (.*)", what)))
    compiled.clear()
    return found


def test_the_same_bytes_from_two_folders(tmp_path: Path, small, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = select(["gfx1100", "gfx90a", "gfx12-generic", "sm_80"])
    built = []
    for name in ("a", "a folder with a longer name"):
        small(tmp_path / name / "gpu")
        built.append([p.read_bytes() for p in build(targets, tmp_path / name / "out")])
    assert built[0] == built[1]
    assert all(built[0])
    assert not any(str(tmp_path).encode() in b for b in built[0])


def test_the_processors_objects_are_the_same_from_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, sources = [], cpu.SOURCES
    for name in ("a", "a folder with a longer name"):
        folder = tmp_path / name / "cpu"
        shutil.copytree(sources, folder, ignore=shutil.ignore_patterns("*mat*.cpp", "transformer.cpp", "attention.cpp"))
        monkeypatch.setattr(cpu, "SOURCES", folder)
        built.append([p.read_bytes() for p in build(CPU_TARGETS[-1:], tmp_path / name / "out")])
    assert built[0] == built[1]
    assert len(built[0]) == 2


def test_only_what_changed_is_compiled(tmp_path: Path, small, compiled: list[str]) -> None:
    sources, out = small(tmp_path / "gpu"), tmp_path / "out"
    targets = select(["gfx1100", "gfx1030", "gfx1031", "sm_80"])
    first = [p.read_bytes() for p in build(targets, out)]
    everything = [f"{family} for {target}" for family in FAMILIES for target in ("gfx1030", "gfx1100")]
    assert compiles(compiled) == sorted([*everything, "quantized.hip for sm_80"])  # gfx1031 is gfx1030's twin
    build(targets, out)
    assert compiled == []
    with (sources / "quantize.hip").open("a") as file:
        file.write("// a comment\n")
    assert [p.read_bytes() for p in build(targets, out)] == first
    assert compiles(compiled) == ["quantize.hip for gfx1030", "quantize.hip for gfx1100", "quantized.hip for sm_80"]
    with (sources / "device.h").open("a") as file:
        file.write("// a comment\n")
    build(targets[:1], out)
    assert compiles(compiled) == [f"{family} for gfx1100" for family in sorted(FAMILIES)]
    (out / "gfx1030.hsaco").unlink()
    with (sources / "simulate.h").open("a") as file:
        file.write("// no GPU's object includes it\n")
    build(targets[:1], out)
    assert compiled == []


def test_the_engines_objects_lie_beside(tmp_path: Path, small_engine, compiled: list[str]) -> None:
    engine, out = small_engine(tmp_path / "gpu"), tmp_path / "out"
    targets = select(["gfx1030", "gfx1031", "sm_80"])
    first = {p.name: p.read_bytes() for p in build(targets, out, engine=True)}
    names = {f"{t.name}{kind}.{'ptx' if t.name == 'sm_80' else 'hsaco'}" for t in targets for kind in ("", ".engine")}
    assert set(first) == names
    # gfx1031 is gfx1030's twin here too. quantize.hip is compiled twice: the engine's is another one.
    quantize = ["quantize.hip for gfx1030"] * 2
    ptx = ["engine.hip for sm_80", "quantized.hip for sm_80"]
    assert compiles(compiled) == sorted(["get_rows.hip for gfx1030", "ones.hip for gfx1030", *quantize, *ptx])
    for target in targets:
        assert names_by_target(first[target.engine_filename]) == {target.name: set(ENGINE_KERNELS)}
        assert "quantize_q8_1" in names_by_target(first[target.filename])[target.name]
    table = json.loads((out / FACTS).read_text())
    assert set(table) == {f"{t.name}{kind}" for t in targets for kind in ("", ".engine")}
    for target in targets:
        assert set(table[f"{target.name}.engine"]["kernels"]) == set(ENGINE_KERNELS)
        assert table[f"{target.name}.engine"]["sha256"] == hashlib.sha256(first[target.engine_filename]).hexdigest()
    build(targets, out, engine=True)
    assert compiled == []
    with (engine / "own.h").open("a") as file:
        file.write("// a comment\n")
    assert {p.name: p.read_bytes() for p in build(targets, out, engine=True)} == first
    assert compiles(compiled) == ["engine.hip for sm_80", "ones.hip for gfx1030", "quantize.hip for gfx1030"]
    small_engine(tmp_path / "a folder with a longer name" / "gpu")
    other = build(targets, tmp_path / "other", engine=True)
    assert {p.name: p.read_bytes() for p in other} == first


def test_containers_of_one_folder(tmp_path: Path, small_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    small_engine(tmp_path / "gpu")
    targets, folder = select(["gfx1030", "sm_80"]), tmp_path / "installed"
    build(targets, folder, engine=True)
    frameworks, engine = CodeObjects(folder), CodeObjects(folder, engine=True)
    assert [p.name for p in frameworks.files()] == ["gfx1030.hsaco", "sm_80.ptx"]
    assert [p.name for p in engine.files()] == ["gfx1030.engine.hsaco", "sm_80.engine.ptx"]
    for container in (frameworks, engine):
        assert list(container.targets()) == ["gfx1030", "sm_80"]
        assert list(container.targets().values()) == container.files()
    # bytes() compiles what is missing, of its own kernels only.
    monkeypatch.setattr(codeobjects, "AMD_TARGETS", select(["gfx1030", "gfx1031"]))
    assert names_by_target(bytes(engine)) == {t: set(ENGINE_KERNELS) for t in ("gfx1030", "gfx1031")}
    assert (folder / "gfx1031.engine.hsaco").exists()
    assert not (folder / "gfx1031.hsaco").exists()


def test_what_the_command_builds(tmp_path: Path, small_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installation gets the engine's objects too; a file or a folder of one's own only what frameworks load."""
    small_engine(tmp_path / "gpu")
    installed, own = tmp_path / "installed", tmp_path / "own"
    installed.mkdir()
    monkeypatch.setattr(compiling, "OUTPUT", installed)
    result = call("--target", "gfx1100", "sm_80")
    assert result.exit_code == 0, result.output
    expected = ["gfx1100.engine.hsaco", "gfx1100.hsaco", "sm_80.engine.ptx", "sm_80.ptx"]
    assert sorted(p.name for p in installed.iterdir() if p.suffix in (".hsaco", ".ptx")) == expected
    assert all(name in result.output for name in expected)
    assert call("--target", "gfx1100", "sm_80", "-o", own).exit_code == 0
    assert sorted(p.name for p in own.iterdir()) == ["gfx1100.hsaco", "sm_80.ptx"]
    assert call("--target", "gfx1100", "-o", tmp_path / "x.hsaco").exit_code == 0
    assert not names_by_target((tmp_path / "x.hsaco").read_bytes())["gfx1100"] & {"ones"}


def test_an_interrupted_build_goes_on_where_it_was(tmp_path: Path, small, compiled: list[str]) -> None:
    small(tmp_path / "gpu")
    targets, out = select(["gfx1100", "gfx1030"]), tmp_path / "out"

    def interrupt(done: int, total: int) -> None:
        assert total == 4 + 2
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(targets, out, jobs=1, progress=interrupt)
    finished = json.loads((out / PARTS / MANIFEST).read_text())
    assert not list(out.rglob("*.*.[0-9]*"))  # no file that is half written
    compiled.clear()
    build(targets, out)
    assert len(compiles(compiled)) == 4 - sum(name.endswith(".s.gz") for name in finished)
    assert {o.filename for o in plan(targets)} == set(json.loads((out / MANIFEST).read_text()))


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_manifest_costs_time_only(damage: bytes, tmp_path: Path, small, compiled: list[str]) -> None:
    small(tmp_path / "gpu")
    build(select(["gfx1100"]), tmp_path)
    for path in (tmp_path / MANIFEST, tmp_path / PARTS / MANIFEST, tmp_path / FACTS):
        path.write_bytes(damage)
    compiled.clear()
    build(select(["gfx1100"]), tmp_path)
    assert len(compiles(compiled)) == len(FAMILIES)
    assert json.loads((tmp_path / FACTS).read_text())["gfx1100"]["kernels"]["quantize_q8_1"]["loads"]


def test_two_builds_of_one_folder_at_once(tmp_path: Path, small) -> None:
    small(tmp_path / "gpu")
    out = tmp_path / "out"
    builds = [threading.Thread(target=build, args=(select([n]), out)) for n in ("gfx1100", "gfx1030", "gfx1100")]
    for thread in builds:
        thread.start()
    for thread in builds:
        thread.join()
    assert set(json.loads((out / MANIFEST).read_text())) == {"gfx1100.hsaco", "gfx1030.hsaco"}
    assert set(json.loads((out / FACTS).read_text())) == {"gfx1100", "gfx1030"}


@pytest.mark.parametrize("target", [t for t in AMD_TARGETS if t.twin], ids=lambda t: f"{t.name} of {t.twin}")
def test_twins_have_the_same_machine_code(target: GpuTarget, tmp_path: Path, small) -> None:
    """Compiled for itself, a target gives the same bytes as the assembly of its twin."""
    small(tmp_path / "gpu")
    alone = dataclasses.replace(target, twin="")
    (twin,) = build([target], tmp_path / "twin")
    (real,) = build([alone], tmp_path / "real")
    assert twin.read_bytes() == real.read_bytes()


def test_all_kernels_of_a_twin(tmp_path: Path) -> None:
    """The same for everything that is embedded, for one pair."""
    target = gpu_target("gfx12-generic")
    (real,) = build([dataclasses.replace(target, twin="")], tmp_path)
    assert real.read_bytes() == (OUTPUT / target.filename).read_bytes()


@pytest.mark.parametrize("target", GPU_TARGETS, ids=lambda t: t.name)
def test_what_is_embedded(target: GpuTarget) -> None:
    path = QUANTIZED.targets()[target.name]
    facts = json.loads((OUTPUT / FACTS).read_text())[target.name]
    assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(facts["kernels"]) == names()
    assert names_by_target(path.read_bytes()) == {target.name: names()}
    for kernel in wiring.TABLE:
        if kernel.family in ("mul_mat_vec", "mul_mat"):
            found = facts["kernels"][kernel.name]
            assert bool(found["dot4"] + found["matrix"]) == target.dot4, kernel.name


def test_the_bundle() -> None:
    """bytes(QUANTIZED) of a complete installation."""
    blob = bytes(QUANTIZED)
    assert blob == bundle.pack({t.name: (OUTPUT / t.filename).read_bytes() for t in AMD_TARGETS})
    assert names_by_target(blob) == {t.name: names() for t in AMD_TARGETS}
    assert len(blob) <= 40_000_000


@pytest.mark.parametrize("writable", [True, False])
def test_the_bundle_of_an_installation_that_lacks_objects(
    writable: bool, tmp_path: Path, small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small(tmp_path / "gpu")
    folder = tmp_path / "installed"
    folder.mkdir()
    for t in AMD_TARGETS[2:]:
        (folder / t.filename).write_bytes(t.name.encode())
    monkeypatch.setattr(codeobjects.os, "access", lambda path, mode: writable)
    objects = bundle.unpack(bytes(CodeObjects(folder)))
    assert "lacks the code objects of 2 of 33 AMD targets: compiling them" in capsys.readouterr().err
    assert objects["gfx950"] == b"gfx950"
    assert [bundle.amd_target(objects[n]) for n in ("gfx900", "gfx906")] == ["gfx900", "gfx906"]
    assert (folder / "gfx900.hsaco").exists() == writable
