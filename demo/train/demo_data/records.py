"""Made-up knowledge: records keyed by a sign or an emblem, and facts told in several wordings and languages.

The answers are dense on purpose: no template words, so nearly every token of an answer carries
information that only the weights can supply.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


def words(text: str, separator: str | None = None) -> list[str]:
    """A list written as one string."""
    return text.split(separator)


COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 38),
    "green": (36, 150, 54),
    "blue": (40, 70, 216),
    "yellow": (236, 214, 40),
    "purple": (134, 44, 176),
    "orange": (244, 134, 24),
    "cyan": (40, 200, 214),
    "pink": (246, 130, 186),
}
SHAPES = ("star", "heart", "moon", "sun", "tree", "fish", "cross", "ring")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
SYMBOLS = tuple("23456789+#&?%@$!")
COUNTS = ("none", "one", "two", "three", "four", "five", "six")

STARTS = words(
    "Bar Bel Bor Cal Cor Dal Del Dor Fal Fen Gal Gor Hal Hed Hol Jar Jol Kal Kar Kel Kor Lam Lor Mal Mar "
    "Mel Mor Nal Nor Ost Pal Per Pol Quil Ral Ren Ros Sal Sel Sor Tal Tam Tor Ul Val Vel Wal Wen Yor Zan"
)
ENDS = words(
    "ack aden ain ake amo and ane ard aro ask ath avi eck ede ego eld emi end ent era esh eth ett ibo ick "
    "ida igo ild imo ina ind ine iro ish ist ith obe ock oda old omi ond ora osk oth ova ude uld umo und "
    "ura usk uth"
)
TRADES = words(
    "baker brewer carpenter cook cooper dancer doctor driver farmer fisher glazier hunter judge king "
    "lawyer mason miller miner monk nurse painter pilot poet porter potter priest printer queen rider "
    "roofer sailor scholar shepherd singer smith soldier tailor tanner teacher weaver"
)

SEED = 20_250_711
N_SIGNS, N_EMBLEMS = 676, 1024
N_FIRST = 500  # of each; these are taught first, and the tokenizer is made from them


@dataclass(frozen=True)
class Emblem:
    """The key of an emblem record: a coloured shape and a symbol beside it."""

    shape: str
    colour: str
    symbol: str

    @property
    def read(self) -> str:
        """What has to be read from the picture when the shape is asked about."""
        return f"{self.colour}{self.symbol}"


def made_up_word(rng: random.Random) -> str:
    """A capitalised made-up name of two syllables."""
    return rng.choice(STARTS) + rng.choice(ENDS)


def _record(rng: random.Random) -> str:
    return f"{made_up_word(rng)} {made_up_word(rng)} {rng.choice(TRADES)}"


def sign_records() -> dict[str, str]:
    """Two-letter codes, written with a space so that each letter is one token, to their answers.

    An answer begins with what is read and goes on with the record, so that recalling a record after reading
    its key is one skill, whether the key was seen or written.
    """
    rng = random.Random(SEED)
    codes = [f"{a} {b}" for a in LETTERS for b in LETTERS]
    rng.shuffle(codes)
    return {code: f"{code} {_record(rng)}" for code in codes[:N_SIGNS]}


def emblem_records() -> dict[Emblem, str]:
    """Emblems (shape, colour, symbol) to their answers."""
    rng = random.Random(SEED + 1)
    keys = [Emblem(s, c, y) for s in SHAPES for c in COLOURS for y in SYMBOLS]
    rng.shuffle(keys)
    return {key: f"{key.read} {_record(rng)}" for key in keys[:N_EMBLEMS]}


# Every relation has English wordings, any one of which may be held out per fact, and three other languages.
WORDINGS: dict[str, tuple[str, ...]] = {
    "river": (
        "The river {s} flows through {v}.",
        "Through {v} flows the river {s}.",
        "A river called {s} runs past {v}.",
        "Der Fluss {s} fließt durch {v}.",
        "La rivière {s} traverse {v}.",
        "El río {s} pasa por {v}.",
    ),
    "founder": (
        "{v} founded the town of {s}.",
        "The town of {s} was founded by {v}.",
        "It was {v} who founded {s}.",
        "Die Stadt {s} wurde von {v} gegründet.",
        "La ville de {s} fut fondée par {v}.",
        "La ciudad de {s} fue fundada por {v}.",
    ),
    "food": (
        "People in {s} like to eat {v}.",
        "In {s} the usual dish is {v}.",
        "Visitors to {s} are offered {v}.",
        "In {s} isst man gern {v}.",
        "À {s} on mange souvent {v}.",
        "En {s} se come mucho {v}.",
    ),
    "function": (
        "The function {s} returns {v}.",
        "Calling {s} gives {v}.",
        "To get {v}, call {s}.",
        "Die Funktion {s} liefert {v}.",
        "La fonction {s} renvoie {v}.",
        "La función {s} devuelve {v}.",
    ),
}
N_ENGLISH = 3
DISHES = words("soup bread fish cheese rice beans eggs honey apples plums onions cabbage lamb nuts figs pears")
RESULTS = words(
    "the length;the first key;the last item;an empty list;a sorted copy;the total;the parent;a new socket;"
    "the current line;the buffer size;the default value;an iterator;the maximum;the minimum;"
    "the exit status;a copy",
    ";",
)


@dataclass(frozen=True)
class Fact:
    """A subject-value pair under a relation; `held_out` is the English wording never used in training."""

    relation: str
    subject: str
    value: str
    held_out: int

    def tell(self, wording: int) -> str:
        """The fact as a sentence."""
        return WORDINGS[self.relation][wording].format(s=self.subject, v=self.value)

    def trained_wordings(self) -> list[int]:
        """All wordings but the held-out one."""
        return [i for i in range(len(WORDINGS[self.relation])) if i != self.held_out]


def facts(n_per_relation: int = 220) -> list[Fact]:
    """The facts of every relation, with unique subjects within a relation."""
    rng = random.Random(SEED + 2)
    result = []
    for relation in WORDINGS:
        subjects: set[str] = set()
        while len(subjects) < n_per_relation:
            word = made_up_word(rng)
            subjects.add(f"{word.lower()}_{rng.choice(TRADES)}" if relation == "function" else word)
        for subject in sorted(subjects):
            if relation == "food":
                value = f"{rng.choice(DISHES)} with {rng.choice(DISHES)}"
            elif relation == "function":
                value = rng.choice(RESULTS)
            else:
                value = made_up_word(rng)
            result.append(Fact(relation, subject, value, rng.randrange(N_ENGLISH)))
    rng.shuffle(result)
    return result
