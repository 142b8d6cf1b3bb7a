"""Makes tests/data/architectures.npz: what llama.cpp computes for the models of tests/architectures.py.

    python tools/reference_logits.py

Needs the PyPI packages llama-cpp-python (0.3.36 made the file) and gguf. Keys and values are halves, and attention is
not fused. Logits are kept as halves, which is an error of 1e-7 in the measure that the tests use.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from pathlib import Path

import numpy as np
from llama_cpp import llama_cpp

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from architectures import FIGURES, KINDS, PROMPTS, SHAPES, F32Array, tokens, write


def logits(path: Path, context: int, n_vocab: int) -> F32Array:
    """float32 [prompts, n_vocab]: the logits of the last token of each prompt."""
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp does not load {path.name}")
    with_context = llama_cpp.llama_context_default_params()
    with_context.n_ctx = with_context.n_batch = with_context.n_ubatch = context
    with_context.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    with_context.n_threads = with_context.n_threads_batch = 2
    found = []
    for n in PROMPTS:
        state = llama_cpp.llama_init_from_model(model, with_context)
        ids = (ctypes.c_int32 * n)(*tokens(n, n_vocab))
        if llama_cpp.llama_decode(state, llama_cpp.llama_batch_get_one(ids, n)):
            raise SystemExit(f"llama.cpp does not run {path.name}")
        found.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(state, -1), (n_vocab,)).copy())
        llama_cpp.llama_free(state)
    llama_cpp.llama_model_free(model)
    return np.stack(found)


def main() -> None:
    llama_cpp.llama_backend_init()
    checksums, every = np.zeros((len(SHAPES), len(KINDS)), np.uint32), []
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, shape) in enumerate(SHAPES.items()):
            for j, kind in enumerate(KINDS):
                path = Path(folder) / f"{name}.{kind}.gguf"
                checksums[i, j] = write(path, shape, kind)
                every.append(logits(path, shape.context, shape.n_vocab))
    values = np.stack(every).reshape(len(SHAPES), len(KINDS), len(PROMPTS), -1)
    if not np.isfinite(values).all():
        raise SystemExit("a model has logits that are not finite")
    FIGURES.parent.mkdir(exist_ok=True)
    np.savez_compressed(FIGURES, names=list(SHAPES), checksums=checksums, logits=values.astype(np.float16))


main()
