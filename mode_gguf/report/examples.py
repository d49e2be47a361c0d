"""Choice of the answers that a report shows."""

from collections.abc import Sequence

from mode_gguf.validation.report import Answer

SHOWN = 6


def examples(answers: Sequence[Answer], count: int = SHOWN) -> list[Answer]:
    """A few, in their order: kinds of questions take turns, and one in three is an answer that changed, if there are.

    Every choice is the first of its kind, so that none is picked by how well it went.
    """
    changed = [answer for answer in answers if answer.reference_answer not in (None, answer.answer)]
    same = [answer for answer in answers if answer not in changed]
    of_changed = _in_turns(changed)[: max(count // 3, count - len(same))]
    chosen = [*of_changed, *_in_turns(same)[: count - len(of_changed)]]
    return [answer for answer in answers if answer in chosen][:count]


def _in_turns(answers: Sequence[Answer]) -> list[Answer]:
    """First one of every kind, then the second ones, and so on."""
    turns: list[tuple[int, int, Answer]] = []
    seen: dict[str, int] = {}
    for number, answer in enumerate(answers):
        turn = seen[answer.kind] = seen.get(answer.kind, -1) + 1
        turns.append((turn, number, answer))
    return [answer for _, _, answer in sorted(turns, key=lambda one: one[:2])]
