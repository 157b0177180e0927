"""A command's settings: one frozen dataclass, filled from its defaults, a TOML or JSON file, and the command line.

The dataclass is the only source of names, types, defaults and help texts. Flags (``--seq-len 64``), overrides
(``seq_len=64``) and the keys of the file (``seq_len = 64``) all become words per field here; `tyro` reads
those that win as the fields' types, and makes the help screen.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from entrenar.errors import ConfigError, UsageError

T = TypeVar("T")
Words = dict[str, list[str]]  # field -> the words given for it


def option(default: Any, help: str) -> Any:
    """A setting with a default."""
    return field(default=default, metadata={"help": help})


def required(help: str, empty: bool = False) -> Any:
    """A setting that must be given; `empty`: the empty text is a value as well."""
    return field(metadata={"help": help, "empty": empty})


def positional(help: str, empty: bool = False) -> Any:
    """A setting that must be given and needs no flag."""
    return field(metadata={"help": help, "empty": empty, "positional": True})


class Meaning(NamedTuple):
    """What another program's key says here: of which setting, and which word for each of its words, None to take back
    what was said. alone: what to say instead, where it makes no sense to take back and say nothing."""

    name: str
    words: Mapping[str, str | None]
    alone: str | None = None


@dataclass(frozen=True)
class Setting:
    """What the reader of words has to know of a field: does it take one word, many, or none."""

    name: str
    help: str
    many: bool = False
    switch: bool = False
    unset: bool = False  # a switch that may also be left open (None)
    positional: bool = False
    required: bool = False
    empty: bool = False  # a required setting that may be the empty text
    meaning: Meaning | None = None  # what its words say in ours, where they are another program's

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def spelling(self) -> str:
        return self.name.upper() if self.positional else self.flag


TAKEN_BACK: list[str] = []  # the words of a setting that is to be as if nobody had given it
CONFIG = Setting("config", "a TOML or JSON file of settings")
SPELLINGS = "name=VALUE means --name VALUE; --config F.toml reads settings from a file."


def settings_of(command: type) -> dict[str, Setting]:
    """Name -> setting, in the order of the fields, then other programs' names for the same (``command.ALIASES``) and
    their keys whose values are spelled otherwise (``command.MEANINGS``)."""
    kinds = typing.get_type_hints(command)
    own = {
        f.name: Setting(
            f.name,
            f.metadata.get("help", ""),
            many=typing.get_origin(kinds[f.name]) in (tuple, list),
            switch=kinds[f.name] in (bool, bool | None),
            unset=kinds[f.name] == bool | None,
            positional=f.metadata.get("positional", False),
            required=f.default is MISSING and f.default_factory is MISSING,
            empty=f.metadata.get("empty", False),
        )
        for f in fields(command)
    }
    for key, meaning in getattr(command, "MEANINGS", {}).items():
        setting = own.get(key, Setting(key, "", switch=set(meaning.words) == {"true", "false"}))
        own[key] = replace(setting, meaning=meaning)
    return own | {alias: own[name] for alias, name in getattr(command, "ALIASES", {}).items() if name in own}


def parse(command: type[T], args: Sequence[str], prog: str) -> T | None:
    """The settings of a command line, or None where it asked for help, which is printed.

    Precedence: default < file of ``--config`` < flag or ``key=value``; of two flags of one value the later one holds.

    Raises:
        UsageError: an unknown name (the error tells the nearest known one), a value of the wrong type, or a
            required setting that is missing.
    """
    known = settings_of(command)
    if any(word in ("-h", "--help") for word in args):
        print(_help(command, known, prog), end="")
        return None
    words = read_words(known, args)
    path = words.pop(CONFIG.name, None)
    if path:
        words = {**read_file(known, Path(path[-1])), **words}
    words = {name: given for name, given in words.items() if given is not TAKEN_BACK}
    for setting in known.values():
        if setting.required and setting.name not in words:
            raise UsageError(f"{setting.spelling} is needed: {setting.help}")
        if setting.required and not setting.empty and "" in words[setting.name]:
            raise UsageError(f"{setting.spelling} is empty: {setting.help}")
    return _typed(command, known, words, prog)


def read_words(known: Mapping[str, Setting], args: Sequence[str]) -> Words:
    """Words per field of a command line; the path of ``--config`` is kept under that name.

    A flag of one value takes the next word whatever it is, unless that begins with ``--``: ``--prompt=--x``.

    Raises:
        UsageError: a word that belongs to nothing, a flag without a value, or one of several values that is given
            twice; of others the last one counts.
    """
    known = {**known, CONFIG.name: CONFIG}
    places = [s.name for s in known.values() if s.positional]
    result: Words = {}
    opened: Setting | None = None  # the flag that the next word may belong to
    for word in args:
        key, equals, value = word.removeprefix("--").partition("=")
        name = key.replace("-", "_")
        if word.startswith("--"):
            if name not in known and not equals and known.get(name.removeprefix("no_"), CONFIG).switch:
                name, equals, value = name.removeprefix("no_"), "=", "false"
            setting = _find(name, known, f"flag --{key}")
            if setting.switch and not equals:
                equals, value = "=", "true"
            _once(setting, result)
            result[setting.name] = [value] if equals else []
            opened = None if equals else setting
        elif opened and (not result[opened.name] or (opened.many and not (equals and name in known))):
            result[opened.name].append(word)
        elif equals and name.isidentifier() and (name in known or not places):
            setting = _find(name, known, f"key {key}")
            _once(setting, result)
            result[setting.name] = [value]
            opened = None
        elif places:
            result[places.pop(0)] = [word]
        else:
            raise UsageError(f"what does {word!r} belong to? Settings are --name VALUE or name=VALUE")
    for name, given in result.items():
        if not given:
            raise UsageError(f"{known[name].flag} needs a value")
    return _in_our_words(known, result)


def _once(setting: Setting, words: Words) -> None:
    if setting.many and setting.name in words:
        raise UsageError(f"{setting.flag} is given twice; give it once, with all its values: {setting.flag} A B")


def read_file(known: Mapping[str, Setting], path: Path) -> Words:
    """Words per field of a TOML file, or of a JSON one (*.json). Tables group keys for the reader only.

    Raises:
        ConfigError: not TOML or no JSON object, an unknown key, or one given twice.
    """
    from entrenar.formats.files import unique_members

    is_json = path.suffix.lower() == ".json"
    kind = "a JSON object" if is_json else "TOML"
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=unique_members) if is_json else tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # the decoders' own errors are ValueErrors, as of wrong UTF-8
        raise ConfigError(str(path), f"is not {kind}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(str(path), f"is not {kind}")
    result: Words = {}
    for key, value in _flat(content):
        name = _find(key.replace("-", "_"), known, f"key {key} in {path}").name
        if name in result:
            raise ConfigError(str(path), f"key {key} is given twice")
        if value is None:  # JSON's null: as if it were not there
            continue
        values = value if isinstance(value, list) else [value]
        result[name] = [str(v).lower() if isinstance(v, bool) else str(v) for v in values]
    return _in_our_words(known, result)


def _flat(table: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield key, value


def _in_our_words(known: Mapping[str, Setting], words: Words) -> Words:
    """Other programs' keys and words replaced by what they mean.

    Raises:
        UsageError: an unknown word, or two keys mean different things; one that takes back means less than any other.
    """
    result = {key: given for key, given in words.items() if known[key].meaning is None}
    said_by = {key: key for key in result}
    taken_back: dict[str, str] = {}
    for key, given in words.items():
        meaning = known[key].meaning
        if meaning is None:
            continue
        said = " ".join(given)
        if said not in meaning.words:
            raise UsageError(f"{key}: {said!r} is not one of {', '.join(meaning.words)}")
        name, ours = meaning.name, meaning.words[said]
        if ours is None:
            taken_back[name] = key
        elif result.setdefault(name, [ours]) != [ours]:
            there = f"{said_by[name]} says {' '.join(result[name])}"
            raise UsageError(f"{key} {said} means {name} {ours}, and {there}; give one of the two")
        said_by.setdefault(name, key)
    for name, key in taken_back.items():
        meaning = known[key].meaning
        if name not in result and meaning is not None and meaning.alone is not None:
            raise UsageError(f"{key} {' '.join(words[key])}: {meaning.alone}")
        result.setdefault(name, TAKEN_BACK)
    return result


def _find(name: str, known: Mapping[str, Setting], what: str) -> Setting:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    spelled = [near_name if what.startswith("key") else known[near_name].flag for near_name in near]
    raise UsageError(f"unknown {what}; {f'did you mean {spelled[0]}?' if spelled else 'see --help'}")


def _typed(command: type[T], known: Mapping[str, Setting], words: Words, prog: str) -> T:
    """The words as the fields' types."""
    import tyro

    args: list[str] = []
    for name, given in words.items():
        setting = known[name]
        if setting.many:
            args += [setting.flag, *given]
        elif setting.unset and given in (["true"], ["false"]):
            args.append(f"{setting.flag}={given[0].capitalize()}")
        elif setting.switch and given in (["true"], ["false"]):
            args.append(setting.flag if given == ["true"] else f"--no-{setting.flag[2:]}")
        elif len(given) == 1 and not setting.switch:
            args.append(f"{setting.flag}={given[0]}")
        else:
            expected = "true or false" if setting.switch else "one value"
            raise UsageError(f"{setting.flag}: {' '.join(given)!r} is not {expected}")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(command, args=args, prog=prog)
    except SystemExit:
        raise UsageError(_sentence(complaint.getvalue(), command.__name__)) from None


def _sentence(box: str, command: str) -> str:
    """What tyro's framed complaint says above its first rule, on one line and in plain words."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if line.startswith(("─", "╰"))), len(lines))
    text = " ".join(lines[:end]).removeprefix(f"Error parsing {command}: ").removeprefix("Error parsing ")
    text = re.sub(r"no type matching .* - <class '\w+'>: ", "", text)  # keep the last type tried
    text = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number", text)
    text = re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", text)
    return text or "the settings could not be read"


def to_toml(settings: object) -> str:
    """The settings of a command as the file that ``--config`` reads; what is None is left out."""
    lines = []
    for f in fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, f.name)
        if value is not None:
            value = list(value) if isinstance(value, tuple) else value
            # JSON's strings, numbers, booleans and lists are TOML's too, but for DEL, which TOML wants escaped.
            written = json.dumps(value).replace("\x7f", "\\u007f")
            lines.append(f"{f.name} = {written}")
    return "\n".join([*lines, ""])


def _help(command: type, known: Mapping[str, Setting], prog: str) -> str:
    import tyro

    places = [s.spelling for s in known.values() if s.positional]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(command, args=["--help"], prog=" ".join([prog, *places]))
    return f"{out.getvalue().rstrip()}\n\n{SPELLINGS}\n"
