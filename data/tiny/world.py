"""The tiny world: ten kinds of task about forty people, with a gold grader for every reply.

A closed vocabulary of some 400 words (words.toml) in which a model of three million parameters can be a chatbot on a
laptop, and in which "helpful" is a number: each task grades any reply from 0 to 1. The grader plays the
human. It labels preferences (`data/tiny/pairs.py`) and measures the end result (`judge.py`); training sees
demonstrations and labels, never a grade.

A task is six functions of an `item`, a plain dict that holds what the task is about:

    draw(rng)          a new item                     ask(item, rng)            the user's words
    key(item)          its content, as text           answer(item, style, rng)  a demonstrator's reply
    follow(item, rng)  next turn: item and words      grade(item, reply)        0 (useless) to 1 (perfect)

Demonstrators come in three styles. `careful` replies are right and in the form users like best; `terse` ones
are right and bare; `sloppy` ones carry one realistic mistake. SFT imitates the mixture: nothing in a
demonstration tells which style users prefer. Preferences do.

Hold-out is by content, not by wording: `split(key)` gives one key in eight to test and one in sixteen to dev,
and no corpus, pretraining included, holds a task whose key is held out.
"""
import ast
import hashlib
import operator
import random
import re
import tomllib
from pathlib import Path

# --------------------------------------------------------------------------------------- the words

WORDS = tomllib.loads(Path(__file__).with_name("words.toml").read_text())
SHE, HE, PLACES, CLASSES, PAST, FACTS = (WORDS[key] for key in ("she", "he", "places", "classes", "past", "facts"))
ANIMALS, FRUITS, COLOURS, DRINKS, OBJECTS = (CLASSES[key] for key in ("animal", "fruit", "colour", "drink", "object"))
EVENTS, MOODS, FEELINGS, OFFERS = ({True: WORDS[f"good_{kind}"], False: WORDS[f"bad_{kind}"]}
                                   for kind in ("events", "moods", "feelings", "offers"))
ALL_MOODS, NAMES, SAY = MOODS[True] + MOODS[False], SHE + HE, WORDS["say"]
COUNTS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}

_draw = random.Random("the people of the tiny world")
PEOPLE = {name: {key: _draw.choice(CLASSES[fact["values"]]) for key, fact in FACTS.items()} for name in NAMES}


def an(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def plural(word: str) -> str:
    if word in ("city", "cherry"):
        return word[:-1] + "ies"
    return word + ("es" if word in ("box", "brush", "bus", "peach") else "s")


def she(name: str) -> str:
    return "she" if name in SHE else "he"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def listing(things: list[str]) -> str:
    return things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]


def other(rng: random.Random, values, *excluded):
    return rng.choice([v for v in values if v not in excluded])


def pick(rng: random.Random, shares: dict[str, float]) -> str:
    return rng.choices(list(shares), list(shares.values()))[0]


def say(rng: random.Random, what: str, **values) -> str:
    """One of the ways to say something (words.toml), with its values."""
    return rng.choice(SAY[what]).format(**values)


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+|\d+", text)


def sentences(text: str) -> list[str]:
    return [s.strip() for s in re.findall(r"[^.!?]+[.!?]", text)]


def mentioned(text: str, values) -> set[str]:
    said = {w.lower() for w in words(text)}
    return {v for v in values if v.lower() in said}


def pattern(form: str, **values: list[str]) -> re.Pattern:
    """A form such as "The {b} was {m}." as a pattern that accepts any of the values given for b and m."""
    parts = re.split(r"\{(\w)\}", form)  # text and names of holes in turn
    return re.compile("".join(f"(?:{'|'.join(values[p])})" if i % 2 else re.escape(p) for i, p in enumerate(parts)))


# ----------------------------------------------------------------------------------- the ten tasks

class Generation:
    """A story of n sentences with a person, an animal and a place."""

    OPENINGS, FORMS = SAY["story_openings"], SAY["story_lines"]
    PATTERNS = [pattern(form, n=NAMES, s=["She", "He"], a=[an(x) for x in ANIMALS], b=ANIMALS, p=PLACES,
                        m=ALL_MOODS, d=DRINKS) for form in FORMS + sum(OPENINGS, [])]

    def draw(self, rng):
        return {"name": rng.choice(NAMES), "animal": rng.choice(ANIMALS), "place": rng.choice(PLACES),
                "n": rng.randint(2, 5)}

    def key(self, item):
        return f"{item['name']} {item['animal']} {item['place']} {item['n']}"

    def ask(self, item, rng):
        about = f"{item['name']}, {an(item['animal'])} and the {item['place']}"
        return say(rng, "story", about=about, n=COUNTS[item["n"]])

    def follow(self, item, rng):
        if rng.random() < 0.6:
            n = other(rng, range(2, 6), item["n"])
            return item | {"n": n}, say(rng, "story_length", n=COUNTS[n])
        name = other(rng, NAMES, item["name"])
        return item | {"name": name}, say(rng, "story_name", name=name)

    def story(self, item, rng):
        lines = list(rng.choice(self.OPENINGS[:1] if item["n"] == 1 else self.OPENINGS))
        lines += rng.sample(self.FORMS, item["n"] - len(lines))
        name, animal, moods = item["name"], item["animal"], ALL_MOODS
        fill = {"n": name, "s": capital(she(name)), "a": an(animal), "b": animal, "p": item["place"]}
        return " ".join(line.format(**fill, m=rng.choice(moods), d=rng.choice(DRINKS)) for line in lines)

    def answer(self, item, style, rng):
        if style == "careful":
            return self.story(item, rng) + " The end."
        if style == "terse":  # no ending, and a sentence short of a long story
            return self.story(item | {"n": item["n"] - (item["n"] > 3)}, rng)
        values = {"name": NAMES, "animal": ANIMALS, "n": [n for n in range(1, 7) if abs(n - item["n"]) > 1]}
        wrong = rng.choice(list(values))
        return self.story(item | {wrong: other(rng, values[wrong], item[wrong])}, rng)

    def grade(self, item, reply):
        told = reply.strip().removesuffix("The end.")
        lines = sentences(told)
        wanted = {item["name"], item["animal"], item["place"]}
        present = mentioned(told, NAMES + ANIMALS + PLACES)
        proper = {line for line in lines if any(p.fullmatch(line) for p in self.PATTERNS)}
        score = 0.15 * len(wanted & present) - 0.15 * bool(present - wanted) + 0.2 * len(proper) / max(len(lines), 1)
        score += {0: 0.25, 1: 0.08}.get(abs(len(lines) - item["n"]), 0)
        return score + 0.1 * (reply.strip().endswith("The end.") and bool(lines))


class OpenQA:
    """A fact about a person, learnt in pretraining only."""

    def draw(self, rng):
        return {"name": rng.choice(NAMES), "fact": rng.choice(list(FACTS))}

    def key(self, item):
        return f"{item['name']} {item['fact']}"

    def ask(self, item, rng):
        return rng.choice(FACTS[item["fact"]]["questions"]).format(n=item["name"])

    def follow(self, item, rng):
        if rng.random() < 0.5:
            fact = other(rng, FACTS, item["fact"])
            her = "her" if item["name"] in SHE else "his"
            return item | {"fact": fact}, FACTS[fact]["follow_up"].format(s=she(item["name"]), p=her)
        name = other(rng, NAMES, item["name"])
        return item | {"name": name}, f"And {name}?"

    def answer(self, item, style, rng):
        fact, value = FACTS[item["fact"]], PEOPLE[item["name"]][item["fact"]]
        if style == "sloppy":
            value = other(rng, CLASSES[fact["values"]], value)
        if style == "terse":
            return capital(value) + "."
        return fact["answer"].format(n=item["name"], v=value, a=an(value))

    def grade(self, item, reply):
        value = PEOPLE[item["name"]][item["fact"]]
        said = mentioned(reply, CLASSES[FACTS[item["fact"]]["values"]])
        right = 0.7 if said == {value} else 0.2 if value in said else 0
        sentence = reply.strip().endswith(".") and item["name"] in words(reply) and 3 <= len(words(reply)) <= 10
        return right + 0.3 * (sentence and right > 0)


class Brainstorm:
    """n things of one kind, perhaps without some of them."""

    def draw(self, rng):
        kind, n = rng.choice(list(CLASSES)), rng.randint(2, 5)
        return {"kind": kind, "n": n, "without": [rng.choice(CLASSES[kind])] if rng.random() < 0.6 else []}

    def key(self, item):
        return f"{item['kind']} {item['n']} {' '.join(sorted(item['without']))}"

    def ask(self, item, rng):
        but = f", but not {listing(item['without'])}" if item["without"] else ""
        return say(rng, "brainstorm", n=COUNTS[item["n"]], kinds=plural(item["kind"]), but=but)

    def follow(self, item, rng):
        if rng.random() < 0.5 or len(item["without"]) > 1:
            n = other(rng, range(2, 6), item["n"])
            return item | {"n": n}, say(rng, "brainstorm_count", n=COUNTS[n])
        without = other(rng, CLASSES[item["kind"]], *item["without"])
        return item | {"without": item["without"] + [without]}, say(rng, "brainstorm_without", thing=without)

    def answer(self, item, style, rng):
        allowed = [v for v in CLASSES[item["kind"]] if v not in item["without"]]
        n = min(item["n"], len(allowed))
        things = rng.sample(allowed, n)
        if style == "sloppy":
            slip = rng.choice(["without", "kind", "short"])
            if slip == "short":
                things.pop()
            else:
                stranger = other(rng, CLASSES, item["kind"])
                thing = rng.choice(slip == "without" and item["without"] or CLASSES[stranger])
                things[rng.randrange(n)] = thing
        if style == "terse" or (style == "sloppy" and rng.random() < 0.5):
            return ", ".join(things) + "."
        return " ".join(f"{i}. {thing}" for i, thing in enumerate(things, 1))

    def grade(self, item, reply):
        numbers = [int(x) for x in re.findall(r"(\d+)\.", reply)]
        given = [w for w in re.findall(r"[A-Za-z]+", reply) if w != "and"]
        good = {w for w in given if w in CLASSES[item["kind"]] and w not in item["without"]}
        score = 0.7 * min(len(good), item["n"]) / max(item["n"], len(given)) * (0.6 if len(given) > item["n"] else 1)
        return score + 0.3 * (numbers == list(range(1, item["n"] + 1)) and len(given) == item["n"])


class Chat:
    """Somebody says how they are: greet by name, feel with them, offer one fitting thing."""

    def news(self, rng):
        good = rng.random() < 0.5
        news = f"I {rng.choice(EVENTS[good])}" if rng.random() < 0.7 else f"I am {rng.choice(MOODS[good])}"
        return {"good": good, "news": news}

    def draw(self, rng):
        return {"name": rng.choice(NAMES)} | self.news(rng)

    def key(self, item):
        return f"{item['name']} {item['news']}"

    def ask(self, item, rng):
        return say(rng, "chat", **item)

    def follow(self, item, rng):
        new = item | self.news(rng)
        return new, say(rng, "chat_news", **new)

    def answer(self, item, style, rng):
        good, name = item["good"], item["name"]
        if style == "sloppy":
            slip = rng.choice(["feeling", "name"])
            good, name = (not good, name) if slip == "feeling" else (good, other(rng, NAMES, name))
        feeling = rng.choice(FEELINGS[good])
        if style == "terse":
            return feeling
        greeting = f"{rng.choice(['Hi', 'Hello'])} {name}."
        return f"{greeting} {feeling}" + (f" {rng.choice(OFFERS[good])}" if style == "careful" else "")

    def grade(self, item, reply):
        greeted = re.match(r"(Hi|Hello|Hey),? (\w+)", reply.strip())
        with_joy, with_sorrow = (bool(mentioned(reply, x)) for x in (["glad", "happy", "great"], ["sorry", "sad"]))
        felt = with_joy != with_sorrow and with_joy == item["good"]
        questions = [s for s in sentences(reply) if s.endswith("?")]
        offered = len(questions) == 1 and questions[0] in OFFERS[item["good"]]
        return 0.25 * bool(greeted and greeted[2] == item["name"]) + 0.45 * felt + 0.3 * offered


class Rewrite:
    """The same sentence in another tense, with another name, or at another place."""

    def draw(self, rng):
        verbs, things = rng.sample(list(PAST), rng.randint(1, 2)), rng.sample(OBJECTS, 2)
        source = {"name": rng.choice(NAMES), "did": [list(x) for x in zip(verbs, things, strict=False)],
                  "place": rng.choice(PLACES), "past": False}
        return self.change(source, source, rng)

    def change(self, source, target, rng):
        what = rng.choice(["name", "place", "past", "past"])
        new = not target["past"] if what == "past" else other(rng, NAMES if what == "name" else PLACES, target[what])
        return {"source": source, "before": target, "target": target | {what: new}, "what": what}

    def sentence(self, of):
        did = [f"{PAST[verb] if of['past'] else verb} {an(thing)}" for verb, thing in of["did"]]
        return f"{of['name']} {listing(did)} at the {of['place']}."

    def key(self, item):
        return self.sentence(item["source"])

    def order(self, item):
        new = item["target"][item["what"]]
        return {"name": f"Use the name {new}", "place": f"Change the place to the {new}",
                "past": f"Put it in the {'past' if new else 'present'} tense"}[item["what"]]

    def ask(self, item, rng):
        return say(rng, "rewrite", order=self.order(item), sentence=self.sentence(item["source"]))

    def follow(self, item, rng):
        item = self.change(item["source"], item["target"], rng)
        order = self.order(item)
        return item, rng.choice([f"Now {order[0].lower()}{order[1:]}.", f"{order} too."])

    def answer(self, item, style, rng):
        right = self.sentence(item["target"])
        if style == "sloppy":
            if rng.random() < 0.5:
                return self.sentence(item["before"])
            verb, thing = item["target"]["did"][0]
            return right.replace(f" {an(thing)}", f" {an(other(rng, OBJECTS, thing))}", 1)
        return right.removesuffix(".") if style == "terse" else right

    def grade(self, item, reply):
        said, right = words(reply), words(self.sentence(item["target"]))
        if said == right:
            return 0.85 + 0.15 * reply.strip().endswith(".")
        if said in (words(self.sentence(item["before"])), words(self.sentence(item["source"]))):
            return 0.15
        return 0.5 * sum(x == y for x, y in zip(said, right, strict=False)) / max(len(said), len(right))


class Summarize:
    """Who did what, with what and where, out of an anecdote of four or five sentences."""

    def draw(self, rng):
        return {"name": rng.choice(NAMES), "verb": rng.choice(list(PAST.values())), "colour": rng.choice(COLOURS),
                "object": rng.choice(OBJECTS), "place": rng.choice(PLACES),
                "asides": [rng.randrange(3), rng.randrange(4)], "mood": rng.choice(ALL_MOODS),
                "home": rng.random() < 0.5, "short": False}

    def key(self, item):
        return f"{item['name']} {item['verb']} {item['colour']} {item['object']} {item['place']}"

    def anecdote(self, item):
        s = she(item["name"])
        aside = SAY["anecdote_asides"][item["asides"][1]].format(o=item["object"], s=capital(s), m=item["mood"])
        told = [SAY["anecdote_openings"][item["asides"][0]], f"{item['name']} went to the {item['place']}.",
                f"There {s} {item['verb']} {an(item['colour'])} {item['object']}.", aside]
        return " ".join(told + [f"Then {s} went home."] * item["home"])

    def ask(self, item, rng):
        return say(rng, "summarize", story=self.anecdote(item))

    def follow(self, item, rng):
        if not item["short"] and rng.random() < 0.6:
            return item | {"short": True}, say(rng, "summary_shorter")
        name = other(rng, NAMES, item["name"])
        return item | {"name": name}, say(rng, "summary_name", name=name)

    def answer(self, item, style, rng):
        if style == "sloppy":
            if rng.random() < 0.3:
                return f"{item['name']} went to the {item['place']}. {capital(she(item['name']))} was {item['mood']}."
            values = {"object": OBJECTS, "place": PLACES, "colour": COLOURS}
            wrong = rng.choice(list(values))
            item = item | {wrong: other(rng, values[wrong], item[wrong])}
        brief = f"{item['name']} {item['verb']} {an(item['object'])}."
        full = f"{item['name']} {item['verb']} {an(item['colour'])} {item['object']} at the {item['place']}."
        if style == "terse":  # bare at first, and then not any shorter
            return full if item["short"] else brief
        return brief if item["short"] else full

    def grade(self, item, reply):
        count, length = len(sentences(reply)), len(words(reply))
        name, thing, colour, place, verb = (
            item[field] in mentioned(reply, [item[field]]) for field in ("name", "object", "colour", "place", "verb"))
        if item["short"]:
            score = 0.25 * name + 0.25 * thing + 0.2 * verb + 0.3 * (count == 1 and length <= 5)
        else:
            score = 0.15 * name + 0.2 * thing + 0.1 * colour + 0.2 * place + 0.15 * verb
            score += 0.2 * (count == 1 and 4 <= length <= 11)
        true = {item[field] for field in ("name", "object", "colour", "place")}
        invented = mentioned(reply, NAMES + OBJECTS + COLOURS + PLACES) - true
        return max(0, (score - 0.2 * bool(invented)) * (0.6 if count > 1 else 1))


class Coding:
    """A Python function of x from a chain of two or three sums."""

    SIGNS = {"add": "+", "subtract": "-", "multiply": "*"}
    PYTHON = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}

    def draw(self, rng):
        return {"ops": [[rng.choice(list(self.SIGNS)), rng.randint(2, 9)] for _ in range(2)]}

    def key(self, item):
        return " ".join(f"{op} {n}" for op, n in item["ops"])

    def step(self, op, n, ending=""):
        if op == "multiply":
            return f"multipl{'ies' if ending else 'y'} by {n}"
        return f"{op}{ending} {n}"

    def ask(self, item, rng):
        chain = " and then ".join(self.step(op, n, "s") for op, n in item["ops"])
        orders = " and then ".join(self.step(op, n) for op, n in item["ops"])
        return say(rng, "coding", chain=chain, orders=orders)

    def follow(self, item, rng):
        ops = [list(x) for x in item["ops"]]
        if len(ops) < 3 and rng.random() < 0.5:
            ops.append([rng.choice(list(self.SIGNS)), rng.randint(2, 9)])
            return {"ops": ops}, f"Then also {self.step(*ops[-1])}."
        ops[-1][1] = other(rng, range(2, 10), ops[-1][1])
        return {"ops": ops}, f"{capital(self.step(*ops[-1]))} instead."

    def expression(self, ops):
        text, loose = "x", False  # loose: a sum that a product must put in brackets
        for op, n in ops:
            text = f"{f'({text})' if loose and op == 'multiply' else text} {self.SIGNS[op]} {n}"
            loose = op != "multiply"
        return text

    def answer(self, item, style, rng):
        ops = [list(x) for x in item["ops"]]
        if style == "sloppy":
            wrong, part = rng.choice(ops), int(rng.random() >= 0.5)  # part: of a step, its sign or its number
            wrong[part] = other(rng, (self.SIGNS, range(2, 10))[part], wrong[part])
        text = self.expression(ops)
        return text if style == "terse" else f"def f(x): return {text}"

    def run(self, node, x):
        """The value of a parsed expression of x, whole numbers, + - * and brackets; anything else is a ValueError."""
        if isinstance(node, ast.BinOp) and type(node.op) in self.PYTHON:
            return self.PYTHON[type(node.op)](self.run(node.left, x), self.run(node.right, x))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name) and node.id == "x":
            return x
        raise ValueError("not a sum")

    def grade(self, item, reply):
        form = re.match(r"def f\(x\): return (.+)$", reply.strip())
        try:
            tree = ast.parse((form[1] if form else reply).strip(), mode="eval").body
            wanted = ast.parse(self.expression(item["ops"]), mode="eval").body
            right = [self.run(tree, x) == self.run(wanted, x) for x in (0, 1, 3, 10)]
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return 0.0
        return (0.75 if all(right) else 0.2 * sum(right) / 4) + 0.25 * bool(form)


class Classify:
    """Happy or sad, by what came last; or which of two kinds a word is."""

    def draw(self, rng):
        if rng.random() < 0.5:
            good = [rng.random() < 0.5 for _ in range(rng.randint(1, 2))]
            if len(good) == 2:
                good[1] = not good[0]
            return {"name": rng.choice(NAMES), "events": [rng.choice(EVENTS[g]) for g in good],
                    "labels": ["happy", "sad"], "right": "happy" if good[-1] else "sad"}
        kinds = rng.sample(list(CLASSES), 2)
        right = rng.choice(kinds)
        return {"word": rng.choice(CLASSES[right]), "labels": kinds, "right": right}

    def text(self, item):
        if "word" in item:
            return item["word"]
        first, *then = item["events"]
        return f"{item['name']} {first}" + "".join(f", but then {she(item['name'])} {event}" for event in then)

    def key(self, item):
        return f"{self.text(item)} {' '.join(sorted(item['labels']))}"

    def ask(self, item, rng):
        labels = " or ".join(item["labels"])
        return say(rng, "classify", labels=labels, capital=capital(labels), text=self.text(item))

    def follow(self, item, rng):
        while True:
            new = self.draw(rng)
            if "word" in item and "word" in new:
                new["right"] = rng.choice(item["labels"])
                new |= {"labels": item["labels"], "word": rng.choice(CLASSES[new["right"]])}
            if ("word" in item) == ("word" in new):
                return new, f"And this? {self.text(new)}."

    def answer(self, item, style, rng):
        label = item["right"] if style != "sloppy" else other(rng, item["labels"], item["right"])
        if style == "terse" or (style == "sloppy" and rng.random() < 0.5):
            return capital(label) + "."
        return f"The answer is {label}."

    def grade(self, item, reply):
        if mentioned(reply, item["labels"]) != {item["right"]}:
            return 0.0
        return 0.75 + 0.25 * (reply.strip() == f"The answer is {item['right']}.")


class ClosedQA:
    """A question that a short passage answers: who has what, its colour, or how many are left."""

    def draw(self, rng):
        if rng.random() < 0.35:
            had = rng.randint(4, 9)
            giver, taker = rng.sample(NAMES, 2)
            return {"giver": giver, "taker": taker, "thing": plural(rng.choice(FRUITS + OBJECTS)), "had": had,
                    "gave": rng.randint(2, had - 2), "about": "left"}
        n = rng.randint(2, 3)
        facts = [*map(list, zip(rng.sample(NAMES, n), rng.sample(COLOURS, n), rng.sample(OBJECTS, n), strict=True))]
        return {"facts": facts, "about": [rng.randrange(n), rng.choice(["who", "colour"])]}

    def passage(self, item):
        if "had" in item:
            return (f"{item['giver']} had {item['had']} {item['thing']}. "
                    f"{capital(she(item['giver']))} gave {item['gave']} to {item['taker']}.")
        return " ".join(f"{name} has {an(colour)} {thing}." for name, colour, thing in item["facts"])

    key = passage

    def question(self, item):
        if item["about"] == "left":
            return f"How many {item['thing']} does {item['giver']} have now?"
        if item["about"] == "given":
            return f"How many {item['thing']} did {item['taker']} get?"
        name, colour, thing = item["facts"][item["about"][0]]
        return f"Who has the {thing}?" if item["about"][1] == "who" else f"What colour is the {thing}?"

    def ask(self, item, rng):
        return say(rng, "closed_qa", passage=self.passage(item), question=self.question(item))

    def follow(self, item, rng):
        if "had" in item:
            new = item | {"about": "given" if item["about"] == "left" else "left"}
        else:
            asked = [[i, what] for i in range(len(item["facts"])) for what in ("who", "colour")]
            new = item | {"about": other(rng, asked, item["about"])}
        return new, f"And {self.question(new)[0].lower()}{self.question(new)[1:]}"

    def solve(self, item):
        """The full answer, its value, and the values a wrong answer could name."""
        if "had" in item:
            who, verb = (item["giver"], "has") if item["about"] == "left" else (item["taker"], "got")
            value = str(item["had"] - item["gave"] if item["about"] == "left" else item["gave"])
            return f"{who} {verb} {value} {item['thing']}.", value, [str(n) for n in range(10)]
        name, colour, thing = item["facts"][item["about"][0]]
        if item["about"][1] == "who":
            return f"{name} has the {thing}.", name, NAMES
        return f"The {thing} is {colour}.", colour, COLOURS

    def answer(self, item, style, rng):
        full, value, values = self.solve(item)
        if style == "sloppy":
            passage = sorted(mentioned(self.passage(item), values) - {value})
            wrong = rng.choice(passage or [v for v in values if v != value])
            full, value = re.sub(rf"\b{value}\b", wrong, full), wrong
        if style == "terse" or (style == "sloppy" and rng.random() < 0.5):
            return capital(value) + "."
        return full

    def grade(self, item, reply):
        full, value, values = self.solve(item)
        if words(reply) == words(full):
            return 1.0
        said = mentioned(reply, values)
        return 0.7 if said == {value} else 0.1 if value in said else 0.0


class Extract:
    """All things of one kind that a text mentions."""

    KINDS = ["animal", "fruit", "object", "tool", "vehicle"]

    def draw(self, rng):
        kinds = rng.sample(self.KINDS, 3)
        things = [[kind, word] for kind in kinds for word in rng.sample(CLASSES[kind], rng.randint(1, 2))]
        rng.shuffle(things)
        return {"names": rng.sample(NAMES, 2), "verbs": rng.sample(list(PAST.values()), 2), "things": things,
                "kind": rng.choice(kinds)}

    def text(self, item):
        half = (len(item["things"]) + 1) // 2
        parts = [listing([an(word) for _, word in part]) for part in (item["things"][:half], item["things"][half:])]
        return " ".join(f"{name} {verb} {part}." for name, verb, part in
                        zip(item["names"], item["verbs"], parts, strict=True))

    key = text

    def ask(self, item, rng):
        return say(rng, "extract", kinds=plural(item["kind"]), text=self.text(item))

    def follow(self, item, rng):
        kind = other(rng, sorted({kind for kind, _ in item["things"]}), item["kind"])
        return item | {"kind": kind}, f"And the {plural(kind)}?"

    def answer(self, item, style, rng):
        wanted = [word for kind, word in item["things"] if kind == item["kind"]]
        if style == "sloppy":
            if len(wanted) > 1 and rng.random() < 0.6:
                wanted.pop(rng.randrange(len(wanted)))
            else:
                place, strangers = rng.randint(0, 1), [word for kind, word in item["things"] if kind != item["kind"]]
                wanted.insert(place, rng.choice(strangers))
        if style == "terse" or (style == "sloppy" and rng.random() < 0.5):
            return " ".join(wanted)
        return ", ".join(wanted) + "."

    def grade(self, item, reply):
        wanted = {word for kind, word in item["things"] if kind == item["kind"]}
        said = words(reply)
        hits = len(wanted & set(said))
        f1 = 2 * hits / (len(wanted) + len(said))
        return 0.8 * f1 * f1 + 0.2 * (hits > 0 and bool(re.fullmatch(r"\w+(, \w+)*\.", reply.strip())))


TASKS = {"generation": Generation(), "open_qa": OpenQA(), "brainstorm": Brainstorm(), "chat": Chat(),
         "rewrite": Rewrite(), "summarize": Summarize(), "coding": Coding(), "classify": Classify(),
         "closed_qa": ClosedQA(), "extract": Extract()}

# --------------------------------------------------------------------- dialogues, demonstrations, grades

SHARES = WORDS["shares"] | {"uniform": dict.fromkeys(TASKS, 1)}
# Copying out of a text takes the tiny model longest to learn.
SHARES["pretraining"] = SHARES["uniform"] | {"closed_qa": 2, "extract": 2, "rewrite": 1.5, "open_qa": 1.5}
# Raw Surge counts leave closed QA and extraction under 3 %, too few to learn in a few thousand demonstrations.
SHARES["sqrt_surge"] = {task: count**0.5 for task, count in SHARES["surge"].items()}

STYLES = {"careful": 0.3, "terse": 0.5, "sloppy": 0.2}


def split(task: str, item: dict) -> str:
    """test, dev or train, by the content of the item alone."""
    bucket = int(hashlib.md5(f"{task} {TASKS[task].key(item)}".encode()).hexdigest(), 16) % 16
    return "test" if bucket < 2 else "dev" if bucket == 2 else "train"


def dialogue(rng: random.Random, wanted: str = "train", shares: str = "uniform", long: float = 1 / 3) -> dict:
    """A dialogue of the split `wanted`: task, and turns of a user's words and an item; a share `long` has several."""
    task = pick(rng, SHARES[shares])
    make = TASKS[task]
    item = make.draw(rng)
    while split(task, item) != wanted:
        item = make.draw(rng)
    turns = [{"user": make.ask(item, rng), "item": item}]
    length = rng.randint(2, 4) if rng.random() < long else 1
    for _ in range(100):  # a follow-up whose content belongs to another split is drawn again
        if len(turns) == length:
            break
        new, said = make.follow(turns[-1]["item"], rng)
        if split(task, new) == wanted and new not in [t["item"] for t in turns]:
            turns.append({"user": said, "item": new})
    return {"category": task, "turns": turns}


def demonstrate(record: dict, rng: random.Random, style: str | None = None) -> list[dict]:
    """The dialogue as messages, answered by one demonstrator."""
    style = style or pick(rng, STYLES)
    messages = []
    for turn in record["turns"]:
        reply = TASKS[record["category"]].answer(turn["item"], style, rng)
        messages += [{"role": "user", "content": turn["user"]}, {"role": "assistant", "content": reply}]
    return messages


def gold(category: str, item: dict, reply: str, finished: bool = True) -> float:
    """The gold score, 0 to 1. A reply that does not end its turn keeps 0.4 of it: users dislike half a reply."""
    score = min(1.0, max(0.0, TASKS[category].grade(item, reply)))
    return score if finished else 0.4 * score
