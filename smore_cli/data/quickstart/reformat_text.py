"""Words, names and units of the reformat family."""

from __future__ import annotations

from smore_cli.data.quickstart.items import words

__all__ = ["ADJECTIVES", "FIRST_NAMES", "MONTHS", "ONES", "SURNAMES", "TENS", "UNITS", "WORDS"]

MONTHS = words("January February March April May June July August September October November December")

ONES = words("one two three four five six seven eight nine")
TENS = words("twenty thirty forty fifty sixty seventy eighty ninety")

# Large unit, small unit, how many small ones make a large one.
UNITS = (
    ("km", "metres", 1000),
    ("metres", "cm", 100),
    ("cm", "mm", 10),
    ("kg", "grams", 1000),
    ("grams", "mg", 1000),
    ("litres", "ml", 1000),
    ("tonnes", "kg", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
)

WORDS = words(
    "anchor apple arrow basket beach bell bottle branch bridge button cabin candle carpet castle chair cherry clock "
    "cloud copper cradle curtain desk door dragon drum engine envelope fabric falcon feather fence field flute forest "
    "fountain garden gate glove hammer harbour helmet honey island jacket jungle kettle key kitchen ladder lamp "
    "lantern leaf lemon letter lock market meadow mirror motor mountain napkin needle notebook ocean olive orange "
    "oven paddle palace paper pebble pencil pepper piano pillow planet pocket puzzle quilt rabbit radio ribbon river "
    "rocket saddle sail saucer shadow shelf shovel silver spoon square statue stone summer table temple thread ticket "
    "timber tunnel umbrella valley velvet village violin wagon wallet water whistle window winter yard zebra"
)

ADJECTIVES = words(
    "blue old quiet small green heavy round broken early empty bright narrow golden wooden hidden second gentle "
    "frozen distant clever simple yellow sleepy open"
)

FIRST_NAMES = words(
    "Maria Peter Aisha Tomas Helen Oscar Lucia Daniel Freya Ivan Nadia Robert Sofia Viktor Laila Martin Greta Paulo "
    "Ruth Simon Clara Hassan Julia Edwin"
)

SURNAMES = words(
    "Lopez Novak Carter Weber Okafor Lindgren Rossi Tanaka Mbeki Dubois Silva Kowalski Haddad Murphy Petrov Keller "
    "Fischer Sharma Jensen Moreau Bianchi Walker Santos Yilmaz"
)
