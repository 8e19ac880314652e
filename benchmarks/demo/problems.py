"""Arithmetic word problems with worked answers, in the style of GSM8K: text that may be shipped, made from a seed.

A problem is a template with names and numbers drawn at random. Every step of its answer is one operation on numbers
that are known by then, so that the answers are right by construction.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Mapping
from dataclasses import dataclass

NAMES = (
    *("Ana", "Ben", "Chloe", "Daniel", "Elif", "Femi", "Grace", "Hugo", "Ines", "Jonas", "Kemal", "Lena", "Mira"),
    *("Noah", "Olga", "Pedro", "Ravi", "Sofia", "Tom", "Yuki"),
)
THINGS = (
    "apples",
    "beads",
    "books",
    "buttons",
    "candles",
    "cards",
    "coins",
    "marbles",
    "pencils",
    "shells",
    "stickers",
)
FOODS = ("cakes", "pies", "loaves of bread", "pizzas", "trays of muffins")
PLACES = ("the lake", "the city", "the coast", "the mountains", "a small village")
# Numbers that the answer does not need.
ASIDES = (
    "It is day {aside} of the month.",
    "The shop has been open for {aside} years.",
    "{friend} is {aside} years old.",
    "The house has number {aside}.",
)
ASIDE_SHARE = 0.3
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@dataclass(frozen=True)
class Problem:
    """A question, and an answer in steps whose last line is `#### ` and the result."""

    question: str
    answer: str


@dataclass(frozen=True)
class Template:
    """What problems of one kind share.

    Attributes:
        facts: the question but for its last sentence, in several wordings.
        ask: the last sentence, in several wordings.
        numbers: the range of every number, as in `range`.
        steps: pairs of an operation such as `all = boxes * each` and the sentence it is told in, where `{work}` is
            the operation with its numbers, such as `3 * 12 = 36`.
    """

    facts: tuple[str, ...]
    ask: tuple[str, ...]
    numbers: Mapping[str, tuple[int, ...]]
    steps: tuple[tuple[str, str], ...]


TEMPLATES = (
    Template(
        (
            "{name} buys {boxes} boxes of {things}, with {per_box} {things} in every box. {name} gives {given} of them "
            "to {friend}.",
            "There are {per_box} {things} in a box. {name} has {boxes} boxes and gives {given} {things} to {friend}.",
        ),
        ("How many {things} does {name} have left?", "How many {things} are left?"),
        {"boxes": (2, 10), "per_box": (4, 25), "given": (3, 40)},
        (
            ("total = boxes * per_box", "At first {name} has {work} {things}."),
            ("left = total - given", "After the gift there are {work} {things} left."),
        ),
    ),
    Template(
        (
            "{name} saves {weekly} dollars every week for {weeks} weeks, and gets {present} dollars from {friend}. "
            "Then {name} spends {spent} dollars.",
            "For {weeks} weeks {name} puts {weekly} dollars a week into a jar. {friend} adds {present} dollars, and "
            "{name} takes out {spent} dollars.",
        ),
        ("How many dollars does {name} have in the end?", "How much money is left?"),
        {"weekly": (3, 30), "weeks": (3, 13), "present": (5, 60, 5), "spent": (10, 120)},
        (
            ("saved = weekly * weeks", "{name} saves {work} dollars."),
            ("total = saved + present", "With the money from {friend} that makes {work} dollars."),
            ("left = total - spent", "After spending some, {name} has {work} dollars."),
        ),
    ),
    Template(
        (
            "A notebook costs {notebook} dollars and a pen costs {pen} dollars. {name} buys {notebooks} notebooks and "
            "{pens} pens, and pays with {paid} dollars.",
            "{name} pays {paid} dollars for {notebooks} notebooks at {notebook} dollars apiece and {pens} pens at "
            "{pen} dollars apiece.",
        ),
        ("How much change does {name} get?", "How many dollars does {name} get back?"),
        {"notebook": (2, 9), "pen": (1, 5), "notebooks": (2, 8), "pens": (2, 10), "paid": (50, 101, 50)},
        (
            ("first = notebooks * notebook", "The notebooks cost {work} dollars."),
            ("second = pens * pen", "The pens cost {work} dollars."),
            ("total = first + second", "Together that is {work} dollars."),
            ("change = paid - total", "The change is {work} dollars."),
        ),
    ),
    Template(
        (
            "{name} drives to {place} for {hours} hours at {speed} miles per hour, and then {more} hours at {slow} "
            "miles per hour.",
            "On the way to {place} {name} drives {speed} miles an hour for {hours} hours. On a smaller road it is "
            "{slow} miles an hour for {more} hours.",
        ),
        ("How many miles is that in total?", "How far does {name} drive?"),
        {"hours": (2, 6), "speed": (45, 71, 5), "more": (2, 5), "slow": (15, 41, 5)},
        (
            ("first = hours * speed", "The first part is {work} miles."),
            ("second = more * slow", "The second part is {work} miles."),
            ("total = first + second", "The whole way is {work} miles."),
        ),
    ),
    Template(
        (
            "{name} has {mine} {things} and {friend} has {theirs} {things}. They put them together and share them "
            "equally among {people} children.",
            "{people} children share {things} equally. {name} brings {mine} of them and {friend} brings {theirs}.",
        ),
        ("How many {things} does every child get?", "How many {things} is that for one child?"),
        {"mine": (8, 60), "theirs": (8, 60), "people": (3, 10)},
        (
            ("total = mine + theirs", "Together they have {work} {things}."),
            ("share = total / people", "Every child gets {work} {things}."),
        ),
    ),
    Template(
        (
            "{name} is {age} years old. {friend} is {older} years older than {name}.",
            "{friend} is {older} years older than {name}, who is {age} years old.",
        ),
        (
            "How old will they be together in {years} years?",
            "What will be the sum of their ages {years} years from now?",
        ),
        {"age": (6, 40), "older": (2, 25), "years": (2, 16)},
        (
            ("other = age + older", "{friend} is {work} years old."),
            ("now = age + other", "Today they are {work} years old together."),
            ("gain = 2 * years", "Both get older, which adds {work} years."),
            ("sum = now + gain", "In the end the sum is {work} years."),
        ),
    ),
    Template(
        (
            "{name} earns {wage} dollars an hour and works {hours} hours a day, {days} days a week. The rent is {rent} "
            "dollars a week.",
            "{name} works {days} days a week, {hours} hours a day, for {wage} dollars an hour, and pays {rent} dollars "
            "of rent every week.",
        ),
        ("How many dollars are left after a week?", "How much does {name} keep of a week's wage?"),
        {"wage": (9, 31), "hours": (4, 10), "days": (2, 7), "rent": (60, 241, 10)},
        (
            ("week = hours * days", "{name} works {work} hours a week."),
            ("pay = week * wage", "That earns {work} dollars."),
            ("left = pay - rent", "After the rent {work} dollars are left."),
        ),
    ),
    Template(
        (
            "{name} wants to bake {count} {foods}. Each of them needs {eggs} eggs, and there are "
            "{stock} eggs in the kitchen.",
            "There are {stock} eggs in the kitchen. {name} bakes {count} {foods}, and each of them needs {eggs} eggs.",
        ),
        ("How many more eggs does {name} need?", "How many eggs must {name} buy?"),
        {"count": (3, 13), "eggs": (2, 9), "stock": (3, 25)},
        (
            ("need = count * eggs", "The recipe needs {work} eggs."),
            ("missing = need - stock", "So {work} eggs are missing."),
        ),
    ),
    Template(
        (
            "{name} reads a book of {pages} pages. For {days} days {name} reads {daily} pages a day, and after that "
            "{faster} pages a day.",
            "A book has {pages} pages. {name} reads {daily} pages on each of the first {days} days and {faster} pages "
            "on each day after.",
        ),
        ("How many more days does {name} need for the rest?", "How many days does the rest of the book take?"),
        {"pages": (120, 401, 10), "days": (2, 8), "daily": (10, 31, 5), "faster": (15, 51, 5)},
        (
            ("read = days * daily", "At first {name} reads {work} pages."),
            ("left = pages - read", "Then {work} pages are left."),
            ("more = left / faster", "They take {work} days."),
        ),
    ),
    Template(
        (
            "{name} plants {rows} rows of {plants} tomato plants. Half of the plants grow well, and each of those "
            "gives {fruits} tomatoes.",
            "In a garden there are {rows} rows with {plants} tomato plants each. One half of them gives {fruits} "
            "tomatoes per plant, the other half gives none.",
        ),
        ("How many tomatoes are there?", "How many tomatoes can {name} pick?"),
        {"rows": (2, 13), "plants": (3, 16), "fruits": (4, 13)},
        (
            ("total = rows * plants", "There are {work} plants."),
            ("good = total / 2", "Half of them is {work} plants."),
            ("tomatoes = good * fruits", "They give {work} tomatoes."),
        ),
    ),
    Template(
        (
            "A bus to {place} starts with {start} people. At the first stop {off} people get off and {on} get on. At "
            "the second stop {more} people get on.",
            "{start} people sit in a bus to {place}. First {off} of them leave and {on} others enter; later {more} "
            "more enter.",
        ),
        ("How many people are in the bus now?", "How many people ride on?"),
        {"start": (12, 50), "off": (2, 20), "on": (2, 20), "more": (2, 15)},
        (
            ("stay = start - off", "After some leave, there are {work} people."),
            ("then = stay + on", "With those who enter, there are {work} people."),
            ("now = then + more", "At the end there are {work} people."),
        ),
    ),
    Template(
        (
            "{name} builds a fence around a garden that is {length} meters long and {width} meters wide. A meter of "
            "fence costs {price} dollars.",
            "A garden of {length} by {width} meters gets a fence on all four sides, for {price} dollars a meter.",
        ),
        ("What does the fence cost?", "How many dollars does {name} pay for the fence?"),
        {"length": (6, 40), "width": (4, 25), "price": (3, 16)},
        (
            ("half = length + width", "Two sides are {work} meters long."),
            ("around = 2 * half", "All four sides are {work} meters."),
            ("cost = around * price", "The fence costs {work} dollars."),
        ),
    ),
    Template(
        (
            "A coat costs {price} dollars. In a sale it is {percent} percent off, and {name} buys {count} of them.",
            "{name} buys {count} coats. One costs {price} dollars, but there is a discount of {percent} percent.",
        ),
        ("How much does {name} pay?", "How many dollars does {name} pay in total?"),
        {"price": (20, 201, 10), "percent": (10, 51, 10), "count": (2, 6)},
        (
            ("part = price * percent", "Price times percent is {work}."),
            ("discount = part / 100", "The discount is {work} dollars."),
            ("reduced = price - discount", "One coat then costs {work} dollars."),
            ("total = reduced * count", "In total {name} pays {work} dollars."),
        ),
    ),
    Template(
        (
            "A tap fills a tank with {flow} liters a minute, while {leak} liters a minute leak out. The tap is open "
            "for {minutes} minutes, and the tank held {start} liters before.",
            "A tank holds {start} liters. For {minutes} minutes {flow} liters a minute run in and {leak} liters a "
            "minute run out.",
        ),
        ("How many liters are in the tank then?", "How much water does the tank hold in the end?"),
        {"flow": (8, 31), "leak": (1, 8), "minutes": (5, 31), "start": (10, 101, 10)},
        (
            ("net = flow - leak", "Every minute adds {work} liters."),
            ("gain = net * minutes", "In the whole time that is {work} liters."),
            ("end = start + gain", "The tank then holds {work} liters."),
        ),
    ),
    Template(
        (
            "{name} collects {first} {things} on Monday, {times} times as many on Tuesday, and {fewer} fewer on "
            "Wednesday than on Tuesday.",
            "On Monday {name} finds {first} {things}. On Tuesday it is {times} times that number, and on Wednesday "
            "{fewer} fewer than on Tuesday.",
        ),
        ("How many {things} is that in three days?", "How many {things} does {name} have in the end?"),
        {"first": (4, 30), "times": (2, 5), "fewer": (2, 20)},
        (
            ("second = first * times", "On Tuesday it is {work} {things}."),
            ("third = second - fewer", "On Wednesday it is {work} {things}."),
            ("two = first + second", "The first two days make {work} {things}."),
            ("total = two + third", "All three days make {work} {things}."),
        ),
    ),
    Template(
        (
            "{classes} classes of {students} students and {teachers} teachers go to {place}. One van takes {seats} "
            "people.",
            "A school goes to {place} in vans for {seats} people: {classes} classes with {students} students each, and "
            "{teachers} teachers.",
        ),
        ("How many vans are needed?", "How many vans does the school need?"),
        {"classes": (2, 8), "students": (12, 31), "teachers": (3, 13), "seats": (6, 13)},
        (
            ("pupils = classes * students", "There are {work} students."),
            ("people = pupils + teachers", "With the teachers there are {work} people."),
            ("vans = people / seats", "They need {work} vans."),
        ),
    ),
    Template(
        (
            "{name} has {hens} hens, and every hen lays {eggs} eggs a week. {name} sells the eggs by the dozen, for "
            "{price} dollars a dozen.",
            "Every week each of {hens} hens lays {eggs} eggs. {name} gets {price} dollars for a dozen of them.",
        ),
        ("How many dollars is that a week?", "How much money do the eggs of a week bring?"),
        {"hens": (4, 37), "eggs": (3, 7), "price": (2, 8)},
        (
            ("total = hens * eggs", "The hens lay {work} eggs."),
            ("dozens = total / 12", "That is {work} dozens."),
            ("money = dozens * price", "They bring {work} dollars."),
        ),
    ),
    Template(
        (
            "{name} runs {laps} laps of {meters} meters on each of {days} days. {friend} runs {less} meters less than "
            "that in the same time.",
            "On {days} days {name} runs {laps} laps a day, and a lap has {meters} meters. {friend} runs {less} meters "
            "less in all.",
        ),
        ("How many meters does {friend} run?", "How far does {friend} run?"),
        {"laps": (2, 9), "meters": (200, 501, 50), "days": (2, 7), "less": (100, 1001, 100)},
        (
            ("rounds = laps * days", "{name} runs {work} laps."),
            ("distance = rounds * meters", "That is {work} meters."),
            ("other = distance - less", "{friend} runs {work} meters."),
        ),
    ),
)


def _work(template: Template, numbers: dict[str, int]) -> list[tuple[str, int]]:
    """The operations with their numbers, and their results; nothing where one of them is not a whole number above 0."""
    lines = []
    for operation, _ in template.steps:
        result, _, left, sign, right = operation.split()
        x, y = (numbers[word] if word in numbers else int(word) for word in (left, right))
        if sign == "/" and x % y:
            return []
        numbers[result] = _OPERATIONS[sign](x, y)
        if numbers[result] <= 0:
            return []
        lines.append((f"{x} {sign} {y} = {numbers[result]}", numbers[result]))
    return lines


def _problem(template: Template, draw: random.Random) -> Problem:
    lines: list[tuple[str, int]] = []
    while not lines:
        numbers = {name: draw.randrange(*limits) for name, limits in template.numbers.items()}
        lines = _work(template, numbers)
    name, friend = draw.sample(NAMES, 2)
    values: dict[str, object] = {**numbers, "name": name, "friend": friend, "aside": draw.randrange(5, 29)}
    values |= {key: draw.choice(words) for key, words in (("things", THINGS), ("foods", FOODS), ("place", PLACES))}
    sentences = [draw.choice(template.facts), draw.choice(template.ask)]
    aside = draw.choice(ASIDES)
    if draw.random() < ASIDE_SHARE:
        sentences.insert(draw.randrange(2), aside)
    told = [
        sentence.format(work=work, **values) for (_, sentence), (work, _) in zip(template.steps, lines, strict=True)
    ]
    question = " ".join(sentence.format(**values) for sentence in sentences)
    return Problem(question, "\n".join([*told, f"#### {lines[-1][1]}"]))


def problems(count: int, seed: int = 0) -> list[Problem]:
    """Different problems, the templates in turn; the same seed gives the same ones, and more of them."""
    draw = random.Random(seed)
    chosen: dict[str, Problem] = {}
    while len(chosen) < count:
        problem = _problem(TEMPLATES[len(chosen) % len(TEMPLATES)], draw)
        chosen.setdefault(problem.question, problem)
    return list(chosen.values())
