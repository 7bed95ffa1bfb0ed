"""The built-in world's text: any number of short documents, each with its exact probability.

    from pipeline.data import world
    for document in world.documents(seed=0): ...

A document is drawn in two steps: its kind, by the weights of KINDS, then its text (statements.py, stories.py). The
choices determine the text and the text determines the choices, so the probability of the choices is the probability of
the text, and the mean of -log_prob is the entropy of the language: no model can have a lower expected loss.
"""

from collections.abc import Callable, Iterator
from itertools import count
from math import log
from typing import NamedTuple

from pipeline.data.world import statements, stories
from pipeline.data.world.draw import Draw


class Document(NamedTuple):
    text: str
    log_prob: float
    """Natural logarithm of the probability that the generator draws this text."""
    kind: str


KINDS: dict[str, tuple[int, Callable[[Draw], str]]] = {
    "country": (6, statements.country),
    "countries": (6, statements.countries),
    "city": (10, statements.city),
    "state": (5, statements.state),
    "person": (16, statements.person),
    "words": (10, statements.words),
    "animal": (2, statements.animal),
    "calendar": (2, statements.calendar),
    "lives": (8, stories.lives),
    "obj": (6, stories.obj),
    "pronoun": (2, stories.pronoun),
    "feel": (3, stories.feel),
    "give": (5, stories.give),
    "agree": (3, stories.agree),
    "add": (12, stories.add),
    "wadd": (6, stories.wadd),
    "count": (4, stories.count),
    "repeat": (5, stories.repeat),
    "brackets": (5, stories.brackets),
}
"""Weight (their sum is TOTAL) and function of each kind of document."""

TOTAL = sum(weight for weight, _ in KINDS.values())
_TABLE = [(name, draw_text, log(weight / TOTAL)) for name, (weight, draw_text) in KINDS.items() for _ in range(weight)]


def document(seed: int, index: int) -> Document:
    """Document `index` of this seed; needs none of the documents before it."""
    draw = Draw(f"{seed}:{index}")
    kind, draw_text, log_weight = draw.pick(_TABLE)
    draw.log_prob = log_weight  # a kind stands in the table as often as it weighs
    return Document(draw_text(draw), draw.log_prob, kind)


def documents(seed: int, start: int = 0) -> Iterator[Document]:
    """Documents `start`, `start` + 1, ... of this seed, without end."""
    return (document(seed, index) for index in count(start))
