"""Studies as files: YAML in, a checked ``Study`` out, and back.

``nodes`` makes a tree of a file, ``extends``, ``quick`` and ``--set`` are laid over it key by key, and the outcome is
compared with the dataclasses of ``study`` by the rules in ``keys``. What a person wrote wrongly is one sentence that
begins with the file and the line.

The ready-made studies are the files in ``studies/``; how to write one is told in docs/studies/README.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .errors import UsageError
from .keys import NAME, OPTIONS, REFUSED, SECTIONS, SHORT, STUDY_KEYS, Rule, choice, option_rule, rule_of, whole
from .nodes import (
    NOTHING,
    NUMBER,
    TRUTH,
    WHOLE,
    Listing,
    Node,
    Scalar,
    Tree,
    Where,
    fail,
    listed,
    near,
    over,
    parse,
    put_setting,
    quoted,
    read_text,
    shown_as,
    split_commas,
)
from .study import Arm, Study

#: The folder of the ready-made studies.
READY = Path(__file__).resolve().parent / "studies"

MOST_SEEDS = 100_000


class _Reader:
    """Reads one tree; remembers where each key stood, for what is found later."""

    def __init__(self, root: Tree) -> None:
        self.root = root

    def refuse(self, node: Node, path: str, rule: Rule) -> NoReturn:
        """The sentence for a value that is not what the key takes."""
        hint = near(node.text, rule.names) if isinstance(node, Scalar) else ""
        fail(node.where, f"{path} is {shown_as(node)}, {rule.wanted} is needed{hint}")

    def scalar(self, node: Node, path: str, rule: Rule) -> Any:
        """A value that has a rule."""
        if rule.numeric:
            self.no_octal(node, path)
        value = rule.parse(node)
        if value is REFUSED:
            self.refuse(node, path, rule)
        return value

    def no_octal(self, node: Node, path: str) -> None:
        """Refuses 010, which is 8 in YAML 1.1 and 10 in YAML 1.2 and in most heads."""
        if isinstance(node, Scalar) and node.plain and re.fullmatch(r"[-+]?0[0-9_]+", node.text):
            bare = node.text.lstrip("+-0_") or "0"
            fail(node.where, f"{path} is {node.text}, an octal number to YAML; write {bare}")

    def tree(self, node: Node, path: str, known: Sequence[str]) -> Tree:
        """A mapping with known keys alone."""
        if isinstance(node, Scalar) and node.plain and node.text in NOTHING:
            return Tree(node.where, {})
        if not isinstance(node, Tree):
            fail(node.where, f"{path} is {shown_as(node)}, a mapping with keys is needed: {', '.join(known)}")
        for key, (where, _) in node.entries.items():
            if key not in known:
                inside = f"{path} has" if path else "a study has"
                fail(where, f"{inside} no key {quoted(key)}{near(key, known)}; there is: {', '.join(known)}")
        return node

    def items(self, node: Node, path: str, example: str) -> tuple[Node, ...]:
        """A list's items."""
        node = split_commas(node)
        if not isinstance(node, Listing):
            fail(node.where, f"{path} is {shown_as(node)}, a list is needed, such as {example}")
        return node.items

    def free(self, node: Node, path: str) -> Any:
        """A value of no declared type: what it looks like decides."""
        if isinstance(node, Tree):
            return {key: self.free(value, f"{path}.{key}") for key, (_, value) in node.entries.items()}
        if isinstance(node, Listing):
            return [self.free(item, path) for item in node.items]
        if not node.plain:
            return node.text
        if node.text in NOTHING:
            return None
        lowered = node.text.lower()
        if lowered in ("true", "false"):
            return lowered == "true"
        if lowered in TRUTH:
            meant = str(TRUTH[lowered]).lower()
            fail(node.where, f'{path} is {node.text}, which YAML takes for {meant}; write {meant}, or "{node.text}"')
        self.no_octal(node, path)
        if WHOLE.fullmatch(node.text) and len(node.text) <= 30:
            return int(node.text)
        if NUMBER.fullmatch(node.text) and math.isfinite(float(node.text)):
            return float(node.text)
        if lowered.lstrip("+-") in (".inf", ".nan"):
            fail(node.where, f"{path} is {node.text}, a finite number is needed")
        return node.text

    def options(self, node: Node, path: str) -> dict[str, Any]:
        """Keyword arguments: those that ``OPTIONS`` knows are checked."""
        if isinstance(node, Scalar) and node.plain and node.text in NOTHING:
            return {}
        if not isinstance(node, Tree):
            fail(node.where, f"{path} is {shown_as(node)}, a mapping is needed, such as {{level: 0.1}}")
        found = {}
        for key, (where, value) in node.entries.items():
            if not key.isidentifier():
                fail(where, f"{path} has the key {quoted(key)}, a name of an argument is needed")
            found[key] = self.option(key, value, f"{path}.{key}")
        return found

    def option(self, key: str, value: Node, path: str) -> Any:
        if key in OPTIONS and not (isinstance(value, Scalar) and value.plain and value.text in NOTHING):
            return self.scalar(value, path, option_rule(key))
        return self.free(value, path)

    def section(self, owner: Any, node: Node, path: str) -> Any:
        """A dataclass from a mapping; keys that aren't given keep their defaults."""
        tree = self.tree(node, path, [item.name for item in dataclasses.fields(owner)])
        values = {key: self.field(owner, key, value, f"{path}.{key}") for key, (_, value) in tree.entries.items()}
        return owner(**values)

    def field(self, owner: Any, name: str, node: Node, path: str) -> Any:
        hint = typing.get_type_hints(owner)[name]
        rule = rule_of(owner, name)
        if typing.get_origin(hint) is tuple:
            assert rule is not None
            values = tuple(
                self.scalar(item, path, rule)
                for item in self.items(node, path, "[1, 2]" if rule.numeric else f"[{rule.names[0]}]")
            )
            if len(set(values)) != len(values):
                fail(node.where, f"{path} names {_twice(values)} twice")
            return values
        if rule is not None:
            return self.scalar(node, path, rule)
        if typing.get_origin(hint) is Mapping or hint is Mapping:
            return self.options(node, path)
        value = self.free(node, path)  # a swept value: a number, a word or nothing
        if isinstance(value, (dict, list, bool)):
            fail(node.where, f"{path} is {shown_as(node)}, a number or a word is needed")
        return value

    def seeds(self, node: Node, path: str) -> tuple[int, ...] | int:
        """A list of seeds, or their number."""
        if isinstance(node, Scalar) and (node.where.line or "," not in node.text):
            return self.scalar(
                node,
                path,
                Rule(f"a whole number from 1 to {MOST_SEEDS}, or a list of seeds,", whole(1, MOST_SEEDS).parse),
            )
        found = tuple(self.scalar(item, path, whole(0, 2**63 - 1)) for item in self.items(node, path, "[1, 2]"))
        if not found:
            fail(node.where, f"{path} is an empty list, one seed at least is needed")
        if len(set(found)) != len(found):
            fail(node.where, f"{path} names {_twice(found)} twice")
        return found

    def arm(self, node: Node, path: str) -> Arm:
        """An arm of the catalogue by its name, or one that is written out."""
        from .arms import CATALOGUE, find_arm

        known = choice(*CATALOGUE)
        if isinstance(node, Scalar):
            if node.text not in CATALOGUE:
                hint = near(node.text, list(CATALOGUE))
                fail(node.where, f"unknown arm {quoted(node.text)}{hint}; there is: {', '.join(CATALOGUE)}")
            return find_arm(node.text)
        fields = [item.name for item in dataclasses.fields(Arm)]
        tree = self.tree(node, path, ["name", "base", *fields[1:], *SHORT])
        entries = tree.entries
        if "name" not in entries and "base" not in entries:
            fail(tree.where, f"{path} has no name")
        name = self.scalar(entries["name"][1], f"{path}.name", NAME) if "name" in entries else ""
        base: Arm | None = None
        if "base" in entries:
            given = entries["base"][1]
            if not (isinstance(given, Scalar) and given.plain and given.text in NOTHING):
                base = find_arm(self.scalar(given, f"{path}.base", known))
        elif name in CATALOGUE:
            base = find_arm(name)
        name = name or (base.name if base else "")
        if not name:
            fail(tree.where, f"{path} has no name")
        if "masks" in entries and isinstance(entries["masks"][1], Scalar) and WHOLE.fullmatch(entries["masks"][1].text):
            fail(
                entries["masks"][0],
                f"{path}.masks says when masks change (fixed, redrawn, other or trained); masks per channel are "
                f"options: {{masks: {entries['masks'][1].text}}}",
            )
        options = dict(base.options) if base else {}
        changed = {key: self.option(key, value, f"{path}.{key}") for key, (_, value) in entries.items() if key in SHORT}
        if "options" in entries:
            changed |= self.options(entries["options"][1], f"{path}.options")
        options |= changed
        values: dict[str, Any] = {"name": name, "options": options}
        if base is not None and name != base.name:
            # Its own words, not those that describe another arm.
            said = ", ".join(f"{key} {_plain(value)}" for key, value in changed.items())
            values |= {
                "title": "",
                "phrase": "",
                "summary": f"As {base.title or base.name}, with {said}." if said else "",
            }
        for key, (_, value) in entries.items():
            if key in fields and key not in ("name", "options"):
                values[key] = self.field(Arm, key, value, f"{path}.{key}")
        return dataclasses.replace(base, **values) if base is not None else Arm(**values)

    def sweep(self, node: Node, path: str, arms: Sequence[Arm]) -> tuple[Arm, ...]:
        """The arms of one sweep: ``{of: pnn, level: [0.1, 0.2]}``."""
        from .arms import CATALOGUE, find_arm, sweep

        if not isinstance(node, Tree):
            fail(node.where, f"{path} is {shown_as(node)}, a sweep is needed, such as {{of: pnn, level: [0.1, 0.2]}}")
        settings = [key for key in node.entries if key != "of"]
        if "of" not in node.entries or len(settings) != 1:
            fail(node.where, f"{path} needs two keys: of, and what is swept, such as {{of: pnn, level: [0.1, 0.2]}}")
        own = {arm.name: arm for arm in arms}
        names = list(dict.fromkeys([*own, *CATALOGUE]))
        of = self.scalar(node.entries["of"][1], f"{path}.of", choice(*names))
        where, values = node.entries[settings[0]]
        items = self.items(values, f"{path}.{settings[0]}", "[0.1, 0.2]")
        found = [self.option(settings[0], item, f"{path}.{settings[0]}") for item in items]
        if not found:
            fail(values.where, f"{path}.{settings[0]} is an empty list, one value at least is needed")
        if len({json.dumps(value) for value in found}) != len(found):
            fail(values.where, f"{path}.{settings[0]} names a value twice")
        try:
            return sweep(own.get(of) or find_arm(of), settings[0], tuple(found))
        except (ValueError, TypeError, UsageError) as error:
            fail(where, f"{path}: {error}")

    def study(self, name: str) -> Study:
        """The whole study."""
        root = self.root
        tree = self.tree(root, "", STUDY_KEYS)
        entries = {key: value for key, (_, value) in tree.entries.items()}
        for key in ("arms", "seeds"):
            if key not in entries:
                fail(root.where, f"the study has no {key}")
        values: dict[str, Any] = {"name": name}
        for key in ("name", "title", "notes", "vary", "device", "precision", "threads"):
            if key in entries:
                values[key] = self.field(Study, key, entries[key], key)
        if not values.get("title"):
            values["title"] = values["name"]
        for key, owner in SECTIONS.items():
            if key in entries:
                values[key] = self.section(owner, entries[key], key)
        nodes = self.items(entries["arms"], "arms", "[pnn, control]")
        arms = [self.arm(item, f"arms[{number}]") for number, item in enumerate(nodes, 1)]
        wheres = [item.where for item in nodes]
        if "sweeps" in entries:
            sweeps = self.items(entries["sweeps"], "sweeps", "[{of: pnn, level: [0.1, 0.2]}]")
            for number, item in enumerate(sweeps, 1):
                new = self.sweep(item, f"sweeps[{number}]", arms)
                arms += new
                wheres += [item.where] * len(new)
        seeds = self.seeds(entries["seeds"], "seeds")
        values["seeds"] = tuple(range(seeds)) if isinstance(seeds, int) else seeds
        if "other_seeds" in entries:
            values["other_seeds"] = self.other_seeds(entries["other_seeds"], values["seeds"])
        study = Study(arms=tuple(arms), **values)
        self.check(study, entries, wheres)
        return study

    def other_seeds(self, node: Node, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(node, Listing) and not node.items:
            return ()
        found = self.seeds(node, "other_seeds")
        if isinstance(found, int):
            return seeds[:found] if found < len(seeds) else ()
        if found[: len(seeds)] != seeds[: len(found)]:
            fail(
                node.where,
                "other_seeds is no beginning of seeds; the other arms could not be paired with the compared ones",
            )
        return found[: len(seeds)]

    def check(self, study: Study, entries: Mapping[str, Node], wheres: Sequence[Where]) -> None:
        """What hangs on more than one key."""
        from .arms import CATALOGUE

        if not study.arms:
            fail(entries["arms"].where, "arms is an empty list, the candidate and the control at least are needed")
        first: dict[str, Where] = {}
        for arm, where in zip(study.arms, wheres):
            if arm.name in first:
                fail(where, f"the arm {quoted(arm.name)} stands twice")
            first[arm.name] = where
        titles: dict[str, str] = {}
        for arm, where in zip(study.arms, wheres):
            title = arm.title or arm.name
            if title in titles:
                fail(where, f"the arms {titles[title]} and {arm.name} have one title, {quoted(title)}")
            titles[title] = arm.name
            for key in ("match", "weights_from"):
                other = getattr(arm, key)
                if other == arm.name:
                    fail(where, f"the arm {arm.name} has itself as its {key}")
                if other and other not in study.arm_names and other not in CATALOGUE:
                    names = list(dict.fromkeys([*study.arm_names, *CATALOGUE]))
                    fail(where, f"{arm.name}.{key} is {quoted(other)}, an arm is needed{near(other, names)}")
        section = entries.get("question")
        for key in ("candidate", "control"):
            name = getattr(study.question, key)
            if name not in study.arm_names:
                node = section.entries.get(key) if isinstance(section, Tree) else None
                where = node[1].where if node else section.where if section else entries["arms"].where
                fail(
                    where,
                    f"question.{key} is {quoted(name)}, which is not among the arms: {', '.join(study.arm_names)}",
                )
        if study.question.candidate == study.question.control:
            fail(section.where if section else self.root.where, "question.candidate and question.control are one arm")
        schedule, section = study.schedule, entries.get("schedule")
        if schedule.decay == "steps" and not schedule.milestones:
            fail(
                section.where if section else self.root.where,
                "schedule.decay is steps, which needs schedule.milestones",
            )
        if list(schedule.milestones) != sorted(schedule.milestones):
            fail(section.where if section else self.root.where, "schedule.milestones do not rise")
        data, section = study.data, entries.get("data")
        if data.train_images and data.validation_images >= data.train_images:
            fail(
                section.where if section else self.root.where,
                f"data.validation_images is {data.validation_images}, fewer than data.train_images "
                f"({data.train_images}) are needed: they are held out from those",
            )


def _twice(values: Sequence[Any]) -> str:
    return next(str(value) for number, value in enumerate(values) if value in values[:number])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def ready_names() -> tuple[str, ...]:
    """The ready-made studies' names, the default first.

    Example:
        >>> ready_names()[0]
        'digits'
    """
    names = sorted(path.stem for path in READY.glob("*.yaml"))
    return tuple(sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)))


_ORDER = (
    "digits",
    "digits-levels",
    "digits-full",
    "mnist",
    "cifar10",
    "cifar10-level-1",
    "imagenet-folder",
    "voc",
    "voc-detection",
)


def text_of(name: str) -> str:
    """A study's file, to read and to copy.

    Args:
        name: a ready-made study's name, or a file's that ends in .yaml.

    Raises:
        UsageError: there is none of that name.
    """
    return read_text(*_locate(name))


def _ready_path(name: str) -> Path:
    names = ready_names()
    if name not in names:
        raise UsageError(
            f"unknown study {name!r}{near(name, names)}; there is: {', '.join(names)}, or the name of a .yaml file"
        )
    return READY / f"{name}.yaml"


def _is_file_name(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or "/" in name or "\\" in name


def _locate(name: str) -> tuple[Path, str]:
    """A study's file, and what messages call it."""
    if _is_file_name(name):
        return Path(name), name
    if name not in ready_names() and Path(name).is_file():
        raise UsageError(f"study {name!r} is a file without the ending .yaml; give it one")
    return _ready_path(name), f"{name}.yaml"


def _tree(path: Path, shown: str, chain: tuple[Path, ...] = ()) -> tuple[Tree, Tree | None]:
    """A file's tree over the one that it extends, and its own ``quick`` part, which is not handed on."""
    node = parse(read_text(path, shown), shown)
    if node is None or (isinstance(node, Scalar) and node.plain and node.text in NOTHING):
        raise UsageError(f"{shown}: the file is empty; torch-pnn studies show digits prints a study to begin with")
    if not isinstance(node, Tree):
        fail(node.where, f"{shown_as(node)}, where a study's keys are needed: {', '.join(STUDY_KEYS)}")
    entries = dict(node.entries)
    where, quick = entries.pop("quick", (node.where, None))
    if quick is not None and not isinstance(quick, Tree):
        fail(where, f"quick is {shown_as(quick)}, a mapping with keys of a study is needed")
    if "extends" in entries:
        where, base = entries.pop("extends")
        below, called = _extended(where, base, path)
        resolved = path.resolve()
        if below.resolve() in (*chain, resolved):
            fail(where, f"extends is {shown_as(base)}: the files extend one another in a circle")
        under = dict(_tree(below, called, (*chain, resolved))[0].entries)
        entries.setdefault("name", (node.where, Scalar(node.where, path.stem, False)))
        if "arms" in entries:  # new arms are not filled with the old ones' sweeps
            under.pop("sweeps", None)
        return over(Tree(node.where, under), Tree(node.where, entries), SECTIONS), quick
    return Tree(node.where, entries), quick


def _extended(where: Where, base: Node, path: Path) -> tuple[Path, str]:
    """The file that ``extends`` names, and what messages call it."""
    if not isinstance(base, Scalar) or base.text in NOTHING:
        fail(where, f"extends is {shown_as(base)}, a ready-made study's name or a file's is needed")
    if not _is_file_name(base.text):
        names = ready_names()
        if base.text not in names:
            wanted = listed((*names, "the name of a .yaml file"))
            fail(base.where, f"extends is {shown_as(base)}, one of {wanted} is needed{near(base.text, names)}")
        return READY / f"{base.text}.yaml", f"{base.text}.yaml"
    if not (path.parent / base.text).is_file():
        fail(base.where, f"extends is {shown_as(base)}, and there is no such file beside this one")
    return path.parent / base.text, base.text


def load(
    name: str,
    *,
    quick: bool = False,
    settings: Sequence[str] = (),
) -> Study:
    """A study from a file, or a ready-made one.

    Args:
        name: a ready-made study's name, or a file's that ends in .yaml.
        quick: take what the file's ``quick`` part says; without one, three seeds, two epochs and 1,000 images at most.
        settings: ``"schedule.epochs=3"``, laid over the file in their order; values are written as in YAML.

    Returns:
        The study, checked as far as can be without its data.

    Raises:
        UsageError: something in it is wrong; the sentence begins with the file and the line, or with the option.
        AblationError: the file can't be read.

    Example:
        >>> load("digits", settings=["schedule.epochs=3", "seeds=2"]).schedule.epochs
        3
        >>> load("digits", settings=["schedule.epochs=many"])
        Traceback (most recent call last):
            ...
        torch_pnn.ablation.errors.UsageError: --set schedule.epochs=many: schedule.epochs is "many", a whole number
        from 1 is needed
    """
    path, shown = _locate(name)
    tree, faster = _tree(path, shown)
    # The part is checked whether it is used or not: a mistake in it should not wait for somebody in a hurry.
    if faster is not None:
        _Reader(over(tree, faster, SECTIONS)).study(path.stem)
    if quick:
        tree = over(tree, faster, SECTIONS) if faster is not None else tree
    for setting in settings:
        key = setting.partition("=")[0].split(".")[0].strip()
        if key in ("extends", "quick"):
            raise UsageError(f"--set {setting}: {key} stands in a file alone")
        tree = put_setting(tree, setting)
    study = _Reader(tree).study(path.stem)
    return _hurried(study) if quick and faster is None else study


def _hurried(study: Study) -> Study:
    """What ``--quick`` makes of a study that does not say it."""
    schedule, data = study.schedule, study.data
    epochs = min(schedule.epochs, 2)
    images = min(data.train_images or 1000, 1000)
    return dataclasses.replace(
        study,
        seeds=study.seeds[:3],
        other_seeds=study.other_seeds[:3] if len(study.other_seeds) < 3 else (),
        schedule=dataclasses.replace(schedule, epochs=epochs, warmup_epochs=min(schedule.warmup_epochs, epochs / 2)),
        data=dataclasses.replace(data, train_images=images, validation_images=min(data.validation_images, images // 5)),
    )


class _Dumper(yaml.SafeDumper):
    """Writes texts in quotes wherever they could be taken for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Flow(list[Any]):
    """A list that is written on one line."""


def _represent_text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    safe = re.fullmatch(r"[A-Za-z][\w./-]*( [\w./(-][\w./()-]*)*", value) and value.lower() not in {*TRUTH, "null"}
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if safe else '"')


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(_Flow, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


def dump(study: Study) -> str:
    """A study as YAML that ``load`` reads as the same study: every key, but of an arm only what isn't the default.

    Example:
        >>> print(dump(Study("s", "S", (Arm("pnn"), Arm("control")), (0, 1))).splitlines()[0])
        name: s
    """
    values = study.to_json()
    defaults = Arm("").__dict__
    arms = []
    for arm in values["arms"]:
        changed = {key: value for key, value in arm.items() if key == "name" or value != defaults[key]}
        arms.append({"name": changed.pop("name"), "base": None, **changed})
    values["arms"] = arms
    seeds = values["seeds"]
    values["seeds"] = len(seeds) if seeds == list(range(len(seeds))) else seeds
    values = _flowed({key: values[key] for key in (*_FIRST, *(key for key in values if key not in _FIRST))})
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


_FIRST = ("name", "title", "notes", "data", "model", "arms", "question", "seeds", "other_seeds")


def _flowed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _flowed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_flowed(item) for item in value] if any(isinstance(i, (dict, list)) for i in value) else _Flow(value)
    return value
