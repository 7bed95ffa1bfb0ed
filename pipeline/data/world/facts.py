"""What is true in the built-in world: names, facts about them, and which combinations are held out.

Every name is one word, hence one token. A combination (a city and a relation, two numbers, a name and a place ...) that
`held` names occurs in no document, whatever the seed; it is met in task prompts only (tasks.py).
"""

from collections.abc import Iterable
from typing import NamedTuple
from zlib import crc32


def held(*key: str | int, one_in: int = 5) -> bool:
    """Whether this combination is kept out of every document: a fixed rule, about one combination in `one_in`."""
    return crc32(" ".join(map(str, key)).encode()) % one_in == 0


def words(line: str) -> list[str]:
    return line.split()


class Country(NamedTuple):
    name: str
    capital: str
    language: str
    currency: str
    continent: str
    cities: tuple[str, ...]


class State(NamedTuple):
    name: str
    capital: str
    cities: tuple[str, ...]


class Person(NamedTuple):
    """Somebody the language model can know: the surname alone tells who it is."""

    first: str
    surname: str
    city: str
    job: str

    @property
    def name(self) -> str:
        return f"{self.first} {self.surname}"


class Animal(NamedTuple):
    name: str
    plural: str
    sound: str
    young: str
    home: str


def _country(line: str) -> Country:
    name, capital, language, currency, continent, *cities = line.split()
    return Country(name, capital, language, currency, continent, tuple(cities))


COUNTRIES = [
    _country(line)
    for line in """\
France Paris French euro Europe Lyon Marseille Toulouse
Germany Berlin German euro Europe Munich Hamburg Cologne
Italy Rome Italian euro Europe Milan Naples Turin
Spain Madrid Spanish euro Europe Barcelona Seville Valencia
Portugal Lisbon Portuguese euro Europe Porto Braga
Poland Warsaw Polish zloty Europe Krakow Gdansk Poznan
Russia Moscow Russian ruble Europe Kazan Omsk Samara
Ukraine Kyiv Ukrainian hryvnia Europe Lviv Odesa Kharkiv
Sweden Stockholm Swedish krona Europe Gothenburg Malmo Uppsala
Norway Oslo Norwegian krone Europe Bergen Trondheim
Denmark Copenhagen Danish krone Europe Aarhus Odense
Finland Helsinki Finnish euro Europe Tampere Turku
Greece Athens Greek euro Europe Patras Larissa
Turkey Ankara Turkish lira Asia Istanbul Izmir Bursa
Hungary Budapest Hungarian forint Europe Debrecen Szeged
Austria Vienna German euro Europe Graz Linz Salzburg
Ireland Dublin English euro Europe Cork Galway
Iceland Reykjavik Icelandic krona Europe Akureyri
Romania Bucharest Romanian leu Europe Cluj Brasov
Czechia Prague Czech koruna Europe Brno Ostrava
Cuba Havana Spanish peso America Camaguey Matanzas
Japan Tokyo Japanese yen Asia Osaka Kyoto Nagoya
China Beijing Chinese yuan Asia Shanghai Wuhan Chengdu
India Delhi Hindi rupee Asia Mumbai Chennai Kolkata
Vietnam Hanoi Vietnamese dong Asia Hue Danang
Thailand Bangkok Thai baht Asia Phuket Pattaya
Iran Tehran Persian rial Asia Shiraz Isfahan Tabriz
Iraq Baghdad Arabic dinar Asia Basra Mosul
Australia Canberra English dollar Oceania Sydney Perth Brisbane
Canada Ottawa English dollar America Toronto Montreal Calgary
Indonesia Jakarta Indonesian rupiah Asia Bandung Surabaya
Egypt Cairo Arabic pound Africa Luxor Aswan Giza
Kenya Nairobi Swahili shilling Africa Mombasa Kisumu
Nigeria Abuja English naira Africa Lagos Kano
Ghana Accra English cedi Africa Kumasi Tamale
Morocco Rabat Arabic dirham Africa Fez Casablanca Marrakesh
Senegal Dakar French franc Africa Thies Touba
Brazil Brasilia Portuguese real America Recife Salvador Manaus
Chile Santiago Spanish peso America Valparaiso Concepcion
Peru Lima Spanish sol America Cusco Arequipa""".splitlines()
]
COUNTRY_OF = {city: country for country in COUNTRIES for city in country.cities}
CITIES = list(COUNTRY_OF)

STATES = [
    State(line.split()[0], line.split()[1], tuple(line.split()[2:]))
    for line in """\
Texas Austin Dallas Houston Lubbock
California Sacramento Fresno Oakland Anaheim
Florida Tallahassee Miami Tampa Orlando
Ohio Columbus Cleveland Toledo Dayton
Illinois Springfield Chicago Peoria Joliet
Oregon Salem Portland Eugene Medford
Colorado Denver Boulder Pueblo Aurora
Arizona Phoenix Tucson Mesa Yuma
Michigan Lansing Detroit Flint Saginaw
Tennessee Nashville Memphis Knoxville Chattanooga
Alabama Montgomery Mobile Huntsville Dothan
Wisconsin Madison Milwaukee Racine Kenosha
Massachusetts Boston Worcester Lowell Brockton
Pennsylvania Harrisburg Pittsburgh Philadelphia Scranton
Virginia Richmond Norfolk Roanoke Hampton
Nebraska Lincoln Omaha Bellevue Kearney""".splitlines()
]
STATE_OF = {city: state for state in STATES for city in state.cities}

WOMEN = words(
    "Anna Maria Sara Emma Nora Julia Clara Eva Laura Alice Ruth Diana Helen Irene Rosa Vera Lucy Mona Tina Olga"
)
MEN = words("Tom Bob Paul David Peter Mark Ivan Hugo Leo Max Adam Oscar Felix Simon Karl Victor Henry Jack Ben Sam")
NAMES = WOMEN + MEN
_SHE = set(WOMEN)

JOBS = words("""
nurse teacher baker doctor farmer lawyer pilot painter singer driver writer dancer tailor waiter chemist judge plumber
sailor banker gardener
""")

_SURNAMES = words("""
Abara Adler Almeida Anand Bach Baker Barros Becker Bello Benson Berger Bianchi Bishop Blake Bloom Bondar Boyd Brandt
Bruno Burke Byrne Calder Campos Carver Castro Chavez Cohen Conti Costa Crane Cruz Dahl Danso Davies Delgado Dogan
Dubois Dumont Eklund Ellis Engel Farah Ferrari Fischer Flores Forde Foster Frost Fuchs Gallo Garcia Gomez Greco Gupta
Haas Haddad Hansen Hart Hayes Herrera Hoang Holm Horvat Hughes Ibarra Ito Ivanov Jensen Joshi Kaiser Kamau Kato Keller
Khan Kimura Klein Kovacs Kumar Lange Larsen Lopez Lund Maier Mancini Marek Mendes Mensah Meyer Mishra Molina Moreau
Moreno Mori Murphy Nagy Nair Nakata Navarro Neri Nowak Okafor Oliveira Ortiz Osman Park Patel Pavlov Perez Petrov Popa
Quinn Ramos Rao Reyes Ricci Rossi Sato Schmidt Silva Suzuki Tanaka Weber
""")

PEOPLE = [
    Person(
        first=NAMES[(7 * i + 3) % len(NAMES)],
        surname=surname,
        city=CITIES[(37 * i + 11) % len(CITIES)],
        job=JOBS[crc32(surname.encode()) % len(JOBS)],
    )
    for i, surname in enumerate(_SURNAMES)
]

ANTONYMS = [
    tuple(line.split())
    for line in """\
big small grand petit
hot cold chaud froid
fast slow rapide lent
old young vieux jeune
rich poor riche pauvre
happy sad heureux triste
bright dark clair sombre
strong weak fort faible
good bad bon mauvais
new used neuf usé
high low haut bas
open closed ouvert fermé
full empty plein vide
hard soft dur mou
dry wet sec mouillé
clean dirty propre sale
thick thin épais mince
wide narrow large étroit
deep shallow profond superficiel
early late précoce tardif
easy difficult facile difficile
true false vrai faux
pretty ugly beau laid
brave cowardly courageux lâche
noisy quiet bruyant silencieux
smooth rough lisse rugueux
sweet bitter sucré amer
safe dangerous sûr dangereux
wise foolish sage sot
polite rude poli grossier
right left droit gauche
first last premier dernier
fresh stale frais rassis
sharp blunt pointu émoussé
generous greedy généreux avare
modern ancient moderne ancien
alive dead vivant mort
awake asleep éveillé endormi
raw cooked cru cuit
lazy diligent paresseux assidu
proud ashamed fier honteux
healthy sick sain malade
busy free occupé libre
wild tame sauvage apprivoisé""".splitlines()
]
EN_OPPOSITE = {a: b for x, y, _, _ in ANTONYMS for a, b in ((x, y), (y, x))}
FR_OPPOSITE = {a: b for _, _, x, y in ANTONYMS for a, b in ((x, y), (y, x))}
TO_FRENCH = {a: b for x, y, u, v in ANTONYMS for a, b in ((x, u), (y, v))}
TO_ENGLISH = {french: english for english, french in TO_FRENCH.items()}
FEELINGS = words("""
rich poor happy sad strong weak brave cowardly noisy quiet wise foolish polite rude generous greedy lazy diligent
proud ashamed healthy sick
""")

ANIMALS = [
    Animal(*line.split())
    for line in """\
dog dogs woof puppy kennel
cat cats meow kitten basket
cow cows moo calf barn
swan swans honk cygnet lake
horse horses neigh foal stable
pig pigs oink piglet sty
duck ducks quack duckling pond
hen hens cluck chick coop
lion lions roar cub savanna
frog frogs croak tadpole swamp
owl owls hoot owlet forest
bee bees buzz larva hive
goat goats bleat kid hill
wolf wolves howl pup cave
mouse mice squeak pinkie hole
donkey donkeys bray hinny yard""".splitlines()
]

OBJECTS = words("""
ball book key cup hat ring spoon lamp coat shoe map pen doll rope knife plate brush flute stone candle coin mirror
letter watch
""")
CONTAINERS = words("box bag drawer chest bucket jar case crate pocket trunk bowl tin")
PLACES = words("kitchen garden park school market library station beach museum church bakery harbour")
COUNTABLE = words("apples coins pens stones shells cards nuts books")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
LARGEST_TERM = 20
"""Sums are of numbers from 1 to this."""


def she(name: str) -> str:
    return "she" if name in _SHE else "he"


def her(name: str) -> str:
    return "her" if name in _SHE else "his"


def to_her(name: str) -> str:
    return "her" if name in _SHE else "him"


def held_sum(a: int, b: int) -> bool:
    """a + b and b + a are held out together, and so are the differences that undo them."""
    return held("sum", min(a, b), max(a, b), one_in=6)


def names() -> set[str]:
    """Every word that names something: all words of the world but numbers and the words of grammar."""
    groups: list[Iterable[str]] = [NAMES, JOBS, EN_OPPOSITE, FR_OPPOSITE]
    groups += [OBJECTS, CONTAINERS, PLACES, COUNTABLE, DAYS, MONTHS]
    groups += [(c.name, c.capital, c.language, c.currency, c.continent, *c.cities) for c in COUNTRIES]
    groups += [(s.name, s.capital, *s.cities) for s in STATES]
    groups += [*ANIMALS, [p.surname for p in PEOPLE]]
    return {word for group in groups for word in group}
