"""The framework functions on a GPU: the fake driver (gpu_devices.py) runs the CPU's kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hipquant as hq
from gpu_devices import Fake, fake_device, fake_driver  # noqa: F401
from hipquant import ops, quants, wiring
from hipquant.codeobjects import QUANTIZED
from hipquant.driver import gpu
from hipquant.driver.gpu_module import Module
from models import random_blocks


def test_ops_give_the_same_as_on_the_cpu(fake: Fake, device: gpu.Device, tmp_path: Path) -> None:
    cpu = hq.device("cpu")

    def action(name: str, geometry: tuple[int, ...], params: Any) -> None:
        kinds = {"pointer": ctypes.c_uint64, "int32": c_int, "int64": ctypes.c_int64, "size": ctypes.c_size_t}
        values = [kinds[a.kind.value].from_address(params[i]).value for i, a in enumerate(wiring.KERNELS[name].args)]
        function = cpu.get_or_load_func(name, QUANTIZED)
        function.launch(geometry[:3], geometry[3:6], 0, cpu.stream, values)  # type: ignore[arg-type]

    fake.action = action
    embedded = {"hip": "gfx1100.hsaco", "cuda": "sm_80.ptx"}[fake.kind]
    (tmp_path / embedded).write_bytes(fake.image())
    device._modules[QUANTIZED] = Module(device, fake.image())
    rng, k, rows = np.random.default_rng(0), 512, 7
    x = rng.standard_normal((3, k)).astype(np.float32)
    for type in quants.DEQUANTIZE_TYPES:
        blocks = random_blocks(rng, type.name, rows, k, 0.1)
        on_cpu, on_gpu = (hq.Tensor.from_numpy(blocks, type.name, (rows, k), device=d) for d in (cpu, device))
        np.testing.assert_array_equal(on_gpu.numpy(), on_cpu.numpy())
        functions: list[Callable[[hq.Tensor], hq.Tensor]] = [ops.dequantize_f32, ops.dequantize_f16]
        if type in quants.WEIGHT_TYPES:
            functions += [
                lambda w: ops.dequantize_mul_mat_vec(w, x[0]),
                lambda w: ops.mul_mat_vec_via_q8_1(w, x),
                lambda w: ops.mul_mat_vec_via_q8_1(w, hq.Tensor.from_numpy(x[0], device=w.device)),
                lambda w: ops.mul_mat_via_q8_1(w, x),
                lambda w: ops.mul_mat_via_q8_1(w, ops.quantize_q8_1(hq.Tensor.from_numpy(x, device=w.device))),
                lambda w: ops.get_rows(w, np.array([3, 0, 3])),
            ]
        for function in functions:
            result, expected = function(on_gpu), function(on_cpu)
            assert (result.device, result.shape, result.type) == (device, expected.shape, expected.type)
            np.testing.assert_array_equal(result.numpy(), expected.numpy())
    with pytest.raises(ValueError, match=f"activations are on <cpu.*, weights on {fake.kind}:0"):
        ops.mul_mat_vec_via_q8_1(hq.Tensor.from_numpy(blocks, "Q6_K", (rows, k), device=device), ops.quantize_q8_1(x))
    del result, on_gpu
    assert device.allocated == 0


def test_a_captured_op_keeps_its_memory(fake: Fake, device: gpu.Device) -> None:
    device._modules[QUANTIZED] = Module(device, fake.image())
    stream, x = device.create_stream(), hq.Tensor.from_numpy(np.ones((2, 64), np.float32), device=device)
    with stream.capture() as graph:
        ops.quantize_q8_1(x, stream=stream)
    held = device.allocated
    del x
    assert device.allocated == held
    graph.launch(stream)
    assert [name for name, _ in fake.ran] == ["quantize_q8_1"]
