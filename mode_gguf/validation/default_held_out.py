"""The held-out set that is used when none is given: small and varied; nothing of it may be calibrated on.

Enough to see whether a file is broken and roughly how far it is from its reference; claims about quality need a set
of one's own.
"""

from importlib.util import find_spec
from pathlib import Path

from mode_gguf.errors import MissingResourceError
from mode_gguf.validation.questions import HeldOutSet, Question

_TEXTS = (
    "The harbour had been silting up for a century before anyone thought to measure it. When the survey was finally "
    "made, in the dry summer after the flood, the engineers found that the channel through which grain ships had once "
    "passed at any tide was now barely deep enough for a rowing boat. They proposed two remedies. The first was to "
    "dredge, every year and for ever; the second was to build a long wall on the western side and let the river do "
    "the work itself.",
    "To calibrate the balance, place it on a level surface and let it warm up for thirty minutes. Press and hold the "
    "zero key until the display shows CAL. Put the 200 g reference weight on the centre of the pan and wait until the "
    "reading is stable. If the display shows an error, remove the weight, check that the pan moves freely, and repeat "
    "the procedure from the beginning. Do not calibrate the balance near an open window or an air vent.",
    "def merge_intervals(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:\n"
    '    """Join intervals that overlap or touch; the result is sorted."""\n'
    "    merged: list[tuple[int, int]] = []\n"
    "    for start, stop in sorted(intervals):\n"
    "        if merged and start <= merged[-1][1]:\n"
    "            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))\n"
    "        else:\n"
    "            merged.append((start, stop))\n"
    "    return merged\n",
    "A train leaves at 9:40 and covers 126 kilometres at an average speed of 84 kilometres per hour. It then waits for "
    "12 minutes before travelling a further 70 kilometres at 100 kilometres per hour. The first part takes "
    "126 / 84 = 1.5 hours, that is 90 minutes. The second part takes 70 / 100 = 0.7 hours, that is 42 minutes. "
    "Altogether the journey takes 90 + 12 + 42 = 144 minutes, so the train arrives at 12:04.",
    "Die Bibliothek ist von Montag bis Freitag zwischen neun und achtzehn Uhr geöffnet, am Samstag nur bis dreizehn "
    "Uhr. Wer ein Buch länger als vier Wochen behalten möchte, kann die Frist einmal verlängern, sofern niemand "
    "anderes es vorgemerkt hat. Für verlorene Bücher muss der Neupreis ersetzt werden.",
    "当地的茶农每年春天只采摘两次。第一次在清明之前，叶子又小又嫩，味道清香；第二次在谷雨前后，叶子稍大，茶汤更浓。"  # noqa: RUF001
    "采下的叶子要在当天晒干、揉捻，然后用小火慢慢烘焙，否则香气很快就会消失。",  # noqa: RUF001
)

_ONE_WORD = "Answer with one word."
_QUESTIONS = (
    ("chelsea.png", f"Which animal is in this picture? {_ONE_WORD}", "cat", "object"),
    ("coffee.png", f"Which drink is in the cup? {_ONE_WORD}", "coffee", "object"),
    ("horse.png", f"The silhouette of which animal is shown? {_ONE_WORD}", "horse", "object"),
    ("rocket.jpg", f"What is standing on the launch pad? {_ONE_WORD}", "rocket", "object"),
    ("astronaut.png", f"What is the profession of this person? {_ONE_WORD}", "astronaut", "object"),
    ("moon.png", f"The surface of which celestial body is shown? {_ONE_WORD}", "moon", "object"),
    ("astronaut.png", "Describe this picture in two sentences.", None, "description"),
    ("page.png", "Read the first two lines of this page aloud.", None, "reading"),
)


def default_held_out() -> HeldOutSet:
    """Six texts, and questions about pictures that scikit-image carries.

    Raises:
        MissingResourceError: scikit-image is not installed.
    """
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise MissingResourceError(
            "the built-in questions use pictures of scikit-image, which is not installed: "
            "pip install scikit-image, or give a held-out folder"
        )
    folder = Path(spec.origin).parent / "data"
    return HeldOutSet(
        "built-in",
        _TEXTS,
        tuple(
            Question(folder / image, question, answer, "contains", kind, f"built-in question {number}")
            for number, (image, question, answer, kind) in enumerate(_QUESTIONS, start=1)
        ),
    )
