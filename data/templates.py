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
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from datetime import datetime
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

NAMED = {file.stem: file.read_text("utf-8") for file in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
# The tokens that one of ours cannot do without; markup of the others is letters where the vocabulary has no such token.
TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>"),
          "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")}


class TemplateError(ValueError):
    """A chat template or the vocabulary cannot render these messages; the message says what and why."""


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
#
# slot     where a text of a message goes: (the message, its field)
# outline  the markup of a template and the slots between: one more markup than slots
# pieces   the same with the texts in the slots, and with each the message whose words it is; None: markup
# spot     a place in pieces: (which piece, the character in it)
# part     a piece, cut in two where a reply begins or ends within it

# Where a message keeps its words, and the names under which templates ask for them.
FIELDS = {"reasoning_content": ("reasoning_content", "reasoning", "thinking"), "content": ("content",)}
MARK = re.compile("\U000f0000([0-9]+) ([a-z_]+)\U000f0001")  # private characters, which no text uses

MOST_OUTLINES = 1000  # kept: a server is asked with dialogues of any shape

Slot = tuple[int, str]
Outline = tuple[list[str], list[Slot]]
Pieces = list[tuple[str, int | None]]
Spot = tuple[int, int]


def _marked(messages: list[dict], shown: Slot | None = None) -> list[dict]:
    """The messages with a mark in place of every text, but for the one of slot `shown`."""
    return [{"role": m["role"]} | {field: m[field] if (i, field) == shown else f"\U000f0000{i} {field}\U000f0001"
                                   for field in FIELDS if field in m} for i, m in enumerate(messages)]


def _changes(words: str) -> Iterator[str]:
    """What templates make of words: nothing, or they trim them."""
    yield words
    for trim in (str.strip, str.lstrip, str.rstrip):
        yield trim(words)
        yield trim(words, "\n")


class ChatTemplate:
    """A template and the special tokens it may name. `tokens` finds tokens in its markup: one of them ends a reply."""

    def __init__(self, text: str, names: dict[str, str], tokens: re.Pattern):
        self.text, self.names, self.tokens = text, names, tokens
        self._outlines: dict[tuple, Outline] = {}
        self._replies: dict[tuple, dict[int, tuple[Spot, Spot]]] = {}

    def __reduce__(self):
        return ChatTemplate, (self.text, self.names, self.tokens)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return ENVIRONMENT.from_string(self.text)
        except Exception as error:  # of too deep a nesting, Python's
            raise TemplateError(f"the chat template is not jinja ({error}): mend it, or set template=") from None

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """The text that transformers' apply_chat_template makes of them."""
        given = [{"role": m["role"]} | {name: m[key] for key, names in FIELDS.items() if key in m for name in names}
                 for m in messages]
        try:
            return self._compiled.render(messages=given, tools=None, documents=None,
                                         add_generation_prompt=add_generation_prompt, **self.names)
        except (TemplateError, MemoryError):
            raise
        except Exception as error:  # a template is a program, which may raise anything
            raise TemplateError(
                f"the chat template cannot render it ({error}): mend or drop it, or set template=") from None

    def parts(self, messages: list[dict], add_generation_prompt: bool = False) -> list[Part]:
        """The rendered messages. A reply is marked as one if it stands there as it does when it has just been made.

        Where replies are is found once, with marks as texts: texts in the same outline make the same pieces.
        """
        pieces, regular = self._pieces(messages, add_generation_prompt)
        if not regular:
            return _cut(pieces, self._find_replies(messages, pieces))
        key = _kinds(messages, add_generation_prompt)
        if key not in self._replies:
            marked = _marked(messages)
            self._replies[key] = self._find_replies(marked, self._pieces(marked, add_generation_prompt)[0])
        return _cut(pieces, self._replies[key])

    def path(self, messages: list[dict]) -> tuple[list[Part], bool]:
        """A dialogue up to the end of its last message, a reply just made, and if markup ends it (else add EOS)."""
        pieces, begin, end, finished = self._last_reply(messages)
        parts = _cut(pieces, {len(messages) - 1: (_spot(pieces, begin), _spot(pieces, end))})
        while parts and parts[-1].reply is None:  # what the template writes behind a reply belongs to the next turn
            parts.pop()
        return parts, finished

    def _find_replies(self, messages: list[dict], whole: Pieces) -> dict[int, tuple[Spot, Spot]]:
        """First and last spot in `whole` of each reply that stands there as `path` has it."""
        replies, text = {}, _join(whole)
        for i in (i for i, m in enumerate(messages) if m["role"] == "assistant"):
            try:
                own, begin, end, finished = self._last_reply(messages[: i + 1])
            except TemplateError:  # it can write this reply in a longer dialogue alone, as a part of a prompt
                continue
            if finished and text.startswith(_join(own)[:end]):
                replies[i] = (_spot(whole, begin), _spot(whole, end))
        return replies

    def _last_reply(self, messages: list[dict]) -> tuple[Pieces, int, int, bool]:
        """The pieces, where the reply that ends them begins (as its prompt ends) and ends, and if a token ends it."""
        reply = len(messages) - 1
        pieces, prompt = self._pieces(messages, False)[0], _join(self._pieces(messages[:-1], True)[0])
        last = max((k for k, (_, message) in enumerate(pieces) if message == reply), default=-1)
        text, begin, said = _join(pieces), len(prompt), len(_join(pieces[: last + 1]))  # said: where its words end
        if not text.startswith(prompt):
            raise TemplateError("the chat template asks for a reply in another way than it writes one "
                                f"(...{prompt[-30:]!r}): set template=")
        lost = ""
        if len("".join(text[begin:said].split())) < len("".join(messages[reply]["content"].split())):
            lost = "a part of its reply"
        if "reasoning_content" in messages[reply] and \
                (reply, "reasoning_content") not in self._outline(messages, False)[1]:
            lost = "its reasoning_content"
        if lost:
            raise TemplateError(f"the chat template leaves {lost} out: drop it, or set template=")
        found = self.tokens.search(text, said)
        return pieces, begin, found.end() if found else said, bool(found)

    def _pieces(self, messages: list[dict], add_generation_prompt: bool) -> tuple[Pieces, bool]:
        """The rendered text, taken apart, and whether its markup is that of all messages of these roles."""
        outline = self._outline(messages, add_generation_prompt)
        text = self.render(messages, add_generation_prompt)
        pieces = _fill(outline, messages, text)
        if pieces is not None:
            return pieces, True
        pieces = self._follow(messages, add_generation_prompt, outline)
        if pieces is None or _join(pieces) != text:
            raise TemplateError("the chat template rewrites it in a way that cannot be followed: mend or drop it, "
                                "or set template=")
        return pieces, False

    def _outline(self, messages: list[dict], add_generation_prompt: bool) -> Outline:
        key = _kinds(messages, add_generation_prompt)
        if key not in self._outlines:
            if len(self._outlines) >= MOST_OUTLINES:
                self._outlines.clear()
                self._replies.clear()
            markup, slots = self._render_marked(messages, add_generation_prompt)
            if any("\U000f0000" in text for text in markup):
                raise TemplateError("the chat template rewrites texts: set template=")
            for i, m in enumerate(messages):
                if (i, "content") not in slots:
                    raise TemplateError(f"the chat template leaves out the {m['role']} text of turn {i + 1}: "
                                        "drop that turn, or set template=")
            self._outlines[key] = markup, slots
        return self._outlines[key]

    def _render_marked(self, messages: list[dict], add_generation_prompt: bool, shown: Slot | None = None) -> Outline:
        found = MARK.split(self.render(_marked(messages, shown), add_generation_prompt))
        return found[::3], [(int(i), field) for i, field in zip(found[1::3], found[2::3], strict=True)]

    def _follow(self, messages: list[dict], add_generation_prompt: bool, outline: Outline) -> Pieces | None:
        """What became of each text, found by rendering it alone among marks; None if the markup changes too.

        A template that takes thoughts out of replies, for one, makes of "<think>Hm.</think>Hello!" in slot ⟨1⟩

            outline    ⟨0⟩ </s>\\n<|assistant|>\\n   ⟨1⟩   </s>
            rendered   ⟨0⟩ </s>\\n<|assistant|>\\n Hello! </s>     between the same markup stands what became of it

        A part of the markup before a reply may be the reply's own: it is taken as far as both have it.
        """
        markup, slots = outline
        before, texts = list(markup), []
        for k, slot in enumerate(slots):
            found, others = self._render_marked(messages, add_generation_prompt, shown=slot)
            if others != slots[:k] + slots[k + 1 :] or not found[k].endswith(markup[k + 1]) or \
                    found[:k] + found[k + 1 :] != markup[:k] + markup[k + 2 :]:
                return None
            between = found[k].removesuffix(markup[k + 1])
            shared = len(os.path.commonprefix([between, markup[k]]))
            if shared < len(markup[k]) and messages[slot[0]]["role"] != "assistant":
                return None
            before[k] = between[:shared]
            texts.append(between[shared:])
        pieces: Pieces = [(before[0], None)]
        for (message, _), text, behind in zip(slots, texts, before[1:], strict=True):
            pieces += [(text, message), (behind, None)]
        return pieces


def _kinds(messages: list[dict], add_generation_prompt: bool) -> tuple:
    """All that a template's markup usually depends on."""
    return add_generation_prompt, *((m["role"], "reasoning_content" in m) for m in messages)


def _fill(outline: Outline, messages: list[dict], text: str) -> Pieces | None:
    """The text as the outline's markup with the words between, which may be trimmed; None if it is not that."""
    markup, slots = outline
    if not text.startswith(markup[0]):
        return None
    pieces: Pieces = [(markup[0], None)]
    at = len(markup[0])
    for (message, field), behind in zip(slots, markup[1:], strict=True):
        words = messages[message][field]
        said = next((w for w in _changes(words) if text.startswith(w + behind, at)), None)
        if said is None:
            return None
        pieces += [(said, message), (behind, None)]
        at += len(said) + len(behind)
    return pieces if at == len(text) else None


def _join(pieces: Pieces) -> str:
    return "".join(text for text, _ in pieces)


def _spot(pieces: Pieces, at: int) -> Spot:
    """The spot of character `at` of the joined pieces."""
    starts = [0, *accumulate(len(text) for text, _ in pieces)]
    k = bisect_right(starts, at) - 1
    return k, at - starts[k]


def _cut(pieces: Pieces, replies: dict[int, tuple[Spot, Spot]]) -> list[Part]:
    """The pieces, cut where replies begin and end."""
    bounds = [bound for reply, (begin, end) in replies.items() for bound in ((begin, reply), (end, None))]
    parts, reply = [], None
    for k, (text, message) in enumerate(pieces):
        at = 0
        while bounds and bounds[0][0][0] == k:
            (_, upto), follows = bounds.pop(0)
            parts.append(Part(text[at:upto], message, reply))
            at, reply = upto, follows
        parts.append(Part(text[at:], message, reply))
    return [part for part in parts if part.text]
