"""Models by name: what a name means, and which file of a repository or of a folder is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from hipquant import aliases
from hipquant.errors import ModelNotFoundError, OutOfDeviceMemoryError, UnsupportedQuantTypeError
from hipquant.hub import Name, find, parse
from hipquant.model_files import ModelFile, models_among

GIB = 1 << 30


# --- names ---


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("owner/name", Name("owner/name")),
        ("owner/name:Q4_K_M", Name("owner/name", None, "Q4_K_M")),
        ("owner/na.me-1@v1.0:sub/file.gguf", Name("owner/na.me-1", "v1.0", "sub/file.gguf")),
        ("owner/name@refs/pr/1", Name("owner/name", "refs/pr/1")),
        ("microsoft/phi-2", Name("TheBloke/phi-2-GGUF", None, "phi-2.Q4_K_M.gguf")),
        ("Microsoft/Phi-2:Q8_0", Name("TheBloke/phi-2-GGUF", None, "Q8_0")),
        ("7b-mistral", Name("TheBloke/Mistral-7B-v0.1-GGUF", None, "mistral-7b-v0.1.Q4_K_S.gguf")),
        ("phi-3b", Name(*aliases.QUANTIZED_PHI["phi-3b"][::2], "Phi-3-mini-4k-instruct-q4.gguf")),
    ],
)
def test_names(given: str, meant: Name) -> None:
    assert parse(given) == meant


@pytest.mark.parametrize(
    "path",
    ["", "model.gguf", "models/x.gguf", "a/b/c", "./a", "../a", "/a/b", "a/..", "a/b@../c", "a/b:", "a/b@", "a b/c",
     "a/b\n", "a/.b", "-a/b", "a/b-", "a/b--c", "a/b.git", "é/b", f"a/{'b' * 95}"],
)  # fmt: skip
def test_what_can_only_be_a_path(path: str) -> None:
    assert parse(path) is None
    assert find(path) == Path(path)


def test_every_alias_is_a_gguf_file_of_a_repository() -> None:
    names = [*aliases.QUANTIZED, *aliases.QUANTIZED_PHI, *aliases._ORIGINALS]
    assert len(names) == len({name.lower() for name in names})
    for name in names:
        known = aliases.alias(name)
        assert known is not None
        assert parse(known.repository) == Name(known.repository)
        assert known.file.endswith(".gguf")
        assert ModelFile((known.file,), 1).runs, known.file


# --- which file ---


@pytest.mark.parametrize(
    ("path", "quant", "runs"),
    [
        ("phi-2.Q4_K_M.gguf", "Q4_K_M", True),
        ("a/smollm2-360m-instruct-q8_0.gguf", "Q8_0", True),
        ("m-Q6_K_L-00001-of-00002.gguf", "Q6_K_L", True),
        ("m-UD-Q4_K_XL.gguf", "UD-Q4_K_XL", True),
        ("Phi-3-mini-4k-instruct-fp16.gguf", "FP16", True),
        ("Phi-3-mini-4k-instruct-q4.gguf", "Q4", True),
        ("m.BF16.gguf", "BF16", True),
        ("m-IQ4_XS.gguf", "IQ4_XS", False),
        ("m-Q4_0_4_8.gguf", "Q4_0_4_8", False),
        ("m-Q8_K_XL.gguf", "Q8_K_XL", False),
        ("m-TQ1_0.gguf", "TQ1_0", False),
        ("ggml-model.gguf", "", True),
    ],
)
def test_what_a_file_name_says(path: str, quant: str, runs: bool) -> None:
    model = ModelFile((path,), 1)
    assert (model.quant, model.runs) == (quant, runs)


def test_models_of_a_listing() -> None:
    files = {
        "m-Q8_0-00002-of-00002.gguf": 3, "m-Q8_0-00001-of-00002.gguf": 4, "m-F16-00001-of-00002.gguf": 9,
        "m-Q4_0.gguf": 5, "mmproj-m-F16.gguf": 8, "m.imatrix.gguf": 8, "README.md": 1,
    }  # fmt: skip
    assert models_among(files) == [
        ModelFile(("m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"), 7),
        ModelFile(("m-Q4_0.gguf",), 5),
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sparse files of a 7b model."""
    for quant, size in (("Q2_K", 3), ("Q4_K_M", 4), ("Q8_0", 7), ("F16", 13), ("IQ4_XS", 5), ("UD-Q6_K_XL", 6)):
        with open(tmp_path / f"m.{quant}.gguf", "wb") as file:
            file.truncate(size * GIB)
    return tmp_path


@pytest.mark.parametrize(("free", "quant"), [(None, "Q8_0"), (64, "Q8_0"), (7.5, "Q4_K_M"), (4, "Q2_K")])
def test_the_best_that_fits_is_taken_and_said(folder: Path, free: float | None, quant: str) -> None:
    said: list[str] = []
    memory = None if free is None else int(free * GIB)
    assert find(folder, free=memory, say=said.append) == folder / f"m.{quant}.gguf"
    assert f"{quant} is the best" in said[0]
    assert ":Q2_K" in said[0]


def test_what_a_folder_has_not(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert find(f"{folder}:q2_k") == folder / "m.Q2_K.gguf"
    assert find(f"{folder}:m.F16.gguf") == folder / "m.F16.gguf"
    with pytest.raises(OutOfDeviceMemoryError, match=r"m\.Q2_K\.gguf, the smallest .* needs 3,738 MiB, 3,072 MiB are"):
        find(folder, free=3 * GIB)
    with pytest.raises(ModelNotFoundError, match="has no 'Q5_0'; there are: :F16 :Q8_0"):
        find(f"{folder}:Q5_0")
    with pytest.raises(UnsupportedQuantTypeError, match="does not support quant type IQ4_XS; supported: Q4_0"):
        find(f"{folder}:IQ4_XS")
    (folder / "other.Q4_K_M.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"several models; .*:m\.Q4_K_M\.gguf"):
        find(folder)
    with pytest.raises(ModelNotFoundError, match=r"several 'Q4_K_M'; name a file: :m\.Q4_K_M\.gguf :other"):
        find(f"{folder}:Q4_K_M")
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ModelNotFoundError, match="has no GGUF model$"):
        find(empty)
    (empty / "model.safetensors").touch()
    with pytest.raises(ModelNotFoundError, match="but weights in another format"):
        find(empty)
    (empty / "m-00001-of-00002.gguf").touch()
    with pytest.raises(ModelNotFoundError, match="a part of a split one is missing"):
        find(empty)


def test_one_file_of_a_type_that_does_not_run_is_not_chosen(tmp_path: Path) -> None:
    for i, quant in enumerate(("IQ2_XXS", "IQ3_S")):
        (tmp_path / f"m-{quant}.gguf").touch()
        with pytest.raises(UnsupportedQuantTypeError, match=("IQ2_XXS;", "IQ2_XXS IQ3_S;")[i]):
            find(tmp_path)
