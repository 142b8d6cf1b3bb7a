"""Measures the demo model: bits per byte of the held-out text, and words copied from the training text.

    python tools/demo_eval.py TEXT demo.gguf [--stories 50] [--temperature 0.8]

Reads the GGUF with the `gguf` package and runs the weights it holds, dequantized to float32, in PyTorch.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from demo_model import CONTEXT, END, Config, Llama, bits_per_byte, generate, split_text

RUN = 12  # words


def read(path: Path) -> tuple[Llama, Tokenizer]:
    reader = gguf.GGUFReader(path)

    def get(key: str) -> Any:
        return reader.fields[key].contents()

    model = Llama(
        Config(
            n_embd=get("llama.embedding_length"),
            n_layer=get("llama.block_count"),
            n_head=get("llama.attention.head_count"),
            n_kv=get("llama.attention.head_count_kv"),
            n_ff=get("llama.feed_forward_length"),
            rope_base=get("llama.rope.freq_base"),
            eps=get("llama.attention.layer_norm_rms_epsilon"),
        )
    )
    weights = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    model.load_state_dict({name: torch.tensor(w) for name, w in weights.items()})
    merges = [tuple(m.split(" ")) for m in get("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(get("tokenizer.ggml.tokens"))}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return model.eval(), tokenizer


def words(text: str) -> list[str]:
    """Lower-cased, with the punctuation stripped."""
    return re.sub(r"[^a-z0-9\s]", "", text.lower()).split()


def runs(ws: list[str], n: int) -> list[int]:
    return [hash(tuple(ws[i : i + n])) for i in range(len(ws) - n + 1)]


def longest_copy(story: list[str], known: dict[int, set[int]]) -> int:
    return max((n for n, seen in known.items() if any(r in seen for r in runs(story, n))), default=0)


def tell(model: Llama, tokenizer: Tokenizer, n: int, seed: int, temperature: float) -> list[str]:
    """Stories from "Once upon a time", of 200 tokens or up to the end that the model gives them."""
    prompt = torch.tensor([[0, *tokenizer.encode("Once upon a time").ids]]).expand(n, -1)
    rows = generate(model, prompt, 200, torch.Generator().manual_seed(seed), temperature, 40, 0.95).tolist()
    return [tokenizer.decode(r[1 : r.index(0, 1) if 0 in r[1:] else None]) for r in rows]


def main() -> None:
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("text", type=Path)
    a.add_argument("model", type=Path)
    a.add_argument("--stories", type=int, default=10, help="for each temperature")
    a.add_argument("--temperature", type=float, nargs="*", default=[0.6, 0.7, 0.8, 0.9, 1.0])
    a.add_argument("--seed", type=int, default=0)
    a.add_argument("--no-bits", action="store_true", help="only the stories")
    a.add_argument("--json", action="store_true")
    o = a.parse_args()
    model, tokenizer = read(o.model)
    text = o.text.read_text()
    n = sum(p.numel() for p in model.parameters())
    figures: dict[str, object] = {"bytes": o.model.stat().st_size, "parameters": n}

    if not o.no_bits:
        held = "".join(split_text(text, 19)[1])
        ids = torch.tensor(tokenizer.encode(held).ids)
        figures |= {"held_out_bytes": len(held.encode()), "held_out_tokens": len(ids)}
        for name, step in [("non-overlapping", CONTEXT - 1), ("half overlapping", CONTEXT // 2)]:
            bits = bits_per_byte([model], ids, len(held.encode()), step, batch=4)
            figures[f"bits per byte, {name}"] = round(bits, 4)

    everything = words(text)
    known = {n: set(runs(everything, n)) for n in range(RUN - 4, RUN + 9)}
    for t in o.temperature:
        stories = tell(model, tokenizer, o.stories, o.seed, t)
        longest = [longest_copy(words(s), known) for s in stories]
        n = sum(n >= RUN for n in longest)
        figures[f"copied, temperature {t}"] = f"{n} of {len(stories)} stories, longest run {max(longest)}"
        if not o.json:
            print(f"---- temperature {t}\n{stories[0]}\n")
            for s, n in zip(stories, longest, strict=True):
                if n >= RUN:
                    ws = words(s)
                    at = [r in known[n] for r in runs(ws, n)].index(True)
                    print(f"copied, {n} words: {' '.join(ws[at : at + n])}")
    print(json.dumps(figures, indent=2) if o.json else "\n".join(f"{k}: {v}" for k, v in figures.items()))


if __name__ == "__main__":
    main()
