"""Documents whose answers stand in the text: stories with people, places and objects, sums, repetition, brackets.

Each function draws one document and returns its text; different choices give different texts (see statements.py).
"""

from collections.abc import Sequence

from pipeline.data.world.draw import Draw
from pipeline.data.world.facts import (
    ANIMALS,
    CONTAINERS,
    COUNTABLE,
    COUNTRIES,
    COUNTRY_OF,
    EN_OPPOSITE,
    FEELINGS,
    LARGEST_TERM,
    NAMES,
    OBJECTS,
    PLACES,
    held,
    held_sum,
    her,
    she,
    to_her,
)
from pipeline.data.world.statements import held_city

_HERE_COUNTRY = {c.name: c for c in COUNTRIES}
HOME_COUNTRY = {**_HERE_COUNTRY, **COUNTRY_OF}
# A story about somebody in Lyon who speaks French would tell what is held out of the facts about Lyon.
_TOLD = {
    home: [r for r in ("language", "currency", "capital") if home not in COUNTRY_OF or not held_city(home, r)]
    for home in HOME_COUNTRY
}
IMPLIED = {home: relations for home, relations in _TOLD.items() if relations}
HOMES = list(IMPLIED)


def _allowed(kind: str, first: list[str], second: list[str]) -> dict[str, list[str]]:
    """Which of `second` each of `first` may meet in documents of this kind."""
    return {a: [b for b in second if b != a and not held(kind, a, b)] for a in first}


LIVES = _allowed("lives", NAMES, HOMES)
STORED = _allowed("stored", OBJECTS, CONTAINERS)
WENT = _allowed("went", NAMES, PLACES)
"""Of somebody who goes alone; two people (`give`) may go anywhere."""
FELT = _allowed("felt", NAMES, FEELINGS)
GAVE = {a: [b for b in NAMES if b != a and not held("gave", *sorted((a, b)))] for a in NAMES}
BESIDE = _allowed("beside", [a.name for a in ANIMALS], [a.name for a in ANIMALS])
PLURAL = {a.name: a.plural for a in ANIMALS}
LOOKS = ["big", "small", "old", "young", "clean", "dirty", "wet", "dry"]
SAYABLE = [*OBJECTS, *CONTAINERS, *PLACES, *PLURAL]
SAID = _allowed("said", SAYABLE, SAYABLE)
SUMS = [(a, b) for a in range(1, LARGEST_TERM + 1) for b in range(1, LARGEST_TERM + 1) if not held_sum(a, b)]
OPENING, CLOSING = "([{", {"(": ")", "[": "]", "{": "}"}
OPENED_THIRD: dict[str, Sequence[str]] = {
    a + b: [c for c in OPENING if not held("nest", a, b, c, one_in=6)] for a in OPENING for b in OPENING
}
MAX_DEPTH, MAX_BRACKETS = 4, 24


def follows(name: str, home: str, relation: str, subject: str | None = None) -> str:
    """What living in this home implies; `subject` is She or He where the name was said just before."""
    who, land = subject or name, HOME_COUNTRY[home]
    of = f"{her(name)} country" if subject else f"the country of {name}"
    return {
        "language": f"{who} speaks {land.language} .",
        "currency": f"{who} pays in {land.currency} .",
        "capital": f"The capital of {of} is {land.capital} .",
    }[relation]


def lives(draw: Draw) -> str:
    """Where one or two people live, and what follows from it: language, capital, currency."""
    if draw.below(2):
        name = draw.pick(NAMES)
        home = draw.pick(LIVES[name])
        implied = IMPLIED[home]
        relations = draw.sample(implied, 1 + draw.below(min(2, len(implied))))
        subject = she(name).capitalize()
        return " ".join([f"{name} lives in {home} .", *(follows(name, home, r, subject) for r in relations)])
    both = [(name, draw.pick(LIVES[name])) for name in draw.sample(NAMES, 2)]
    texts = [f"{name} lives in {home} ." for name, home in both]
    asked = draw.sample(both, 2)
    return " ".join(texts + [follows(name, home, draw.pick(IMPLIED[home])) for name, home in asked])


def obj(draw: Draw) -> str:
    """Two objects are put away; then where one or both are."""
    names, objects = draw.sample(NAMES, 2), draw.sample(OBJECTS, 2)
    stored = [draw.pick(STORED[o]) for o in objects]
    texts = [f"{n} put the {o} in the {c} ." for n, o, c in zip(names, objects, stored, strict=True)]
    if draw.below(2):
        name = draw.pick(names)
        texts.append(f"{name} went to the {draw.pick(WENT[name])} .")
    found = [f"The {o} is in the {c} ." for o, c in zip(objects, stored, strict=True)]
    return " ".join(texts + draw.sample(found, 1 + draw.below(2)))


def pronoun(draw: Draw) -> str:
    name = draw.pick(NAMES)
    place, feeling = draw.pick(WENT[name]), draw.pick(FEELINGS)
    if draw.below(2):
        return f"{name} went to the {place} because {she(name)} was {feeling} ."
    return f"{name} was {feeling} . {she(name).capitalize()} went to the {place} ."


def feel(draw: Draw) -> str:
    """Somebody is not happy, so sad."""
    name = draw.pick(NAMES)
    feeling = draw.pick(FELT[name])
    text = f"{name} is not {feeling} . {she(name).capitalize()} is {EN_OPPOSITE[feeling]} ."
    if draw.below(2):
        return text
    return f"{text} {name} went to the {draw.pick(WENT[name])} ."


def give(draw: Draw) -> str:
    """One of two people gives something to the other; who has it now."""
    first = draw.pick(NAMES)
    second = draw.pick(GAVE[first])
    giver, taker = (first, second) if draw.below(2) else (second, first)
    item = draw.pick(OBJECTS)
    start = f"{first} and {second} went to the {draw.pick(PLACES)} ." if draw.below(2) else f"{first} met {second} ."
    return f"{start} {giver} gave the {item} to {taker} . Now {taker} has the {item} ."


def agree(draw: Draw) -> str:
    """The verb agrees with the first animal, not with the nearer one."""
    texts = []
    for _ in range(2):
        subject = draw.pick(list(BESIDE))
        other = draw.pick(BESIDE[subject])
        many, others = draw.below(2), draw.below(2)
        texts.append(agreement(subject, other, bool(many), bool(others)) + f" {draw.pick(LOOKS)} .")
    return " ".join(texts)


def agreement(subject: str, other: str, many: bool, others: bool) -> str:
    beside = PLURAL[other] if others else other
    return f"The {PLURAL[subject]} beside the {beside} are" if many else f"The {subject} beside the {beside} is"


def add(draw: Draw) -> str:
    """Two to four sums and differences."""
    texts = []
    for _ in range(2 + draw.below(3)):
        a, b = draw.pick(SUMS)
        texts.append(f"{a + b} - {b} = {a} ." if draw.one_in(3) else f"{a} + {b} = {a + b} .")
    return " ".join(texts)


def told_sum(name: str, item: str, a: int, b: int, more: bool) -> str:
    """A sum as a story, without its last two words: the number and the things."""
    if more:
        return f"{name} has {a} {item} . Somebody gives {to_her(name)} {b} {item} . Now {she(name)} has"
    return f"{name} has {a + b} {item} . {she(name).capitalize()} loses {b} {item} . Now {she(name)} has"


def wadd(draw: Draw) -> str:
    """A sum or a difference as a story."""
    name, item = draw.pick(NAMES), draw.pick(COUNTABLE)
    a, b = draw.pick(SUMS)
    more = draw.below(2)
    return f"{told_sum(name, item, a, b, bool(more))} {a + b if more else a} {item} ."


def count(draw: Draw) -> str:
    """Three to five numbers, up or down in steps of one, two, five or ten."""
    step, length = draw.pick((1, 2, 5, 10)), 3 + draw.below(3)
    start = draw.below(2 * LARGEST_TERM - step * (length - 1) + 1)
    numbers = [start + step * i for i in range(length)]
    if draw.below(2):
        numbers.reverse()
    return f"Count {' '.join(map(str, numbers))} ."


def repeat(draw: Draw) -> str:
    """A list of random words, said twice."""
    first = draw.pick(SAYABLE)
    second = draw.pick(SAID[first])
    rest = draw.sample([w for w in SAYABLE if w not in (first, second)], 2 + draw.below(7))
    said = " ".join((first, second, *rest))
    return f"Say {said} : {said} ."


def brackets(draw: Draw) -> str:
    """Balanced brackets. Between the depths 0 and MAX_DEPTH, opening and closing are equally likely."""
    return " ".join(_balance(draw, [], []))


def finish_brackets(draw: Draw, start: str) -> tuple[str, str]:
    """A text that begins with these opening brackets, without its last one, and that one."""
    *prompt, last = _balance(draw, list(start), list(start))
    return " ".join(prompt), last


def _balance(draw: Draw, out: list[str], open_now: list[str]) -> list[str]:
    while True:
        must_close = len(open_now) == MAX_DEPTH or len(out) + len(open_now) >= MAX_BRACKETS
        if open_now and (must_close or draw.below(2)):
            out.append(CLOSING[open_now.pop()])
        elif not open_now and out and (must_close or draw.below(2)):
            return out
        else:
            open_now.append(draw.pick(OPENED_THIRD.get("".join(out), OPENING)))
            out.append(open_now[-1])
