"""Makes the quickstart's data: requests in plain English, answered with strict JSON.

The task is small enough for a 135M model and a CPU, and its score is exact match, so that what training did is plain to
see: the base model does not know the schema and scores nothing. What has to be learned: ten intents and their fields,
field order, which words are a slot's value (to be copied), and which have to be normalised ("half past six in the
evening" is "18:30", "an hour and a half" is 90). A field that the request does not mention is left out.

The test set holds no request and no answer of the training set. Its names, places, dishes, ..., clock times and
numbers never occur in training (but for what comes from a short closed list: days, units, "half an hour", "a dozen"),
and about a third of it is phrased in ways that training never shows.

Run ``python configs/data/make_requests.py`` to write both files again; a test compares them byte for byte. Not part of
the wheel: only what it wrote is.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

SEED = 0
NUM_TRAIN = 1000
NUM_TEST = 100
SYSTEM_PROMPT = "Turn the request into JSON."
FOLDER = Path(__file__).resolve().parent

Slot = Callable[[Random, bool], tuple[str, Any]]  # (random, held_out) -> (what the request says, the field's value)


class Intent(NamedTuple):
    """One kind of request: its fields in order, and how people ask for it. The answer has a phrasing's fields."""

    fields: dict[str, Slot]
    phrasings: Sequence[str]
    held_out_phrasings: Sequence[str]


NUMBER_WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"
]  # fmt: skip


def words(train: str | Sequence[str], test: str | Sequence[str]) -> Slot:
    """A slot that is copied as it stands, from lists or comma-separated strings."""
    train_words = train.split(", ") if isinstance(train, str) else list(train)
    test_words = test.split(", ") if isinstance(test, str) else list(test)
    assert not set(train_words) & set(test_words)

    def slot(random: Random, held_out: bool) -> tuple[str, str]:
        word = random.choice(test_words if held_out else train_words)
        return word, word

    return slot


def synonyms(table: dict[Any, str]) -> Slot:
    """A slot with a closed list of values, each said in one of several comma-separated ways."""
    said = [(way, value) for value, ways in table.items() for way in ways.split(", ")]

    def slot(random: Random, held_out: bool) -> tuple[str, Any]:
        return random.choice(said)

    return slot


def number(low: int, high: int, step: int = 1) -> Slot:
    """A number in digits. Every fifth one is kept for the test set."""

    def slot(random: Random, held_out: bool) -> tuple[str, int]:
        value = random.choice([n for n in range(low, high + 1, step) if (n // step % 5 == 2) == held_out])
        return str(value), value

    return slot


def count(random: Random, held_out: bool) -> tuple[str, int]:
    """How many of something: "2", "two", "a couple of", "a dozen"."""
    value = random.choice([2, 2, 3, 4, 5, 6, 7, 8, 9, 12])
    said = [str(value), NUMBER_WORDS[value]]
    said += {2: ["a couple of"], 6: ["half a dozen"], 12: ["a dozen"]}.get(value, [])
    return random.choice(said), value


def clock_time(random: Random, held_out: bool) -> tuple[str, str]:
    """A time of day as people say it, and as HH:MM. Every fifth five-minute slot is kept for the test set."""
    while True:
        hour, minute = random.randrange(24), random.choice([0, 0, 0, 15, 30, 30, 45, 5, 10, 20, 25, 35, 40, 50, 55])
        if ((hour * 60 + minute) // 5 % 5 == 2) == held_out:
            break
    value = f"{hour:02d}:{minute:02d}"
    hour12, half = hour % 12 or 12, "am" if hour < 12 else "pm"
    said = [value, f"{hour12}:{minute:02d} {half}" if minute else f"{hour12} {half}"]
    if hour in (0, 12) and minute == 0:
        said += ["midnight" if hour == 0 else "noon"] * 2
    if 5 <= hour < 22 and hour != 12:
        part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
        this, following = NUMBER_WORDS[hour12], NUMBER_WORDS[hour12 % 12 + 1]
        said += {
            0: [f"{this} {part}", f"{this} o'clock {part}"],
            15: [f"quarter past {this} {part}"],
            30: [f"half past {this} {part}"] * 2,
            45: [f"quarter to {following} {part}"] if hour not in (11, 17, 21) else [],
        }.get(minute, [])
    return random.choice(said), value


def duration(random: Random, held_out: bool) -> tuple[str, int]:
    """A length of time as people say it, and in minutes."""
    said = [
        ("half an hour", 30), ("an hour", 60), ("an hour and a half", 90), ("a quarter of an hour", 15),
        ("two hours", 120), ("two and a half hours", 150), ("three hours", 180), ("three quarters of an hour", 45),
    ]  # fmt: skip
    if random.random() < 0.4:
        return random.choice(said)
    text, minutes = number(3, 59)(random, held_out)
    return f"{text} minutes", minutes


def products(random: Random, held_out: bool) -> tuple[str, list[str]]:
    """One to three things to buy, as a list."""
    chosen: list[str] = []
    for _ in range(random.choice([1, 2, 2, 3])):
        product = PRODUCT(random, held_out)[0]
        if product not in chosen:
            chosen.append(product)
    return ", ".join(chosen[:-1]) + " and " + chosen[-1] if len(chosen) > 1 else chosen[0], chosen


PRODUCT = words(
    "milk, eggs, butter, olive oil, rice, coffee, toothpaste, paper towels, onions, tomatoes, cheese, yoghurt, pasta, "
    "flour, sugar, black tea, bananas, apples, shampoo, dish soap, batteries, salt, honey, oats, carrots, frozen peas, "
    "bread, orange juice, chicken, potatoes, garlic, lemons, cat food, light bulbs, mustard, almonds",
    "spinach, peanut butter, candles, soy sauce, mushrooms, dog food, cinnamon, pears, sparkling water, cereal",
)
NAME = words(
    "Anna, Ben, Carla, David, Emma, Felix, Grace, Hassan, Irene, Jack, Kofi, Laura, Marco, Nina, Omar, Paula, Ravi, "
    "Sofia, Tom, Uma, Victor, Wei, Yusuf, Zoe, Mum, Dad, my sister, the landlord, Lukas, Amara",
    "Priya, Oliver, Chloe, Diego, Helen, Samuel, my brother, Ingrid, Leo, Mei",
)
TEXT = words(
    [
        "I am running late", "dinner is ready", "the meeting is moved", "I got the job", "we are out of milk",
        "the train is delayed", "happy birthday", "I will call later", "the keys are under the mat", "see you tonight",
        "the parcel has arrived", "I am on my way", "good luck with the exam", "the car is fixed", "we won the match",
        "I cannot come tomorrow", "the kids are asleep", "lunch is on me", "the heating is broken",
        "thanks for the gift",
        "I left my bag at work", "the tickets are booked", "it is snowing here", "the printer works again",
        "we need more chairs", "the rent is paid", "I found your scarf", "the show starts soon", "please feed the cat",
        "the report is done",
    ],
    [
        "the bus broke down", "I forgot my umbrella", "the cake is in the oven", "we landed safely",
        "the shop is closed", "I have a new number", "the dog needs a walk", "practice is cancelled",
        "I will bring dessert", "the door is unlocked", "the power is back", "your order is here",
    ],
)  # fmt: skip
EVENT = words(
    "dentist, team meeting, yoga class, haircut, job interview, piano lesson, lunch with Sam, parent evening, "
    "car service, book club, flight to Rome, football training, doctor, movie night, budget review, vet appointment, "
    "guitar lesson, birthday party, swimming, project kickoff, eye test, choir practice, coffee with Lena, "
    "house viewing",
    "chess club, tax advisor, dinner with Kim, blood test, pottery class, school concert, tennis match, "
    "phone call with Joe",
)
ARTIST = words(
    "Adele, Miles Davis, Daft Punk, Nina Simone, Radiohead, Bach, Shakira, Pink Floyd, Norah Jones, Coldplay, Mozart, "
    "Beyonce, David Bowie, Fela Kuti, The Beatles, Bob Marley, Taylor Swift, Johnny Cash, Massive Attack, Chopin, "
    "Queen, Stevie Wonder, Billie Eilish, Ella Fitzgerald",
    "Abba, Louis Armstrong, Leonard Cohen, Vivaldi, Kate Bush, Gorillaz, Tina Turner, Johnny Marr, Dolly Parton",
)
CITY = words(
    "Paris, Oslo, Tokyo, Nairobi, Lima, Toronto, Berlin, Madrid, Cairo, Sydney, Mumbai, Boston, Rome, Seoul, Dublin, "
    "Vienna, Chicago, Lisbon, Athens, Prague, Helsinki, Bogota, Hanoi, Denver, Glasgow, Lagos, Zurich, Cape Town",
    "Warsaw, Santiago, Osaka, Leeds, Montreal, Accra, Naples, Seattle, New Delhi, Bergen",
)
DISH = words(
    "margherita pizza, chicken curry, veggie burger, pad thai, beef taco, caesar salad, tomato soup, salmon bowl, "
    "falafel wrap, lasagne, ramen, fish and chips, cheeseburger, spring roll, pepperoni pizza, noodle soup, burrito, "
    "club sandwich, greek salad, lentil soup, chocolate cake, fried rice, apple pie, mushroom risotto",
    "lamb kebab, onion soup, tuna sandwich, pumpkin pie, shrimp taco, hawaiian pizza, bean burrito, potato salad",
)
ROOM = words(
    "kitchen, living room, bedroom, hallway, bathroom, office, garage, dining room, basement, porch, garden",
    "attic, nursery, guest room, library, balcony",
)
LABEL = words(
    "pasta, laundry, tea, pizza, nap, workout, rice, meditation, bread, parking, homework, eggs, plank, break, roast",
    "cookies, yoga, reading, potatoes, hair dye, stretching",
)
DAY = synonyms(
    {
        "today": "today", "tomorrow": "tomorrow", "monday": "on Monday", "tuesday": "on Tuesday",
        "wednesday": "on Wednesday", "thursday": "on Thursday",
        "friday": "on Friday", "saturday": "on Saturday", "sunday": "on Sunday",
    }
)  # fmt: skip
REPEAT = synonyms({"daily": "every day, daily", "weekdays": "on weekdays, every weekday", "weekends": "at weekends"})
STATE = synonyms({"on": "on", "off": "off"})
COLOR = words("red, blue, green, warm white, purple, orange", "yellow, pink, turquoise")
UNIT = synonyms(
    {
        "km": "kilometres, km", "mi": "miles", "kg": "kilos, kilograms, kg", "lb": "pounds", "cm": "centimetres, cm",
        "in": "inches", "l": "litres", "gal": "gallons", "g": "grams", "oz": "ounces", "m": "metres", "ft": "feet",
        "C": "degrees celsius, celsius", "F": "degrees fahrenheit, fahrenheit",
    }
)  # fmt: skip
UNITS_OF_A_KIND = [{"km", "mi", "cm", "in", "m", "ft"}, {"kg", "lb", "g", "oz"}, {"l", "gal"}, {"C", "F"}]
PERCENT = number(5, 95, step=5)

INTENTS = {
    "set_alarm": Intent(
        {"time": clock_time, "repeat": REPEAT},
        [
            "set an alarm for {time}", "wake me at {time}", "wake me up at {time} {repeat}",
            "I need to be up by {time}", "alarm at {time} {repeat}", "set my alarm to {time} {repeat}",
            "get me out of bed at {time}",
        ],
        ["make sure I am awake at {time}", "I want an alarm at {time} {repeat}"],
    ),
    "set_timer": Intent(
        {"minutes": duration, "label": LABEL},
        [
            "set a timer for {minutes}", "start a {label} timer for {minutes}", "timer for {minutes}",
            "count down {minutes}", "remind me in {minutes} about the {label}", "set a {label} timer, {minutes}",
        ],
        ["start a timer of {minutes} for the {label}", "give me a timer for {minutes}"],
    ),
    "add_event": Intent(
        {"title": EVENT, "day": DAY, "time": clock_time},
        [
            "add {title} {day} at {time}", "put {title} in my calendar {day}", "schedule {title} {day} at {time}",
            "book {title} for {time} {day}", "I have {title} {day} at {time}", "new event: {title} {day}",
        ],
        ["note down {title} {day} at {time}", "{title} {day} at {time}, put it in the calendar"],
    ),
    "send_message": Intent(
        {"to": NAME, "text": TEXT},
        [
            "tell {to} {text}", "text {to} that {text}", "send a message to {to} saying {text}",
            "let {to} know that {text}", "message {to}: {text}", "write to {to} that {text}",
        ],
        ["drop {to} a line that {text}", "send {to} a text saying {text}"],
    ),
    "play_music": Intent(
        {"artist": ARTIST, "room": ROOM, "volume": PERCENT},
        [
            "play {artist}", "put on some {artist}", "play {artist} in the {room}", "I want to hear {artist}",
            "play {artist} at {volume} percent volume", "put {artist} on in the {room} at {volume} percent",
        ],
        ["let me listen to {artist} in the {room}", "play something by {artist}"],
    ),
    "get_weather": Intent(
        {"city": CITY, "day": DAY},
        [
            "what is the weather in {city}", "weather in {city} {day}", "how is the weather {day} in {city}",
            "will it rain in {city} {day}", "is it cold in {city}", "forecast for {city} {day}",
        ],
        ["do I need a coat in {city} {day}", "show me the weather for {city}"],
    ),
    "order_food": Intent(
        {"item": DISH, "quantity": count, "time": clock_time},
        [
            "order {quantity} x {item}", "get me {quantity} {item} for {time}", "I would like {quantity} {item}",
            "order {item} for {time}", "order {quantity} {item}", "I want {item}",
        ],
        ["can I have {quantity} {item}", "have {item} delivered at {time}"],
    ),
    "set_lights": Intent(
        {"room": ROOM, "state": STATE, "brightness": PERCENT, "color": COLOR},
        [
            "turn {state} the {room} lights", "switch the {room} lights {state}",
            "dim the {room} to {brightness} percent", "set the {room} lights to {brightness} percent",
            "make the {room} lights {color}", "{room} lights {state}",
        ],
        ["lights {state} in the {room}", "I want {color} light in the {room}"],
    ),
    "convert_units": Intent(
        {"value": number(2, 250), "from": UNIT, "to": UNIT},
        [
            "convert {value} {from} to {to}", "how many {to} are {value} {from}", "what is {value} {from} in {to}",
            "{value} {from} in {to}", "turn {value} {from} into {to}",
        ],
        ["change {value} {from} into {to}", "express {value} {from} in {to}"],
    ),
    "add_to_list": Intent(
        {"items": products},
        [
            "add {items} to my shopping list", "put {items} on the list", "we need {items}", "buy {items}",
            "shopping list: {items}", "I have to buy {items}",
        ],
        ["we are running low on {items}", "remember to get {items}"],
    ),
}  # fmt: skip


def example(random: Random, intent_name: str, *, held_out: bool) -> tuple[str, str]:
    """One request and its answer.

    Args:
        random: the only source of chance.
        intent_name: key of ``INTENTS``.
        held_out: take values, and in a third of the cases the phrasing too, from those that training never shows.

    Returns:
        The request and the compact JSON.
    """
    intent = INTENTS[intent_name]
    new_phrasing = held_out and random.random() < 1 / 3
    phrasing = random.choice(intent.held_out_phrasings if new_phrasing else intent.phrasings)
    asked = {name for _, name, _, _ in string.Formatter().parse(phrasing) if name}
    said: dict[str, str] = {}
    answer: dict[str, Any] = {"intent": intent_name}
    for name, slot in intent.fields.items():
        if name in asked:
            said[name], answer[name] = slot(random, held_out)
    request = phrasing.format(**said)
    polite = random.choice(["{}", "{}", "{}", "{}", "hey, {}", "{}, please", "{}, thanks"])
    return polite.format(request), json.dumps(answer, separators=(",", ":"))


def make(seed: int = SEED) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training and the test set, as lists of ``{"messages": [...]}``."""
    random = Random(seed)
    train = _unique(random, NUM_TRAIN, held_out=False, taken=set())
    taken = {text for pair in train.items() for text in pair}
    test = _unique(random, NUM_TEST, held_out=True, taken=taken)
    return [_messages(*pair) for pair in train.items()], [_messages(*pair) for pair in test.items()]


def write(folder: Path = FOLDER) -> None:
    """Write ``requests_train.jsonl`` and ``requests_test.jsonl`` into ``folder``."""
    for name, examples in zip(("requests_train.jsonl", "requests_test.jsonl"), make(), strict=True):
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in examples)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def _unique(random: Random, num: int, *, held_out: bool, taken: set[str]) -> dict[str, str]:
    """``num`` different requests with their answers, as many of each intent, in random order; none in ``taken``."""
    pairs: dict[str, str] = {}
    names = list(INTENTS)
    while len(pairs) < num:
        request, answer = example(random, names[len(pairs) % len(names)], held_out=held_out)
        if _makes_sense(json.loads(answer)) and request not in pairs and not {request, answer} & taken:
            pairs[request] = answer
    order = list(pairs.items())
    random.shuffle(order)
    return dict(order)


def _makes_sense(answer: dict[str, Any]) -> bool:
    if answer["intent"] != "convert_units":
        return True
    units = {answer["from"], answer["to"]}
    return len(units) == 2 and any(units <= kind for kind in UNITS_OF_A_KIND)


def _messages(request: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": request},
            {"role": "assistant", "content": answer},
        ]
    }


if __name__ == "__main__":
    write()
