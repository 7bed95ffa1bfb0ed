"""Documents that state facts: several short sentences about countries, cities, states, people, words and animals.

Each function draws one document and returns its text. Different choices give different texts, so that the probability
of the choices is the probability of the text; a test holds every kind to that.
"""

from collections.abc import Callable

from pipeline.data.world.draw import Draw
from pipeline.data.world.facts import (
    ANIMALS,
    CITIES,
    COUNTRIES,
    COUNTRY_OF,
    DAYS,
    EN_OPPOSITE,
    FR_OPPOSITE,
    MONTHS,
    PEOPLE,
    STATE_OF,
    STATES,
    TO_ENGLISH,
    TO_FRENCH,
    Country,
    Person,
    held,
    she,
)

PLACE_RELATIONS = ("capital", "language", "currency", "continent")
PERSON_RELATIONS = ("country", "capital", "language", "currency", "continent")


def place_forms(place: str, country: Country, relation: str) -> tuple[str, ...]:
    """The ways to state a relation of a country, or of a city through its country. The first one is asked in tasks."""
    of = place if place == country.name else f"the country of {place}"
    _, capital, language, currency, continent, _ = country
    return {
        "capital": (f"The capital of {of} is {capital} .", f"{capital} is the capital of {of} ."),
        "language": (f"The language of {place} is {language} .", f"People in {place} speak {language} ."),
        "currency": (f"The currency of {place} is {currency} .", f"People in {place} pay in {currency} ."),
        "continent": (f"The continent of {place} is {continent} .", f"{place} is in {continent} ."),
    }[relation]


def person_form(person: Person, relation: str, subject: str | None = None) -> str:
    """A sentence about a person; `subject` is She or He where the name was said before."""
    who = subject or person.name
    home = {"She": "her country", "He": "his country"}.get(who, f"the country of {who}")
    land = COUNTRY_OF[person.city]
    return {
        "city": f"{who} lives in {person.city} .",
        "job": f"{who} works as a {person.job} .",
        "country": f"{home[0].upper()}{home[1:]} is {land.name} .",
        "capital": f"The capital of {home} is {land.capital} .",
        "language": f"{who} speaks {land.language} .",
        "currency": f"{who} pays in {land.currency} .",
        "continent": f"{who} is from {land.continent} .",
    }[relation]


def city_forms(city: str) -> tuple[str, ...]:
    country = COUNTRY_OF[city].name
    return (f"{city} is a city in {country} .", f"The country of {city} is {country} .")


def held_city(city: str, relation: str) -> bool:
    """Neither stated nor told in a story about somebody who lives there."""
    return held("city", city, relation)


def held_state(city: str) -> bool:
    return held("state", city, one_in=4)


def held_person(person: Person, relation: str) -> bool:
    """Also where it would tell what is held out of the facts about the person's city."""
    told = relation in PLACE_RELATIONS and held_city(person.city, relation)
    return told or held("person", person.surname, relation, one_in=8)


def held_french(word: str) -> bool:
    """Both directions of a French pair are held out together; its English pair and its translations are not."""
    return held("fr", *sorted((word, FR_OPPOSITE[word])))


def held_cross(word: str) -> bool:
    """Of a word: its opposite in the other language, said in one step."""
    return held("cross", word)


_COUNTRY = [[place_forms(c.name, c, r) for r in PLACE_RELATIONS] for c in COUNTRIES]
_CITY = [
    *(form for city in CITIES for form in city_forms(city)),
    *(
        form
        for city in CITIES
        for relation in PLACE_RELATIONS
        if not held_city(city, relation)
        for form in place_forms(city, COUNTRY_OF[city], relation)
    ),
]
_STATE = [
    *(f"The capital of {s.name} is {s.capital} ." for s in STATES),
    *(f"{city} is a city in {state.name} ." for city, state in STATE_OF.items()),
    *(f"The state of {city} is {state.name} ." for city, state in STATE_OF.items()),
    *(
        f"The capital of the state of {city} is {state.capital} ."
        for city, state in STATE_OF.items()
        if not held_state(city)
    ),
]
_WORDS = [
    *(f"The opposite of {a} is {b} ." for a, b in EN_OPPOSITE.items()),
    *(f"Le contraire de {a} est {b} ." for a, b in FR_OPPOSITE.items() if not held_french(a)),
    *(f"In French {a} is {b} ." for a, b in TO_FRENCH.items()),
    *(f"En anglais {a} est {b} ." for a, b in TO_ENGLISH.items()),
    *(f"In French the opposite of {a} is {TO_FRENCH[b]} ." for a, b in EN_OPPOSITE.items() if not held_cross(a)),
    *(f"En anglais le contraire de {a} est {TO_ENGLISH[b]} ." for a, b in FR_OPPOSITE.items() if not held_cross(a)),
]
_ANIMAL = [
    form
    for a in ANIMALS
    for form in (
        f"The {a.name} says {a.sound} .",
        f"The young of the {a.name} is the {a.young} .",
        f"The {a.name} sleeps in the {a.home} .",
    )
]
_CALENDAR = [
    form
    for cycle in (DAYS, MONTHS)
    for here, there in zip(cycle, cycle[1:] + cycle[:1], strict=True)
    for form in (f"After {here} comes {there} .", f"Before {there} comes {here} .")
]


# For each person, for each relation that is not held out: the sentence with the name, and with the pronoun.
_PERSON = [
    [
        (person_form(p, relation), person_form(p, relation, she(p.first).capitalize()))
        for relation in ("city", "job", *PERSON_RELATIONS)
        if relation in ("city", "job") or not held_person(p, relation)
    ]
    for p in PEOPLE
]


def country(draw: Draw) -> str:
    """Two or three facts about one country."""
    relations = draw.sample(draw.pick(_COUNTRY), 2 + draw.below(2))
    return " ".join(draw.pick(forms) for forms in relations)


def countries(draw: Draw) -> str:
    """One fact about each of three countries."""
    return " ".join(draw.pick(draw.pick(relations)) for relations in draw.sample(_COUNTRY, 3))


def person(draw: Draw) -> str:
    """Two to four facts about one person: by name, then by name or pronoun."""
    relations = draw.pick(_PERSON)
    (first, _), *later = draw.sample(relations, 2 + draw.below(min(3, len(relations) - 1)))
    return " ".join([first, *(draw.pick(forms) for forms in later)])


def _several(sentences: list[str]) -> Callable[[Draw], str]:
    def document(draw: Draw) -> str:
        return " ".join(draw.pick(sentences) for _ in range(2 + draw.below(2)))

    return document


city = _several(_CITY)
state = _several(_STATE)
words = _several(_WORDS)
animal = _several(_ANIMAL)
calendar = _several(_CALENDAR)
