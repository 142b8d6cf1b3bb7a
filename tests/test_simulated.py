"""Every kernel simulated, under AddressSanitizer and UBSan; and what the simulator must catch, on broken kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hipquant import wiring
from hipquant.toolchain import gpu, simulate
from hipquant.toolchain.cases import cases, complaints
from hipquant.toolchain.compile import CompileError
from hipquant.toolchain.simulate import SimulationError, Simulator
from hipquant.wiring import Arg, Kernel

KERNELS = [k for k in wiring.TABLE if k in wiring.COMPATIBILITY or k.family == "get_rows"]
SOURCE = Path(__file__).parent / "mutants" / "kernels.hip"
waves = pytest.mark.parametrize("wave", [32, 64])
needs_gcc = pytest.mark.skipif(
    not simulate.can_sanitize(),
    reason="the run time of AddressSanitizer and UBSan comes with gcc, which is not installed",
)


@pytest.fixture(scope="session")
def simulators() -> Iterator[Callable[..., Simulator]]:
    """Builds each simulator once, or fails once: it takes a while."""
    built: dict[object, Simulator | CompileError] = {}

    def get(wave: int, sanitize: bool = True, sources: tuple[Path, ...] = (), matrix_units: bool = False) -> Simulator:
        key = wave, sanitize, sources, matrix_units
        if key not in built:
            try:
                built[key] = simulate.build(wave, sanitize, sources or None, matrix_units=matrix_units)
            except CompileError as error:
                built[key] = error
        found = built[key]
        if isinstance(found, CompileError):
            raise found
        return found

    yield get
    for simulator in built.values():
        if isinstance(simulator, Simulator):
            simulator.close()


@needs_gcc
@waves
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_every_kernel(kernel: Kernel, wave: int, simulators: Callable[..., Simulator]) -> None:
    simulator = simulators(wave)
    for case in cases(kernel):
        assert complaints(case, simulator) == []


@needs_gcc
@waves
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.family == "mul_mat"], ids=lambda k: k.name)
def test_products_by_matrix_units(kernel: Kernel, wave: int, simulators: Callable[..., Simulator]) -> None:
    simulator = simulators(wave, sources=(gpu.SOURCES / "mat_mat.hip",), matrix_units=True)
    for case in cases(kernel):
        assert complaints(case, simulator) == []


@needs_gcc
@waves
@pytest.mark.parametrize("kind", ["q3_K", "q6_K"])
def test_products_by_way_of_shared_memory(kind: str, wave: int, simulators: Callable[..., Simulator]) -> None:
    """Copies in the background: early and late, rows shared and not, all blocks at once and some of them idle."""
    simulator = simulators(wave, sources=(gpu.SOURCES / "mat_vec.hip",), matrix_units=True)
    small = [c for c in cases(wiring.kernel(f"mul_mat_vec_{kind}_q8_1_hip1"), thorough=True) if c.grid[0] < 300]
    assert {c.grid[0] for c in small} >= {1, 5, 7, 131, 257}
    for case in small:
        assert complaints(case, simulator) == []


@waves
def test_without_sanitizers(wave: int, simulators: Callable[..., Simulator]) -> None:
    """With zig alone, as `hipquant verify --run` does it."""
    simulator = simulators(wave, sanitize=False, sources=(gpu.SOURCES / "quantize.hip", SOURCE))
    for name in ("quantize_q8_1", "mul_mat_vec_q4_0_q8_1_hip3", "mul_mat_q4_0", "dequantize_mul_mat_vec_q4_0_hip"):
        for case in cases(wiring.kernel(name)):
            assert complaints(case, simulator) == []


# Broken kernels

BATCH, MATRIX, VECTOR = "mul_mat_vec_q4_0_q8_1_hip3", "mul_mat_q4_0", "dequantize_mul_mat_vec_q4_0_hip"


def complaints_about(name: str, old: str, new: str, wave: int, folder: Path, sanitize: bool = True) -> str:
    """What is said of a kernel of SOURCE in which one piece of text is another."""
    text = SOURCE.read_text()
    assert text.count(old) == 1, old
    source = folder / "mutant.hip"
    source.write_text(text.replace(old, new))
    simulator = simulate.build(wave, sanitize, [source], folder=folder)
    said = []
    for case in cases(wiring.kernel(name)):
        try:
            said += complaints(case, simulator)
        except SimulationError as error:
            said.append(str(error))
    simulator.close()
    return "\n".join(said)


@needs_gcc
@waves
def test_they_are_right_as_they_stand(wave: int, tmp_path: Path) -> None:
    for name in (BATCH, MATRIX, VECTOR):
        assert complaints_about(name, "right as they stand", "right", wave, tmp_path) == ""


TEAM_SUM = "sum = team_sum(sum);\n        if"
BARRIER = "    barrier();\n"
MISTAKES = {
    "4: a tile that differs from the host's": (
        MATRIX,
        "kTileRows = 128",
        "kTileRows = 64",
        "rows 128 to 130 (3 of 131) not written: is its tile another than the table's 64 columns x 128 rows?",
    ),
    "5: half of the rows": (BATCH, "kRows = 2", "kRows = 1", "half of the rows: rows 3 to 4 (2 of 5) not written"),
    "6: past the last row": (
        BATCH,
        "if (row < nrows_x) dst",
        "dst",
        "wrote past the last row: at row 3 of column 0, of 3 rows",
    ),
    "a barrier for some": (
        BATCH,
        BARRIER,
        "    if (thread_x() < 16) barrier();\n",
        "threads wait for others that do not come\n  thread 0 waits at the barrier in mutant.hip:34",
    ),
    "different barriers": (
        BATCH,
        BARRIER,
        "    if (thread_y() == 1) barrier();\n    else barrier();\n",
        "threads of a block wait at different barriers",
    ),
    "a shuffle for some": (
        BATCH,
        TEAM_SUM,
        "if (thread_x() != 7) sum = team_sum(sum);\n        if",
        "threads wait for others that do not come",
    ),
    "different shuffles": (
        BATCH,
        TEAM_SUM,
        "sum = thread_x() < 16 ? team_sum(sum) : team_sum(2 * sum);\n        if",
        "lanes of a team meet at different shuffles\n  thread 0 waits at the shuffle in mutant.hip:31",
    ),
    "a shuffle after some have left": (
        VECTOR,
        "    sum = team_sum(sum);\n    if",
        "    if (thread_x() == 31) return;\n    sum = team_sum(sum);\n    if",
        "thread 31 has ended",
    ),
    "one byte behind the end": (
        VECTOR,
        "    float sum = 0;\n    for (int i = thread_x()",
        "    float sum = 0 * *(volatile const uint8_t*)(row + ncols / 32 * 18);\n    for (int i = thread_x()",
        "byte 0 behind the end of parameter x of 450 bytes",
    ),
    "one byte before the beginning": (
        VECTOR,
        "    float sum = 0;\n    for (int i = thread_x()",
        "    float sum = 0 * *(volatile const uint8_t*)(row - 1);\n    for (int i = thread_x()",
        "byte 1 before parameter x of 450 bytes",
    ),
    "outside of shared memory": (
        BATCH,
        "partial[thread_y()][i] = sum",
        "(&partial[0][0])[thread_y() + 23] = sum",
        f"is located 0 bytes to the right of global variable '{BATCH}::partial'",
    ),
    "shared memory that nobody wrote": (BATCH, "if (thread_x() == 0) partial", "if (0) partial", "found nan"),
    "a write to an input": (
        VECTOR,
        "    sum = team_sum(sum);\n    if",
        "    ((float*)y)[0] = 1;\n    sum = team_sum(sum);\n    if",
        "it has written to parameter y, which is an input",
    ),
    "a load that is not aligned": (
        VECTOR,
        "* y[i];",
        "* y[i] + 0 * load_words<4>(w + 1).w[0];",
        "a load at an address that is not a multiple of 4",
    ),
    "more than 24 bits": (VECTOR, "* y[i];", "* y[i] + mul24(1 << 24, 1);", "mul24(16777216, 1): more than 24 bits"),
    "an overflow": (VECTOR, "* y[i];", "* y[i] + (i + 2147483647 < 0);", "runtime error: signed integer overflow"),
}


@needs_gcc
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake: str, tmp_path: Path) -> None:
    name, old, new, expected = MISTAKES[mistake]
    said = complaints_about(name, old, new, 32, tmp_path)
    assert expected in said
    assert name in said


WAVE_SUM = "for (int m = wave_size() / 2; m; m /= 2) sum += wave_shuffle_xor(sum, m);\n    if"


@needs_gcc
def test_mistake_7_lanes_that_do_not_exist(tmp_path: Path) -> None:
    """A sum over the whole wave is right on waves of 32; on waves of 64 a block of 32 has half of the lanes."""
    old = "    sum = team_sum(sum);\n    if"
    assert complaints_about(VECTOR, old, WAVE_SUM, 32, tmp_path) == ""
    said = complaints_about(VECTOR, old, WAVE_SUM, 64, tmp_path)
    assert "a shuffle over 64 lanes reads lane 32, which does not exist" in said
    assert f"{VECTOR}, simulated on waves of 64: block (0, 0), thread (31, 0)" in said


@needs_gcc
def test_a_missing_barrier_is_seen(tmp_path: Path) -> None:
    assert [bool(complaints_about(BATCH, BARRIER, "", wave, tmp_path)) for wave in (32, 64)] == [True, True]


def test_what_ends_the_child_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sanitizers: a signal, and a kernel that does not end; the next launch has a new child."""
    new = "    float sum = *(volatile const int*)8;\n    for (int i = thread_x()"
    old = "    float sum = 0;\n    for (int i = thread_x()"
    said = complaints_about(VECTOR, old, new, 32, tmp_path, sanitize=False)
    assert said.count(f"{VECTOR}, simulated on waves of 32: it ended with signal 11") == 2
    monkeypatch.setattr(simulate, "TIMEOUT", 0.5)
    said = complaints_about(
        VECTOR, "i += 32) {\n        const uint8_t* w", "i += 0) {\n        const uint8_t* w", 32, tmp_path, False
    )
    assert said.count("it did not end within 0 s") == 2


def test_a_kernel_that_is_not_there(simulators: Callable[..., Simulator]) -> None:
    with pytest.raises(SimulationError, match="quantize_q8_1, .*: there is no such kernel in these sources"):
        simulators(32, sanitize=False, sources=(SOURCE,))(next(cases(wiring.kernel("quantize_q8_1"))))


def test_what_cannot_be_built(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="32 or 64 lanes, not 16"):
        simulate.build(16)
    with pytest.raises(CompileError, match="no .hip files"):
        simulate.build(32, False, tmp_path)
    (tmp_path / "broken.hip").write_text('#include "device.h"\nHQ_KERNEL(32) k() { sing(); }\n')
    with pytest.raises(
        CompileError, match=r"compiling broken.hip for the simulator failed:\n(.|\n)*undeclared identifier 'sing'"
    ):
        simulate.build(32, False, tmp_path, folder=tmp_path)


# The simulator's own arithmetic


def row(name: str, *args: str) -> Kernel:
    """A kernel that is not in the table: 32 threads."""
    pairs = (a.rpartition(" ") for a in args)
    return Kernel(name, "", tuple(Arg(ctype, arg) for ctype, _, arg in pairs), (32, 1, 1), lambda: (1, 1, 1))


def test_half_precision(simulators: Callable[..., Simulator]) -> None:
    """All halves, and floats around each of them and between them, as numpy converts them."""
    halves = np.arange(65536, dtype=np.uint16)
    every = halves.view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        steps = np.nextafter(every, np.float32(np.inf))
        between = (every[:-1].astype(np.float64) + every[1:]) / 2
        floats = np.concatenate(
            [every, steps, between.astype(np.float32), np.nextafter(between.astype(np.float32), np.float32(0))]
        )
        expected = floats.astype(np.float16)
    floats = np.concatenate([floats, np.zeros(-len(floats) % 65536, np.float32)])
    kernel = row(
        "convert", "const uint16_t* halves", "const float* floats", "float* to_floats", "uint16_t* to_halves", "int n"
    )
    found = []
    for part in floats.reshape(-1, 65536):
        to_floats, to_halves = np.zeros(65536, np.float32), np.zeros(65536, np.uint16)
        simulators(32, sanitize=False, sources=(SOURCE,)).launch(
            kernel, (1, 1, 1), [halves, part, to_floats, to_halves, 65536]
        )
        np.testing.assert_array_equal(to_floats, every)
        assert (np.signbit(to_floats) == np.signbit(every)).all()
        found.append(to_halves)
    together = np.concatenate(found)[: len(expected)].view(np.float16)
    np.testing.assert_array_equal(together, expected)
    assert (np.signbit(together) == np.signbit(expected))[~np.isnan(expected)].all()


@pytest.mark.parametrize("k", [16, 32])
def test_matrix_units(k: int, simulators: Callable[..., Simulator]) -> None:
    rng = np.random.default_rng(k)
    a, b = (rng.integers(-128, 128, (n, k)).astype(np.int8) for n in (16, 8))
    c = np.zeros((16, 8), np.int32)
    kernel = row("matrix_units", "const uint32_t* a", "const uint32_t* b", "int* c", "int k")
    simulators(64, sanitize=False, sources=(SOURCE,)).launch(kernel, (1, 1, 1), [a, b, c, k])
    np.testing.assert_array_equal(c, 100 + a.astype(int) @ b.astype(int).T)


def test_a_launch_that_does_not_fit(simulators: Callable[..., Simulator]) -> None:
    """It is refused before anything runs."""
    simulator = simulators(32, sanitize=False, sources=(SOURCE,))
    with pytest.raises(ValueError, match="2 parameters; expected void matrix_units"):
        simulator.launch(
            row("matrix_units", "const uint32_t* a", "const uint32_t* b", "int* c", "int k"), (1, 1, 1), [1, 2]
        )
