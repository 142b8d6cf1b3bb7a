"""Makes tests/data/vocabularies.json: token ids of llama.cpp for a few texts, and what of each vocabulary they need.

    python tools/vocabulary_figures.py FOLDER

FOLDER is models/ of llama.cpp (in the sdist of llama-cpp-python: vendor/llama.cpp/models), whose ggml-vocab-*.gguf have
texts (.inp) and ids (.out) beside them. Kept are the tokens and merges whose text occurs in one of the texts: no other
can take part in encoding them, so the ids are those of the whole vocabulary.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hipquant.gguf_file import GGUFFile, StringArray
from hipquant.tokenizer import _byte_characters

OUTPUT = Path(__file__).parent.parent / "tests" / "data" / "vocabularies.json"
ENTRIES = (0, 1, 10, 16, 19, 20, 28, 30, 31, 32, 37, 43)  # of the .inp files
END = "\n__ggml_vocab_test__\n"


def figures(path: Path) -> dict[str, Any]:
    with GGUFFile(path) as file:
        metadata = {
            k.removeprefix("tokenizer.ggml."): v.tolist() if isinstance(v, StringArray) else v
            for k, v in file.metadata.items()
        }
    texts = Path(f"{path}.inp").read_bytes().decode().split(END)
    lines = Path(f"{path}.out").read_text().splitlines()
    cases = [[texts[i], [int(word) for word in lines[i].split()]] for i in ENTRIES]
    if metadata["model"] == "llama":
        everything = "\n".join("\u2581" + text.replace(" ", "\u2581") for text, _ in cases)
    else:
        characters = _byte_characters()
        everything = " ".join("".join(characters[b] for b in text.encode()) for text, _ in cases)
    always = range(3 + 256) if metadata["model"] == "llama" else ()
    everything += "\0".join(["", *(text for text, _ in cases)])  # user-defined tokens are written as they are
    kept = [i for i, token in enumerate(metadata["tokens"]) if i in always or (token and token in everything)]
    found = {
        "model": metadata["model"],
        "name": metadata.get("general.name", ""),
        "ids": kept,
        "tokens": [metadata["tokens"][i] for i in kept],
        "types": [int(metadata["token_type"][i]) for i in kept],
        "cases": cases,
    }
    if metadata["model"] == "llama":
        return found | {"scores": [float(metadata["scores"][i]) for i in kept]}
    merges = [merge for merge in metadata["merges"] if merge.replace(" ", "") in everything]
    return found | {"pre": metadata["pre"], "merges": merges}


if __name__ == "__main__":
    paths = sorted(Path(sys.argv[1]).glob("ggml-vocab-*.gguf"))
    with_ids = {p.stem.removeprefix("ggml-vocab-"): p for p in paths if Path(f"{p}.out").exists()}
    known = {name: figures(p) for name, p in with_ids.items() if name not in ("bert-bge", "gemma-4")}
    rows = (f"{json.dumps(name)}: {json.dumps(row, ensure_ascii=False)}" for name, row in known.items())
    OUTPUT.write_text("{\n" + ",\n".join(rows) + "\n}\n")
