"""How byte-level BPE cuts a text into words before it merges, by the name in `tokenizer.ggml.pre`.

The patterns are the models' own, as in their tokenizer.json (in the regex dialect of the `tokenizers` library).
"""

from __future__ import annotations

from typing import NamedTuple


class PreTokenizer(NamedTuple):
    """A pre-tokenizer: each pattern splits further what the one before left; then the family's defaults."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a word that is a token is taken as it is, whatever the merges say
    add_bos: bool = False


_LINES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    return _CONTRACTION + rf"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*" + _LINES


def _cased(end: str, digits: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_UPPER}*{_LOWER}+{end}|{start}{_UPPER}+{_LOWER}*{end}"
    return words + rf"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _LINES


_QWEN35 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _LINES
_CJK = "[一-龥ࠀ-一가-\ud7ff]+"
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-"
    "ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
# The lookbehind and the possessive plus keep a long run of spaces linear.
_DEEPSEEK_LLM = (
    r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"(?<!\s)\s++$", _CJK, r"\p{N}+",
)  # fmt: skip
_DEEPSEEK_V3 = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
_DEEPSEEK_V3 += r"| ?[\p{P}\p{S}]+[\r\n]*" + _LINES

# Old files name no pre-tokenizer. These architectures have one all the same; for others llama.cpp's guess is taken.
OF_ARCHITECTURE = {"gpt2": "gpt-2", "phi2": "phi-2"}

PRE_TOKENIZERS = {
    name: pre
    for names, pre in {
        "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        "gpt-2 phi-2 mpt olmo jais exaone4 mellum gigachat a.x-4.0 trillion granite-docling": PreTokenizer((_GPT2,)),
        "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": PreTokenizer((r"\p{N}", _GPT2)),
        "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2 midm-2.0": PreTokenizer(
            (_words("{1,3}"),), whole_words=True, add_bos=True
        ),
        "dbrx smaug-bpe chatglm-bpe": PreTokenizer((_words("{1,3}"),)),
        "glm4 glm5": PreTokenizer((_words("{1,3}"),), whole_words=True),
        "qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan grok-2 kormo": PreTokenizer((_words(""),)),
        "qwen35": PreTokenizer((_QWEN35,)),
        "deepseek-llm": PreTokenizer(_DEEPSEEK_LLM),
        "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4": PreTokenizer(
            (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK_V3)
        ),
        "gpt-4o o200k llama4 kanana2 minimax-m2": PreTokenizer((_cased(_CONTRACTION + "?", "{1,3}"),)),
        "tekken": PreTokenizer((_cased("", ""),), whole_words=True, add_bos=True),
    }.items()
    for name in names.split()
}
