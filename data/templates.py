"""Chat templates: jinja texts, a checkpoint's own or one of data/templates/, rendered so that it is known which
characters are markup of the template and which are a message's own words.

    messages   user "Hi", assistant "Hello!"                                     template zephyr
    outline    <s><|user|>\\n ⟨0⟩ </s>\\n<|assistant|>\\n   ⟨1⟩    </s>   \\n     a mark stands in for each content
    parts      <s><|user|>\\n Hi  </s>\\n<|assistant|>\\n | Hello! </s> | \\n     and here the contents themselves
    loss                                                  |   1     1  |

Joined, the parts are to the character what transformers renders. A template that leaves a message out, or rewrites it
beyond recognition, is refused (TemplateError). A reply begins where the prompt that asks for it ends, so that what is
trained is what is asked for at inference, and ends with the first token of markup behind its words.
"""
from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

NAMED = {file.stem: file.read_text() for file in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
# The tokens that one of ours cannot do without; markup of the others is letters where the vocabulary has no such token.
TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>"),
          "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")}


class TemplateError(ValueError):
    """A chat template cannot render these messages; the message says what and why."""


class Part(NamedTuple):
    """A run of rendered characters."""

    text: str
    message: int | None  # whose own words these are; None: markup
    reply: int | None    # the message that, as a reply, these are part of; None: they stand outside replies


# ----------------------------------------------------------------- what transformers offers to a template

class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}, by which some templates mark what a model says: its body as it is."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=[_Generation, loopcontrols])
ENVIRONMENT.filters["tojson"] = _tojson
ENVIRONMENT.globals |= {"raise_exception": _raise_exception,
                        "strftime_now": lambda form: datetime.now().strftime(form)}


# ------------------------------------------------------------------------------------------ rendering

# Where a message keeps its words, and the names under which templates ask for them.
FIELDS = {"reasoning_content": ("reasoning_content", "reasoning", "thinking"), "content": ("content",)}
MARK = re.compile("\U000f0000([0-9]+)\U000f0001")  # private characters, which no text uses


def _words(messages: list[dict]) -> dict[int, str]:
    """The words of the messages by number: 2 i is the reasoning of message i, 2 i + 1 its content."""
    return {2 * i + k: m[field] for i, m in enumerate(messages) for k, field in enumerate(FIELDS) if field in m}


def _replace_words(messages: list[dict], words: Callable[[int, str], str]) -> list[dict]:
    return [{"role": m["role"]} | {field: words(2 * i + k, m[field]) for k, field in enumerate(FIELDS) if field in m}
            for i, m in enumerate(messages)]


def _mark(number: int, words: str) -> str:
    return f"\U000f0000{number}\U000f0001"


def _changes(words: str) -> Iterator[str]:
    """What templates make of words: nothing, or they trim them."""
    yield words
    for trim in (str.strip, str.lstrip, str.rstrip):
        yield trim(words)
        yield trim(words, "\n")


Pieces = list[tuple[str, int | None]]  # text, and the message whose words it is
Spot = tuple[int, int]                 # a place in pieces: which one, and the character in it


class ChatTemplate:
    """A template and the special tokens it may name. `tokens` finds tokens in its markup: one of them ends a reply."""

    def __init__(self, text: str, names: dict[str, str], tokens: re.Pattern):
        self.text, self.names, self.tokens = text, names, tokens
        self._outlines: dict[tuple, list] = {}
        self._places: dict[tuple, dict[int, tuple[Spot, Spot]]] = {}

    def __reduce__(self):
        return ChatTemplate, (self.text, self.names, self.tokens)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return ENVIRONMENT.from_string(self.text)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template is not jinja ({error}): mend it, or set template=") from None

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """The text that transformers' apply_chat_template makes of them."""
        given = [{"role": m["role"]} | {name: m[key] for key, names in FIELDS.items() if key in m for name in names}
                 for m in messages]
        try:
            return self._compiled.render(messages=given, tools=None, documents=None,
                                         add_generation_prompt=add_generation_prompt, **self.names)
        except TemplateError:
            raise
        except Exception as error:  # a template is a program, which may raise anything
            raise TemplateError(
                f"the chat template cannot render it ({error}): mend or drop it, or set template=") from None

    def parts(self, messages: list[dict], add_generation_prompt: bool = False) -> list[Part]:
        """The rendered messages. A reply is marked as one if it stands there as it does when it has just been made."""
        pieces, regular = self._pieces(messages, add_generation_prompt)
        if not regular:
            return _cut(pieces, self._find_replies(messages, pieces))
        key = _kinds(messages, add_generation_prompt)
        if key not in self._places:
            marked = _replace_words(messages, _mark)
            self._places[key] = self._find_replies(marked, self._pieces(marked, add_generation_prompt)[0])
        return _cut(pieces, self._places[key])

    def path(self, messages: list[dict]) -> tuple[list[Part], bool]:
        """A dialogue up to the end of its last message, a reply that has just been made; whether markup ends it.

        Where it does not, EOS has to be added. Some templates write a reply in another way once the dialogue goes on.
        """
        pieces, _ = self._pieces(messages, False)
        prompt, _ = self._pieces(messages[:-1], True)
        begin, end, finished = self._find_reply(pieces, prompt, len(messages) - 1)
        if begin is None:
            raise TemplateError("the chat template asks for a reply in another way than it writes one "
                                f"(...{_join(prompt)[-30:]!r}): set template=")
        if lost := self._left_out(messages, pieces, begin):
            raise TemplateError(f"the chat template leaves {lost} out: drop it, or set template=")
        parts = _cut(pieces, {len(messages) - 1: (_spot(pieces, begin), _spot(pieces, end))})
        while parts and parts[-1].reply is None:  # what the template writes behind a reply belongs to the next turn
            parts.pop()
        return parts, finished

    def _find_replies(self, messages: list[dict], whole: Pieces) -> dict[int, tuple[Spot, Spot]]:
        """Where in `whole` each reply stands as `path` has it."""
        places, text = {}, _join(whole)
        for i in (i for i, m in enumerate(messages) if m["role"] == "assistant"):
            upto = messages[: i + 1]
            try:
                own = self._pieces(upto, False)[0]
                begin, end, finished = self._find_reply(own, self._pieces(messages[:i], True)[0], i)
            except TemplateError:  # it can write this reply in a longer dialogue alone, as a part of a prompt
                continue
            stays = begin is not None and finished and text.startswith(_join(own)[:end])
            if stays and not self._left_out(upto, own, begin):
                places[i] = (_spot(whole, begin), _spot(whole, end))
        return places

    def _left_out(self, messages: list[dict], own: Pieces, begin: int) -> str:
        """What the template leaves out of the last message, a reply that has just been made; "" for nothing."""
        reply = len(messages) - 1
        if "reasoning_content" in messages[reply] and 2 * reply not in self._outline(messages, False):
            return "its reasoning_content"
        said = "".join(_join(own)[begin : self._said(own, reply)].split())
        return "a part of its reply" if len(said) < len("".join(messages[reply]["content"].split())) else ""

    def _find_reply(self, own: Pieces, prompt: Pieces, reply: int) -> tuple[int | None, int, bool]:
        """First and last character of the reply that ends `own`, and whether a token of markup ends it.

        It begins where its prompt ends; None if `own` does not begin with the prompt.
        """
        text, before = _join(own), _join(prompt)
        said = self._said(own, reply)
        found = self.tokens.search(text, said)
        return len(before) if text.startswith(before) else None, found.end() if found else said, bool(found)

    @staticmethod
    def _said(own: Pieces, reply: int) -> int:
        """The character at which the words of the reply end."""
        last = max((k for k, (_, message) in enumerate(own) if message == reply), default=-1)
        return sum(len(piece) for piece, _ in own[: last + 1])

    def _pieces(self, messages: list[dict], add_generation_prompt: bool) -> tuple[Pieces, bool]:
        """The rendered text, taken apart, and whether its markup is that of all messages of these roles."""
        outline, words = self._outline(messages, add_generation_prompt), _words(messages)
        text = self.render(messages, add_generation_prompt)
        pieces = _fill(outline, words, text)
        if pieces is not None:
            return pieces, True
        pieces = self._follow(messages, add_generation_prompt, outline)
        if pieces is None or _join(pieces) != text:
            raise TemplateError("the chat template rewrites it in a way that cannot be followed: mend or drop it, "
                                "or set template=")
        return pieces, False

    def _outline(self, messages: list[dict], add_generation_prompt: bool) -> list:
        """Markup and, between, the numbers of the words: [markup, number, markup, ..., markup]."""
        key = _kinds(messages, add_generation_prompt)
        if key not in self._outlines:
            found = MARK.split(self.render(_replace_words(messages, _mark), add_generation_prompt))
            found[1::2] = map(int, found[1::2])
            if any("\U000f0000" in markup for markup in found[::2]):
                raise TemplateError("the chat template rewrites texts: set template=")
            for i, m in enumerate(messages):
                if 2 * i + 1 not in found[1::2]:
                    raise TemplateError(f"the chat template leaves out the {m['role']} text of turn {i + 1}: "
                                        "drop that turn, or set template=")
            self._outlines[key] = found
        return self._outlines[key]

    def _follow(self, messages: list[dict], add_generation_prompt: bool, outline: list) -> Pieces | None:
        """What became of each text, found by rendering it alone among stand-ins; None if the markup changes too.

        Templates take thoughts out of replies, for one. A part of the markup before a reply may be the reply's own.
        """
        filled = list(outline)
        for k in range(1, len(outline), 2):
            number = outline[k]
            alone = _replace_words(messages, lambda n, w, number=number: w if n == number else _mark(n, w))
            found = MARK.split(self.render(alone, add_generation_prompt))
            between, rest = found[k - 1], found[: k - 1] + found[k:]
            if rest != [str(x) for x in outline[: k - 1] + outline[k + 2 :]] or not between.endswith(outline[k + 1]):
                return None
            between = between.removesuffix(outline[k + 1])
            shared = next((i for i, (a, b) in enumerate(zip(between, outline[k - 1], strict=False)) if a != b),
                          min(len(between), len(outline[k - 1])))
            if shared < len(outline[k - 1]) and messages[number // 2]["role"] != "assistant":
                return None
            filled[k - 1], filled[k] = between[:shared], between[shared:]
        return [(x, outline[k] // 2 if k % 2 else None) for k, x in enumerate(filled)]


def _kinds(messages: list[dict], add_generation_prompt: bool) -> tuple:
    """All that a template's markup usually depends on."""
    return add_generation_prompt, *((m["role"], "reasoning_content" in m) for m in messages)


def _fill(outline: list, words: dict[int, str], text: str) -> Pieces | None:
    """The text as the outline's markup with the words between, which may be trimmed; None if it is not that."""
    if not text.startswith(outline[0]):
        return None
    pieces: Pieces = [(outline[0], None)]
    at = len(outline[0])
    for number, markup in zip(outline[1::2], outline[2::2], strict=True):
        said = next((w for w in _changes(words[number]) if text.startswith(w + markup, at)), None)
        if said is None:
            return None
        pieces += [(said, number // 2), (markup, None)]
        at += len(said) + len(markup)
    return pieces if at == len(text) else None


def _join(pieces: Pieces) -> str:
    return "".join(text for text, _ in pieces)


def _spot(pieces: Pieces, at: int) -> Spot:
    """The place of character `at` of the joined pieces."""
    starts = [0, *accumulate(len(text) for text, _ in pieces)]
    k = bisect_right(starts, at) - 1
    return k, at - starts[k]


def _cut(pieces: Pieces, places: dict[int, tuple[Spot, Spot]]) -> list[Part]:
    """The pieces, cut where replies begin and end."""
    bounds = [bound for reply, (begin, end) in places.items() for bound in ((begin, reply), (end, None))]
    parts, reply = [], None
    for k, (text, message) in enumerate(pieces):
        at = 0
        while bounds and bounds[0][0][0] == k:
            (_, upto), follows = bounds.pop(0)
            parts.append(Part(text[at:upto], message, reply))
            at, reply = upto, follows
        parts.append(Part(text[at:], message, reply))
    return [part for part in parts if part.text]
