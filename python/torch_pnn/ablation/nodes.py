"""YAML as a tree of nodes that know where they were written: the lowest layer of study files.

PyYAML's safe loader makes the nodes; no Python object is made of a file's tags. Refused here, each in one sentence that
begins with the file and the line: what is no YAML, keys that stand twice, tags, aliases that stand inside themselves or
for more than a study could hold, text that is not UTF-8.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .errors import AblationError, UsageError, describe_os_error

#: A file larger than this, or one whose aliases stand for more nodes than this, is no study.
MOST_BYTES = 1 << 18
MOST_NODES = 100_000

_DIGITS = "[0-9]+(?:_[0-9]+)*"
WHOLE = re.compile(f"[-+]?{_DIGITS}")
NUMBER = re.compile(rf"[-+]?({_DIGITS}(\.({_DIGITS})?)?|\.{_DIGITS})([eE][-+]?[0-9]+)?")
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOTHING = ("", "~", "null", "Null", "NULL")


def quoted(text: str) -> str:
    """A text in quotes on one line, shortened.

    Example:
        >>> quoted("a" * 70)
        '"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..."'
    """
    return json.dumps(text if len(text) <= 60 else f"{text[:57]}...", ensure_ascii=False)


def shown_as(node: Node) -> str:
    """What was written, for a sentence."""
    if isinstance(node, Tree):
        return "a mapping"
    if isinstance(node, Listing):
        return "a list"
    if not node.plain:
        return f"{quoted(node.text)} in quotes"
    if node.text in NOTHING:
        return "empty"
    if len(node.text) <= 60 and (NUMBER.fullmatch(node.text) or node.text.lower() in TRUTH):
        return node.text
    return quoted(node.text)


def near(word: str, known: Sequence[str]) -> str:
    """A guess at what was meant, to end a sentence; "" where nothing is near.

    Example:
        >>> near("epoch", ["epochs", "seeds"])
        ' (did you mean epochs?)'
    """
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def listed(words: Sequence[str], last: str = "or") -> str:
    """Words in a row.

    Example:
        >>> listed(["sgd", "adam", "adamw"])
        'sgd, adam or adamw'
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


@dataclass(frozen=True)
class Where:
    """Where something was written.

    Attributes:
        source: the file's name, or an option of the command line.
        line: counted from 1; 0 on the command line.
    """

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class Scalar:
    """A number, a word, a text: ``plain`` where it stands without quotes."""

    where: Where
    text: str
    plain: bool


@dataclass(frozen=True)
class Listing:
    """A list."""

    where: Where
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Tree:
    """A mapping: the name of each key -> (where the key is written, its value)."""

    where: Where
    entries: Mapping[str, tuple[Where, Node]]


Node = Scalar | Listing | Tree


def fail(where: Where, sentence: str) -> NoReturn:
    """Refuses what stands at a place."""
    raise UsageError(f"{where}: {sentence}")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader; a tag, which would ask for another type than the study's key has, is refused."""

    source = ""
    lines = True

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag is not None and tag != "!":
            tag = tag.replace("tag:yaml.org,2002:", "!!")
            place = Where(self.source, event.start_mark.line + 1 if self.lines else 0)
            fail(place, f"the tag {tag} has no meaning in a study; leave it out")
        return super().compose_node(parent, index)


def parse(text: str, source: str, *, lines: bool = True) -> Node | None:
    """A YAML text as a tree; None where nothing is in it.

    Raises:
        UsageError: the text is no YAML, or not of the kind that a study may be.
    """

    def where(mark: Any) -> Where:
        return Where(source, mark.line + 1 if lines and mark is not None else 0)

    try:
        loader = _Loader(text)
        loader.source, loader.lines = source, lines
        root = loader.get_node() if loader.check_node() else None
        if loader.check_node():
            fail(where(loader.peek_event().start_mark), "a second document begins here; a study is one document")
        return None if root is None else _convert(root, where, {}, [0])
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        fail(Where(source, line if lines else 0), f"the character U+{error.character:04X} can't stand in YAML")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        fail(where(mark), _syntax(error, text, mark))
    except RecursionError:
        raise UsageError(f"{source}: nested too deeply for a study") from None


def _syntax(error: yaml.MarkedYAMLError, text: str, mark: Any) -> str:
    """What is wrong with the YAML itself, in a sentence; the commonest mistakes in words of our own."""
    problem = error.problem or "it is damaged"
    line = text[: mark.index + 1].rpartition("\n")[2] if mark is not None else ""
    if "'\\t'" in problem or line.lstrip(" ").startswith("\t"):
        return "a tab, where YAML wants blanks; indent with blanks"
    if "mapping values are not allowed" in problem:
        return 'not YAML: a ": " too much, or a key that is indented too far; a text with ": " in it goes into quotes'
    if "undefined alias" in problem:
        return f"not YAML: {problem.replace('found undefined alias', 'there is no anchor')}"
    column = f" (column {mark.column + 1})" if mark is not None else ""
    return f"not YAML: {problem}{column}"


def _convert(node: yaml.Node, where: Callable[[Any], Where], active: dict[int, bool], count: list[int]) -> Node:
    """PyYAML's node as ours: aliases and merge keys written out, keys that stand twice refused."""
    place = where(node.start_mark)
    count[0] += 1
    if count[0] > MOST_NODES:
        fail(place, f"its aliases stand for more than {MOST_NODES} values; that is no study")
    if isinstance(node, yaml.ScalarNode):
        return Scalar(place, node.value, not node.style)
    if id(node) in active:
        fail(place, "the anchor stands inside itself")
    active[id(node)] = True
    try:
        if isinstance(node, yaml.SequenceNode):
            return Listing(place, tuple(_convert(item, where, active, count) for item in node.value))
        merged: dict[str, tuple[Where, Node]] = {}
        own: dict[str, tuple[Where, Node]] = {}
        for key, value in node.value:
            spot = where(key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                fail(spot, "a key is a word, not a list or a mapping")
            converted = _convert(value, where, active, count)
            if key.value == "<<" and not key.style:
                parts = converted.items if isinstance(converted, Listing) else (converted,)
                for part in parts:
                    if not isinstance(part, Tree):
                        fail(spot, "<< takes a mapping, or a list of mappings")
                    merged = {**part.entries, **merged}
                continue
            if key.value in own:
                fail(spot, f"{quoted(key.value)} stands twice; it is also on line {own[key.value][0].line}")
            own[key.value] = (spot, converted)
        return Tree(place, {**merged, **own})
    finally:
        del active[id(node)]


def read_text(path: Path, shown: str) -> str:
    """A file's text."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"{shown}: there is no such file") from None
    except OSError as error:
        raise AblationError(f"can't read {shown}: {describe_os_error(error)}") from error
    if len(content) > MOST_BYTES:
        raise UsageError(f"{shown}: larger than {MOST_BYTES >> 10} KiB; that is no study")
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UsageError(f"{shown}: UTF-16 text; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        fail(Where(shown, line), f"the byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8")


def over(base: Tree, upper: Tree, sections: Collection[str]) -> Tree:
    """One mapping over another: ``sections`` key by key, everything else replaced."""
    entries = dict(base.entries)
    for key, (where, value) in upper.entries.items():
        below = entries.get(key, (where, value))[1]
        if key in sections and isinstance(below, Tree) and isinstance(value, Tree):
            value = Tree(value.where, {**below.entries, **value.entries})
        entries[key] = (where, value)
    return Tree(upper.where, entries)


def put_setting(tree: Tree, text: str) -> Tree:
    """The tree with one ``--set key=value`` laid over it."""
    option = f"--set {text}"
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UsageError(f"{option}: key=value is needed, such as schedule.epochs=3")
    node = parse(value, option, lines=False) or Scalar(Where(option), "", True)
    return _put(tree, key.split("."), _unlined(node, Where(option)), Where(option), key)


def split_commas(node: Node) -> Node:
    """On the command line ``a,b`` is a list."""
    if isinstance(node, Scalar) and node.plain and not node.where.line and node.text not in NOTHING:
        return Listing(node.where, tuple(Scalar(node.where, part.strip(), True) for part in node.text.split(",")))
    return node


def _unlined(node: Node, where: Where) -> Node:
    """The same values, all written at one place."""
    if isinstance(node, Scalar):
        return dataclasses.replace(node, where=where)
    if isinstance(node, Listing):
        return Listing(where, tuple(_unlined(item, where) for item in node.items))
    return Tree(where, {key: (where, _unlined(value, where)) for key, (_, value) in node.entries.items()})


def _put(tree: Tree, path: Sequence[str], value: Node, where: Where, whole_key: str) -> Tree:
    """The tree with a value at a dotted path. ``arms.NAME.key`` reaches into the arm of that name."""
    head, rest = path[0], path[1:]
    if not rest:
        return Tree(tree.where, {**tree.entries, head: (where, value)})
    below = tree.entries.get(head, (where, Tree(where, {})))[1]
    if head == "arms" and len(path) == len(whole_key.split(".")) and not isinstance(below, Tree):
        below = split_commas(below)
        if len(rest) < 2:
            fail(where, f"{whole_key} is an arm, one of its keys is needed, such as {whole_key}.level")
        if isinstance(below, Listing):
            return Tree(tree.where, {**tree.entries, head: (where, _put_arm(below, rest, value, where, whole_key))})
    if not isinstance(below, Tree):
        fail(where, f"there is nothing below {'.'.join(whole_key.split('.')[: -len(rest)])}")
    return Tree(tree.where, {**tree.entries, head: (where, _put(below, rest, value, where, whole_key))})


def _put_arm(arms: Listing, path: Sequence[str], value: Node, where: Where, whole_key: str) -> Node:
    items, names = [], []
    for item in arms.items:
        if isinstance(item, Tree):
            named = item.entries.get("name") or item.entries.get("base")
            name = named[1].text if named and isinstance(named[1], Scalar) else ""
        else:
            name = item.text if isinstance(item, Scalar) else ""
        names.append(name)
        if name == path[0]:
            whole_arm = item if isinstance(item, Tree) else Tree(where, {"name": (where, Scalar(where, name, False))})
            item = _put(whole_arm, path[1:], value, where, whole_key)
        items.append(item)
    if path[0] not in names:
        fail(where, f"{path[0]} is no arm of the study{near(path[0], names)}; there is: {', '.join(names)}")
    return Listing(arms.where, tuple(items))
