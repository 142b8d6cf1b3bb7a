"""Counts the stories of a model that have twelve words in a row from a text, told by hipquant itself.

    python tools/demo_copies.py TEXT [--model MODEL] [--stories 300]

Words are compared in lower case and without punctuation, the words of the prompt included.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import hipquant as hq

RUN = 12
PROMPT = "Once upon a time"


def words(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9 ]+", " ", text.lower().replace("'", "")).split()


def runs(text: str) -> list[tuple[str, ...]]:
    ws = words(text)
    return [tuple(ws[i : i + RUN]) for i in range(len(ws) - RUN + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", help="a GGUF file (default: the demo model)")
    parser.add_argument("--stories", type=int, default=300, help="for each temperature")
    parser.add_argument("--temperature", type=float, nargs="*", default=[0.6, 0.7, 0.8, 1.0])
    o = parser.parse_args()
    known, model = set(runs(o.text.read_text())), hq.load(o.model)
    for temperature in o.temperature:
        copied = []
        for seed in range(o.stories):
            story = PROMPT + model.generate(PROMPT, max_tokens=200, temperature=temperature, seed=seed).text
            copied += [next(" ".join(run) for run in runs(story) if run in known)] if known & set(runs(story)) else []
        print(f"temperature {temperature}: {len(copied)} of {o.stories}")
        for run in copied:
            print(f"    {run}")


if __name__ == "__main__":
    main()
