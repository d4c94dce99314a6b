"""The studies that ship with the package."""

from __future__ import annotations

import dataclasses
import difflib

from .arms import find_arm
from .errors import UsageError
from .study import Study

#: digits: twelve epochs of ten seeds take about three minutes on two cores.
STUDIES: dict[str, Study] = {
    "digits": Study(
        name="digits",
        title="Handwritten digits, 8×8 pixels",
        notes="The learning rate was picked from 0.02, 0.05, 0.1 and 0.2 on a quarter of the training images held "
        "out, with seeds that the study does not use; CNN, LBCNN and PNN differed no more between the rates than "
        "between seeds.",
        arms=tuple(map(find_arm, ("cnn", "cnn-params", "lbcnn", "pnn", "control", "waves"))),
        seeds=tuple(range(10)),
    ),
}


def find_study(name: str, *, quick: bool = False) -> Study:
    """A ready-made study by its name.

    Raises:
        UsageError: there is none of that name; the sentence lists those that are.

    Example:
        >>> find_study("digits").name
        'digits'
    """
    if name not in STUDIES:
        close = difflib.get_close_matches(name, STUDIES, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(f"unknown study {name!r}{hint}; there is: {', '.join(STUDIES)}")
    study = STUDIES[name]
    if quick:
        schedule = dataclasses.replace(study.schedule, epochs=6, warmup_epochs=1.0)
        study = dataclasses.replace(study, seeds=tuple(range(3)), schedule=schedule)
    return study
