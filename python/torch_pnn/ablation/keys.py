"""What each key of a study file takes, and the reference of all keys that the documentation holds.

A key's type is its annotation in ``study``, its range stands in ``RULES``. YAML 1.1 has traps that are closed here:
``1e-4`` is a number, ``010`` is refused instead of being 8, and ``on``, ``off``, ``yes`` and ``no`` are truth values
only where a truth value is asked for.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch_pnn.presets import PRESETS
from torch_pnn.reference import ACTIVATIONS

from .errors import UsageError
from .nodes import NUMBER, TRUTH, WHOLE, Node, Scalar, listed
from .study import STREAMS, Arm, DataSettings, ModelSettings, Question, Schedule, Study

#: The parts of a study that are mappings of their own.
SECTIONS: dict[str, Any] = {"data": DataSettings, "model": ModelSettings, "schedule": Schedule, "question": Question}


@dataclass(frozen=True)
class Rule:
    """What a key takes.

    Attributes:
        wanted: in words, after which "is needed" can follow.
        parse: from the node to the value, or to ``REFUSED``.
        numeric: it is a number: ``010`` is refused.
        names: the words to choose from, where it is a choice.
    """

    wanted: str
    parse: Callable[[Node], Any]
    numeric: bool = False
    names: tuple[str, ...] = ()


REFUSED = object()


def whole(low: int | None = None, high: int | None = None) -> Rule:
    """A whole number in a range."""

    def parse(node: Node) -> Any:
        if not isinstance(node, Scalar) or not node.plain or not WHOLE.fullmatch(node.text) or len(node.text) > 30:
            return REFUSED
        value = int(node.text)
        inside = (low is None or value >= low) and (high is None or value <= high)
        return value if inside else REFUSED

    reach = "" if low is None else f" from {low}" + ("" if high is None else f" to {high}")
    return Rule(f"a whole number{reach}", parse, numeric=True)


def number(low: float | None = None, high: float | None = None, *, above: bool = False, below: bool = False) -> Rule:
    """A finite number in a range; ``above`` and ``below`` leave its ends out."""

    def parse(node: Node) -> Any:
        if not isinstance(node, Scalar) or not node.plain or not NUMBER.fullmatch(node.text):
            return REFUSED
        value = float(node.text)
        if not math.isfinite(value) or (low is not None and (value < low or (above and value == low))):
            return REFUSED
        return REFUSED if high is not None and (value > high or (below and value == high)) else value

    reach = "" if low is None else f" above {low:g}" if above else f" from {low:g}"
    reach += "" if high is None else f" to below {high:g}" if below else f" to {high:g}"
    return Rule(f"a number{reach}", parse, numeric=True)


def truth() -> Rule:
    """True or false."""

    def parse(node: Node) -> Any:
        if not isinstance(node, Scalar) or not node.plain:
            return REFUSED
        return TRUTH.get(node.text.lower(), REFUSED)

    return Rule("true or false", parse)


def text(pattern: str = r"(?s).*", wanted: str = "a text") -> Rule:
    """A text; numbers and words such as ``on`` are taken as they stand."""

    def parse(node: Node) -> Any:
        if not isinstance(node, Scalar) or (node.plain and node.text in ("~", "null", "Null", "NULL")):
            return REFUSED
        return node.text if re.fullmatch(pattern, node.text) else REFUSED

    return Rule(wanted, parse)


def choice(*names: str, otherwise: str = "", pattern: str = "") -> Rule:
    """One of some words, or what ``pattern`` matches, which ``otherwise`` describes."""

    def parse(node: Node) -> Any:
        if not isinstance(node, Scalar):
            return REFUSED
        return node.text if node.text in names or (pattern and re.fullmatch(pattern, node.text)) else REFUSED

    return Rule(f"one of {listed((*names, otherwise) if otherwise else names)}", parse, names=tuple(names))


def _data_sets() -> Rule:
    from .data import DATA_SETS

    return choice(*DATA_SETS)


def _networks() -> Rule:
    from .networks import NETWORKS, find_network

    ours = choice(*NETWORKS, otherwise="module:function, or torchvision's", pattern=r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

    def parse(node: Node) -> Any:
        value = ours.parse(node)
        if value is not REFUSED or not isinstance(node, Scalar) or ":" in node.text:
            return value
        try:
            return find_network(node.text).name
        except UsageError:
            return REFUSED

    return dataclasses.replace(ours, parse=parse)


def _noises() -> Rule:
    from .layers import NOISES

    return choice(*NOISES)


def _norms() -> Rule:
    from .layers import NORM_POSITIONS

    positions, answers = choice(*NORM_POSITIONS, otherwise="true or false"), truth()

    def parse(node: Node) -> Any:
        answer = answers.parse(node)
        return positions.parse(node) if answer is REFUSED else answer

    return dataclasses.replace(positions, parse=parse)


def _layers() -> Rule:
    from .layers import LAYERS

    return choice(*LAYERS)


NAME = text(r"[^\s,/\\][^,/\\\n]*", "a name without commas and slashes")

#: What a key takes beyond its annotation. A function where that is known only to a module that is loaded late.
RULES: dict[str, Rule | Callable[[], Rule]] = {
    "Study.name": NAME,
    "Study.vary": choice(*STREAMS),
    "Study.device": choice("cpu", "cuda", otherwise='"cuda:1"', pattern=r"cuda:[0-9]{1,3}"),
    "Study.precision": choice("float32", "bfloat16", "float16"),
    "Study.threads": whole(1, 1024),
    "DataSettings.name": _data_sets,
    "DataSettings.train_images": whole(0),
    "DataSettings.validation_images": whole(0),
    "DataSettings.image_size": whole(0, 65536),
    "DataSettings.shifts": whole(1, 65536),
    "DataSettings.split_seed": whole(0, 2**32 - 1),
    "ModelSettings.network": _networks,
    "ModelSettings.width": whole(0, 1 << 20),
    "Arm.name": NAME,
    "Arm.layer": _layers,
    "Arm.masks": choice("fixed", "redrawn", "other", "trained"),
    "Arm.match_by": choice("parameters", "macs"),
    "Schedule.epochs": whole(1),
    "Schedule.batch_size": whole(1),
    "Schedule.optimizer": choice("sgd", "adam", "adamw"),
    "Schedule.learning_rate": number(0, above=True),
    "Schedule.decay": choice("cosine", "steps", "constant"),
    "Schedule.milestones": whole(1),
    "Schedule.factor": number(0, 1, above=True),
    "Schedule.warmup_epochs": number(0),
    "Schedule.momentum": number(0, 1, below=True),
    "Schedule.weight_decay": number(0),
    "Schedule.test_every": whole(1),
    "Question.margin": number(0),
}

#: Layer options whose type is known, wherever they are given; an arm may have them as keys of its own.
OPTIONS: dict[str, Rule | Callable[[], Rule]] = {
    "preset": choice(*PRESETS),
    "noise": _noises,
    "activation": choice(*ACTIVATIONS),
    "norm": _norms,
    "downsample": choice("max", "avg", "subsample"),
    "masks": whole(1),
    "level": number(),
    "shared_masks": truth(),
    "train_masks": truth(),
    "mixing": truth(),
    "sparsity": number(0, 1),
    "anchors": whole(1),
}

#: Those that an arm may have as keys of its own. An arm's own key ``masks`` says when masks change.
SHORT = tuple(name for name in OPTIONS if name != "masks")


def option_rule(name: str) -> Rule:
    """What a key of ``OPTIONS`` takes."""
    found = OPTIONS[name]
    return found if isinstance(found, Rule) else found()


def rule_of(owner: type, name: str) -> Rule | None:
    """What a key of a dataclass takes; None for mappings, sections and lists of arms."""
    found = RULES.get(f"{owner.__name__}.{name}")
    if found is not None:
        return found if isinstance(found, Rule) else found()
    hint = typing.get_type_hints(owner)[name]
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    plain: dict[Any, Callable[[], Rule]] = {int: whole, float: number, bool: truth, str: text}
    return plain[hint]() if hint in plain else None


#: The keys of a file that ``Study`` does not have: what it builds on, arms by the dozen, and what --quick changes.
EXTRA_KEYS: dict[str, str] = {
    "extends": "a ready-made study's name, or a file's beside this one: keys that are not given here are taken from "
    "there. Sections are laid over one another key by key, lists and `options` are replaced.",
    "sweeps": "further arms, a list of `{of: ARM, SETTING: [values]}`: the arm with one of its options at each value.",
    "quick": "what `--quick` changes: keys of a study.",
}

#: The keys of an arm that ``Arm`` does not have.
ARM_KEYS: dict[str, str] = {
    "`base`": "the arm of the catalogue that it begins as; `null` = none. Where it isn't given, the arm of its own "
    "name, if there is one.",
    ", ".join(f"`{name}`" for name in SHORT): "options of the layer, which may also stand in `options`.",
}
STUDY_KEYS = (*(item.name for item in dataclasses.fields(Study)), *EXTRA_KEYS)


def attributes(owner: type) -> Iterator[tuple[str, str]]:
    """Name and meaning of each attribute, from the class's docstring."""
    lines = inspect.cleandoc(owner.__doc__ or "").splitlines()
    found: list[tuple[str, str]] = []
    for line in lines[lines.index("Attributes:") + 1 :]:
        match = re.fullmatch(r" {4}([a-z_]+(?:, [a-z_]+)*): (.*)", line)
        if match:
            found.append((match[1], match[2]))
        elif line.strip() and found:
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
    for names, meaning in found:
        for name in names.split(", "):
            yield name, meaning


_SPECIAL = {
    ("Study", "arms"): "a list of names and mappings, see below",
    ("Study", "seeds"): "a number n, which means 0 to n−1, or a list of whole numbers",
    ("Study", "other_seeds"): "a number n, which means the first n, or a list of whole numbers",
    ("Arm", "value"): "a number or a word",
}


def _takes(owner: type, name: str) -> str:
    hint = typing.get_type_hints(owner)[name]
    rule = rule_of(owner, name)
    many = typing.get_origin(hint) is tuple
    if (owner.__name__, name) in _SPECIAL:
        return _SPECIAL[owner.__name__, name]
    if rule is None:
        return "a section, see below" if dataclasses.is_dataclass(hint) else "a mapping"
    if many:
        return f"a list: each {rule.wanted}"
    return rule.wanted


def _default(owner: type, item: dataclasses.Field[Any]) -> str:
    if item.default is not dataclasses.MISSING:
        value: Any = item.default
    elif item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
    else:
        return {"Study.name": "the file's name", "Study.title": "the name"}.get(
            f"{owner.__name__}.{item.name}", "needed"
        )
    if dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, Mapping):
        return "`{}`"
    return {"": '`""`', None: "`null`"}.get(
        value, f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"
    )


def reference() -> str:
    """Every key that a study file may have, as Markdown tables, from the dataclasses and their docstrings."""
    blocks = []
    for heading, owner in (
        ("A study", Study),
        ("`data`", DataSettings),
        ("`model`", ModelSettings),
        ("An arm", Arm),
        ("`schedule`", Schedule),
        ("`question`", Question),
    ):
        meanings = dict(attributes(owner))
        rows = [f"### {heading}", "", "| key | takes | default | meaning |", "| --- | --- | --- | --- |"]
        for item in dataclasses.fields(owner):
            meaning = meanings[item.name].replace("``", "`").replace("|", "\\|").replace("see there", "see below")
            takes, default = _takes(owner, item.name), _default(owner, item)
            rows.append(f"| `{item.name}` | {takes} | {default} | {meaning[:1].upper()}{meaning[1:]} |")
        for key, said in {Study: EXTRA_KEYS, Arm: ARM_KEYS}.get(owner, {}).items():
            name = key if "`" in key else f"`{key}`"
            rows.append(f"| {name} | | | {said[:1].upper()}{said[1:]} |")
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks) + "\n"
