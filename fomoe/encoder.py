"""The encoders of text, built from a vocabulary by the `tokenizers` package.

Owns: byte-level BPE and SentencePiece as that package wants them. Does not know: files, special
tokens, decoding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.models import BPE

from fomoe.errors import FormatError
from fomoe.pretokenizers import PreTokenizer

SPACE_MARK = "▁"
"""What SentencePiece writes for a space."""


# The package needs 150 bytes for a character while it encodes; texts are books at times.
_PIECE_CHARS = 1 << 16
# Before a blank between letters or digits: no expression of a pre-tokenizer matches across that, or
# sees anything else there than at a text's end.
_BETWEEN_WORDS = re.compile(r"(?<=[^\W_])(?=[ \n][^\W_])")


def pieces(text: str) -> Iterator[str]:
    """A long text cut between words, so that byte-level BPE gives the same tokens for the pieces as
    for the whole."""
    begin = 0
    while len(text) - begin > _PIECE_CHARS:
        found = _BETWEEN_WORDS.search(text, begin + _PIECE_CHARS)
        if found is None:
            break
        yield text[begin : found.start()]
        begin = found.start()
    yield text[begin:]


def build_bpe(
    vocab: dict[str, int], merges: Sequence[str], pre: PreTokenizer
) -> tokenizers.Tokenizer:
    """Byte-level BPE: `merges` are "left right" each, best first. Raises FormatError."""
    # No part holds a space: one split for all is the fastest way to the pairs.
    parts = " ".join(merges).split(" ") if merges else []
    if len(parts) != 2 * len(merges):
        raise FormatError("tokenizer.ggml.merges: a merge is not of two parts")
    # For a part that is no token the package raises Exception, for such a union it panics.
    if not all(map(vocab.__contains__, map(str.__add__, parts[::2], parts[1::2]))):
        raise FormatError("tokenizer.ggml.merges: a merge into what is no token")
    pairs = list(zip(parts[::2], parts[1::2], strict=True))
    try:
        model = BPE(vocab, pairs, ignore_merges=pre.whole_words)
    except Exception as error:
        raise FormatError(f"tokenizer.ggml.merges: {error}") from None
    encoder = tokenizers.Tokenizer(model)
    if pre.nfc:
        encoder.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    return encoder


def build_sentencepiece(
    vocab: dict[str, int],
    pieces: Sequence[tuple[str, float]],
    unknown: str,
    *,
    space_prefix: bool,
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: `pieces` (text, score) are joined, best score first; what is no piece is
    spelt in byte tokens. `space_prefix` puts a space before the text and after special tokens.
    """
    model = BPE(
        vocab,
        merges_of_scores(vocab, pieces),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    encoder = tokenizers.Tokenizer(model)
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE_MARK)]
    if space_prefix:
        steps.insert(0, normalizers.Prepend(SPACE_MARK))
    encoder.normalizer = normalizers.Sequence(steps)
    return encoder


def merges_of_scores(
    vocab: dict[str, int], pieces: Sequence[tuple[str, float]]
) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best: the same, as a list of merges."""
    merges: list[tuple[float, int, str, str]] = []
    for i, (text, score) in enumerate(pieces):
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab:
                merges.append((-score, i, left, right))
    merges.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in merges]
