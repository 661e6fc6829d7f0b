"""The functions of the tool task: what each is called, takes, is asked for, returns, and how that is told."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .words import CITIES, COLORS, COUNTRIES, DAYS, FOODS, LANGUAGES, NAMES, ROOMS, WORDS

Draw = Callable[[random.Random], Any]


def _hour(rng: random.Random) -> str:
    return f"{rng.randrange(24):02}:{rng.choice((0, 15, 30, 45)):02}"


def _words(rng: random.Random) -> str:
    return " ".join(rng.sample(WORDS, rng.randint(2, 4)))


def _of(values: tuple[str, ...]) -> Draw:
    return lambda rng: rng.choice(values)


def _number(low: int, high: int) -> Draw:
    return lambda rng: rng.randrange(low, high)


@dataclass(frozen=True)
class Parameter:
    names: tuple[str, ...]
    about: str
    draw: Draw
    type: str = "string"


@dataclass(frozen=True)
class Function:
    """In the texts, a parameter goes by the first of its names."""

    names: tuple[str, ...]
    about: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    requests: tuple[str, ...]
    returns: dict[str, Draw]
    answer: str


_CITY = Parameter(("city", "location", "place"), "Name of the city", _of(CITIES))
_DONE: dict[str, Draw] = {"status": _of(("ok", "done", "success"))}

FUNCTIONS: tuple[Function, ...] = (
    Function(
        ("get_weather", "weather", "weather_now"),
        ("Get the weather of a city", "Current weather in a city"),
        (_CITY,),
        ("What is the weather in {city}?", "How is the weather in {city}?", "Tell me the weather in {city}."),
        {"temperature": _number(-20, 40), "sky": _of(("sunny", "cloudy", "rainy", "windy"))},
        "It is {sky} in {city}, with {temperature} degrees.",
    ),
    Function(
        ("get_time", "local_time", "clock"),
        ("Get the local time of a city", "Current time in a city"),
        (_CITY,),
        ("What time is it in {city}?", "Tell me the time in {city}."),
        {"time": _hour},
        "It is {time} in {city}.",
    ),
    Function(
        ("set_alarm", "alarm", "wake_up"),
        ("Set an alarm", "Set the alarm clock"),
        (Parameter(("time", "at", "hour"), "Time as hours and minutes", _hour),),
        ("Set an alarm for {time}.", "Wake me up at {time}.", "I need an alarm at {time}."),
        _DONE,
        "The alarm is set for {time}.",
    ),
    Function(
        ("send_message", "message", "send_text"),
        ("Send a message to a person", "Write a message to somebody"),
        (
            Parameter(("to", "person", "receiver"), "Who gets the message", _of(NAMES)),
            Parameter(("text", "body", "content"), "Text of the message", _words),
        ),
        ("Send {to} the message: {text}", "Write to {to}: {text}", "Send a message to {to}: {text}"),
        _DONE,
        "The message to {to} is sent.",
    ),
    Function(
        ("translate", "translate_text", "translation"),
        ("Translate a text", "Translate words to another language"),
        (
            Parameter(("text", "words", "source"), "Text to translate", _words),
            Parameter(("language", "target", "to"), "Target language", _of(LANGUAGES)),
        ),
        ("Translate to {language}: {text}", "How do I say this in {language}: {text}"),
        {"result": _words},
        "In {language} that is: {result}",
    ),
    Function(
        ("play_music", "play", "start_song"),
        ("Play a song", "Play music"),
        (Parameter(("song", "title", "track"), "Title of the song", _words),),
        ("Play the song {song}.", "I want to hear {song}.", "Please play {song}."),
        _DONE,
        "Now playing {song}.",
    ),
    Function(
        ("switch_light", "light", "set_light"),
        ("Switch the light of a room", "Turn a light on or off"),
        (
            Parameter(("room", "where", "place"), "Name of the room", _of(ROOMS)),
            Parameter(("state", "value", "mode"), "on or off", _of(("on", "off"))),
        ),
        ("Turn the light in the {room} {state}.", "Switch {state} the light of the {room}."),
        _DONE,
        "The light in the {room} is {state}.",
    ),
    Function(
        ("get_stock", "count_items", "inventory"),
        ("How many pieces of an item are in stock", "Look up the stock of an item"),
        (Parameter(("item", "product", "name"), "Name of the item", _of(WORDS)),),
        ("How many pieces of {item} are in stock?", "Look up the stock of {item}."),
        {"count": _number(0, 500)},
        "There are {count} pieces of {item} in stock.",
    ),
    Function(
        ("order_food", "order", "buy_food"),
        ("Order food", "Order a number of dishes"),
        (
            Parameter(("dish", "food", "item"), "What to order", _of(FOODS)),
            Parameter(("count", "number", "amount"), "How many", _number(1, 20), "integer"),
        ),
        ("Order {count} times {dish}.", "I want to order {dish}, {count} pieces."),
        {"minutes": _number(10, 90)},
        "Your {dish} comes in {minutes} minutes.",
    ),
    Function(
        ("get_distance", "distance", "how_far"),
        ("Distance between two cities", "Get the way between two cities in kilometers"),
        (
            Parameter(("start", "from", "a"), "First city", _of(CITIES)),
            Parameter(("end", "to", "b"), "Second city", _of(CITIES)),
        ),
        ("How far is it from {start} to {end}?", "What is the distance from {start} to {end}?"),
        {"kilometers": _number(100, 9999)},
        "It is {kilometers} kilometers from {start} to {end}.",
    ),
    Function(
        ("add_reminder", "remind", "reminder"),
        ("Add a reminder", "Remind the user of something on a day"),
        (
            Parameter(("text", "about", "task"), "What to remember", _words),
            Parameter(("day", "when", "date"), "Day of the week", _of(DAYS)),
        ),
        ("Remind me on {day}: {text}", "Add a reminder for {day}: {text}"),
        _DONE,
        "I will remind you on {day}.",
    ),
    Function(
        ("find_contact", "phone_book", "get_phone"),
        ("Find the phone number of a person", "Look up a phone number"),
        (Parameter(("name", "person", "who"), "Name of the person", _of(NAMES)),),
        ("What is the phone number of {name}?", "Find the number of {name}."),
        {"phone": _number(100000, 999999)},
        "The phone number of {name} is {phone}.",
    ),
    Function(
        ("get_population", "population", "count_people"),
        ("Population of a country", "How many people live in a country"),
        (Parameter(("country", "name", "nation"), "Name of the country", _of(COUNTRIES)),),
        ("How many people live in {country}?", "What is the population of {country}?"),
        {"millions": _number(1, 400)},
        "{millions} million people live in {country}.",
    ),
    Function(
        ("set_temperature", "heating", "thermostat"),
        ("Set the temperature of a room", "Heat or cool a room"),
        (
            Parameter(("room", "where", "place"), "Name of the room", _of(ROOMS)),
            Parameter(("degrees", "temperature", "value"), "Degrees", _number(10, 30), "integer"),
        ),
        ("Set the {room} to {degrees} degrees.", "I want {degrees} degrees in the {room}."),
        _DONE,
        "The {room} will have {degrees} degrees.",
    ),
    Function(
        ("paint_wall", "set_color", "change_color"),
        ("Change the color of a thing", "Give something a color"),
        (
            Parameter(("thing", "object", "item"), "What to change", _of(WORDS)),
            Parameter(("color", "shade", "value"), "The color", _of(COLORS)),
        ),
        ("Make the {thing} {color}.", "Change the color of the {thing} to {color}."),
        _DONE,
        "The {thing} is {color} now.",
    ),
    Function(
        ("search", "search_files", "find_files"),
        ("Search the files", "Find files by words"),
        (Parameter(("query", "words", "text"), "What to search", _words),),
        ("Search the files for {query}.", "Find files about {query}."),
        {"found": _number(0, 100)},
        "I found {found} files.",
    ),
)
