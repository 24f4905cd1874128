"""Vocabularies: text to token ids and back, by the sentencepiece or the tokenizers library.

Some put a space before the first word of a text. What stands before a text decides whether it gets one: nothing, a
special token, or other text (transformers: legacy, prepend_scheme, add_prefix_space).
"""
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import tokenizers

from data.templates import TOKENS, TemplateError
from runtime import fail, shown
from runtime.sandbox import try_out

TRIED = "Hi, 2 × é 世\n\t!"  # a text that a vocabulary must not stumble over
MOST_GAPS = 2**14  # ids that tokens may leave unused: each has a row of the embedding
START, TOKEN, TEXT = "start", "token", "text"
PREFIXED = {"always": (START, TOKEN), "first": (START,), "never": ()}


class Added(NamedTuple):
    """A token outside the text vocabulary: special, or (thoughts, tool calls) to be found in text as well."""

    id: int
    special: bool
    lstrip: bool = False  # it takes the blanks before it, or behind it, out of the text
    rstrip: bool = False


class SentencePiece:
    """tokenizer.model alone: Llama-2, Mistral as first published, data/tiny."""

    def __init__(self, file: Path, settings: dict):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError):
            fail(f"{file}: is not a sentencepiece model: copy it again")
        self.size = self.model.get_piece_size()
        self.names = [self.model.id_to_piece(i) for i in range(self.size)]
        templates = {token for tokens in TOKENS.values() for token in tokens}
        self.added = {name: Added(i, True) for i, name in enumerate(self.names)
                      if self.model.is_control(i) or name in templates}
        self.bos_id, self.eos_id, self.adds_bos = self.model.bos_id(), self.model.eos_id(), True
        self.parting: set[str] = set()  # tokens behind which a text starts anew, with a space of its own
        self.prefixed = PREFIXED["never" if settings.get("add_prefix_space") is False else
                                 "first" if settings.get("legacy") is False else "always"]
        # A text without the space is encoded after a newline, which never merges with what follows, and the newline's
        # ids are dropped.
        self._newline_ids = len(self.model.encode("\n"))

    def find(self, name: str) -> int | None:
        i = self.model.piece_to_id(name)
        return i if i < self.size and self.names[i] == name else None

    def encode(self, text: str, after: str) -> list[int]:
        if after in self.prefixed:
            return self.model.encode(text)
        return self.model.encode("\n" + text)[self._newline_ids :]

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


class Fast:
    """tokenizer.json: Llama-3, Qwen, Falcon, StarCoder, Pythia; and sentencepiece vocabularies converted to it."""

    def __init__(self, file: Path):
        try:
            table = json.loads(file.read_text("utf-8"))
            key, fault = try_out(_steps(table))
            if fault:
                raise ValueError(f"{key}: {fault}")
            self.model = self._ready(tokenizers.Tokenizer.from_file(str(file)))
            scheme, inner = _without_prefix(table)
            self.prefixed = PREFIXED[scheme]
            self.inner = self.model if inner is None else self._ready(tokenizers.Tokenizer.from_str(json.dumps(inner)))
            self.adds_bos = bool(self.model.encode("").ids)
            self.inner.encode(TRIED)
            if not self.inner.encode("\n", add_special_tokens=False).ids:
                raise ValueError("it has no token for a new line")
            ids = self.model.get_vocab().values()
            if max(ids) >= len(ids) + MOST_GAPS:
                raise ValueError(f"{len(ids):,} tokens have ids up to {max(ids)}")
        except BaseException as error:  # the library raises nothing narrower, and panics
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            fail(f"{file}: is not a tokenizer ({error}): copy it again")
        self.size = max(ids) + 1
        self.names = [self.model.id_to_token(i) or f"[{i}]" for i in range(self.size)]
        decoder = self.model.get_added_tokens_decoder()
        self.added = {token.content: Added(i, token.special, token.lstrip, token.rstrip)
                      for i, token in decoder.items()}
        self.parting = {token.content for token in decoder.values() if TOKEN in self.prefixed
                        and not (token.normalized or token.lstrip or token.rstrip)}
        self.bos_id = self.eos_id = -1  # tokenizer_config.json names them

    @staticmethod
    def _ready(model: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True  # in text, the spelling of a special token is only letters
        return model

    def find(self, name: str) -> int | None:
        return self.model.token_to_id(name)

    def encode(self, text: str, after: str) -> list[int]:
        try:
            return (self.model if after in self.prefixed else self.inner).encode(text, add_special_tokens=False).ids
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise TemplateError(
                f"tokenizer.json cannot encode {shown(text)} ({error}): drop or mend one of them") from None

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False)


def _steps(table: dict) -> Iterator[str]:
    """The steps of a tokenizer.json but for its vocabulary, on texts at which regular expressions may hang."""
    word = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    yield "its keys"
    model = tokenizers.Tokenizer.from_str(json.dumps(table | {"model": word, "added_tokens": []}))
    steps = json.dumps([table.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    expressions = " ".join(re.findall('"Regex": "(.*?)"}', steps))[:1000]
    # Behind many of a letter the expressions' own words, without which their engine does not even begin
    texts = [TRIED, *(f"{letter * 200}\ue000{expressions}" for letter in sorted({*expressions, *TRIED}))]
    yield "normalizer"
    for text in [*texts, *(token["content"] for token in table.get("added_tokens") or ())] * bool(model.normalizer):
        model.normalizer.normalize_str(text)
    yield "pre_tokenizer"
    for text in texts * bool(model.pre_tokenizer):
        model.pre_tokenizer.pre_tokenize_str(text)
    yield "decoder"
    for text in texts * bool(model.decoder):
        model.decoder.decode([text])


def _without_prefix(table: dict) -> tuple[str, dict | None]:
    """Which texts get a space (a key of PREFIXED), and a tokenizer.json by which none does; None if none did."""
    scheme, changed = "never", dict(table)
    for part, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        steps = []
        for step in (table.get(part) or {}).get(inner) or [table.get(part) or {}]:
            if step.get("type") == "Prepend":
                scheme = "always"
                continue
            if step.get("type") == "Metaspace":
                scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
                step = step | {"prepend_scheme": "never", "add_prefix_space": False}
            elif step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
                scheme = "always"
                step = step | {"add_prefix_space": False}
            steps += [step] if step else []
        changed[part] = {"type": "Sequence", inner: steps} if steps else None
    return scheme, changed if scheme != "never" else None
