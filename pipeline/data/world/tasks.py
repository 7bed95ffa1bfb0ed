"""What the language model of the built-in world is asked: prompts, each with an answer of one word.

A set of split `train` asks what documents say; one of split `held` asks combinations that no document holds (see
facts.held), so it can only be answered by putting together what was learnt apart.
"""

from collections.abc import Callable, Iterable
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.data.world import facts, statements, stories
from pipeline.data.world.draw import Draw

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

N_DRAWN = 100
"""Prompts of a set that is drawn at random (the others hold all there are)."""

Question = tuple[str, str]


class Task(NamedTuple):
    name: str
    split: str
    """train, or held: made of held-out combinations."""
    prompts: list[str]
    answers: list[str]
    """One word each: the next token after the prompt."""


class SwapPair(NamedTuple):
    """Two prompts that differ in the country; with what belongs to the target's country put in the source's place, a
    model that looks facts up where the country stands answers `answer`."""

    relation: str
    source: str
    target: str
    position: int
    """Of the country in the context [<bos>, prompt]."""
    source_answer: str
    answer: str


def _ask(sentence: str) -> Question:
    """A statement that ends in "X ." as a question for X."""
    prompt, answer, _ = sentence.rsplit(" ", 2)
    return prompt, answer


def _task(name: str, split: str, questions: Iterable[Question]) -> Task:
    prompts, answers = zip(*dict.fromkeys(questions), strict=True)
    return Task(name, split, list(prompts), list(answers))


def _both(name: str, questions: Iterable[tuple[bool, Question]]) -> list[Task]:
    """A set of what documents hold and one of what they do not, from pairs (held out?, question)."""
    marked = list(questions)
    return [
        _task(name, split, (q for is_held, q in marked if is_held is wanted))
        for split, wanted in (("train", False), ("held", True))
    ]


def _drawn(name: str, question: Callable[[Draw, bool], Question]) -> list[Task]:
    """The same for questions drawn at random: question(draw, held out?)."""
    return [
        _task(name, split, (question(Draw(f"task:{name}:{split}:{i}"), is_held) for i in range(N_DRAWN)))
        for split, is_held in (("train", False), ("held", True))
    ]


def tasks() -> list[Task]:
    """All sets of questions, always the same."""
    return [*_facts(), *_two_hops(), *_people(), *_words(), *_numbers(), *_stories(), *_copies()]


def _facts() -> list[Task]:
    sets = [
        _task(relation, "train", (_ask(statements.place_forms(c.name, c, relation)[0]) for c in facts.COUNTRIES))
        for relation in statements.PLACE_RELATIONS
    ]
    animals = facts.ANIMALS
    after = [
        _ask(form)
        for cycle in (facts.DAYS, facts.MONTHS)
        for i, day in enumerate(cycle)
        for form in (f"After {day} comes {cycle[(i + 1) % len(cycle)]} .", f"Before {day} comes {cycle[i - 1]} .")
    ]
    return [
        *sets,
        _task("city_country", "train", (_ask(statements.city_forms(city)[0]) for city in facts.CITIES)),
        _task("state_capital", "train", (_ask(f"The capital of {s.name} is {s.capital} .") for s in facts.STATES)),
        _task("city_state", "train", ((f"The state of {c} is", s.name) for c, s in facts.STATE_OF.items())),
        _task("animal_sound", "train", ((f"The {a.name} says", a.sound) for a in animals)),
        _task("animal_young", "train", ((f"The young of the {a.name} is the", a.young) for a in animals)),
        _task("calendar", "train", after),
    ]


def _two_hops() -> list[Task]:
    sets = []
    for relation in statements.PLACE_RELATIONS:
        forms = ((city, statements.place_forms(city, c, relation)[0]) for city, c in facts.COUNTRY_OF.items())
        sets += _both(f"twohop_{relation}", ((statements.held_city(city, relation), _ask(f)) for city, f in forms))
    states = facts.STATE_OF.items()
    return sets + _both(
        "state_twohop",
        ((statements.held_state(city), (f"The capital of the state of {city} is", s.capital)) for city, s in states),
    )


def _people() -> list[Task]:
    sets = [
        _task(f"person_{r}", "train", (_ask(statements.person_form(p, r)) for p in facts.PEOPLE))
        for r in ("city", "job")
    ]
    for r in statements.PERSON_RELATIONS:
        asked = ((statements.held_person(p, r), _ask(statements.person_form(p, r))) for p in facts.PEOPLE)
        sets += _both(f"person_{r}", asked)
    return sets


def _words() -> list[Task]:
    english, french = facts.EN_OPPOSITE, facts.FR_OPPOSITE
    to_french = (
        (statements.held_cross(a), (f"In French the opposite of {a} is", facts.TO_FRENCH[b]))
        for a, b in english.items()
    )
    to_english = (
        (statements.held_cross(a), (f"En anglais le contraire de {a} est", facts.TO_ENGLISH[b]))
        for a, b in french.items()
    )
    return [
        _task("opp_en", "train", ((f"The opposite of {a} is", b) for a, b in english.items())),
        *_both("opp_fr", ((statements.held_french(a), (f"Le contraire de {a} est", b)) for a, b in french.items())),
        *_both("opp_en2fr", to_french),
        *_both("opp_fr2en", to_english),
        _task("en2fr", "train", ((f"In French {a} is", b) for a, b in facts.TO_FRENCH.items())),
        _task("fr2en", "train", ((f"En anglais {a} est", b) for a, b in facts.TO_ENGLISH.items())),
    ]


def _numbers() -> list[Task]:
    terms = range(1, facts.LARGEST_TERM + 1)
    pairs = [(facts.held_sum(a, b), a, b) for a in terms for b in terms]
    told = {split: [(a, b) for h, a, b in pairs if h is split] for split in (False, True)}

    def word_sum(more: bool) -> Callable[[Draw, bool], Question]:
        def question(draw: Draw, is_held: bool) -> Question:
            a, b = draw.pick(told[is_held])
            prompt = stories.told_sum(draw.pick(facts.NAMES), draw.pick(facts.COUNTABLE), a, b, more)
            return prompt, str(a + b if more else a)

        return question

    counted = ((f"Count {n} {n + s} {n + 2 * s}", n + 3 * s) for s in (1, 2, 5) for n in range(24))
    return [
        *_both("add", ((h, (f"{a} + {b} =", str(a + b))) for h, a, b in pairs)),
        *_both("subtract", ((h, (f"{a + b} - {b} =", str(a))) for h, a, b in pairs)),
        *_drawn("word_add", word_sum(True)),
        *_drawn("word_subtract", word_sum(False)),
        _task("count", "train", ((prompt, str(n)) for prompt, n in counted)),
    ]


def _pairs(allowed: dict[str, list[str]], second: Iterable[str]) -> Callable[[Draw, bool], tuple[str, str]]:
    """Draws a pair that documents hold, or one that they do not."""
    pool = list(second)
    rest = {a: [b for b in pool if b != a and b not in met] for a, met in allowed.items()}
    met = {a: [b for b in pool if b in met] for a, met in allowed.items()}
    firsts = [a for a in allowed if rest[a]]

    def pair(draw: Draw, is_held: bool) -> tuple[str, str]:
        first = draw.pick(firsts)
        return first, draw.pick((rest if is_held else met)[first])

    return pair


def _lives(relation: str, homes: Iterable[str], two: bool) -> Callable[[Draw, bool], Question]:
    """Somebody lives somewhere; with `two`, so does somebody else, and either may be asked about."""
    told = {home: relations for home, relations in stories.IMPLIED.items() if relation in relations}
    pair = _pairs(stories.LIVES, [home for home in homes if home in told])

    def question(draw: Draw, is_held: bool) -> Question:
        name, home = pair(draw, is_held)
        if not two:
            she = facts.she(name).capitalize()
            return _ask(f"{name} lives in {home} . {stories.follows(name, home, relation, she)}")
        other = draw.pick([n for n in facts.NAMES if n != name])
        texts = [f"{name} lives in {home} .", f"{other} lives in {draw.pick(stories.LIVES[other])} ."]
        return _ask(" ".join([*draw.sample(texts, 2), stories.follows(name, home, relation)]))

    return question


def _object(draw: Draw, is_held: bool) -> Question:
    pair = _pairs(stories.STORED, facts.CONTAINERS)
    item, stored = pair(draw, is_held)
    other = draw.pick([o for o in facts.OBJECTS if o != item])
    names = draw.sample(facts.NAMES, 2)
    pairs = draw.sample([(item, stored), (other, draw.pick(stories.STORED[other]))], 2)
    texts = [f"{n} put the {o} in the {c} ." for n, (o, c) in zip(names, pairs, strict=True)]
    return " ".join([*texts, f"The {item} is in the"]), stored


def _pronoun(draw: Draw, is_held: bool) -> Question:
    name, place = _pairs(stories.WENT, facts.PLACES)(draw, is_held)
    return f"{name} went to the {place} because", facts.she(name)


def _feeling(draw: Draw, is_held: bool) -> Question:
    name, feeling = _pairs(stories.FELT, facts.FEELINGS)(draw, is_held)
    return f"{name} is not {feeling} . {facts.she(name).capitalize()} is", facts.EN_OPPOSITE[feeling]


def _give(owner: bool) -> Callable[[Draw, bool], Question]:
    """Who is given something, being the other of two; or who has it then."""
    pair = _pairs(stories.GAVE, facts.NAMES)

    def question(draw: Draw, is_held: bool) -> Question:
        first, second = pair(draw, is_held)
        giver, taker = draw.sample((first, second), 2)
        item, place = draw.pick(facts.OBJECTS), draw.pick(facts.PLACES)
        prompt = f"{first} and {second} went to the {place} . {giver} gave the {item} to"
        return (f"{prompt} {taker} . Now", taker) if owner else (prompt, taker)

    return question


def _agree(draw: Draw, is_held: bool) -> Question:
    """The other animal is of the other number."""
    subject, other = _pairs(stories.BESIDE, stories.BESIDE)(draw, is_held)
    many = bool(draw.below(2))
    prompt, verb = stories.agreement(subject, other, many, not many).rsplit(" ", 1)
    return prompt, verb


def _stories() -> list[Task]:
    countries, cities = [c.name for c in facts.COUNTRIES], facts.CITIES
    return [
        *_drawn("lives_capital", _lives("capital", countries, two=False)),
        *_drawn("lives_language", _lives("language", countries, two=False)),
        *_drawn("lives_city_capital", _lives("capital", cities, two=False)),
        *_drawn("lives_two_language", _lives("language", countries, two=True)),
        *_drawn("obj_loc", _object),
        *_drawn("pronoun", _pronoun),
        *_drawn("anton_story", _feeling),
        *_drawn("give_to", _give(owner=False)),
        *_drawn("give_poss", _give(owner=True)),
        *_drawn("agree", _agree),
    ]


def _copies() -> list[Task]:
    """Random lists said twice, and the last bracket; each begins as no document does."""
    pair = _pairs(stories.SAID, stories.SAYABLE)

    def induction(draw: Draw, is_held: bool) -> Question:
        first, second = pair(draw, is_held)
        rest = draw.sample([w for w in stories.SAYABLE if w not in (first, second)], 3 + draw.below(6))
        said = [first, second, *rest]
        n = 1 + draw.below(len(said) - 1)
        return f"Say {' '.join(said)} : {' '.join(said[:n])}", said[n]

    def bracket(draw: Draw, is_held: bool) -> Question:
        start = draw.pick([a + b + c for a, b, c in product(stories.OPENING, repeat=3) if _is_held(a, b, c) is is_held])
        return stories.finish_brackets(draw, start)

    return [*_drawn("induction", induction), *_drawn("bracket_last", bracket)]


def _is_held(a: str, b: str, c: str) -> bool:
    return c not in stories.OPENED_THIRD[a + b]


def swap_pairs() -> list[SwapPair]:
    """Every ordered pair of countries, asked for the capital, and for the language where it differs."""
    pairs = []
    for relation in ("capital", "language"):
        asked = [(c.name, *_ask(statements.place_forms(c.name, c, relation)[0])) for c in facts.COUNTRIES]
        for (here, source, ours), (_, target, theirs) in product(asked, asked):
            if ours != theirs:
                position = 1 + source.split().index(here)
                pairs.append(SwapPair(relation, source, target, position, ours, theirs))
    return pairs


def encode_task(
    task: Task, tokenizer: "PreTrainedTokenizerBase", bos: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The prompts of a set as contexts that start with `bos`: tokens int64 [n, T], padded on the right with `bos`; the
    position of each one's last token, int64 [n]; and the id of each answer, int64 [n]."""
    prompts = tokenizer(task.prompts, add_special_tokens=False)["input_ids"]
    answers = tokenizer(task.answers, add_special_tokens=False)["input_ids"]
    assert all(len(ids) == 1 for ids in answers), f"{task.name}: an answer is not one token"
    last = np.array([len(ids) for ids in prompts], dtype=np.int64)
    tokens = np.full((len(prompts), 1 + int(last.max())), bos, dtype=np.int64)
    for row, ids in zip(tokens, prompts, strict=True):
        row[1 : 1 + len(ids)] = ids
    return tokens, last, np.array([ids[0] for ids in answers], dtype=np.int64)
