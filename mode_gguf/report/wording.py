"""The template's filters: numbers and names as text."""

import math

from mode_gguf.report import colours
from mode_gguf.sizes import decimal_size

NONE = "\N{EN DASH}"
STAGES = {
    "calibrate": "run the samples, count what every expert serves",
    "sensitivity": "price every candidate type of every tensor and expert",
    "unit-kl": "measure the KL that single tensors cause",
    "plan": "choose types under the budget",
    "round": "round with feedback",
    "export": "pack and write the text model",
    "projector": "write the image encoder",
    "reference": "write the full-precision file to compare with",
    "validate: structure": "check that the file holds what was planned",
    "validate: transformers": "compare the export with the checkpoint in transformers",
    "validate: smoke": "load it and let it answer",
    "validate: reference": "run the full-precision file",
    "validate: candidate": "run this file",
}
ANSWERS = {"text": "text", "image": "answers about pictures", "cost": "cost"}
MODALITIES = {
    "text": "text tokens",
    "any": "all tokens",
    "key_vision": "key vision tokens",
    "redundant_vision": "redundant vision tokens",
}
PARTS = {
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "out",
    "ffn_gate_exps": "gate",
    "ffn_up_exps": "up",
    "ffn_gate_up_exps": "gate and up",
    "ffn_down_exps": "down",
    "token_embd": "token embedding",
    "output": "output head",
}


def size(n_bytes: float) -> str:
    """`12.3 GB`, `6.7 MB` or `81 kB`, decimal as on a download page."""
    return decimal_size(n_bytes)


def count(number: float) -> str:
    """`30.5 billion`, `18.2 million`, or all digits."""
    for divisor, unit in ((1e9, "billion"), (1e6, "million")):
        if number >= divisor:
            return f"{number / divisor:.1f} {unit}"
    return f"{number:,.0f}"


def percent(share: float | None, digits: int = 1) -> str:
    return NONE if share is None else f"{100 * share:.{digits}f} %"


def nats(value: float | None, digits: int = 3) -> str:
    """`digits` significant ones, written out unless there would be more than seven places."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.1e}" if places > 7 else f"{value:.{max(places, 0)}f}"


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def type_style(name: str) -> str:
    """Background and text of a cell with one type."""
    colour = colours.type_colour(name)
    return f"background:{colours.css(colour)};color:{colours.text_colour(colour)}"


def mix_style(types: dict[str, int]) -> str:
    """Background of a cell whose experts have several types, as wide as their numbers."""
    total, start, stops = sum(types.values()), 0, []
    for name, number in types.items():
        end = start + number
        stops.append(f"{colours.css(colours.type_colour(name))} {100 * start / total:.4g}% {100 * end / total:.4g}%")
        start = end
    return f"background:linear-gradient(90deg,{','.join(stops)})"


def mix_words(types: dict[str, int]) -> str:
    """`Q2_K 96, Q3_K 32`."""
    return ", ".join(f"{name} {number}" for name, number in types.items())


FILTERS = {
    "size": size,
    "count": count,
    "percent": percent,
    "nats": nats,
    "duration": duration,
    "type_style": type_style,
    "mix_style": mix_style,
    "mix_words": mix_words,
    "stage_words": lambda name: STAGES.get(name, ""),
    "short_answer": lambda name: "pictures" if name == "image" else name,
    "answer_words": lambda name: ANSWERS.get(name, name),
    "modality_words": lambda name: MODALITIES.get(name, name.replace("_", " ")),
    "part_words": lambda name: PARTS.get(name, name),
}
