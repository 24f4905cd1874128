"""Tokenizer and chat templates: from messages to token ids with a loss flag on each.

A template is a function from messages to pieces. A piece is text or a special token, and says whether the model is
trained to produce it. Text is tokenized piece by piece and the ids are joined, so that

- the loss mask is made while rendering, not searched for in the rendered text;
- prompt and reply are tokenized apart, in training as at inference: no token spans their boundary;
- a user who types "<|assistant|>" gets the letters, never the token.

    messages   user "Hi", assistant "Hello!"                                            template zephyr
    pieces     BOS <|user|> "\\nHi" EOS "\\n" <|assistant|> "\\n" | "Hello!" EOS | "\\n"
    loss                                                         |      1    1  |
"""
from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import tokenizers
import torch

from model import generate
from runtime import fail, file_hash

# --------------------------------------------------------------------------------------- templates

class Piece(NamedTuple):
    text: str
    kind: str = "text"   # "text"; "token": a special token; "tag": a special token if the vocabulary has it, else text
    loss: bool = False   # the model is trained to produce it


BOS, EOS = Piece("BOS", "token"), Piece("EOS", "token")  # whatever the vocabulary calls them
END = Piece("EOS", "token", loss=True)                   # the EOS of a reply


def zephyr(messages: list[dict]) -> Iterator[Piece]:
    """Zephyr-7B. Role tags are plain text in Mistral's vocabulary, single tokens in that of data/tiny."""
    yield BOS
    for m in messages:
        yield Piece(f"<|{m['role']}|>", "tag")
        yield Piece("\n")
        reply = m["role"] == "assistant"
        yield Piece(m["content"], loss=reply)
        yield END if reply else EOS
        yield Piece("\n")


def llama_2(messages: list[dict]) -> Iterator[Piece]:
    """Llama-2 chat: the system text is part of the first user turn; every round has its own BOS and EOS."""
    system = ""
    for m in messages:
        if m["role"] == "system":
            system = f"<<SYS>>\n{m['content']}\n<</SYS>>\n\n"
        elif m["role"] == "user":
            yield BOS
            yield Piece(f"[INST] {system}{m['content'].strip()} [/INST]")
            system = ""
        else:
            yield Piece(f" {m['content'].strip()} ", loss=True)
            yield END


def mistral(messages: list[dict]) -> Iterator[Piece]:
    """Mistral instruct: one BOS, no system role (a system text is put before the first user text)."""
    yield BOS
    system = ""
    for m in messages:
        if m["role"] == "system":
            system = m["content"] + "\n\n"
        elif m["role"] == "user":
            yield Piece(f"[INST] {system}{m['content']} [/INST]")
            system = ""
        else:
            yield Piece(f" {m['content']}", loss=True)
            yield END


def chatml(messages: list[dict]) -> Iterator[Piece]:
    """ChatML (Yi, Qwen, MPT): a turn ends with <|im_end|>, not with EOS."""
    yield BOS
    for m in messages:
        reply = m["role"] == "assistant"
        yield Piece("<|im_start|>", "token")
        yield Piece(f"{m['role']}\n")
        yield Piece(m["content"], loss=reply)
        yield Piece("<|im_end|>", "token", loss=reply)
        yield Piece("\n")


def llama_3(messages: list[dict]) -> Iterator[Piece]:
    """Llama-3 instruct: headers name the role, <|eot_id|> ends a turn."""
    yield BOS
    for m in messages:
        reply = m["role"] == "assistant"
        yield Piece("<|start_header_id|>", "token")
        yield Piece(m["role"])
        yield Piece("<|end_header_id|>", "token")
        yield Piece("\n\n")
        yield Piece(m["content"].strip(), loss=reply)
        yield Piece("<|eot_id|>", "token", loss=reply)


_ALPACA_PREAMBLE = ("Below is an instruction that describes a task. Write a response that appropriately completes "
                    "the request.\n\n")


def alpaca(messages: list[dict]) -> Iterator[Piece]:
    """Stanford Alpaca: the reply follows "### Response:" without a space. A system text replaces the preamble."""
    yield BOS
    before = _ALPACA_PREAMBLE
    for m in messages:
        if m["role"] == "system":
            before = m["content"] + "\n\n"
        elif m["role"] == "user":
            yield Piece(f"{before}### Instruction:\n{m['content']}\n\n### Response:")
            before = "\n\n"
        else:
            yield Piece(m["content"], loss=True)
            yield END


def plain(messages: list[dict]) -> Iterator[Piece]:
    """No markup but the words "User:" and "Assistant:": for base models and few-shot prompts."""
    yield BOS
    for m in messages:
        if m["role"] == "assistant":
            yield Piece(f" {m['content']}", loss=True)
            yield END
            yield Piece("\n")
        else:
            yield Piece(f"User: {m['content']}\nAssistant:" if m["role"] == "user" else f"{m['content']}\n\n")


@dataclass(frozen=True)
class Template:
    pieces: Callable[[list[dict]], Iterator[Piece]]
    jinja: str                       # the same for transformers and vLLM, saved with the tokenizer
    mark: str                        # text by which a published jinja template is recognised
    opening: tuple[Piece, ...] = ()  # asks for a reply, where the user's turn does not end with it
    tags: tuple[str, ...] = ()       # tokens it uses if the vocabulary has them
    tokens: tuple[str, ...] = ()     # tokens it cannot do without
    end: str = ""                    # the one of them that ends a reply; "": EOS does


_ZEPHYR_JINJA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
_LLAMA2_JINJA = (
    "{% set s = namespace(text='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set s.text = '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' %}{% elif m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + s.text + m['content'] | trim + ' [/INST]' }}{% set s.text = '' %}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}")
_MISTRAL_JINJA = (
    "{% set s = namespace(text='') %}{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set s.text = m['content'] + '\n\n' %}{% elif m['role'] == 'user' %}"
    "{{ '[INST] ' + s.text + m['content'] + ' [/INST]' }}{% set s.text = '' %}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}")
_CHATML_JINJA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
_LLAMA3_JINJA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
_ALPACA_JINJA = (
    "{% set s = namespace(text='" + _ALPACA_PREAMBLE + "') %}"
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set s.text = m['content'] + '\n\n' %}{% elif m['role'] == 'user' %}"
    "{{ s.text + '### Instruction:\n' + m['content'] + '\n\n### Response:' }}{% set s.text = '\n\n' %}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}")
_PLAIN_JINJA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token + '\n' }}"
    "{% elif m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\nAssistant:' }}"
    "{% else %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}")

TEMPLATES = {  # recognised in this order
    "zephyr": Template(
        zephyr, _ZEPHYR_JINJA, "<|assistant|>", opening=(Piece("<|assistant|>", "tag"), Piece("\n")),
        tags=("<|system|>", "<|user|>", "<|assistant|>")),
    "llama-2": Template(llama_2, _LLAMA2_JINJA, "<<SYS>>"),
    "mistral": Template(mistral, _MISTRAL_JINJA, "[INST]"),
    "chatml": Template(
        chatml, _CHATML_JINJA, "<|im_start|>", opening=(Piece("<|im_start|>", "token"), Piece("assistant\n")),
        tokens=("<|im_start|>", "<|im_end|>"), end="<|im_end|>"),
    "llama-3": Template(
        llama_3, _LLAMA3_JINJA, "<|start_header_id|>",
        opening=(Piece("<|start_header_id|>", "token"), Piece("assistant"), Piece("<|end_header_id|>", "token"),
                 Piece("\n\n")),
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), end="<|eot_id|>"),
    "alpaca": Template(alpaca, _ALPACA_JINJA, "### Instruction:"),
    "plain": Template(plain, _PLAIN_JINJA, "User: "),
}

# --------------------------------------------------------------------------------------- tokenizer

class _SentencePiece:
    """tokenizer.model: Llama-2, Yi, Mistral, data/tiny."""

    def __init__(self, file: Path):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError):
            fail(f"{file}: is not a sentencepiece model: copy it again")
        self.size = self.model.get_piece_size()
        self.names = [self.model.id_to_piece(i) for i in range(self.size)]
        self.special = {self.names[i]: i for i in range(self.size) if self.model.is_control(i)}
        self.bos_id, self.eos_id, self.adds_bos = self.model.bos_id(), self.model.eos_id(), True
        # Some models put a space before the first word of a text. A text that continues another must not get one: it
        # is encoded after a newline, which never merges with what follows, and the newline's ids are dropped.
        self._newline_ids = len(self.model.encode("\n"))
        self.space_first = self._newline_ids > 1

    def encode(self, text: str, continues: bool) -> list[int]:
        return self.model.encode("\n" + text)[self._newline_ids :] if continues else self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


class _ByteLevel:
    """tokenizer.json, byte-level BPE: Llama-3, Qwen, Falcon, StarCoder, Pythia."""

    space_first = False

    def __init__(self, file: Path):
        try:
            self.model = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            fail(f"{file}: is not a tokenizer ({error}): copy it again")
        self.size = max(self.model.get_vocab().values()) + 1
        self.names = [self.model.id_to_token(i) or f"[{i}]" for i in range(self.size)]
        self.special = {token.content: i for i, token in self.model.get_added_tokens_decoder().items() if token.special}
        self.bos_id = self.eos_id = -1  # tokenizer_config.json names them
        self.adds_bos = bool(self.model.encode("").ids)
        self.model.encode_special_tokens = True  # in text, the spelling of a special token is only letters

    def encode(self, text: str, continues: bool) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False)


def _read_settings(file: Path) -> dict:
    """tokenizer_config.json; empty if there is none."""
    try:
        settings = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        fail(f"{file}: is not JSON ({error}): copy it again")
    if not isinstance(settings, dict):
        fail(f"{file}: holds a {type(settings).__name__}, expected a JSON object: copy it again")
    return settings


class TemplateError(ValueError):
    """A chat template cannot render these messages; the message says what and why."""


FILES = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json",
         "generation_config.json")  # copied as they are; tokenizer_config.json is written


class Tokenizer:
    """A vocabulary, tokens added to it, and the chat template that belongs to the checkpoint."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        pieces, fast = self.path / "tokenizer.model", self.path / "tokenizer.json"
        if not pieces.is_file() and not fast.is_file():
            fail(f"{pieces}: no such file, nor tokenizer.json, expected the checkpoint's tokenizer: "
                 "copy it beside the weights")
        self.vocabulary = _SentencePiece(pieces) if pieces.is_file() else _ByteLevel(fast)
        settings = self.path / "tokenizer_config.json"
        self.settings = _read_settings(settings)
        wanted = {token for t in TEMPLATES.values() for token in t.tokens + t.tags}
        self.special = self.vocabulary.special | {
            name: i for i, name in enumerate(self.vocabulary.names) if name in wanted}
        for i, token in self.settings.get("added_tokens_decoder", {}).items():
            if token["content"] != "<unk>" and token.get("special", True):
                self.special.setdefault(token["content"], int(i))
        self.vocab_size = max([self.vocabulary.size, *(i + 1 for i in self.special.values())])
        self.bos_id = self._named("bos_token", self.vocabulary.bos_id)
        self.eos_id = self._named("eos_token", self.vocabulary.eos_id)
        if self.eos_id < 0:
            fail(f"{settings}: names no eos_token of the vocabulary, expected the token that ends a reply: add it")
        # Yi has a BOS token but starts no text with it.
        self.adds_bos = self.settings.get("add_bos_token", self.vocabulary.adds_bos)
        self.template: str | None = self.settings.get("template") or self._recognise_template()
        if self.template not in (None, *TEMPLATES):
            fail(f"{settings}: template is {self.template!r}, expected one of {', '.join(TEMPLATES)}")

    def _named(self, key: str, default: int) -> int:
        """Id of the token that tokenizer_config.json names under `key`."""
        token = self.settings.get(key)
        token = token["content"] if isinstance(token, dict) else token
        return self.special.get(token, default)

    def _recognise_template(self) -> str | None:
        """Which of TEMPLATES the jinja text that came with the checkpoint is."""
        published = self.settings.get("chat_template")
        return next((name for name, t in TEMPLATES.items() if published and t.mark in published), None)

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Token ids of a text, never a special token. `continues`: it follows other text without a space between."""
        ids = self.vocabulary.encode(text, continues)
        spelled = next((name for name, i in self.special.items() if i in ids), None)
        if spelled is None:
            return ids
        cut = text.index(spelled) + 1  # some vocabularies match special tokens in text: encode this one in two parts
        return self.encode(text[:cut], continues) + self.encode(text[cut:], continues=True)

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; special tokens are left out."""
        special = set(self.special.values()) | {self.bos_id, self.eos_id}
        return self.vocabulary.decode([i for i in ids if i not in special and 0 <= i < self.vocabulary.size])

    def name(self, i: int) -> str:
        """How one token is shown to a person."""
        special = {i: name for name, i in self.special.items()}
        return special.get(i) or (self.vocabulary.names[i] if i < self.vocabulary.size else f"[{i}]")

    def spans(
        self, messages: list[dict], template: str | None = None, add_generation_prompt: bool = False
    ) -> list[tuple[list[int], bool]]:
        """The rendered messages as spans of ids, each wholly in the loss or wholly outside it.

        A dialogue of k replies gives 2k or 2k + 1 spans: prompt, reply, prompt, reply, ...
        """
        if template is None and self.template is None:
            fail(f"{self.path}: has no chat template of its own: set template= to one of {', '.join(TEMPLATES)}")
        t = TEMPLATES[template or self.template]
        spans: list[tuple[list[int], bool]] = []
        text, follows_text = "", False  # text not yet tokenized; whether other text stands right before it

        def flush():
            nonlocal text, follows_text
            if not text:
                return
            if follows_text and text.startswith(" ") and self.vocabulary.space_first:
                ids = self.encode(text[1:])  # the vocabulary puts that space there itself
            else:
                ids = self.encode(text, continues=follows_text)
            spans[-1][0].extend(ids)
            text, follows_text = "", True

        for piece in [*t.pieces(messages), *(t.opening if add_generation_prompt else ())]:
            if piece == BOS and not self.adds_bos:
                continue
            if not spans or spans[-1][1] != piece.loss:
                flush()
                spans.append(([], piece.loss))
            token = self._token(piece)
            if token is None:
                text += piece.text
            else:
                flush()
                spans[-1][0].append(token)
                follows_text = False
        flush()
        return spans

    def _token(self, piece: Piece) -> int | None:
        """Id of a piece that is one special token; None if it is text."""
        if piece.kind == "text":
            return None
        token = {"BOS": self.bos_id, "EOS": self.eos_id}.get(piece.text, self.special.get(piece.text))
        if token is None and piece.kind == "token":
            raise ValueError(f"the vocabulary has no {piece.text}: adopt_template adds it")
        return token

    def adopt(self, name: str) -> list[str]:
        """Make `name` the chat template and add the tokens it needs. Returns those the model has not been trained on.

        They are the added ones; of a base model, which had no template, all that the template uses.
        """
        t, before, self.template = TEMPLATES[name], self.template, name
        added = [token for token in t.tokens if token not in self.special]
        for token in added:
            self.special[token] = self.vocab_size
            self.vocab_size += 1
        return added if before else [token for token in t.tokens + t.tags if token in self.special]

    def render(
        self, messages: list[dict], template: str | None = None, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Ids of a dialogue and, for each, whether it is in the loss."""
        spans = self.spans(messages, template, add_generation_prompt)
        return [i for ids, _ in spans for i in ids], [loss for ids, loss in spans for _ in ids]

    def fingerprint(self) -> str:
        """A hash of all that decides the ids of a dialogue: vocabulary, special tokens, template. 16 hex digits."""
        files = [self.path / name for name in ("tokenizer.model", "tokenizer.json") if (self.path / name).is_file()]
        told = repr((file_hash(*files), self.template, sorted(self.special.items()), self.adds_bos))
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply."""
        end = TEMPLATES[self.template].end if self.template else ""
        return tuple(dict.fromkeys((self.eos_id, self.special[end]))) if end else (self.eos_id,)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer's files into a checkpoint, its template and added tokens included."""
        path = Path(path)
        if path.resolve() != self.path.resolve():
            for name in FILES:
                if (self.path / name).is_file():
                    shutil.copyfile(self.path / name, path / name)
        as_written = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
        added = {str(i): {"content": name} | as_written
                 for name, i in sorted(self.special.items(), key=lambda x: x[1])}
        settings = self.settings | {"added_tokens_decoder": self.settings.get("added_tokens_decoder", {}) | added}
        if self.template:
            jinja = TEMPLATES[self.template].jinja
            jinja = jinja if self.adds_bos else jinja.replace("{{ bos_token }}", "")
            settings |= {"template": self.template, "chat_template": jinja}
            file = path / "generation_config.json"  # where transformers and vLLM read which tokens end a reply
            generation = json.loads(file.read_text()) if file.is_file() else {}
            generation |= {"bos_token_id": self.bos_id, "eos_token_id": self.stop_ids()}
            file.write_text(json.dumps(generation, indent=1) + "\n")
        (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
        fast = path / "tokenizer.json"
        if fast.is_file():
            table = json.loads(fast.read_text())
            known = {token["id"] for token in table["added_tokens"]}
            table["added_tokens"] += [{"id": int(i)} | token for i, token in added.items() if int(i) not in known]
            fast.write_text(json.dumps(table, ensure_ascii=False))


def check_template(name: str) -> None:
    """Leave with one line unless it is one of TEMPLATES, or "" for the checkpoint's own."""
    if name and name not in TEMPLATES:
        fail(f"template is '{name}', expected one of {', '.join(TEMPLATES)}")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory: tokenizer.model (sentencepiece), or else tokenizer.json (BPE)."""
    return Tokenizer(path)


def check_vocabulary(model, tokenizer: Tokenizer) -> None:
    """Refuse a model without an embedding for every token of text; adopt_template adds those of special tokens."""
    tokens = 1 + max(set(range(tokenizer.vocabulary.size)) - set(tokenizer.special.values()))
    if tokens > model.config.vocab_size:
        fail(f"{tokenizer.path}: the tokenizer has {tokens} tokens, the model {model.config.vocab_size}: "
             "copy the model's own beside it")


def adopt_template(model, tokenizer: Tokenizer, name: str) -> str:
    """Give a model and its tokenizer a chat template with the tokens it needs; returns one line for the log.

    The embedding of a token that the base model never saw is noise, or (tied) a direction it has learnt never to emit.
    So the token that ends a turn starts as a copy of EOS, the other tags as copies of the newline, plus a little noise
    that tells them apart. Rows that a chat model has been trained on, under whichever template, stay as they are.
    """
    check_vocabulary(model, tokenizer)
    before = tokenizer.template
    if before == name:
        return f"template {name}, as in the checkpoint"
    unseen = tokenizer.adopt(name)
    model.new_rows = bool(unseen)  # an adapter for this model has to bring its embeddings along
    model.resize(max(model.config.vocab_size, tokenizer.vocab_size))
    newline = tokenizer.encode("\n", continues=True)[-1]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in [model.embed_tokens.weight] + ([] if model.lm_head is None else [model.lm_head.weight]):
            for token in unseen:
                source = weight[tokenizer.eos_id if token == TEMPLATES[name].end else newline].clone()
                noise = torch.randn(len(source), generator=generator).to(source)
                weight[tokenizer.special[token]] = source + 0.1 * source.std() * noise
    instead = f" instead of the checkpoint's {before}" if before else ""
    started = f"; {' '.join(unseen)} start from the embeddings of seen tokens" if unseen else ""
    return f"template {name}{instead}{started}"


def sample_texts(model, tokenizer: Tokenizer, prompts: list[list[int]], seed: int) -> list[str]:
    """The model's replies to some prompts at temperature 0.7, as lines to print."""
    lines = []
    samples = generate(model, prompts, 64, temperature=0.7, stop_ids=tokenizer.stop_ids(), seed=seed)
    for prompt, (sample,) in zip(prompts, samples, strict=True):
        reply = f"{tokenizer.decode(sample.tokens)!r}{'' if sample.finished else ' ...'}"
        lines += [f"  {tokenizer.decode(prompt).strip()!r}", f"    {reply}"]
    return lines
