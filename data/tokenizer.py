"""Tokenizer and chat templates: from messages to token ids with a loss flag on each.

A template is a function from messages to pieces. A piece is text or a special token, and says whether the
model is trained to produce it. Text is tokenized piece by piece and ids are joined, which settles three things:

- the mask is made while rendering, never found again by searching in the text;
- the boundary between prompt and reply is the same in training and at inference, whatever merges across it;
- a user who types "<|assistant|>" gets the letters, never the token.

    messages   user "Hi", assistant "Hello!"                                            template zephyr
    pieces     BOS <|user|> "\\nHi" EOS "\\n" <|assistant|> "\\n" | "Hello!" EOS | "\\n"
    loss                                                         |      1    1  |
"""
from __future__ import annotations

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
from runtime import fail

# --------------------------------------------------------------------------------------- templates

class Piece(NamedTuple):
    text: str
    kind: str = "text"   # text; token: must be in the vocabulary; tag: a token where the vocabulary has it, text elsewhere
    loss: bool = False


BOS, EOS = Piece("BOS", "token"), Piece("EOS", "token")  # whatever the tokenizer calls them
END = Piece("EOS", "token", loss=True)                   # the one that ends a reply


def zephyr(messages: list[dict]) -> Iterator[Piece]:
    """Zephyr-7B. The role tags are plain text in Mistral's vocabulary and single tokens in the tiny world's."""
    yield BOS
    for m in messages:
        yield Piece(f"<|{m['role']}|>", "tag")
        yield Piece("\n")
        reply = m["role"] == "assistant"
        yield Piece(m["content"], loss=reply)
        yield END if reply else EOS
        yield Piece("\n")


def llama_2(messages: list[dict]) -> Iterator[Piece]:
    """Llama-2 chat: the system text lives in the first user turn; every round has its own BOS and EOS."""
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
    """Mistral instruct: one BOS, no system role (a system text goes before the first user text)."""
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
        yield from (Piece("<|start_header_id|>", "token"), Piece(m["role"]), Piece("<|end_header_id|>", "token"), Piece("\n\n"))
        yield Piece(m["content"].strip(), loss=reply)
        yield Piece("<|eot_id|>", "token", loss=reply)


def alpaca(messages: list[dict]) -> Iterator[Piece]:
    """Stanford Alpaca: the reply follows "### Response:" with no blank. A system text replaces the preamble."""
    yield BOS
    before = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
              "\n\n")
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
    """No markup beyond two words: for few-shot prompts and base models."""
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
    jinja: str                       # the same for transformers and vLLM, written beside the tokenizer
    mark: str                        # by which a published jinja template is recognised
    opening: tuple[Piece, ...] = ()  # what asks for a reply, where the user turn does not end with it
    tags: tuple[str, ...] = ()       # tokens it uses if the vocabulary has them
    tokens: tuple[str, ...] = ()     # tokens it cannot do without


_ZEPHYR_JINJA = ("{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
_LLAMA2_JINJA = ("{% set s = namespace(text='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
                 "{% set s.text = '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' %}{% elif m['role'] == 'user' %}"
                 "{{ bos_token + '[INST] ' + s.text + m['content'] | trim + ' [/INST]' }}{% set s.text = '' %}"
                 "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}")
_MISTRAL_JINJA = ("{% set s = namespace(text='') %}{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
                  "{% set s.text = m['content'] + '\n\n' %}{% elif m['role'] == 'user' %}"
                  "{{ '[INST] ' + s.text + m['content'] + ' [/INST]' }}{% set s.text = '' %}"
                  "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}")
_CHATML_JINJA = ("{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
_LLAMA3_JINJA = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
                 "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
_ALPACA_JINJA = ("{% set s = namespace(text='Below is an instruction that describes a task. Write a response that "
                 "appropriately completes the request.\n\n') %}{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
                 "{% set s.text = m['content'] + '\n\n' %}{% elif m['role'] == 'user' %}"
                 "{{ s.text + '### Instruction:\n' + m['content'] + '\n\n### Response:' }}{% set s.text = '\n\n' %}"
                 "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}")
_PLAIN_JINJA = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token + '\n' }}"
                "{% elif m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\nAssistant:' }}"
                "{% else %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}")

TEMPLATES = {  # recognised in this order
    "zephyr": Template(zephyr, _ZEPHYR_JINJA, "<|assistant|>", (Piece("<|assistant|>", "tag"), Piece("\n")),
                       tags=("<|system|>", "<|user|>", "<|assistant|>")),
    "llama-2": Template(llama_2, _LLAMA2_JINJA, "<<SYS>>"),
    "mistral": Template(mistral, _MISTRAL_JINJA, "[INST]"),
    "chatml": Template(chatml, _CHATML_JINJA, "<|im_start|>", (Piece("<|im_start|>", "token"), Piece("assistant\n")),
                       tokens=("<|im_start|>", "<|im_end|>")),
    "llama-3": Template(llama_3, _LLAMA3_JINJA, "<|start_header_id|>",
                        (Piece("<|start_header_id|>", "token"), Piece("assistant"), Piece("<|end_header_id|>", "token"), Piece("\n\n")),
                        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "alpaca": Template(alpaca, _ALPACA_JINJA, "### Instruction:"),
    "plain": Template(plain, _PLAIN_JINJA, "User: "),
}

# --------------------------------------------------------------------------------------- tokenizer

class _SentencePiece:
    """tokenizer.model: Llama-2, Yi, Mistral, the tiny world."""

    def __init__(self, file: Path):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError):
            fail(f"{file}: is not a sentencepiece model: copy it again")
        self.size = self.model.get_piece_size()
        self.names = [self.model.id_to_piece(i) for i in range(self.size)]
        self.special = {self.names[i]: i for i in range(self.size) if self.model.is_control(i)}
        self.bos_id, self.eos_id, self.adds_bos = self.model.bos_id(), self.model.eos_id(), True
        # A model with a dummy prefix writes the first word of a text with a leading blank. A newline never
        # merges with what follows, so ids after "\n" are those of a text that continues another.
        self._anchor = len(self.model.encode("\n"))
        self.blank_first = self._anchor > 1

    def encode(self, text: str, continues: bool) -> list[int]:
        return self.model.encode("\n" + text)[self._anchor :] if continues else self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


class _ByteLevel:
    """tokenizer.json, byte-level BPE: Llama-3, Qwen, Falcon, StarCoder, Pythia."""

    blank_first = False

    def __init__(self, file: Path):
        try:
            self.model = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            fail(f"{file}: is not a tokenizer ({error}): copy it again")
        self.size = max(self.model.get_vocab().values()) + 1
        self.names = [self.model.id_to_token(i) or f"[{i}]" for i in range(self.size)]
        self.special = {token.content: i for i, token in self.model.get_added_tokens_decoder().items() if token.special}
        self.bos_id = self.eos_id = -1  # tokenizer_config.json names them
        added = self.model.encode("").ids
        self.adds_bos = bool(added)
        self.model.encode_special_tokens = True  # a special token's spelling is text like any other

    def encode(self, text: str, continues: bool) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False)


class Tokenizer:
    """A vocabulary, tokens added to it, and the chat template that belongs to the checkpoint."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        pieces, fast = self.path / "tokenizer.model", self.path / "tokenizer.json"
        if not pieces.is_file() and not fast.is_file():
            fail(f"{pieces}: no such file, nor tokenizer.json, expected the checkpoint's tokenizer: copy it beside the weights")
        self.vocabulary = _SentencePiece(pieces) if pieces.is_file() else _ByteLevel(fast)
        settings = self.path / "tokenizer_config.json"
        try:
            self.settings = json.loads(settings.read_text()) if settings.is_file() else {}
        except ValueError as error:
            fail(f"{settings}: is not JSON ({error}): copy it again")
        wanted = {token for t in TEMPLATES.values() for token in t.tokens + t.tags}
        self.special = self.vocabulary.special | {name: i for i, name in enumerate(self.vocabulary.names) if name in wanted}
        for i, token in self.settings.get("added_tokens_decoder", {}).items():
            if token["content"] != "<unk>" and token.get("special", True):
                self.special.setdefault(token["content"], int(i))
        self.vocab_size = max([self.vocabulary.size, *(i + 1 for i in self.special.values())])
        self.bos_id = self._named("bos_token", self.vocabulary.bos_id)
        self.eos_id = self._named("eos_token", self.vocabulary.eos_id)
        if self.eos_id < 0:
            fail(f"{settings}: names no eos_token that the vocabulary has, expected the token that ends a reply: add it")
        self.adds_bos = self.settings.get("add_bos_token", self.vocabulary.adds_bos)  # Yi has a BOS that no text begins with
        self.template: str | None = self.settings.get("template") or self._recognised()

    def _named(self, key: str, default: int) -> int:
        token = self.settings.get(key)
        token = token["content"] if isinstance(token, dict) else token
        return self.special.get(token, default)

    def _recognised(self) -> str | None:
        published = self.settings.get("chat_template")
        return next((name for name, t in TEMPLATES.items() if published and t.mark in published), None)

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Token ids of a text, no special token among them. `continues`: it follows other text without a blank."""
        ids = self.vocabulary.encode(text, continues)
        spelled = next((name for name, i in self.special.items() if i in ids), None)
        if spelled is None:
            return ids
        cut = text.index(spelled) + 1  # some vocabularies match their specials in text: break the spelling
        return self.encode(text[:cut], continues) + self.encode(text[cut:], continues=True)

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; special tokens are left out."""
        special = set(self.special.values()) | {self.bos_id, self.eos_id}
        return self.vocabulary.decode([i for i in ids if i not in special and 0 <= i < self.vocabulary.size])

    def name(self, i: int) -> str:
        """How one token is shown to a person."""
        named = {i: name for name, i in self.special.items()}
        return named.get(i) or (self.vocabulary.names[i] if i < self.vocabulary.size else f"[{i}]")

    def spans(self, messages: list[dict], template: str | None = None,
               add_generation_prompt: bool = False) -> list[tuple[list[int], bool]]:
        """The rendered messages as spans of ids that are all, or all not, in the loss.

        A dialogue of k replies gives 2k or 2k + 1 spans: prompt, reply, prompt, reply, ...
        """
        t = TEMPLATES[template or self._own_template()]
        pieces = [*t.pieces(messages), *(t.opening if add_generation_prompt else ())]
        spans: list[tuple[list[int], bool]] = []
        text, after_text = "", False  # text not yet tokenized; whether more text stands right before it

        def flush():
            nonlocal text, after_text
            if text:
                if after_text and text.startswith(" ") and self.vocabulary.blank_first:
                    ids = self.encode(text[1:])  # the dummy prefix is that blank
                else:
                    ids = self.encode(text, continues=after_text)
                spans[-1][0].extend(ids)
                text, after_text = "", True

        for piece in pieces:
            if piece == BOS and not self.adds_bos:
                continue
            token = self._token(piece)
            if not spans or spans[-1][1] != piece.loss:
                flush()
                spans.append(([], piece.loss))
            if token is None:
                text += piece.text
            else:
                flush()
                spans[-1][0].append(token)
                after_text = False
        flush()
        return spans

    def _token(self, piece: Piece) -> int | None:
        if piece.kind == "text":
            return None
        token = {"BOS": self.bos_id, "EOS": self.eos_id}.get(piece.text, self.special.get(piece.text))
        if token is None and piece.kind == "token":
            raise ValueError(f"the vocabulary has no {piece.text}: adopt_template adds it")
        return token

    def adopt(self, name: str) -> list[str]:
        """Make `name` the template; the tokens of it that the model has not been trained on: new ones, and on a base model all."""
        t, before, self.template = TEMPLATES[name], self.template, name
        added = [token for token in t.tokens if token not in self.special]
        for token in added:
            self.special[token] = self.vocab_size
            self.vocab_size += 1
        return added if before else [token for token in t.tokens + t.tags if token in self.special]

    def _own_template(self) -> str:
        if self.template is None:
            fail(f"{self.path}: has no chat template of its own: set template= to one of {', '.join(TEMPLATES)}")
        return self.template

    def render(self, messages: list[dict], template: str | None = None,
               add_generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
        """Ids of a dialogue and, for each, whether it is in the loss."""
        spans = self.spans(messages, template, add_generation_prompt)
        return [i for ids, _ in spans for i in ids], [loss for ids, loss in spans for _ in ids]

    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply."""
        end = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>"}.get(self.template)
        return tuple(dict.fromkeys((self.eos_id, self.special[end]))) if end else (self.eos_id,)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer files beside a checkpoint, its template and added tokens included."""
        path = Path(path)
        if path.resolve() != self.path.resolve():
            for name in ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json",
                         "generation_config.json"):
                if (self.path / name).is_file():
                    shutil.copyfile(self.path / name, path / name)
        added = {str(i): {"content": name, "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
                 for name, i in sorted(self.special.items(), key=lambda x: x[1])}
        settings = self.settings | {"added_tokens_decoder": self.settings.get("added_tokens_decoder", {}) | added}
        if self.template:
            jinja = TEMPLATES[self.template].jinja
            settings |= {"template": self.template, "chat_template": jinja if self.adds_bos else jinja.replace("{{ bos_token }}", "")}
            file = path / "generation_config.json"  # where transformers and vLLM look for what ends a reply
            generation = json.loads(file.read_text()) if file.is_file() else {}
            file.write_text(json.dumps(generation | {"bos_token_id": self.bos_id, "eos_token_id": self.stop_ids()}, indent=1) + "\n")
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
    """The tokenizer of a Hugging Face model directory: tokenizer.model (sentencepiece), or else tokenizer.json (byte-level BPE)."""
    return Tokenizer(path)


def check_vocabulary(model, tokenizer: Tokenizer) -> None:
    """Leave with one line if the model has no embedding for a token of text; special ones are added as templates need them."""
    tokens = 1 + max(set(range(tokenizer.vocabulary.size)) - set(tokenizer.special.values()))
    if tokens > model.config.vocab_size:
        fail(f"{tokenizer.path}: the tokenizer has {tokens} tokens, the model {model.config.vocab_size}: copy the model's own beside it")


def adopt_template(model, tokenizer: Tokenizer, name: str) -> str:
    """Give a checkpoint its chat template, with every token it needs; what was done, in one line for the log.

    A token the base model has never met starts from a direction it has learnt never to emit (tied embeddings),
    or from noise. So the end of a turn is copied from EOS and other tags from the newline, plus a little
    noise that tells them apart. Rows a chat model has learnt, under this template or another, stay as they are.
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
                source = weight[tokenizer.eos_id if token in ("<|im_end|>", "<|eot_id|>") else newline].clone()
                noise = torch.randn(len(source), generator=generator).to(source)
                weight[tokenizer.special[token]] = source + 0.1 * source.std() * noise
    instead = f" instead of the checkpoint's {before}" if before else ""
    return f"template {name}{instead}" + (f"; {' '.join(unseen)} start from the embeddings of seen tokens" if unseen else "")


def sample_texts(model, tokenizer: Tokenizer, prompts: list[list[int]], seed: int) -> list[str]:
    """What the model says after each prompt at temperature 0.7, as lines to print."""
    lines = []
    samples = generate(model, prompts, 64, temperature=0.7, stop_ids=tokenizer.stop_ids(), seed=seed)
    for prompt, (sample,) in zip(prompts, samples, strict=True):
        lines += [f"  {tokenizer.decode(prompt).strip()!r}", f"    {tokenizer.decode(sample.tokens)!r}{'' if sample.finished else ' ...'}"]
    return lines
