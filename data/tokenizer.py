"""Tokenizer: from messages to token ids with a loss flag on each.

A chat template (data/templates.py) gives text in parts: markup, and the messages' own words. Special tokens are looked
for in markup alone, and the text between two of them is tokenized as one, as transformers does, but for one place:

- prompt and reply are tokenized apart, in training as at inference: no token spans their boundary;
- the loss mask is made while rendering, not searched for in the rendered text;
- a user who types "<|assistant|>" gets the letters, never the token.

    messages   user "Hi", assistant "Hello!"                                            template zephyr
    tokens     BOS <|user|> "\\nHi" EOS "\\n" <|assistant|> "\\n" | "Hello!" EOS | "\\n"
    loss                                                         |      1    1  |
"""
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoints import embeddings
from data.templates import NAMED, TOKENS, ChatTemplate, Part, TemplateError
from data.vocabulary import MOST_GAPS, START, TEXT, TOKEN, Added, Fast, SentencePiece
from families import find_folder
from runtime import fail, file_hash, shown
from runtime.json_files import SWITCH, Checked, Kind, read_json, whole
from runtime.sandbox import try_out


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{file}: cannot be read as text ({error}): copy it again")


# --------------------------------------------------------------------------------------- the tokenizer

# Copied as they are; tokenizer_config.json is written.
FILES = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json",
         "added_tokens.json", "generation_config.json")
TEMPLATE_FILES = ("chat_template.jinja", "additional_chat_templates")
# Classes by which one of transformers 4 and 5 reads tokenizer.json otherwise than it is written, or not at all.
REWRITERS = ("LlamaTokenizer", "LlamaTokenizerFast", "TokenizersBackend")
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE_NAMES = ("extra_special_tokens", "model_specific_special_tokens")  # tables of others, in transformers 4 and 5
PROBE = [{"role": role, "content": text} for role, text in (
    ("system", " S "), ("user", " U\n"), ("assistant", " A "), ("user", "V"), ("assistant", "B\n"))]
OWN = "own"  # the name of a checkpoint's template that is none of ours


def _is_name(value) -> bool:
    return isinstance(value.get("content") if isinstance(value, dict) else value, str)


def _are_names(value) -> bool:
    return isinstance(value, list) or isinstance(value, dict) and all(x is None or _is_name(x) for x in value.values())


def _are_tokens(value) -> bool:
    return isinstance(value, dict) and all(
        i.isdecimal() and len(i) < 10 and isinstance(token, dict) and _is_name(token)
        and all(type(token.get(key, False)) is bool for key in ("special", "lstrip", "rstrip"))
        for i, token in value.items())


def _is_template(value) -> bool:
    """Text, or texts by name in one of two forms."""
    if isinstance(value, list):
        return all(isinstance(x, dict) and isinstance(x.get("name"), str) and _is_template(x.get("template"))
                   for x in value)
    return isinstance(value, str) or (isinstance(value, dict) and all(isinstance(x, str) for x in value.values()))


KINDS = {  # of the keys that are read
    **dict.fromkeys(NAMES, Kind(_is_name, 'text, or an object whose "content" is text')),
    **dict.fromkeys(MORE_NAMES, Kind(_are_names, "names of tokens")),
    **dict.fromkeys(("add_bos_token", "add_prefix_space", "legacy"), SWITCH),
    "added_tokens_decoder": Kind(_are_tokens, "tokens by their ids"),
    "chat_template": Kind(_is_template, "text, or texts by name"),
    "eos_token_id": Kind(lambda x: all(type(i) is int and abs(i) < 2**24 for i in (x if isinstance(x, list) else [x])),
                         "a token id, or several"),  # of generation_config.json; -1 is none
}


def _read(file: Path) -> Checked:
    """A JSON object; empty if there is no such file."""
    return Checked(file, read_json(file) if file.exists() else {}, KINDS)


def _any_of(tokens: Iterable[str]) -> re.Pattern:
    """Finds any of the tokens, the longest first; with none it finds nothing."""
    pattern = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    return re.compile(f"({pattern})" if pattern else "(?!)")


class Reply(NamedTuple):
    """A reply, ids[start:end], behind what it replies to. Several paths of a dialogue may share one list of ids."""

    ids: list[int]
    start: int
    end: int
    turn: int  # of the user's turns, the one it replies to, from 1


class Tokenizer:
    """A vocabulary, the tokens added to it, and the chat template that belongs to the checkpoint.

    added      all tokens outside the text vocabulary, by name
    special    of them, with their ids, those that text never becomes; the others, such as <think>, it may become
    markup     of them, those that the template writes; `end` is the one it ends a reply with
    names      of them, what bos_token, eos_token and so on are called here
    """

    def __init__(self, path: str | Path):
        self.path = find_folder(path)
        pieces, fast = self.path / "tokenizer.model", self.path / "tokenizer.json"
        if not pieces.is_file() and not fast.is_file():
            fail(f"{pieces}: no such file, nor tokenizer.json, expected the checkpoint's tokenizer: "
                 "copy it beside the weights")
        config = self.path / "tokenizer_config.json"
        self.settings, self.generation = _read(config), _read(self.path / "generation_config.json")
        self.vocabulary = Fast(fast) if fast.is_file() else SentencePiece(pieces, self.settings)
        self.added = self._declared() | self.vocabulary.added
        names = self._special_names()
        for name in names.values():
            if name not in self.added and (i := self.vocabulary.find(name)) is not None:
                self.added[name] = Added(i, True)
        self.names = {key: name for key, name in names.items() if name in self.added}
        most = self.vocabulary.size + len(self.added) + MOST_GAPS
        for name, token in self.added.items():
            if not 0 <= token.id < most:
                fail(f"{config}: the token {shown(name)} has the id {token.id}, expected one below {most:,}, as the "
                     f"vocabulary has {self.vocabulary.size:,} tokens: copy it again")
        self.vocab_size = max([self.vocabulary.size, *(token.id + 1 for token in self.added.values())])
        self.bos_id = self._id("bos_token", self.vocabulary.bos_id)
        self.eos_id = self._id("eos_token", self.vocabulary.eos_id)
        if self.eos_id < 0:
            fail(f"{config}: names no eos_token of the vocabulary, expected the token that ends a reply: add it")
        # Yi has a BOS token but starts no text with it.
        self.adds_bos = self.settings.get("add_bos_token", self.vocabulary.adds_bos)
        self.generation.get("eos_token_id")  # refused now rather than after training
        self.own = self._own_template()
        self._use(None if self.own is None else OWN)
        if self.own is not None:
            self.template = next((name for name in NAMED if self._same(name)), OWN)

    def _declared(self) -> dict[str, Added]:
        """The tokens that tokenizer_config.json and, in old checkpoints, added_tokens.json add to the vocabulary."""
        special, older = set(self._special_names().values()), self.path / "added_tokens.json"
        found = {}
        for name, i in _read(older).items():
            if not whole(0, 2**24).fits(i):
                fail(f"{older}: {shown(name)} is {shown(i)}, expected the token's id: copy it again")
            found[name] = Added(i, name in special)
        for i, token in (self.settings.get("added_tokens_decoder") or {}).items():
            found[token["content"]] = Added(int(i), token.get("special", True), token.get("lstrip", False),
                                            token.get("rstrip", False))
        return found

    def _special_names(self) -> dict[str, str]:
        """What BOS, EOS and so on are called; an old checkpoint's special_tokens_map.json has the last word."""
        tables = [self.settings]
        if "added_tokens_decoder" not in self.settings:
            tables.append(_read(self.path / "special_tokens_map.json"))
        named = {key: table.get(key) for table in tables for key in NAMES if key in table}
        for more in (table.get(key) for key in MORE_NAMES for table in reversed(tables) if key in table):
            named = (more if isinstance(more, dict) else {}) | named
        names = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
        return {key: name for key, name in names.items() if name}

    def _id(self, key: str, default: int) -> int:
        return self.added[self.names[key]].id if key in self.names else default

    def _own_template(self) -> str | None:
        """The checkpoint's chat template, where transformers looks for it; of several the one named default."""
        file = self.path / "chat_template.jinja"
        if file.is_file():
            return _read_text(file)
        found = self.settings.get("chat_template")
        if isinstance(found, list):
            found = {t["name"]: t["template"] for t in found}
        if isinstance(found, dict):
            if "default" not in found:
                fail(f"{self.path}: its chat templates are named {', '.join(map(str, found))}, and none of them "
                     "default: write the one to use to a file chat_template.jinja there")
            found = found["default"]
        return found or None

    # ------------------------------------------------------------------------------------ the template

    def _chat(self, name: str | None) -> ChatTemplate:
        """A template by name: one of ours, the checkpoint's own, or a .jinja file's."""
        if name is None:
            fail(f"{self.path}: has no chat template of its own: set template= to one of {', '.join(NAMED)}")
        if name == OWN:
            return ChatTemplate(self.own, self.names, self._tokens)
        missing = [token for token in TOKENS.get(name, ()) if token not in self.added]
        if missing:
            raise ValueError(f"the vocabulary has no {' '.join(missing)}: adopt_template adds it")
        return ChatTemplate(self._text(name), self.names, self._tokens)

    def _text(self, name: str) -> str:
        """The jinja text of a template that is not the checkpoint's own, as it is saved."""
        if name not in NAMED:
            return _read_text(Path(name))
        return NAMED[name] if self.adds_bos and self.bos_id >= 0 else "{%- set bos_token = '' %}\n" + NAMED[name]

    def _use(self, name: str | None) -> None:
        """Make `name` the template, and find out which tokens its markup has and which of them ends a reply."""
        self._tokens = _any_of(token for token in self.added if token.strip())
        self.template, self.chat = name, None if name is None else self._chat(name)
        if self.chat and name not in NAMED:
            key, fault = try_out(self._trial())
            if fault:
                file = self.path / "chat_template.jinja" if name == OWN else Path(name)
                file = file if file.is_file() else self.path / "tokenizer_config.json"
                fail(f"{file}: {key} {fault} to render a few turns: mend or remove it, and set template=")
        self.markup, self.end, structure = self._probe() if self.chat else ([], None, set())
        self.special = {token: found.id for token, found in self.added.items() if found.special or token in structure}
        unknown = self.names.get("unk_token")
        self._guarded = {i for token, i in self.special.items() if token != unknown}  # text must not become these
        # Tokens that text may become and that the vocabulary itself does not look for, or not without a text's start
        found = self.vocabulary.added.keys() - self.vocabulary.parting
        sought = [token for token in self.added.keys() - self.special.keys() - found if token.strip()]
        self._in_text = _any_of(sought) if sought else None

    def _trial(self) -> Iterator[str]:
        """What shows that a stranger's template ends: short dialogues, and one of twenty long turns."""
        yield "chat_template"
        self._probe()
        with suppress(TemplateError):
            self.chat.render([m | {"content": m["content"] * 1000} for m in PROBE[1:3]] * 10)

    def _probe(self) -> tuple[list[str], str | None, set[str]]:
        """What a dialogue shows: tokens of the markup; the one that ends a reply; it and those outside replies."""
        for messages in (PROBE, PROBE[1:]):  # some templates take no system text
            try:
                parts, finished = self.chat.path(messages)
            except TemplateError:
                continue
            written = [(token, part.reply) for part in parts if part.message is None
                       for token in self._tokens.findall(part.text)]
            end = written[-1][0] if finished else None
            structure = {token for token, reply in written if reply is None or token == end}
            return list(dict.fromkeys(token for token, _ in written)), end, structure
        return [], None, set()

    def _same(self, name: str) -> bool:
        """Whether the checkpoint's own template is one of ours."""
        if any(token not in self.added for token in TOKENS.get(name, ())):
            return False
        ours = self._chat(name)
        try:
            return all(self.chat.render(PROBE[a:b], ask) == ours.render(PROBE[a:b], ask)
                       for a, b in ((0, 2), (0, 5), (1, 2), (1, 5)) for ask in (False, True))
        except TemplateError:
            return False

    def adopt(self, name: str = "") -> list[str]:
        """Make `name` the chat template, and add the tokens it needs. "": the checkpoint's own, or zephyr without one.

        Returns the tokens that the model has not been trained on: those added, or (a base model) those of the markup.
        """
        before = self.template
        name = name or before or "zephyr"
        if name == before:
            return []
        if name == OWN and self.own is None:
            self._chat(None)
        added = [token for token in TOKENS.get(name, ()) if token not in self.added]
        for token in added:
            self.added[token] = Added(self.vocab_size, True)
            self.vocab_size += 1
        self._use(name)
        return added if before else [token for token in self.markup
                                     if self.added[token].id not in (self.bos_id, self.eos_id)]

    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply: EOS, the one the template ends it with, and what generation_config.json names."""
        ends = self.generation.get("eos_token_id")
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        return tuple(dict.fromkeys([self.eos_id, *([self.added[self.end].id] if self.end else []), *ends]))

    # ------------------------------------------------------------------------------------------- text

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Token ids of a text, never a special token. `continues`: it follows other text without a space between."""
        return self._encode(text, TEXT if continues else START)

    def _encode(self, text: str, after: str) -> list[int]:
        ids = self._find_added(text, after) if self._in_text else self.vocabulary.encode(text, after)
        if self._guarded.isdisjoint(ids):
            return ids
        # Some vocabularies match special tokens in text: cut their names in two, behind the first letter. It ends, for
        # each piece is shorter than the text.
        found = self._guarded.intersection(ids)
        names = "|".join(re.escape(name) for name, i in self.special.items() if i in found and name in text)
        cuts = [0, *(match.start() + 1 for match in re.finditer(names, text)), len(text)] if names else []
        return [i for k, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False))
                for i in self._encode(text[a:b], TEXT if k else after)] if names else ids

    def _find_added(self, text: str, after: str) -> list[int]:
        ids: list[int] = []
        for piece in self._in_text.split(text):
            if piece in self.added:
                ids.append(self.added[piece].id)
                after = TOKEN
            elif piece:
                ids += self.vocabulary.encode(piece, after)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; special tokens are left out."""
        left_out = {*self.special.values(), self.bos_id, self.eos_id}
        ids = [i for i in ids if i not in left_out]
        others = {token.id: name for name, token in self.added.items() if token.id >= self.vocabulary.size}
        if others.keys().isdisjoint(ids):
            return self.vocabulary.decode([i for i in ids if 0 <= i < self.vocabulary.size])
        runs = groupby(ids, key=others.get)
        return "".join(name * len(list(run)) if name else self.vocabulary.decode(list(run)) for name, run in runs)

    def name(self, i: int) -> str:
        """How one token is shown to a person."""
        added = {token.id: name for name, token in self.added.items()}
        return added.get(i) or (self.vocabulary.names[i] if i < self.vocabulary.size else f"[{i}]")

    # ------------------------------------------------------------------------------------------ dialogues

    def render(
        self, messages: list[dict], template: str | None = None, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Ids of a dialogue, and whether each is in the loss; a reply with "loss": False is only read by the next."""
        ids: list[int] = []
        in_loss: list[bool] = []
        for span, reply in self._spans(self._template(template).parts(messages, add_generation_prompt)):
            ids += span
            in_loss += [reply is not None and messages[reply].get("loss", True)] * len(span)
        return ids, in_loss

    def paths(self, messages: list[dict], template: str | None = None) -> list[Reply]:
        """Every reply to be learnt, behind the tokens that precede it when it is made.

        Most share one list of ids. Where a template writes a reply in another way once the dialogue goes on (Qwen3
        drops its thoughts), or ends it with no token, it has ids of its own, ended with EOS if need be.
        """
        chat = self._template(template)
        placed, ids = {}, []
        for span, reply in self._spans(chat.parts(messages)):
            placed[reply] = len(ids), len(ids) + len(span)
            ids += span
        paths = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or not message.get("loss", True):
                continue
            turn = sum(m["role"] == "user" for m in messages[:i])
            if i in placed:
                paths.append(Reply(ids, *placed[i], turn))
                continue
            parts, finished = chat.path(messages[: i + 1])
            spans = self._spans(parts)
            own = [t for span, _ in spans for t in span] + [self.eos_id] * (not finished)
            start = sum(len(span) for span, reply in spans if reply is None or reply < i)
            paths.append(Reply(own, start, len(own), turn))
        return paths

    def _template(self, name: str | None) -> ChatTemplate:
        return self.chat if name in (None, self.template) and self.chat else self._chat(name)

    def _spans(self, parts: list[Part]) -> list[tuple[list[int], int | None]]:
        """Ids of the parts, run by run: outside replies, or one reply's (the number of its message)."""
        spans = []
        after, strip = START, False  # what stands before the next text; whether it loses the blanks it begins with
        for reply, run in groupby(parts, key=lambda part: part.reply):
            ids: list[int] = []
            for text, token in self._texts_and_tokens(run):
                text = text.lstrip() if strip else text
                text = text.rstrip() if token and token.lstrip else text
                if text:
                    ids += self._encode(text, after)
                    after, strip = TEXT, False
                if token:
                    ids.append(token.id)
                    after, strip = TOKEN, token.rstrip
            spans.append((ids, reply))
        return spans

    def _texts_and_tokens(self, parts: Iterable[Part]) -> Iterator[tuple[str, Added | None]]:
        """Every token of the markup behind the text before it, which may be empty; last a text behind which is none."""
        text = ""
        for part in parts:
            for piece in [part.text] if part.message is not None else self._tokens.split(part.text):
                if part.message is None and piece in self.added:
                    yield text, self.added[piece]
                    text = ""
                else:
                    text += piece
        yield text, None

    # -------------------------------------------------------------------------------------------- files

    def fingerprint(self) -> str:
        """A hash of all that decides the ids of a dialogue: vocabulary, added tokens, template. 16 hex digits."""
        files = [self.path / name for name in ("tokenizer.model", "tokenizer.json") if (self.path / name).is_file()]
        text = self.chat.text if self.chat else ""
        today = str(date.today()) if "strftime_now" in text else ""
        told = repr((file_hash(*files), text, today, sorted(self.added.items()), self.names, self.adds_bos))
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the tokenizer's files into a checkpoint, its template and added tokens included."""
        path = Path(path)
        own = self.own is not None and self.chat is not None and self.chat.text == self.own
        if path.resolve() != self.path.resolve():
            for name in FILES + TEMPLATE_FILES * (own or self.chat is None):
                if (self.path / name).is_file():
                    shutil.copyfile(self.path / name, path / name)
                elif (self.path / name).is_dir():
                    shutil.copytree(self.path / name, path / name)
        settings = {key: value for key, value in self.settings.items() if key != "template"}
        if self.chat and not own:
            settings["chat_template"] = self.chat.text
        table = {str(token.id): {"content": name, "special": token.special, "lstrip": token.lstrip,
                                 "rstrip": token.rstrip, "normalized": not token.special and not name.strip(),
                                 "single_word": False}
                 for name, token in sorted(self.added.items(), key=lambda item: item[1].id)}
        if table.keys() - {str(token.id) for token in self.vocabulary.added.values()}:  # all of them or none
            settings |= {key: name for key, name in self.names.items() if key in NAMES}
            settings |= {"added_tokens_decoder": table | (self.settings.get("added_tokens_decoder") or {})}
        if (self.path / "tokenizer.json").is_file() and settings.get("tokenizer_class") in REWRITERS:
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
        if self.chat:
            file = path / "generation_config.json"  # where transformers and vLLM read which tokens end a reply
            generation = self.generation | {"eos_token_id": self.stop_ids()}
            if self.bos_id >= 0:
                generation["bos_token_id"] = self.bos_id
            file.write_text(json.dumps(generation, indent=1) + "\n")
        fast = path / "tokenizer.json"
        if fast.is_file():  # the added tokens go into one that has not all of them
            tokenizer = json.loads(fast.read_text("utf-8"))
            held = tokenizer.get("added_tokens") or []
            known = {token["id"] for token in held}
            if new := [{"id": int(i)} | token for i, token in table.items() if int(i) not in known]:
                tokenizer["added_tokens"] = held + new
                fast.write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")


def check_template(name: str) -> None:
    """Leave with one line unless it is one of ours, "own" or "" for the checkpoint's, or a jinja file."""
    if name.endswith(".jinja") and not Path(name).is_file():
        fail(f"template is '{name}': no such file")
    if name not in ("", OWN, *NAMED) and not name.endswith(".jinja"):
        fail(f"template is '{name}', expected one of {', '.join(NAMED)}, {OWN} (the checkpoint's) or a .jinja file")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory: tokenizer.json, or else tokenizer.model (sentencepiece)."""
    return Tokenizer(path)


def check_vocabulary(model, tokenizer: Tokenizer) -> None:
    """Refuse a model without an embedding for every token of text; adopt_template adds those of special tokens."""
    added = {token.id for token in tokenizer.added.values()}
    tokens = 1 + max(set(range(tokenizer.vocabulary.size)) - added, default=-1)
    if tokens > model.config.vocab_size:
        fail(f"{tokenizer.path}: the tokenizer has {tokens} tokens, the model {model.config.vocab_size}: "
             "copy the model's own beside it")


def adopt_template(model, tokenizer: Tokenizer, name: str = "") -> str:
    """Give a model and its tokenizer a chat template with the tokens it needs; returns one line for the log.

    `name` "" is the checkpoint's own, or zephyr if it has none. The embedding of a token that the base model never saw
    is noise, or (tied) a direction it has learnt never to emit. So the token that ends a turn starts as a copy of EOS,
    the other tags as copies of the newline, plus a little noise that tells them apart. Rows that a chat model has been
    trained on, under whichever template, stay as they are.
    """
    check_vocabulary(model, tokenizer)
    before = tokenizer.template
    unseen = tokenizer.adopt(name)
    unseen += [token for token, found in tokenizer.added.items()
               if found.id >= model.config.vocab_size and token not in unseen]
    model.new_rows = bool(unseen)  # an adapter for this model has to bring its embeddings along
    model.resize(max(model.config.vocab_size, tokenizer.vocab_size))
    newline = tokenizer.encode("\n", continues=True)[-1]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in embeddings(model):
            for token in unseen:
                source = weight[tokenizer.eos_id if token == tokenizer.end else newline].clone()
                noise = torch.randn(len(source), generator=generator).to(source)
                weight[tokenizer.added[token].id] = source + 0.1 * source.std() * noise
    known = {OWN: "the checkpoint's own"}
    why = (", as in the checkpoint" if before == tokenizer.template != OWN else "" if before == tokenizer.template
           else f" instead of {known.get(before, before)}" if before else "" if name else
           ", for the checkpoint has none of its own")
    started = f"; {' '.join(unseen)} start from the embeddings of seen tokens" if unseen else ""
    return f"template {known.get(tokenizer.template, tokenizer.template)}{why}{started}"
