"""Code objects on GPUs: which one a device takes, and what is said of those that it refuses."""

from __future__ import annotations

import ctypes
import json
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from gpu_devices import ADD, HEADER, Fake, amd_elf, fake_device, fake_driver  # noqa: F401
from hipquant import wiring
from hipquant.cli.app import cli
from hipquant.codeobjects import ENGINE, QUANTIZED, CodeObjects, bundle
from hipquant.driver import gpu
from hipquant.driver import gpu_symbols as symbols
from hipquant.driver.gpu_module import Module, ptx_pieces
from hipquant.driver.gpu_objects import GENERIC, GpuModel, check_whole, choose, image_for, ptx_target, unfit
from hipquant.errors import DriverError, InvalidCodeObjectError, KernelNotFoundError
from hipquant.targets import AMD_TARGETS, GPU_TARGETS, NVIDIA_TARGETS


def test_choice_of_a_target() -> None:
    def best(targets: str, name: str, kind: str = "hip", version: tuple[int, int] = (7, 0)) -> str | None:
        return choose(targets.split(), GpuModel(name, kind, version))[0]

    assert best("gfx1100 gfx11-generic gfx1101", "gfx1100") == "gfx1100"
    assert best("gfx1100 gfx11-generic", "gfx1103") == "gfx11-generic"
    assert best("gfx1100 gfx11-generic", "gfx1103", version=(6, 2)) is None
    assert best("gfx9-generic gfx906", "gfx90a") is None
    assert best("gfx90a:xnack+", "gfx90a") == "gfx90a:xnack+"
    assert best("sm_75 sm_80 sm_90a gfx1100", "sm_90", "cuda") == "sm_90a"
    assert best("sm_75 sm_80 sm_90a", "sm_89", "cuda") == "sm_80"
    assert best("sm_75 sm_80 sm_90a", "sm_120", "cuda") == "sm_80"
    assert best("sm_90 sm_90a", "sm_90", "cuda") == "sm_90a"
    assert best("sm_100f", "sm_103", "cuda") == "sm_100f"
    assert best("sm_80", "sm_75", "cuda") is None
    gpu_model = GpuModel("gfx1103", "hip", (5, 2))
    rejected = dict(choose([t.name for t in GPU_TARGETS if t.name != "gfx1103"], gpu_model)[1])
    assert len(rejected) == len(GPU_TARGETS) - 1
    assert rejected["gfx1100"] == "this is gfx1103"
    assert rejected["gfx11-generic"] == "needs ROCm 6.3, this is 5.2"
    assert rejected["gfx9-generic"] == "does not cover gfx1103"
    assert rejected["sm_75"] == "for NVIDIA GPUs, this is gfx1103"
    hopper = GpuModel("sm_120", "cuda")
    assert unfit("sm_90a", hopper) == "runs on compute capability 9.0 only, this is sm_120"
    assert unfit("gfx900", hopper) == "for AMD GPUs, this is sm_120"
    # Every AMD target of hipquant runs on its own GPU, and those of a generic one have no other.
    for target in AMD_TARGETS:
        assert target.name in GENERIC or best(target.name, target.name) == target.name
    covered = [name for names in GENERIC.values() for name in names]
    assert len(covered) == len(set(covered))
    assert GENERIC.keys() == {t.name for t in AMD_TARGETS if t.name.endswith("generic")}


def test_the_embedded_objects(fake: Fake, device: gpu.Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = CodeObjects(tmp_path)
    with pytest.raises(
        InvalidCodeObjectError, match=r"this installation holds none for a GPU\. Build one: hipquant bu"
    ):
        device.get_or_load_func("quantize_q8_1", objects)
    others = {"gfx900.hsaco": amd_elf("gfx900"), "sm_80.ptx": HEADER.replace("75", "80").encode()}
    others |= {"gfx90c.hsaco": amd_elf("gfx90c")}
    for name, raw in others.items():
        (tmp_path / name).write_bytes(raw)
    if fake.kind == "hip":
        expected = r"gfx900 gfx90c: this is gfx1100; sm_80: for NVIDIA GPUs.*hipquant build --target gfx1100"
        with pytest.raises(InvalidCodeObjectError, match=expected):
            device.get_or_load_func("quantize_q8_1", objects)
    (tmp_path / "gfx11-generic.hsaco").write_bytes(amd_elf("gfx11-generic", b"generic"))
    (tmp_path / "sm_75.ptx").write_text(HEADER + "// 75")
    objects = CodeObjects(tmp_path)
    assert device.get_or_load_func("quantize_q8_1", objects).name == "quantize_q8_1"
    image = (ctypes.c_char * 64).in_dll(fake.lib, "fake_last_image").raw
    assert (b".target sm_80" in image) if fake.kind == "cuda" else (image[48] == bundle_number("gfx11-generic"))
    with pytest.raises(KernelNotFoundError, match=r"no kernel 'missing_q8_1' in the code object for (gfx|sm_)"):
        device.get_or_load_func("missing_q8_1", objects)

    def unreadable(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(Path, "read_bytes", unreadable)
    with pytest.raises(
        InvalidCodeObjectError, match=r"the code object (gfx11-generic\.hsaco|sm_80\.ptx) could not be re"
    ):
        device.get_or_load_func("quantize_q8_1", CodeObjects(tmp_path))


def test_the_engines_objects(fake: Fake, device: gpu.Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are chosen among themselves, and are another module than the frameworks' kernels."""
    frameworks, engine = CodeObjects(tmp_path), CodeObjects(tmp_path, engine=True)
    monkeypatch.setattr(gpu, "ENGINE", engine)
    name = device.target.name
    stem, suffix = (name, "hsaco") if fake.kind == "hip" else ("sm_75", "ptx")
    (tmp_path / f"{stem}.{suffix}").write_bytes(fake.image())
    missing = f"no code object for {name}; this installation's engine holds none for a GPU. Build one: hipquant build"
    assert device.get_or_load_func("quantize_q8_1", frameworks).name == "quantize_q8_1"
    assert device.engine_missing.startswith(missing)
    with pytest.raises(InvalidCodeObjectError, match=missing):
        device.get_or_load_func("add_bias_rows_f32", engine)
    (tmp_path / "gfx900.engine.hsaco").write_bytes(amd_elf("gfx900"))
    (tmp_path / f"{stem}.engine.{suffix}").write_bytes(fake.image())
    assert device.engine_missing == ""
    assert device.get_or_load_func("add_bias_rows_f32", engine).name == "add_bias_rows_f32"
    assert device.load(engine) is not device.load(frameworks)
    fake.fail(fake.symbols["get_function"], symbols.NOT_FOUND)  # as of a name that only the other one has
    with pytest.raises(
        KernelNotFoundError, match="no kernel 'rope_store_kv_q8' .*; nearest: rope_store_kv_q8_0, rope_sto"
    ):
        device.get_or_load_func("rope_store_kv_q8", frameworks)  # in between is rope_store_kv, which is the CPU's
    assert fake.live() == {"streams": 1, "modules": 2}


def test_devices_tells_of_an_engine_that_is_missing(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ENGINE", CodeObjects(tmp_path, engine=True))
    stem = "gfx1100.engine.hsaco" if fake.kind == "hip" else "sm_75.engine.ptx"
    told = json.loads(CliRunner().invoke(cli, ["devices", "--json"]).output)["devices"]
    (missing,) = (d["engine_missing"] for d in told if d["name"] == f"{fake.kind}:0")
    assert missing.startswith("no code object for ")
    assert f"{fake.kind}:0 runs no models: {missing}\n" in CliRunner().invoke(cli, ["devices"]).output
    (tmp_path / stem).write_bytes(fake.image())
    assert f"{fake.kind}:0 runs no models" not in CliRunner().invoke(cli, ["devices"]).output
    told = json.loads(CliRunner().invoke(cli, ["devices", "--json"]).output)["devices"]
    assert [d["engine_missing"] for d in told if d["name"] == f"{fake.kind}:0"] == [None]


def bundle_number(target: str) -> int:
    return next(number for number, name in bundle._MACHINES.items() if name == target)


def test_which_objects_are_rejected_and_which_are_missing(device: gpu.Device) -> None:
    there = QUANTIZED.targets()
    rejected = {r.target: r.reason for r in device.rejected}
    assert there.keys() - {device.object_target} <= rejected.keys()
    for target in rejected.keys() - there.keys():
        assert rejected[target] == f"not in this installation; hipquant build --target {target} adds it"
    assert rejected.keys() | {device.object_target} >= {device.target.name} & {t.name for t in GPU_TARGETS}


def test_bytes_of_every_kind(fake: Fake, device: gpu.Device) -> None:
    amd = bundle.pack({t: amd_elf(t) for t in ("gfx900", "gfx1100", "gfx90a")})
    host = struct.pack("<16sHH", b"\x7fELF\x02\x01\x01", 1, 62) + bytes(60)
    cubin = struct.pack("<16sHH", b"\x7fELF\x02\x01\x01", 2, 190) + bytes(44)
    good = {
        "hip": [amd, amd_elf("gfx1100")],
        "cuda": [ADD.encode(), b"// by a compiler\n\n" + ADD.encode() + b"\0", cubin],
    }
    for blob in good[fake.kind]:
        Module(device, blob)
    wrong: dict[str, list[tuple[bytes, str]]] = {
        "hip": [
            (host, r"this is a host object for x86-64; gfx1100 needs an AMD code object .*--genco"),
            (cubin, "this is an NVIDIA cubin; gfx1100 needs"),
            (ADD.encode(), "this is PTX for NVIDIA's sm_75; gfx1100 needs"),
            (amd_elf("gfx90a"), r"gfx90a: this is gfx1100\. Build one: hipquant build --target gfx1100"),
            (bundle.pack({"gfx900": amd_elf("gfx900"), "gfx90c": amd_elf("gfx90c")}), "gfx900 gfx90c: this is gfx1100"),
            (amd[:5000], "bundle|bytes"),
            (b"", "not an offload bundle"),
            (b"\x7fELF", "not AMD machine code"),
        ],
        "cuda": [
            (host, r"an ELF file, but not a cubin; sm_90 needs PTX"),
            (amd, r"the bytes begin with b'__CLANG.*; sm_90 needs PTX"),
            (ADD.replace("sm_75", "sm_100").encode(), r"this PTX holds none that it runs: sm_100: needs compute cap"),
            (ADD.replace("sm_75", "sm_80a").encode(), r"sm_80a: runs on compute capability 8.0 only, this is sm_90"),
            (ADD.encode().replace(b"ret;", b"r\0t;"), "the PTX is damaged: there is a zero byte at"),
            (cubin[:40], "cut off at 40"),
            (b"\x50\xed\x55\xba\1\0\x10\0" + struct.pack("<Q", 1 << 40), "the fat binary is truncated"),
            (b"", "the bytes begin with b''"),
        ],
    }
    for blob, message in wrong[fake.kind]:
        with pytest.raises(InvalidCodeObjectError, match=message):
            Module(device, blob)
    del blob
    assert fake.live() == {"streams": 1}


def test_what_the_driver_says_of_a_module(fake: Fake, device: gpu.Device) -> None:
    if fake.kind == "cuda":
        with pytest.raises(InvalidCodeObjectError, match=r"CUDA_ERROR_INVALID_PTX \(218\)\. ptxas .* line 4; fatal"):
            Module(device, ADD.replace("ret;", "BROKEN").encode())
    fake.fail(fake.symbols["load_module"], 200)
    with pytest.raises(
        InvalidCodeObjectError, match=r"the driver refuses it with (hipErrorI|CUDA_ERROR_INVALID_IMAGE)"
    ):
        Module(device, fake.image())
    fake.fail(fake.symbols["load_module"], 2)
    with pytest.raises(DriverError, match=r"OutOfMemory|OUT_OF_MEMORY"):
        Module(device, fake.image())


@given(st.integers(0, 200), st.binary(max_size=80), st.sampled_from(["hip", "cuda"]))
def test_hostile_bytes(at: int, junk: bytes, kind: str) -> None:
    """Whatever the bytes are, they end as an image or as InvalidCodeObjectError."""
    gpu_model = GpuModel({"hip": "gfx1100", "cuda": "sm_90"}[kind], kind)
    elf = (
        amd_elf("gfx1100", bytes(200))
        if kind == "hip"
        else struct.pack("<16sHH", b"\x7fELF\x02\x01\x01", 2, 190) + bytes(200)
    )
    for blob in (
        bundle.pack({"gfx1100": amd_elf("gfx1100")})[:600],
        elf,
        ADD.encode(),
        b"\x50\xed\x55\xba" + bytes(20),
    ):
        damaged = blob[:at] + junk + blob[at + len(junk) :]
        for bad in (damaged, damaged[:at]):
            try:
                image = image_for(bad, gpu_model)
            except InvalidCodeObjectError:
                continue
            assert len(image) <= len(bad) + 1


def test_whole_files_only() -> None:
    """Truncation of a real ELF shared object at any byte is seen."""
    path = next(iter(QUANTIZED.files()))
    if path.suffix not in (".so", ".hsaco"):
        pytest.skip("no ELF file is embedded")
    whole = path.read_bytes()
    check_whole(whole)
    for size in (0, 63, 64, 200, len(whole) // 2, len(whole) - 1):
        with pytest.raises(InvalidCodeObjectError, match="damaged|truncated"):
            check_whole(whole[:size])


def test_the_target_that_ptx_names() -> None:
    assert ptx_target(ADD.encode()) == "sm_75"
    assert ptx_target(b"\n//\n// Generated by LLVM\n//\n\n.version 8.0\n.target sm_90a\n.address_size 64\n") == "sm_90a"
    for other in (
        b"",
        b".version 8.0\n",
        b"// .version 8.0 .target sm_90",
        b"int main() { .version 8.0 .target sm_90 }",
    ):
        assert ptx_target(other) == ""


def test_ptx_kernel_by_kernel() -> None:
    """Our PTX falls into as many texts as it has kernels; what kernels share keeps it whole."""
    for container, rows in ((QUANTIZED, [*wiring.COMPATIBILITY]), (ENGINE, wiring.GPU_ENGINE)):
        for target in NVIDIA_TARGETS:
            if target.name in container.targets():
                pieces = ptx_pieces(container.targets()[target.name].read_bytes() + b"\0")
                assert pieces.keys() >= {k.name for k in rows}
                for name, text in pieces.items():
                    assert text.count(b".entry") == 1
                    assert f".entry {name}(".encode() in text
                    assert text.startswith(b".version")
                    assert f".target {target.name}\n".encode() in text
    two = b".version 6.4\n.target sm_75\n.address_size 64\n" + b"".join(
        b"// one\n.visible .entry %s(\n\t.param .u64 a\n)\n{\n\tret;\n}\n" % name for name in (b"f", b"g")
    )
    assert ptx_pieces(two).keys() == {"f", "g"}
    assert ptx_pieces(two + b".global .u32 counter;\n") == {}
    assert ptx_pieces(two + b".func h()\n{\n\tret;\n}\n") == {}
