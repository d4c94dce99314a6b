"""The questions beyond the primary one that a study's arms can answer, and the answers in plain words.

Each question is a family of comparisons of the candidate with other arms, paired by seed like the primary one and
adjusted for their number among themselves (Holm). A reading is given only where the comparison is decided.
"""

from __future__ import annotations

from dataclasses import dataclass

from .records import Records
from .statistics import PairedDifference, adjust, compare, interval, points, probability, seeds_needed, verdict
from .tables import StudyResult, number, pair, phrase, title


@dataclass(frozen=True)
class Item:
    """One comparison of an answer.

    Attributes:
        name: what the candidate is compared with, in a few words.
        difference: the comparison.
        sentence: its verdict.
        reading: what that points to; "" where it is undecided.
    """

    name: str
    difference: PairedDifference
    sentence: str
    reading: str


@dataclass(frozen=True)
class Answer:
    """One question and what the rows say about it.

    Attributes:
        question: a heading.
        meaning: what the comparisons tell apart.
        summary: the outcomes in one sentence.
        items: the comparisons.
    """

    question: str
    meaning: str
    summary: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class _Question:
    heading: str
    meaning: str
    arms: tuple[str, ...]
    shifts: bool = False


_QUESTIONS = (
    _Question(
        "Does it help over plain 1×1 convolutions?",
        "The same network with plain 1×1 convolutions in the layers' places has the same mixing weights.",
        ("conv1x1",),
    ),
    _Question(
        "Is it the noise, or the position?",
        "A fixed mask is noise, but it also tells a layer where on the image it is. These arms have the one without "
        "the other, or neither.",
        ("waves", "waves-shuffled", "constant", "redrawn", "other-masks"),
        shifts=True,
    ),
    _Question(
        "How far is a CNN?",
        "The same network with 3×3 convolutions, at the candidate's own cost and at its full width.",
        ("cnn-params", "cnn-macs", "cnn"),
    ),
    _Question(
        "What do other cheap layers reach?",
        "Fixed filters, moved channels and separable convolutions see neighbouring pixels, which a 1×1 does not.",
        ("lbcnn", "frozen-conv", "shift", "separable"),
    ),
    _Question(
        "Do the masks' values matter?",
        "Masks that are learnt, or drawn from another distribution.",
        ("trained", "uniform-continuous", "normal", "pnn noise uniform-continuous", "pnn noise normal"),
    ),
)

#: What a decided comparison of the candidate with an arm points to.
_READINGS = {
    "waves": {
        "better": "The noise's disorder does better than a smooth arrangement of the same values.",
        "worse": "It is not the disorder that helps: the same values, arranged smoothly, do better.",
        "equivalent": "Whether the same values are arranged as noise or smoothly makes no difference that matters.",
    },
    "waves-shuffled": {
        "better": "Noise does better than the waves' values in disorder.",
        "worse": "The waves' values in disorder do better than the noise.",
        "equivalent": "Any disorder of such values will do.",
    },
    "constant": {
        "better": "The masks do more than an offset for each map would.",
        "worse": "An offset for each map does better: the masks' change over the image is a burden here.",
        "equivalent": "An offset for each map does as well: neither noise nor position is needed.",
    },
    "redrawn": {
        "better": "It matters that the mask stays the same: noise as such, new at every step, does worse.",
        "worse": "Noise that is new at every step does better than a fixed mask.",
        "equivalent": "A fixed mask does no more than noise that is new at every step.",
    },
    "other-masks": {
        "better": "The network has adapted to its own masks: with others of the same kind it does worse.",
        "worse": "With other masks than it was trained with, the network does better.",
        "equivalent": "Which masks are used in the test makes no difference that matters.",
    },
    "trained": {
        "better": "Masks that are learnt do worse than fixed ones.",
        "worse": "Learning the masks helps.",
        "equivalent": "Learning the masks makes no difference that matters.",
    },
}


def answers(records: Records, result: StudyResult) -> list[Answer]:
    """The answers to every question that the study has arms for, in order."""
    found = []
    for question in _QUESTIONS:
        answer = _answer(records, result, question)
        if answer is not None:
            found.append(answer)
    return found


def _answer(records: Records, result: StudyResult, question: _Question) -> Answer | None:
    study, fixed = records.study, records.study.question
    names = [arm for arm in question.arms if arm in study.arm_names and arm not in (fixed.candidate, fixed.control)]
    differences = {arm: pair(records, fixed.candidate, arm) for arm in names}
    shifts = _shift_differences(records, result) if question.shifts else {}
    differences |= shifts
    if not differences:
        return None
    items = []
    for key, difference in adjust(differences).items():
        if key in shifts:
            sentence = _shift_sentence(records, result, key.removeprefix("shift "), difference)
            pixels = key.removeprefix("shift ")
            name, reading = f"moved by {pixels} pixel{'' if pixels == '1' else 's'}", ""
            if difference.outcome == "worse":
                reading = "It relies on positions more than its control does."
        else:
            candidate, other = phrase(study, fixed.candidate), _quoted(phrase(study, key))
            sentence = verdict(difference, candidate, other, result.metric) + _sizes(records, result, key)
            name = _short(title(study, key), title(study, fixed.candidate))
            reading = _READINGS.get(key, {}).get(difference.outcome, "")
        items.append(Item(name, difference, sentence, reading))
    compared = [item for item in items if item.difference.count and not item.name.startswith("moved by ")]
    moved = [item for item in items if item.difference.differs and item.name.startswith("moved by ")]
    summary = _summary(title(study, fixed.candidate), compared, moved)
    return Answer(question.heading, question.meaning, summary, tuple(items))


def _quoted(name: str) -> str:
    """A name that has a comma, as a sentence can hold it."""
    return f"“{name}”" if "," in name else name


def _short(name: str, candidate: str) -> str:
    """An arm's title without the candidate's, where it begins with that.

    Example:
        >>> _short("PNN, waves", "PNN"), _short("CNN, narrowed", "PNN")
        ('waves', '“CNN, narrowed”')
    """
    return _quoted(name.removeprefix(f"{candidate}, "))


def _summary(candidate: str, items: list[Item], moved: list[Item]) -> str:
    """The outcomes by their kind; of the test sets of moved images only those that are decided."""
    words = {
        "better": f"{candidate} does better than",
        "worse": f"{candidate} does worse than",
        "equivalent": "Equivalent within the margin:",
        "undecided": "Undecided:",
    }
    parts = []
    for outcome, start in words.items():
        names = [item.name for item in items if item.difference.outcome == outcome]
        if names:
            parts.append(f"{start} {', '.join(names)}.")
    for item in moved:
        more = "more" if item.difference.mean < 0 else "less"
        parts.append(f"It loses {more} than its control on test images {item.name}.")
    return " ".join(parts) if parts else "No seed has finished these arms yet."


def _sizes(records: Records, result: StudyResult, arm: str) -> str:
    """The costs beside each other, where the comparison is one at equal cost."""
    mine, other = result.find(records.study.question.candidate), result.find(arm)
    if arm not in ("conv1x1", "cnn-params", "cnn-macs", "cnn") or mine is None or other is None:
        return ""
    if mine.parameters is None or other.parameters is None or mine.macs is None or other.macs is None:
        return ""
    return (
        f" Learnable parameters: {number(mine.parameters)} against {number(other.parameters)}; multiply-adds: "
        f"{number(mine.macs)} against {number(other.macs)}."
    )


def _shift_differences(records: Records, result: StudyResult) -> dict[str, PairedDifference]:
    """What moving the images does to the candidate, more than to the control, paired by seed."""
    question = records.study.question
    candidate, control = result.find(question.candidate), result.find(question.control)
    if candidate is None or control is None:
        return {}
    return {
        f"shift {shift}": compare(values, control.shifted[shift], 100, margin=question.margin)
        for shift, values in candidate.shifted.items()
        if shift in control.shifted
    }


def _shift_sentence(records: Records, result: StudyResult, shift: str, difference: PairedDifference) -> str:
    study, question = records.study, records.study.question
    candidate, control = phrase(study, question.candidate), phrase(study, question.control)
    if difference.count == 0:
        return f"Undecided: no seed has finished both {candidate} and {control}."
    pixels = f"{shift} pixel{'' if shift == '1' else 's'}"
    seeds = f"{difference.count} seed{'' if difference.count == 1 else 's'}"
    inside = f"95 % interval {interval(difference)}" if difference.count > 1 else interval(difference)
    p = f"sign-flip p {probability(difference.adjusted_p)}"
    evidence = f"({inside}, {seeds}, {p}, adjusted for {difference.comparisons} comparisons)"
    start = f"With the test images moved by {pixels},"
    if difference.outcome in ("better", "worse"):
        word = "less" if difference.mean > 0 else "more"
        return f"{start} {candidate} loses {abs(difference.mean):.2f} points {word} than {control} {evidence}."
    if difference.outcome == "equivalent":
        return (
            f"{start} {candidate} and {control} lose the same within ±{difference.margin:g} points: the difference "
            f"seen is {points(difference.mean)} {evidence}."
        )
    needed = seeds_needed(difference.comparisons)
    few = f" ({needed} seeds are needed)" if difference.count < needed else ""
    return (
        f"Undecided{few}: {start[0].lower()}{start[1:]} {candidate} changes by {points(difference.mean)} points "
        f"against {control} {evidence}."
    )
