"""The pre-tokenizers of byte-level BPE: `tokenizer.ggml.pre` -> how text is cut into words.

Owns: the expressions, as the models' own tokenizer.json files have them, in the form that the
`tokenizers` package takes. Does not know: vocabularies, files.
"""

# ruff: noqa: RUF001  (look-alike characters are what these expressions are about)

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """Text is split by each of `patterns` in turn, matches and what lies between being the pieces.

    `nfc`: the text is normalised first. `whole_words`: a piece that is a token is not built from
    merges. `add_bos`: what holds when the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3_PATTERN = rf"{_SUFFIX}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACE}"

# A letter's case: upper-case run then lower-case run, marks and caseless scripts in either.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

# The letters of DeepSeek-LLM's expression: Latin, Greek, Cyrillic and other cased scripts. Those
# that Unicode normalisation would change are escaped, so that no editor can change them.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ"
    "-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ"
    "-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CJK = "[一-龥ࠀ-一가-퟿]+"

_QWEN2 = PreTokenizer(patterns=(rf"{_SUFFIX}|{_WORD}|\p{{N}}|{_PUNCTUATION}|{_SPACE}",), nfc=True)
_QWEN35 = PreTokenizer(
    patterns=(
        rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACE}",
    ),
    nfc=True,
)
_LLAMA3 = PreTokenizer(patterns=(_LLAMA3_PATTERN,), whole_words=True, add_bos=True)
_GLM4 = PreTokenizer(patterns=(_LLAMA3_PATTERN,), whole_words=True)
_GPT2 = PreTokenizer(patterns=(_GPT2_PATTERN,))
_SMOLLM = PreTokenizer(patterns=(r"\p{N}", _GPT2_PATTERN))
_GPT4O = PreTokenizer(
    patterns=(
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}",
    )
)
_DEEPSEEK_LLM = PreTokenizer(
    patterns=(
        r"[\r\n]",
        rf"\s?[{_DEEPSEEK_LETTERS}]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        _CJK,
        r"\p{N}+",
    )
)
_DEEPSEEK_CODER = PreTokenizer(patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"))
_DEEPSEEK_V3 = PreTokenizer(
    patterns=(
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACE}",
    )
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "qwen35": _QWEN35,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smollm": _SMOLLM,
    "refact": _SMOLLM,
    "starcoder": _SMOLLM,
    "gpt-2": _GPT2,
    "olmo": _GPT2,
    "gpt-4o": _GPT4O,
    "glm4": _GLM4,
    "deepseek-llm": _DEEPSEEK_LLM,
    "deepseek-coder": _DEEPSEEK_CODER,
    "deepseek-v3": _DEEPSEEK_V3,
}
"""By the names that GGUF files use; those of one model family share a row."""
