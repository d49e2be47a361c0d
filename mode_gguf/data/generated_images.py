"""Charts, tables and documents as drawn images, with questions whose answers are known."""

import json
import math
import random
from collections.abc import Iterator

from PIL import Image, ImageDraw, ImageFont

from mode_gguf.data.sample import Message, Sample

_COLOURS = {"red": "#c0392b", "blue": "#2471a3", "green": "#1e8449", "orange": "#d68910", "purple": "#7d3c98"}
_MONTHS = ("January", "February", "March", "April", "May", "June")
_GOODS = ("Apples", "Bread", "Cheese", "Coffee", "Honey", "Milk", "Olives", "Pepper", "Rice", "Tea")
_CITIES = ("Bergen", "Cusco", "Dakar", "Hanoi", "Lyon", "Osaka", "Quito", "Riga")
_PER_GENERATOR = 6


def generated_samples(dataset: str) -> Iterator[Sample]:
    """Image samples of six generators: bar, line and pie charts, tables, receipts and notices."""
    generators = (_bar_chart, _line_chart, _pie_chart, _table, _receipt, _notice)
    for generate in generators:
        for number in range(_PER_GENERATOR):
            rng = random.Random(f"{generate.__name__} {number}")
            image, question, answer = generate(rng)
            messages = (Message("user", question), Message("assistant", answer))
            origin = f"{dataset}: {generate.__name__.strip('_').replace('_', ' ')} {number}"
            yield Sample(origin, dataset, messages=messages, image=image)


_ImageChat = tuple[Image.Image, str, str]


def _canvas(width: int, height: int, colour: str = "white") -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (width, height), colour)
    return image, ImageDraw.Draw(image)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _bar_chart(rng: random.Random) -> _ImageChat:
    image, draw = _canvas(480, 320)
    goods = rng.sample(_GOODS, 5)
    values = rng.sample(range(10, 100), 5)
    draw.text((20, 10), "Boxes sold this week", fill="black", font=_font(20))
    draw.line((50, 280, 460, 280), fill="black", width=2)
    for position, (name, value, colour) in enumerate(zip(goods, values, _COLOURS.values(), strict=True)):
        left = 65 + 80 * position
        draw.rectangle((left, 280 - 2 * value, left + 50, 280), fill=colour)
        draw.text((left + 14, 258 - 2 * value), str(value), fill="black", font=_font(16))
        draw.text((left, 286), name, fill="black", font=_font(15))
    best = max(range(5), key=values.__getitem__)
    return (
        image,
        "Which product sold best according to the chart, and how many boxes were sold?",
        f"{goods[best]} sold best, with {values[best]} boxes. In all, {sum(values)} boxes were sold: "
        + ", ".join(f"{name} {value}" for name, value in zip(goods, values, strict=True))
        + ".",
    )


def _line_chart(rng: random.Random) -> _ImageChat:
    image, draw = _canvas(520, 320)
    city = rng.choice(_CITIES)
    values = [rng.randint(2, 30) for _ in _MONTHS]
    draw.text((20, 10), f"Mean temperature in {city} (°C)", fill="black", font=_font(20))
    for degrees in range(0, 31, 10):
        draw.line((60, 270 - 7 * degrees, 500, 270 - 7 * degrees), fill="#cccccc")
        draw.text((25, 260 - 7 * degrees), str(degrees), fill="black", font=_font(15))
    points = [(80 + 78 * position, 270 - 7 * value) for position, value in enumerate(values)]
    draw.line(points, fill=rng.choice(list(_COLOURS.values())), width=3)
    for (x, y), month in zip(points, _MONTHS, strict=True):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill="black")
        draw.text((x - 22, 282), month[:3], fill="black", font=_font(16))
    trend = "warmer" if values[-1] > values[0] else "colder" if values[-1] < values[0] else "as warm"
    return (
        image,
        "Read the values off the chart, month by month, and say how June compares with January.",
        f"In {city}: "
        + ", ".join(f"{month} {value} °C" for month, value in zip(_MONTHS, values, strict=True))
        + f". June is {trend} {'as' if trend == 'as warm' else 'than'} January.",
    )


def _pie_chart(rng: random.Random) -> _ImageChat:
    image, draw = _canvas(420, 320)
    shares = [rng.randint(1, 8) for _ in _COLOURS]
    total = sum(shares)
    start = 0.0
    draw.text((20, 10), "Votes", fill="black", font=_font(22))
    for colour, share in zip(_COLOURS.values(), shares, strict=True):
        end = start + 360 * share / total
        draw.pieslice((30, 50, 270, 290), start, end, fill=colour, outline="white")
        middle = math.radians((start + end) / 2)
        draw.text((145 + 80 * math.cos(middle), 162 + 80 * math.sin(middle)), str(share), fill="white", font=_font(18))
        start = end
    for row, (name, colour) in enumerate(_COLOURS.items()):
        draw.rectangle((300, 70 + 32 * row, 318, 88 + 32 * row), fill=colour)
        draw.text((328, 68 + 32 * row), name, fill="black", font=_font(17))
    return (
        image,
        "How many votes did each list get? Answer as a list.",
        "\n".join(f"- {name}: {share} of {total}" for name, share in zip(_COLOURS, shares, strict=True)),
    )


def _table(rng: random.Random) -> _ImageChat:
    image, draw = _canvas(500, 300)
    cities = rng.sample(_CITIES, 4)
    header = ("City", "Trains", "Buses", "Delay (min)")
    rows = [(city, *(str(rng.randint(1, 99)) for _ in header[1:])) for city in cities]
    for line, cells in enumerate((header, *rows)):
        y = 30 + 50 * line
        draw.line((20, y - 10, 480, y - 10), fill="black")
        for column, cell in enumerate(cells):
            draw.text((30 + 115 * column, y), cell, fill="black", font=_font(20 if line else 19))
    draw.line((20, 270, 480, 270), fill="black")
    markdown = [" | ".join(cells) for cells in (header, *rows)]
    return image, "Transcribe the table as Markdown.", "\n".join([markdown[0], "--- | --- | --- | ---", *markdown[1:]])


def _receipt(rng: random.Random) -> _ImageChat:
    image, draw = _canvas(320, 440)
    goods = rng.sample(_GOODS, 6)
    cents = [rng.randint(45, 1999) for _ in goods]
    day = rng.randint(1, 28)
    draw.text((70, 20), "CORNER SHOP", fill="black", font=_font(24))
    draw.text((105, 55), f"{day:02d}.03.2024", fill="#444444", font=_font(17))
    for line, (name, price) in enumerate(zip(goods, cents, strict=True)):
        draw.text((30, 100 + 36 * line), name, fill="black", font=_font(18))
        draw.text((225, 100 + 36 * line), f"{price / 100:7.2f}", fill="black", font=_font(18))
    draw.line((25, 325, 295, 325), fill="black", width=2)
    draw.text((30, 340), "TOTAL", fill="black", font=_font(22))
    draw.text((215, 340), f"{sum(cents) / 100:.2f}", fill="black", font=_font(22))
    bought = {name: price / 100 for name, price in zip(goods, cents, strict=True)}
    answer = {"date": f"2024-03-{day:02d}", "items": bought, "total": sum(cents) / 100}
    return image, "What was bought, when, and what did it cost in total? Reply in JSON.", json.dumps(answer)


def _notice(rng: random.Random) -> _ImageChat:
    background, ink = rng.choice([("#fdf6e3", "#222222"), ("#1b2631", "#f4f6f7"), ("#e8f8f5", "#0b5345")])
    image, draw = _canvas(560, 260, background)
    lines = (
        f"NOTICE No. {rng.randint(100, 999)}",
        f"The library in {rng.choice(_CITIES)} is closed",
        f"from {rng.randint(1, 14)} to {rng.randint(15, 28)} {rng.choice(_MONTHS)}.",
        f"Please return books in room {rng.randint(2, 40)}.",
    )
    for row, line in enumerate(lines):
        draw.text((30, 30 + 52 * row), line, fill=ink, font=_font(30 if row == 0 else 24))
    return image, "Read the text in the image, line by line.", "\n".join(lines)
