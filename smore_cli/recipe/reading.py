"""YAML as plain values. Scalars follow YAML 1.2: only `true` and `false` are booleans, and `1e-4` is a number.

PyYAML by itself follows YAML 1.1, which reads `no` as false and `1e-4` as a string, and keeps the last of two equal
keys without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from smore_cli.errors import RecipeError
from smore_cli.recipe.document import Document, Loc, Mark, Problem

__all__ = ["CORE_SCALARS", "read_document", "read_value"]

CORE_SCALARS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    # At most 300 digits: a longer one is a float too large to be finite, and Python refuses to read very long integers.
    ("int", re.compile(r"^(?:[-+]?[0-9]{1,300}|0o[0-7]{1,300}|0x[0-9a-fA-F]{1,300})$"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
)
"""YAML 1.2 core schema: type, pattern of a plain scalar, the characters it may start with. int goes before float."""

_TAG = "tag:yaml.org,2002:"
_UNUSABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # what an escape such as "\0" writes
_LINE_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")  # what YAML counts as a line
_MAX_BYTES = 1 << 20  # a model file given by mistake is not read to its end
_MAX_VALUES = 100_000  # aliases of aliases can say more than any memory holds


class _CoreLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (declared so in PyYAML); none of YAML 1.1's


for _name, _pattern, _first in CORE_SCALARS:
    _CoreLoader.add_implicit_resolver(_TAG + _name, _pattern, _first)


def read_document(path: str | Path) -> Document:
    """Reads a recipe file; duplicate keys and the like are noted in the document's problems.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or is not a mapping of sections.
    """
    text = _read_text(path)
    document = Document(str(path), _LINE_BREAK.split(text))
    node = _compose(text, document)
    if node is None:
        raise RecipeError([f"{path}: the recipe is empty"], "`smore recipe list` shows ready recipes to start from")
    reader = _NodeReader(document.keys, document.places, document.unreadable)
    document.values = reader.read(node, ())
    document.problems += reader.problems
    if reader.count > _MAX_VALUES:
        document.fail_if_any()
    if not isinstance(document.values, dict):
        message = "a recipe is a mapping of sections, as in 'model: {name_or_path: ...}'"
        document.problems = [Problem(_mark(node), message)]
        document.fail_if_any()
    return document


def read_value(text: str) -> tuple[Any, list[str]]:
    """Returns the value of one override, read as YAML, and what is wrong with it."""
    document = Document("", _LINE_BREAK.split(text))
    try:
        node = _compose(text, document)
    except RecipeError:
        return None, [problem.message for problem in document.problems]
    if node is None:
        return None, ["there is no value (null removes the key)"]
    reader = _NodeReader({}, {}, set())
    value = reader.read(node, ())
    return value, [problem.message for problem in reader.problems]


def _read_text(path: str | Path) -> str:
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError([f"{path}: no such file"], "`smore recipe list` shows ready recipes") from None
    except IsADirectoryError:
        raise RecipeError([f"{path}: a folder, not a recipe"], "name the .yaml file in it") from None
    except OSError as error:
        raise RecipeError([f"{path}: cannot be read: {error.strerror}"]) from None
    if len(raw) > _MAX_BYTES:
        raise RecipeError([f"{path}: larger than 1 MiB, so it is no recipe"])
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = _LINE_BREAK.split(raw[: error.start].decode("utf-8-sig"))
        place = f"{path}:{len(before)}:{len(before[-1]) + 1}"
        message = f"{place}: not UTF-8 text (byte 0x{raw[error.start]:02x})"
        raise RecipeError([message], "save the file as UTF-8") from None


def _compose(text: str, document: Document) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_CoreLoader)
    except yaml.reader.ReaderError as error:
        before = _LINE_BREAK.split(text[: error.position])
        place = Mark(len(before), len(before[-1]) + 1)
        said = f"character U+{ord(text[error.position]):04X} is not allowed in YAML"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if error.context in ("while scanning a quoted scalar", "while scanning a simple key"):
            mark = error.context_mark  # what is missing is missing where it begins, not at the end of the file
        place = Mark(mark.line + 1, mark.column + 1) if mark else Mark(1, 1)
        said = _syntax_message(error)
    except RecursionError:
        place, said = Mark(1, 1), "nested too deeply"
    document.problems.append(Problem(place, said))
    document.fail_if_any()
    return None


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    said = error.problem or ""
    if "'\\t'" in said:
        return "a tab; YAML is indented with spaces"
    if alias := re.fullmatch("found undefined alias '(.*)'", said):
        return f"*{alias[1]} refers to an anchor &{alias[1]} that is not defined above it"
    if said == "but found another document":
        return "a second document starts here ('---'); a recipe is one"
    hint = ""
    if said.startswith("mapping values are not allowed"):
        hint = "; put quotes around a value that contains ': '"
    elif "<block end>" in said:
        hint = "; check the indentation"
    elif error.context == "while scanning a quoted scalar" and said == "found unexpected end of stream":
        return "not valid YAML: a quote is opened here and never closed"
    elif error.context == "while scanning a simple key":
        return "not valid YAML: no 'key: value' here; there must be a colon and a space after the key"
    context = f"{error.context} that starts on line {error.context_mark.line + 1}, " if error.context_mark else ""
    return f"not valid YAML: {context}{said}{hint}"


def _mark(node: yaml.Node) -> Mark:
    return Mark(node.start_mark.line + 1, node.start_mark.column + 1)


class _NodeReader:
    """Turns YAML nodes into plain values and notes where each stands."""

    def __init__(self, keys: dict[Loc, Mark], places: dict[Loc, Mark], unreadable: set[Loc]) -> None:
        self.keys, self.places, self.unreadable = keys, places, unreadable
        self.problems: list[Problem] = []
        self._open: set[int] = set()  # collections being read: an alias to one of them would never end
        self.count = 0

    def read(self, node: yaml.Node, loc: Loc) -> Any:
        self.count += 1
        if self.count > _MAX_VALUES:
            if self.count == _MAX_VALUES + 1:
                self._note(node, f"more than {_MAX_VALUES:,} values, aliases written out: no recipe is that long")
            return None
        self.places[loc] = _mark(node)
        if id(node) in self._open:
            self._note(node, "an alias to something that contains it")
            self.unreadable.add(loc)
            return None
        self._open.add(id(node))
        value: Any
        if isinstance(node, yaml.MappingNode):
            value = self._mapping(node, loc)
        elif isinstance(node, yaml.SequenceNode):
            value = [self.read(item, (*loc, index)) for index, item in enumerate(node.value)]
        else:
            known = len(self.problems)
            value = self._scalar(node)
            if len(self.problems) > known:
                self.unreadable.add(loc)
        self._open.discard(id(node))
        return value

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> Mapping[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or not isinstance(key := self._scalar(key_node), str):
                self._note(key_node, "a key must be a string" + (": put it in quotes" if key_node.value else ""))
            elif key == "<<" and key_node.style is None:
                self._note(key_node, "merge keys ('<<') are not part of YAML 1.2: write the keys out")
            elif key in values:
                first = self.keys[*loc, key].line
                self._note(key_node, f"duplicate key '{key}'{_inside(loc)}, first set on line {first}")
            else:
                self.keys[*loc, key] = _mark(key_node)
                values[key] = self.read(value_node, (*loc, key))
        return values

    def _scalar(self, node: yaml.Node) -> Any:
        text, kind = node.value, node.tag.removeprefix(_TAG)
        patterns = {name: pattern for name, pattern, _ in CORE_SCALARS}
        if kind == "str":
            if wrong := _UNUSABLE.search(text):
                self._note(node, f"character U+{ord(wrong[0]):04X} has no place in a recipe: remove it")
            return text
        if kind not in patterns:
            self._note(node, f"tag '{node.tag.replace(_TAG, '!!')}' has no meaning in a recipe")
        elif not patterns[kind].match(text) and not (kind == "float" and patterns["int"].match(text)):
            self._note(node, f"{text!r} is not {kind}, as its tag says")
        elif kind == "bool":
            return text.lower() == "true"
        elif kind == "int":
            return int(text, 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10)
        elif kind == "float":
            return float(re.sub(r"\.(?=[a-zA-Z])", "", text))  # .inf and .nan are inf and nan in Python
        return None

    def _note(self, node: yaml.Node, message: str) -> None:
        self.problems.append(Problem(_mark(node), message))


def _inside(loc: Loc) -> str:
    return f" in {'.'.join(map(str, loc))}" if loc else ""
