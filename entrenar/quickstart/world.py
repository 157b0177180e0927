"""The small world of the quickstart: the stories its base model read, and the notes it learns to file.

People of a few towns buy, carry and count things. `corpus` tells of them, and the base model is trained on that;
a text names its people and things more than once, so that a model which reads on learns to look back and copy.
`orders` are notes with the JSON record a clerk would file: the instruction data of the fine-tune.

Only ``random.Random(seed).random()`` is drawn from, whose sequence Python promises to keep, so the same seed gives
the same text on every machine and version.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# fmt: off
NAMES = (
    "Ada", "Amir", "Bela", "Bruno", "Carla", "Chen", "Dalia", "Diego", "Elsa", "Emil", "Fatima", "Felix",
    "Greta", "Hugo", "Ines", "Ivan", "Jonas", "Kofi", "Leila", "Lena", "Marco", "Mina", "Nadia", "Nora",
    "Olaf", "Omar", "Paula", "Pedro", "Rosa", "Samir", "Sofia", "Tomas", "Uma", "Vera", "Yuki", "Zara",
)
TOWNS = (
    "Accra", "Bern", "Cairo", "Delhi", "Dublin", "Hanoi", "Havana", "Kyoto", "Lagos", "Lima",
    "Oslo", "Paris", "Perth", "Porto", "Quito", "Riga", "Seoul", "Tunis", "Turin", "Vienna",
)
GOODS = (
    "apple", "basket", "blanket", "boot", "candle", "carpet", "chair", "clock", "coat", "cup",
    "drum", "flute", "glove", "hat", "kettle", "kite", "ladder", "lamp", "lemon", "map",
    "mirror", "pear", "pen", "plate", "ring", "rope", "spoon", "stool", "table", "tent",
)
KINDS = ("red", "blue", "green", "white", "black", "yellow", "small", "large", "old", "new", "plain", "round")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
COUNTS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
# fmt: on
PRICES = range(10, 100)  # coins


class Dice:
    """Choices from one seeded stream."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def one(self, of: Sequence[T]) -> T:
        return of[self.below(len(of))]

    def some(self, of: Sequence[T], n: int) -> list[T]:
        """`n` different ones, in any order."""
        left = list(of)
        return [left.pop(self.below(len(left))) for _ in range(n)]


@dataclass(frozen=True)
class Order:
    """Somebody wants some things: what a note says, and what its record holds."""

    name: str
    count: str
    kind: str
    good: str
    town: str
    day: str
    price: int

    @classmethod
    def any(cls, dice: Dice) -> Order:
        return cls(
            name=dice.one(NAMES),
            count=dice.one(COUNTS),
            kind=dice.one(KINDS),
            good=dice.one(GOODS),
            town=dice.one(TOWNS),
            day=dice.one(DAYS),
            price=dice.one(PRICES),
        )

    @property
    def item(self) -> str:
        return f"{self.kind} {self.good}"

    @property
    def items(self) -> str:
        return f"{self.item}s"

    @property
    def digits(self) -> int:
        return COUNTS.index(self.count) + 2

    def record(self) -> str:
        """The JSON that a clerk files: the thing in the singular, the count in digits."""
        fields = {"name": self.name, "item": self.item, "count": self.digits}
        return json.dumps(fields | {"town": self.town, "day": self.day, "price": self.price})


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


# ---- instruction data ---------------------------------------------------------------------------------------------


def note(dice: Dice, o: Order) -> str:
    """An order in words; who, what, where, when and how much come in many arrangements."""
    return sentence(
        dice.one((
            f"On {o.day} {o.name} bought {o.count} {o.items} in {o.town} for {o.price} coins.",
            f"{o.name} came to {o.town} on {o.day} and paid {o.price} coins for {o.count} {o.items}.",
            f"{o.count} {o.items} for {o.name}, please. Bring them to {o.town} on {o.day}, I pay {o.price} coins.",
            f"In {o.town} {o.name} asked for {o.count} {o.items}, for {o.price} coins. They are wanted on {o.day}.",
            f"Please send {o.count} {o.items} to {o.name} in {o.town}. {o.day} is good. The price is {o.price} coins.",
            f"For {o.price} coins {o.name} took {o.count} {o.items} home to {o.town} on {o.day}.",
            f"{o.name} from {o.town} wants {o.count} {o.items} on {o.day} and will pay {o.price} coins.",
            f"We sold {o.count} {o.items} to {o.name} on {o.day}. The shop in {o.town} got {o.price} coins.",
        ))
    )  # fmt: skip


def orders(seed: int, n: int) -> list[dict[str, str]]:
    """`n` samples {"prompt", "completion"}; no two have the same record."""
    dice = Dice(seed)
    samples: dict[str, str] = {}
    while len(samples) < n:
        order = Order.any(dice)
        samples.setdefault(order.record(), note(dice, order))
    return [{"prompt": f"Note: {text} Record:", "completion": f" {record}"} for record, text in samples.items()]


# ---- what the base model reads ------------------------------------------------------------------------------------


def corpus(seed: int, n: int) -> Iterator[str]:
    """`n` texts of a few sentences."""
    dice = Dice(seed)
    for _ in range(n):
        yield dice.one(TEXTS)(dice)


def market(dice: Dice) -> str:
    """A story of somebody who buys something."""
    o, seller = Order.any(dice), dice.one(NAMES)
    opening = dice.one((
        f"On {o.day} {o.name} went to the market in {o.town}.",
        f"{o.name} lives in {o.town}. On {o.day} {o.name} went to the market.",
        f"It was {o.day}, and the market in {o.town} was full. {o.name} came early.",
    ))  # fmt: skip
    middle = dice.one((
        f'{seller} sold {o.items} there. "{sentence(o.count)} {o.items} are {o.price} coins," said {seller}.',
        f'"I want {o.count} {o.items}," said {o.name} to {seller}. "They are {o.price} coins," said {seller}.',
        f'There was a sign: "{o.items}, {o.price} coins". {seller} had written the sign.',
    ))  # fmt: skip
    end = dice.one((
        f"{o.name} paid {o.price} coins and carried the {o.count} {o.items} home. One {o.item} was for {seller}.",
        f"So {o.name} gave {seller} {o.price} coins and took the {o.items}. All of {o.town} wanted one {o.item}.",
        f"{o.name} liked the {o.items} and paid the {o.price} coins. Then {o.name} left {o.town}.",
    ))  # fmt: skip
    return f"{opening} {middle} {end}"


def letter(dice: Dice) -> str:
    o, writer = Order.any(dice), dice.one(NAMES)
    news = dice.one((
        f"I saw {o.count} {o.items} and thought of you, {o.name}. They cost {o.price} coins.",
        f"Do you still have the {o.items}? In {o.town} they pay {o.price} coins for one {o.item}.",
    ))  # fmt: skip
    return "\n".join((
        f"Dear {o.name},",
        f"I came to {o.town} on {o.day}. {news}",
        f"The {o.items} will come to you, {o.name}, on {dice.one((o.day, dice.one(DAYS)))}.",
        f"{writer} from {dice.one(TOWNS)}",
    ))  # fmt: skip


def reading(dice: Dice) -> str:
    """A list that is read twice, with and without quotation marks."""
    name = dice.one(NAMES)
    words = []
    for _ in range(4 + dice.below(5)):
        o = Order.any(dice)
        words.append(dice.one((o.item, o.name, o.town, o.day, f"{o.price} coins", f"{o.count} {o.good}s")))
    plain, quoted = ", ".join(words), ", ".join(f'"{word}"' for word in words)
    first, again = dice.one((plain, quoted)), dice.one((plain, quoted))
    return dice.one((
        f"{name} wrote a list: {first}. On the way {name} read it again: {again}.",
        f"{first}, said {name}. And again: {again}.",
        f"The list of {name} was {first}. Then {name} said {again}.",
    ))  # fmt: skip


def questions(dice: Dice) -> str:
    """A few facts, and what a listener asks about them."""
    o = Order.any(dice)
    n, items, price = o.count, o.items, f"{o.price} coins"
    facts = dice.some((
        dice.one((f"{o.name} was in {o.town}.", f"{o.name} came from {o.town}.", f"In {o.town} they know {o.name}.")),
        dice.one((f"There were {n} {items}.", f"{sentence(n)} {items} were sold.", f"They had {n} {items}.")),
        dice.one((f"{o.day} was the day.", f"It was on {o.day}.", f"They did it on {o.day}.")),
        dice.one((f"It cost {price}.", f"For this they got {price}.", f"The price was {price}.")),
    ), 4)  # fmt: skip
    asked = dice.some((
        ("Who", o.name), ("What", o.item), ("How many", o.digits),
        ("Where", o.town), ("When", o.day), ("How much", o.price),
    ), 3 + dice.below(4))  # fmt: skip
    mark = dice.one(("", '"'))
    return " ".join([*facts, *(f"{who}? {mark}{answer}{mark}." for who, answer in asked)])


def counting(dice: Dice) -> str:
    """Counts in words and in digits."""
    lines = []
    for _ in range(3 + dice.below(3)):
        o = Order.any(dice)
        lines.append(dice.one((
            f"{o.name} counted {o.count} {o.items} and wrote {o.digits}.",
            f"{sentence(o.count)} {o.items} are {o.digits} {o.good}s, each one {o.item}.",
            f'How many {o.good}s are {o.count} {o.items}? "{o.digits}".',
        )))  # fmt: skip
    return " ".join(lines)


def card(dice: Dice) -> str:
    """A fact or two, and the card that was written about them: two or three fields of what a record has six."""
    o = Order.any(dice)
    fact, fields = dice.one((
        (f"{o.name} lives in {o.town}.", {"name": o.name, "town": o.town}),
        (f"The shop in {o.town} opens on {o.day}.", {"town": o.town, "day": o.day}),
        (f"{o.name} keeps {o.count} {o.items}.", {"name": o.name, "count": o.digits, "item": o.item}),
        (f"One {o.item} costs {o.price} coins on {o.day}.", {"item": o.item, "day": o.day, "price": o.price}),
    ))  # fmt: skip
    return f"{fact} The card says {json.dumps(fields)}"


TEXTS = (market, letter, reading, reading, questions, questions, questions, counting, card)
