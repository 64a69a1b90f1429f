# ruff: noqa: RUF001  (look-alike characters are wanted here)
"""Tokenizers built from GGUF keys, against ones built by `tokenizers` and `transformers`."""

import contextlib
import json
import random
import threading
from itertools import pairwise
from pathlib import Path

import gguf
import pytest
import tokenizers
from gguf import GGUFEndian
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from fomoe import encoder
from fomoe.demo import DEMO_MODEL
from fomoe.encoder import merges_of_scores
from fomoe.errors import FomoeError, FormatError, RequestError, UnsupportedError
from fomoe.gguf import GgufFile
from fomoe.tokenizer import Tokenizer

TEXT = (
    "The sea was calm, and it's 12345 o'clock; we'll see what they've done. The\n\n  def f(x):"
    "\n\treturn x**2 + 0.5  # naïve café\r\nÜber Straße, Ελληνικά ΚΑΙ πεζά, Русский текст; "
    "हिन्दी में लिखा। 中文字符和日本語のテキスト、한국어도. I'M SHOUTING "
    "HelloWorld camelCase 🙂👍🏽 e\u0301 ™ ½ ²³   \n \n end"
) * 3

CASES = [
    "",
    " ",
    "\n\n\n",
    "a",
    TEXT,
    "Hello   world\t\t!\r\n\r\n1234567 it'S we'LL",
    "हिन्दी",
    "e\u0301",
    "日本語テキストabc",
    "x" * 300,
    "\x00\x01\x7f\u200d\u202e",
]

# As the models' own tokenizer.json have them, written out.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")
FAMILIES: dict[str, tuple[tuple[str, ...], bool]] = {
    "qwen2": ((QWEN2,), True),
    "qwen35": ((QWEN35,), True),
    "llama-bpe": ((LLAMA3,), False),
    "smollm": ((r"\p{N}", GPT2), False),
    "gpt-2": ((GPT2,), False),
    "gpt-4o": ((GPT4O,), False),
    "glm4": ((LLAMA3,), False),
    "deepseek-v3": (DEEPSEEK_V3, False),
    "deepseek-coder": ((*CODER, r"\p{N}"), False),
}
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
SPECIAL_TYPES = [3, 3, 3, 4]


def train(patterns: tuple[str, ...], nfc: bool, *, whole_words: bool) -> tokenizers.Tokenizer:
    """A byte-level BPE of 600 tokens trained on TEXT, with SPECIALS at its end."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=whole_words))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(p), "isolated") for p in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(text, special=kind == 3, normalized=False)
            for text, kind in zip(SPECIALS, SPECIAL_TYPES, strict=True)
        ]
    )
    return tokenizer


def model_of(tokenizer: tokenizers.Tokenizer) -> tuple[list[str], list[str]]:
    """Its tokens by id (specials included), and its merges."""
    state = json.loads(tokenizer.to_str())["model"]
    vocab = tokenizer.get_vocab()
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["merges"]]
    return sorted(vocab, key=vocab.__getitem__), merges


def write(path: Path, model: str, tokens: list[str], types: list[int], **keys: object) -> GgufFile:
    writer = gguf.GGUFWriter(path, "toy", endianess=GGUFEndian.LITTLE)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in keys.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)  # type: ignore[arg-type]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GgufFile.open(path)


def bpe_file(path: Path, pre: str, trained: tokenizers.Tokenizer, **keys: object) -> GgufFile:
    tokens, merges = model_of(trained)
    types = [1] * (len(tokens) - len(SPECIALS)) + SPECIAL_TYPES
    return write(path, "gpt2", tokens, types, pre=pre, merges=merges, **keys)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "qwen.gguf"
    trained = train((QWEN35,), True, whole_words=False)
    eos = trained.token_to_id("<|im_end|>")
    return Tokenizer.from_gguf(bpe_file(path, "qwen35", trained, eos_token_id=eos))


@pytest.mark.parametrize("pre", FAMILIES)
def test_bpe_families(tmp_path: Path, pre: str) -> None:
    trained = train(*FAMILIES[pre], whole_words=pre in ("llama-bpe", "glm4"))
    ours = Tokenizer.from_gguf(bpe_file(tmp_path / "m.gguf", pre, trained))
    assert ours.vocab_size == trained.get_vocab_size()
    for text in [*CASES, "a<|im_start|>b <think>c"]:
        ids = ours.encode(text, add_special=False)
        assert ids == trained.encode(text, add_special_tokens=False).ids
        want = normalizers.NFC().normalize_str(text) if pre.startswith("qwen") else text
        assert ours.decode(ids, skip_special=False) == want


@pytest.mark.parametrize("pre", FAMILIES)
def test_long_texts_are_encoded_in_pieces(
    tmp_path: Path, pre: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [*CASES, "one\ntwo\n3\n\nfour!\n/five\n_six\n'll\r\nseven\n e\nÜ", "end\n"]
    text = "\n".join(random.Random(1).choices(lines, k=60)) + "<|im_start|>\nsystem\nx"
    ours = Tokenizer.from_gguf(
        bpe_file(tmp_path / "m.gguf", pre, train(*FAMILIES[pre], whole_words=pre == "glm4"))
    )
    whole = ours.encode(text)
    monkeypatch.setattr("fomoe.encoder._PIECE_CHARS", 16)
    assert len(list(encoder.pieces(text))) > 50
    assert "".join(encoder.pieces(text)) == text
    assert ours.encode(text) == whole


def test_deepseek_llm_splits(tmp_path: Path) -> None:
    trained = train((GPT2,), False, whole_words=False)
    ours = Tokenizer.from_gguf(bpe_file(tmp_path / "m.gguf", "deepseek-llm", trained))
    encoder = ours._encoder.pre_tokenizer
    assert encoder is not None
    pieces = encoder.pre_tokenize_str("it's \u1fd3 ok!\nab\u4e2d\u6587 123  ")
    # What lies outside [A-Za-z...] and has no expression of its own stays whole: "s \u1fd3" does
    # not, since the expression for Chinese spans U+0800 to U+4E00.
    want = ["it", "'", "s", "Ġ", "á¿ĵ", "Ġok", "!", "Ċ", "ab", "ä¸Ńæĸĩ", "Ġ", "123", "ĠĠ"]
    assert [piece for piece, _ in pieces] == want


def test_equals_transformers_qwen2(tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    trained = train((QWEN2,), True, whole_words=False)
    tokens, merges = model_of(trained)
    theirs = Qwen2Tokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m.split()) for m in merges]
    )
    ours = Tokenizer.from_gguf(bpe_file(tmp_path / "m.gguf", "qwen2", trained))
    for text in CASES:
        assert ours.encode(text) == theirs.encode(text)


def test_special_tokens_only_when_asked(qwen: Tokenizer) -> None:
    text = "<|im_start|>user"
    assert qwen.encode(text)[0] == qwen.token_id("<|im_start|>")
    plain = qwen.encode(text, parse_special=False)
    assert qwen.token_id("<|im_start|>") not in plain
    assert qwen.decode(plain) == text
    # User-defined tokens are part of the text proper, and are found in either case.
    assert qwen.encode("<think>", parse_special=False) == [qwen.token_id("<think>")]


def test_decoding_special_tokens(qwen: Tokenizer) -> None:
    ids = qwen.encode("<|im_start|>a<think>b<|im_end|>")
    assert qwen.decode(ids) == "a<think>b"
    assert qwen.decode(ids, skip_special=False) == "<|im_start|>a<think>b<|im_end|>"


def test_ids_out_of_range(qwen: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"token id 9999: the vocabulary has ids 0 to \d+"):
        qwen.decode([9999])
    with pytest.raises(RequestError):
        qwen.token_bytes(-1)


def test_lone_surrogates_are_refused(qwen: Tokenizer) -> None:
    with pytest.raises(RequestError, match="not Unicode"):
        qwen.encode("a\ud800b")


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=60))
def test_incremental_decoding_never_splits_a_character(qwen: Tokenizer, text: str) -> None:
    ids = qwen.encode(text, add_special=False, parse_special=False)
    decoder = qwen.decoder()
    pieces = [decoder.push(id_) for id_ in ids]
    assert decoder.flush() == ""
    whole = normalizers.NFC().normalize_str(text)
    assert "".join(pieces) == whole == qwen.decode(ids)
    assert b"".join(qwen.token_bytes(id_) for id_ in ids) == whole.encode()
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in whole


def test_incomplete_character_at_the_end(qwen: Tokenizer) -> None:
    ids = [qwen.token_id(c) for c in "ðŁĻĤ"]  # 🙂, byte by byte
    decoder = qwen.decoder()
    assert [decoder.push(id_) for id_ in ids[:3] if id_ is not None] == ["", "", ""]
    assert decoder.flush() == "\ufffd"
    assert qwen.decode([id_ for id_ in ids if id_ is not None]) == "🙂"


def test_threads_may_share_it(qwen: Tokenizer) -> None:
    marked = qwen.encode("<|im_end|>x")
    plain = qwen.encode("<|im_end|>x", parse_special=False)
    wrong: list[list[int]] = []

    def run(parse: bool) -> None:
        for _ in range(200):
            got = qwen.encode("<|im_end|>x", parse_special=parse)
            if got != (marked if parse else plain):
                wrong.append(got)

    threads = [threading.Thread(target=run, args=(bool(i % 2),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_beginning_and_end_tokens(tmp_path: Path) -> None:
    trained = train((LLAMA3,), False, whole_words=True)
    bos, eos = trained.token_to_id("<|im_start|>"), trained.token_to_id("<|endoftext|>")
    keys: dict[str, object] = {"bos_token_id": bos, "eos_token_id": eos}
    default = Tokenizer.from_gguf(bpe_file(tmp_path / "a.gguf", "llama-bpe", trained, **keys))
    assert default.encode("a")[0] == bos
    assert default.encode("<|im_start|>a").count(bos) == 1
    assert bos not in default.encode("a", add_special=False)
    keys |= {"add_bos_token": False, "add_eos_token": True}
    told = Tokenizer.from_gguf(bpe_file(tmp_path / "b.gguf", "llama-bpe", trained, **keys))
    assert told.encode("a") == [*told.encode("a", add_special=False), eos]


def test_stop_tokens_by_key_and_by_text(tmp_path: Path) -> None:
    texts = ["</s>", "a", "b", "<|im_end|>", "<|endoftext|>", "<other>", "[EOT]"]
    types = [1, 1, 1, 3, 3, 3, 4]  # "</s>" is an ordinary word here, as it is for Qwen
    file = write(
        tmp_path / "m.gguf", "gpt2", texts, types, pre="qwen2", merges=["a b"], eot_token_id=5
    )
    tokenizer = Tokenizer.from_gguf(file)
    assert tokenizer.stop_ids == {3, 4, 5, 6}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, None)


def test_stop_tokens_of_harmony(tmp_path: Path) -> None:
    texts = ["a", "b", "<|end|>", "<|return|>", "<|call|>", "<|channel|>"]
    file = write(
        tmp_path / "m.gguf", "gpt2", texts, [1, 1, 3, 3, 3, 3], pre="gpt-4o", merges=["a b"],
        eos_token_id=3,
    )  # fmt: skip
    tokenizer = Tokenizer.from_gguf(file)
    assert tokenizer.stop_ids == {3, 4}
    assert tokenizer.decode([5, 0, 2, 3]) == "<|channel|>a<|end|>"


def sentencepiece(path: Path, **keys: object) -> tuple[Tokenizer, dict[str, int], list[float]]:
    """A SentencePiece-like vocabulary trained by `tokenizers`; its pieces and scores."""
    trained = tokenizers.SentencePieceBPETokenizer()
    trained.train_from_iterator([TEXT], vocab_size=500, min_frequency=1, show_progress=False)
    vocab = trained.get_vocab()
    pieces = [p for p in sorted(vocab, key=vocab.__getitem__) if p != "<unk>" and "🙂" not in p]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    scores = [0.0] * 259 + [float(-i) for i in range(len(pieces))]
    keys = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "scores": scores} | keys
    file = write(path, "llama", tokens, types, **keys)
    return Tokenizer.from_gguf(file), {t: i for i, t in enumerate(tokens)}, scores


def merge_by_score(text: str, vocab: dict[str, int], scores: list[float]) -> list[int]:
    """SentencePiece's rule, slowly: join the neighbours whose union scores best, leftmost first."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [
            (-scores[vocab[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in vocab
        ]
        if not unions:
            break
        _, i = min(unions)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids: list[int] = []
    for part in parts:
        known = part in vocab
        ids += [vocab[part]] if known else [vocab[f"<0x{b:02X}>"] for b in part.encode()]
    return ids


def test_sentencepiece(tmp_path: Path) -> None:
    ours, vocab, scores = sentencepiece(tmp_path / "m.gguf")
    for text in ["The sea was calm", "naïve  café 🙂 ~|", " x", "a\n\nb", TEXT[:200]]:
        ids = ours.encode(text)
        assert ids[0] == 1
        assert ids[1:] == merge_by_score(text, vocab, scores)
        assert ours.decode(ids) == text
    assert ours.encode("") == [1]


def test_sentencepiece_decodes_bytes_as_they_come(tmp_path: Path) -> None:
    ours, vocab, _ = sentencepiece(tmp_path / "m.gguf")
    decoder = ours.decoder()
    ids = [vocab["▁The"], *(vocab[f"<0x{b:02X}>"] for b in "🙂".encode())]
    assert [decoder.push(id_) for id_ in ids] == [" The", "", "", "", "🙂"]


def test_sentencepiece_special_tokens(tmp_path: Path) -> None:
    ours, vocab, _ = sentencepiece(tmp_path / "m.gguf")
    assert ours.encode("The</s>The", add_special=False) == [vocab["▁The"], 2, vocab["▁The"]]
    assert 2 not in ours.encode("</s>", parse_special=False)
    assert ours.stop_ids == {2}


def test_sentencepiece_without_space_prefix(tmp_path: Path) -> None:
    ours, vocab, _ = sentencepiece(tmp_path / "m.gguf", add_space_prefix=False)
    assert ours.encode(" The", add_special=False) == [vocab["▁The"]]
    assert ours.decode([vocab["▁The"]]) == " The"


def test_equals_transformers_llama(tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    ours, vocab, scores = sentencepiece(tmp_path / "m.gguf")
    pieces = [(text, scores[i]) for text, i in vocab.items() if i >= 259]
    theirs = LlamaTokenizer(vocab=vocab, merges=merges_of_scores(vocab, pieces))
    # Before a leading space, transformers adds none; SentencePiece and llama.cpp do.
    for text in [case for case in CASES if not case.startswith(" ")]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special=False) == ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_demo_model() -> None:
    tokenizer = Tokenizer.from_gguf(GgufFile.open(DEMO_MODEL))
    assert tokenizer.vocab_size == 4096
    assert tokenizer.decode(tokenizer.encode(TEXT)) == normalizers.NFC().normalize_str(TEXT)
    assert tokenizer.eos_id in tokenizer.stop_ids


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    def opened(model: str, **keys: object) -> None:
        tokens = keys.pop("tokens", ["a", "b"])
        assert isinstance(tokens, list)
        file = write(tmp_path / "m.gguf", model, tokens, [1] * len(tokens), **keys)
        Tokenizer.from_gguf(file).encode("a")

    with pytest.raises(UnsupportedError, match=r"tokenizer 'rwkv'; supported: gpt2"):
        opened("rwkv")
    with pytest.raises(UnsupportedError, match=r"'kimi-k2'; supported: qwen2, .*qwen35"):
        opened("gpt2", pre="kimi-k2", merges=["a b"])
    with pytest.raises(UnsupportedError, match="the key is missing"):
        opened("gpt2", merges=["a b"])
    with pytest.raises(FormatError, match=r"tokenizer\.ggml\.merges is missing"):
        opened("gpt2", pre="qwen2")
    with pytest.raises(FormatError, match=r"tokenizer\.ggml\.scores is missing"):
        opened("llama")
    with pytest.raises(FormatError, match="eos_token_id is 7, of 2 tokens"):
        opened("gpt2", pre="qwen2", merges=["a b"], eos_token_id=7)
    with pytest.raises(FormatError, match="a merge into what is no token"):
        opened("gpt2", pre="qwen2", merges=["a b"])
    with pytest.raises(FormatError, match="out of vocabulary"):
        opened("gpt2", pre="qwen2", merges=["a Z"], tokens=["a", "b", "aZ"])
    with pytest.raises(FormatError, match="not of two parts"):
        opened("gpt2", pre="qwen2", merges=["ab"])
    with pytest.raises(FormatError, match=r"2 tokens, but tokenizer\.ggml\.scores has 1"):
        opened("llama", scores=[0.5])


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_random_damage(tmp_path: Path, model: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A damaged vocabulary is refused by name, or makes a tokenizer that works in some way."""
    path = tmp_path / "m.gguf"
    if model == "gpt2":
        bpe_file(path, "qwen35", train((QWEN35,), True, whole_words=False))
    else:
        sentencepiece(path)
    sound = path.read_bytes()
    rng = random.Random(model)
    worked = 0
    for _ in range(200):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with open(path, "r+b", buffering=0) as out:
            out.write(data)
        with contextlib.suppress(FomoeError):
            tokenizer = Tokenizer.from_gguf(GgufFile.open(path))
            tokenizer.decode(tokenizer.encode("The sea was calm 🙂 <|im_end|></s>"))
            worked += 1
    assert 0 < worked < 200
    assert "panicked" not in capfd.readouterr().err
