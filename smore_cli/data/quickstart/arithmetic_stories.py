"""The stories of the arithmetic family: texts with three numbers, and what to do with them."""

from __future__ import annotations

from dataclasses import dataclass

from smore_cli.data.quickstart.items import words

__all__ = ["ITEMS", "NAMES", "STORIES", "Story"]

Range = tuple[int, int]


@dataclass(frozen=True)
class Story:
    """One story; its answer is `(a first b) second c`.

    Attributes:
        name: the kind.
        text: the question, with `{a}`, `{b}`, `{c}`, names and `{items}`.
        first: the first step, one of + - * /.
        second: the second step, one of + - * / and ~ (take the result away from c).
        a: smallest and largest value of a; likewise b and c.
    """

    name: str
    text: str
    first: str
    second: str
    a: Range
    b: Range
    c: Range


NAMES = words(
    "Ada Ben Carla Dev Elif Farid Grace Hugo Ines Jonas Kira Leo Mina Noor Otto Priya Quentin Rosa Sam Tara Umar Vera "
    "Wim Yara Zoe Anton Bella Cyrus Dina Emil"
)

ITEMS = words(
    "apples pens shells marbles stickers buttons beads stamps plums cards nuts candles coins ribbons pebbles badges "
    "biscuits tokens blocks lemons"
)

STORIES = (
    Story(
        "gift",
        "{name} has {a} {items}, buys {b} more and gives {c} away. How many {items} are left?",
        *("+", "-", (3, 15), (2, 12), (2, 12)),
    ),
    Story(
        "bus",
        "A bus carries {a} people. At the stop {b} get off and {c} get on. How many people are on the bus now?",
        *("-", "+", (8, 25), (2, 9), (2, 12)),
    ),
    Story(
        "boxes",
        "There are {a} boxes with {b} {items} in each, and {c} loose {items}. How many {items} are there in all?",
        *("*", "+", (2, 6), (2, 7), (2, 9)),
    ),
    Story(
        "packing",
        "{name} packs {a} bags with {b} {items} each. Then {c} {items} are sold. How many {items} remain?",
        *("*", "-", (2, 6), (2, 8), (2, 12)),
    ),
    Story(
        "harvest",
        "{name} picks {a} plums before lunch and {b} after lunch and puts them equally in {c} baskets. "
        "How many plums go in each basket?",
        *("+", "/", (3, 18), (3, 18), (2, 5)),
    ),
    Story(
        "bakery",
        "{name} bakes {a} rolls, burns {b} and puts the others equally on {c} plates. How many rolls are on a plate?",
        *("-", "/", (12, 35), (2, 8), (2, 5)),
    ),
    Story(
        "change",
        "A pen costs {a} coins. {name} buys {b} pens and pays with {c} coins. How many coins come back?",
        *("*", "~", (2, 6), (2, 6), (15, 45)),
    ),
    Story(
        "savings",
        "{name} saves {a} coins a week for {b} weeks and had {c} coins before. How many coins are there now?",
        *("*", "+", (2, 7), (2, 6), (2, 12)),
    ),
    Story(
        "reading",
        "{name} reads {a} pages on Monday and {b} on Tuesday. The book has {c} pages. How many pages are unread?",
        *("+", "~", (3, 15), (3, 15), (20, 50)),
    ),
    Story(
        "party_bags",
        "A bag holds {a} red and {b} green {items}. How many {items} are in {c} such bags?",
        *("+", "*", (2, 7), (2, 7), (2, 6)),
    ),
    Story(
        "eggs",
        "A carton of {a} eggs has {b} broken ones. How many whole eggs are in {c} such cartons?",
        *("-", "*", (6, 14), (2, 5), (2, 6)),
    ),
    Story(
        "sweets",
        "{name} deals {a} sweets equally to {b} children and then gives each child {c} more. "
        "How many sweets does one child have?",
        *("/", "+", (8, 40), (2, 6), (2, 9)),
    ),
    Story(
        "card_game",
        "{name} deals {a} cards equally to {b} players. Each player lays down {c}. How many cards does a player hold?",
        *("/", "-", (18, 60), (2, 5), (1, 8)),
    ),
    Story(
        "tickets",
        "It costs {a} coins to buy {b} equal tickets. How many coins do {c} of these tickets cost?",
        *("/", "*", (6, 40), (2, 6), (2, 7)),
    ),
    Story(
        "teams",
        "On the field {a} teams of {b} players form new groups of {c}. How many groups are there?",
        *("*", "/", (2, 10), (3, 12), (2, 6)),
    ),
    Story(
        "weather",
        "At noon it is {a} degrees. It gets {b} degrees colder and then {c} degrees warmer. How warm is it then?",
        *("-", "+", (9, 25), (2, 8), (2, 9)),
    ),
    Story(
        "farm",
        "A farm has {a} hens, {b} ducks and {c} geese. How many birds does the farm have?",
        *("+", "+", (3, 20), (2, 15), (2, 15)),
    ),
    Story(
        "ages",
        "{name} is {a}. {name2} is {b} years older than {name}. {name3} is {c} years younger than {name2}. "
        "How old is {name3}?",
        *("+", "-", (5, 20), (2, 9), (2, 9)),
    ),
    Story(
        "water_tank",
        "A tank holds {a} litres. The garden takes {b} litres and the car wash {c} litres. How many litres are left?",
        *("-", "-", (20, 60), (3, 18), (3, 18)),
    ),
    Story(
        "train_ride",
        "A train runs {a} km before noon and {b} km after noon. The whole trip is {c} km. How many km are still to go?",
        *("+", "~", (4, 20), (4, 20), (25, 60)),
    ),
    Story(
        "cinema",
        "Visitors fill {a} rows of {b} seats. The hall has {c} seats. How many seats are free?",
        *("*", "~", (2, 6), (3, 8), (20, 60)),
    ),
    Story(
        "snack_bar",
        "A roll costs {a} coins and a drink {b} coins. What do {c} friends pay together for one of each?",
        *("+", "*", (2, 8), (2, 7), (2, 6)),
    ),
    Story(
        "shelves",
        "Each of {a} shelves holds {b} boxes, and each box holds {c} cups. How many cups are there?",
        *("*", "*", (2, 6), (2, 6), (2, 9)),
    ),
    Story(
        "library",
        "A shelf has {a} books. {name} lends out {b} and then gets {c} back. How many books are on the shelf?",
        *("-", "+", (12, 35), (3, 10), (1, 8)),
    ),
)
