"""A kernel is loaded by its name and launched: the product of a Q4_0 matrix and a vector, on whatever device is there.

python examples/wiring.py            the last device that `hipquant devices` lists
python examples/wiring.py cpu        a device by name
"""

from __future__ import annotations

import sys

import numpy as np

import hipquant

ROWS, K = 1024, 4096


def main() -> None:
    device = hipquant.device(sys.argv[1]) if len(sys.argv) > 1 else hipquant.devices()[-1]
    print(device)

    # A Q4_0 block is a half-precision scale and 32 weights of 4 bits: the low halves of 16 bytes, then the high ones.
    random = np.random.default_rng(0)
    scales = random.uniform(0.01, 0.02, (ROWS, K // 32, 1)).astype(np.float16)
    nibbles = random.integers(0, 256, (ROWS, K // 32, 16), np.uint8)
    blocks = np.concatenate([scales.view(np.uint8), nibbles], axis=2)
    vector = random.standard_normal(K).astype(np.float32)

    x, y = device.upload(blocks), device.upload(vector)
    q8_1, result = device.allocate(K // 32 * 36), device.allocate(4 * ROWS)

    # The wiring: a name, an argument list, a launch geometry (the table is hipquant/wiring/).
    quantize = device.get_or_load_func("quantize_q8_1", hipquant.QUANTIZED)
    quantize.launch((K // 256, 1, 1), (256, 1, 1), 0, device.stream, [y, q8_1, K, K])
    mat_vec = device.get_or_load_func("mul_mat_vec_q4_0_q8_1_hip1", hipquant.QUANTIZED)
    mat_vec.launch((ROWS, 1, 1), (32, 4, 1), 0, device.stream, [x, q8_1, result, K, ROWS, K, ROWS])

    found = result.read(np.float32, (ROWS,))
    weights = (np.concatenate([nibbles & 15, nibbles >> 4], axis=2).astype(np.float64) - 8) * scales
    expected = weights.reshape(ROWS, K) @ vector
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    print(f"{ROWS} rows of {K} weights; the error of the result is {error:.2%} of its size")
    if error > 0.02:  # the vector is rounded to 8 bits
        sys.exit("that is too much")


if __name__ == "__main__":
    main()
