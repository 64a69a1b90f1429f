"""Text <-> token ids, from the keys of a GGUF file.

Owns: vocabulary, special tokens, which ids end a generation, incremental decoding. Does not know:
how text is encoded (encoder.py), chat messages, sampling.
"""

from __future__ import annotations

import codecs
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Final

import numpy as np
import tokenizers

from fomoe.encoder import SPACE_MARK, build_bpe, build_sentencepiece, pieces
from fomoe.errors import FormatError, RequestError, UnsupportedError
from fomoe.gguf import GgufFile
from fomoe.pretokenizers import PRE_TOKENIZERS, PreTokenizer

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_STOP_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")

# Tokens that end a generation whatever the keys say, as llama.cpp has them. Unlike there, a normal
# token of such a text does not count: Qwen's vocabulary has "</s>" as an ordinary word of HTML.
_STOP_TEXTS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~[",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>",
    "<|file_sep|>",
})  # fmt: skip
# Harmony (gpt-oss) uses these within an answer: shown, and <|end|> does not end the generation.
_HARMONY_TEXTS = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>", "<|end|>"})
_HARMONY_MARKS = frozenset({"<|return|>", "<|call|>"})

_MAX_TOKEN_CHARS = 4096


def _byte_of_char() -> dict[str, int]:
    """GPT-2's map of bytes to printable characters, reversed: bytes without one start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    others = (b for b in range(256) if chr(b) not in table)
    table.update({chr(0x100 + i): b for i, b in enumerate(others)})
    return table


_BYTE_OF_CHAR: Final = _byte_of_char()


class Tokenizer:
    """The tokenizer of one model. Made by `Tokenizer.from_gguf`; its methods are thread-safe."""

    def __init__(
        self,
        *,
        tokens: list[str],
        types: Sequence[int],
        merges: Callable[[], list[str]],
        scores: Sequence[float],
        pre: PreTokenizer | None,
        ids: dict[str, int],
        add_bos: bool,
        add_eos: bool,
        add_space_prefix: bool,
    ) -> None:
        self._tokens, self._types = tokens, list(types)
        self._merges, self._scores, self._pre = merges, scores, pre
        self._ids = ids
        self.adds_bos, self._add_eos, self._add_space_prefix = add_bos, add_eos, add_space_prefix
        self._lock = threading.Lock()
        self.bos_id, self.eos_id = ids.get("bos"), ids.get("eos")
        self.pad_id, self.unknown_id = ids.get("padding"), ids.get("unknown")
        self.stop_ids: frozenset[int] = self._find_stop_ids()

    @classmethod
    def from_gguf(cls, gguf: GgufFile) -> Tokenizer:
        """Read the vocabulary of `gguf`; the encoder itself is built at the first `encode`.

        Raises UnsupportedError for a tokenizer or pre-tokenizer that fomoe lacks, FormatError when
        the keys contradict each other.
        """
        model = gguf.value("tokenizer.ggml.model", str)
        if model not in ("gpt2", "llama"):
            raise UnsupportedError(
                f"{gguf.paths[0]}: tokenizer {model!r}; supported: gpt2 (byte-level BPE), llama "
                "(SentencePiece)"
            )
        sentencepiece = model == "llama"
        pre = None if sentencepiece else _pre_tokenizer(gguf)
        tokens = gguf.strings("tokenizer.ggml.tokens")
        if not 0 < max(map(len, tokens), default=0) <= _MAX_TOKEN_CHARS:
            raise FormatError(f"{gguf.paths[0]}: no tokens, or one longer than any real one")
        types = _numbers(gguf, "token_type", len(tokens), np.ones(len(tokens), np.int32))
        scores = np.zeros(0)
        if sentencepiece:
            scores = _numbers(gguf, "scores", len(tokens), None)
        default_bos = sentencepiece or (pre is not None and pre.add_bos)
        return cls(
            tokens=tokens,
            types=types.tolist(),
            merges=partial(gguf.strings, "tokenizer.ggml.merges"),
            scores=scores.tolist(),
            pre=pre,
            ids=_special_ids(gguf, len(tokens)),
            add_bos=gguf.value("tokenizer.ggml.add_bos_token", bool, default_bos),
            add_eos=gguf.value("tokenizer.ggml.add_eos_token", bool, False),
            add_space_prefix=gguf.value("tokenizer.ggml.add_space_prefix", bool, sentencepiece),
        )

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def token_text(self, id_: int) -> str:
        """The token as the vocabulary spells it; see `token_bytes` for what it stands for."""
        return self._tokens[self._check_id(id_)]

    def token_id(self, text: str) -> int | None:
        """The id of the token spelt so (as `token_text`), if there is one."""
        return self._id_of_token.get(text)

    def is_special(self, id_: int) -> bool:
        """Whether the token is markup that `skip_special` leaves out, not text."""
        return self._types[self._check_id(id_)] in (CONTROL, UNKNOWN)

    def prepare(self) -> None:
        """Build the encoder now, not at the first `encode`; may run in another thread.

        For 248,320 tokens and as many merges it takes half a second and 160 MB, of which 110 stay.
        """
        with self._lock:
            self._encoder  # noqa: B018

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """The ids of `text`.

        `add_special` adds the beginning and end tokens that the model wants (no second beginning
        when the text has its own); `parse_special` takes special tokens spelt out in the text for
        what they are, otherwise they are plain text, as text from a stranger should be.
        """
        ids: list[int] = []
        with self._lock:
            self._encoder.encode_special_tokens = not parse_special
            try:
                for piece in pieces(text) if self._pre else (text,):
                    ids += self._encoder.encode(piece, add_special_tokens=False).ids
            except (UnicodeEncodeError, TypeError):
                raise RequestError("the text holds lone surrogates: it is not Unicode") from None
        if add_special and self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        if add_special and self._add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        decoder = self.decoder(skip_special=skip_special)
        text = "".join([decoder.push(id_) for id_ in ids]) + decoder.flush()
        return text.removeprefix(" ") if self._add_space_prefix else text

    def decoder(self, *, skip_special: bool = True) -> IncrementalDecoder:
        """A decoder for ids that come one by one; a leading space of the first is kept."""
        return IncrementalDecoder(self, skip_special)

    def token_bytes(self, id_: int) -> bytes:
        """The bytes that a token stands for, which may be a part of a character."""
        text, kind = self._tokens[self._check_id(id_)], self._types[id_]
        if kind == UNUSED:
            return b""
        if kind == BYTE:
            return bytes([_byte_token_value(text)])
        if kind != NORMAL:
            return text.encode()
        if self._pre is None:
            return text.replace(SPACE_MARK, " ").encode()
        try:
            return bytes([_BYTE_OF_CHAR[c] for c in text])
        except KeyError:  # not spelt in bytes: some converters mark added tokens as normal
            return text.encode()

    def _check_id(self, id_: int) -> int:
        if not 0 <= id_ < len(self._tokens):
            raise RequestError(f"token id {id_}: the vocabulary has ids 0 to {self.vocab_size - 1}")
        return id_

    def _find_stop_ids(self) -> frozenset[int]:
        found = {self._ids[key] for key in _STOP_KEYS if key in self._ids}
        markup = [
            (id_, text)
            for id_, (text, kind) in enumerate(zip(self._tokens, self._types, strict=True))
            if kind not in (NORMAL, UNUSED)
        ]
        harmony = {text for _, text in markup} >= _HARMONY_MARKS
        for id_, text in markup:
            if harmony and text in _HARMONY_TEXTS:
                self._types[id_] = USER_DEFINED
                found.discard(id_)
            elif text in _STOP_TEXTS:
                found.add(id_)
        for id_ in found:
            self._types[id_] = CONTROL
        return frozenset(found)

    @cached_property
    def _id_of_token(self) -> dict[str, int]:
        return dict(zip(self._tokens, range(len(self._tokens)), strict=True))

    @cached_property
    def _encoder(self) -> tokenizers.Tokenizer:
        if self._pre is not None:
            encoder = build_bpe(self._id_of_token, self._merges(), self._pre)
        else:
            pieces = [
                (text, score)
                for text, kind, score in zip(self._tokens, self._types, self._scores, strict=True)
                if kind in (NORMAL, USER_DEFINED)
            ]
            unknown = self._tokens[self.unknown_id or 0]
            encoder = build_sentencepiece(
                self._id_of_token, pieces, unknown, space_prefix=self._add_space_prefix
            )
        # Every token is in the vocabulary already, so these keep their ids.
        encoder.add_tokens(
            [
                tokenizers.AddedToken(text, special=kind != USER_DEFINED, normalized=False)
                for text, kind in zip(self._tokens, self._types, strict=True)
                if kind in (CONTROL, USER_DEFINED, UNKNOWN) and text
            ]
        )
        return encoder


class IncrementalDecoder:
    """Turns ids into text as they come, holding back bytes until their character is complete."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id_: int) -> str:
        """The text that is certain after this token: "" while a character is incomplete."""
        if self._skip_special and self._tokenizer.is_special(id_):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(id_))

    def flush(self) -> str:
        """The end: U+FFFD for a character that never became complete, else ""."""
        return self._utf8.decode(b"", final=True)


def _pre_tokenizer(gguf: GgufFile) -> PreTokenizer:
    name = gguf.value("tokenizer.ggml.pre", str, "")
    if name not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"{gguf.paths[0]}: pre-tokenizer {name!r}"
            + ("" if name else " (the key is missing)")
            + f"; supported: {', '.join(PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[name]


def _numbers(gguf: GgufFile, name: str, count: int, default: np.ndarray | None) -> np.ndarray:
    key = f"tokenizer.ggml.{name}"
    if key not in gguf.metadata and default is not None:
        return default
    values = gguf.numbers(key)
    if len(values) != count:
        raise FormatError(f"{gguf.paths[0]}: {count} tokens, but {key} has {len(values)}")
    return values


def _special_ids(gguf: GgufFile, num_tokens: int) -> dict[str, int]:
    ids: dict[str, int] = {}
    for name in (*_STOP_KEYS, "bos", "padding", "unknown"):
        key = f"tokenizer.ggml.{name}_token_id"
        id_ = gguf.value(key, int, None)
        if id_ is None:
            continue
        if not 0 <= id_ < num_tokens:
            raise FormatError(f"{gguf.paths[0]}: {key} is {id_}, of {num_tokens} tokens")
        ids[name] = id_
    return ids


def _byte_token_value(text: str) -> int:
    """The value of a byte token, spelt "<0x0A>"."""
    try:
        return int(text[1:-1], 16) & 0xFF
    except ValueError:
        raise FormatError(f"byte token {text!r} is not spelt as one") from None
