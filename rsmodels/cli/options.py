"""Command-line options from a dataclass: its fields are the options, the line under a field is the help.

jsonargparse does the work (types, nested options as --optim.lr, --config FILE). This module adds what it
lacks: options are spelled with hyphens and understood either way, `--debug` needs no value, `--bands 3,2,1`
is a list, an unknown option gets the nearest known one, and every error is one line.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

# Names that are short for another. Not the other way round: `torchrun train.py --run DIR` never arrives here,
# for torchrun itself finds --run ambiguous (its own --run-path), whatever stands before it.
ALIASES = {"--run": "--run_dir"}
_NUMBER = r"-?\d+(\.\d*)?(e-?\d+)?"
NUMBERS = re.compile(rf"{_NUMBER}(,{_NUMBER})+")
ONE_NUMBER = re.compile(_NUMBER)
BOOLEANS = ("true", "false", "null")


class UsageError(ValueError):
    """The command line itself is wrong; the message is one line."""


class Parser(jsonargparse.ArgumentParser):
    """A parser whose help spells options with hyphens, as users should."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        text = super().format_help(*args, **kwargs)
        return re.sub(r"--\w[\w.]*", lambda option: option[0].replace("_", "-"), text)


def parse(command: str, summary: str, run: Callable[[Any], int], arguments: Sequence[str]) -> Any:
    """The dataclass that `run` takes, filled from the command line.

    A field whose metadata says `positional` takes the words without an option: one, or for a list many.
    The help of one whose metadata has `choices` ends with their names.
    Raises UsageError, or SystemExit after --help.
    """
    config_class = typing.get_type_hints(run)["config"]
    parser = _parser(command, summary, config_class)
    try:
        words = _normalise(parser, arguments, _read_config_files(parser, arguments))
        parsed = parser.instantiate(parser.parse_args(words))
    except argparse.ArgumentError as error:
        raise UsageError(f"{_one_line(str(error))} (see rsmodels {command} --help)") from None
    return config_class(**{field.name: parsed[field.name] for field in dataclasses.fields(config_class)})


def _parser(command: str, summary: str, config_class: type) -> Parser:
    description = f"{summary[0].upper()}{summary[1:]}."
    parser = Parser(f"rsmodels {command}", description=description, exit_on_error=False, allow_abbrev=False)
    positional = [field for field in dataclasses.fields(config_class) if field.metadata.get("positional")]
    types = typing.get_type_hints(config_class)
    for field in positional:
        many = typing.get_origin(types[field.name]) is list
        optional = field.default is not dataclasses.MISSING
        parser.add_argument(
            field.name, nargs="+" if many else "?" if optional else None, help=field.metadata["positional"]
        )
        if optional:
            parser.set_defaults({field.name: field.default})
    parser.add_argument("--config", action="config", help="YAML file of options; those after it win")
    parser.add_class_arguments(config_class, skip={field.name for field in positional})
    for field in dataclasses.fields(config_class):
        if choices := field.metadata.get("choices"):
            action = next(action for action in parser._actions if action.dest == field.name)
            action.help = f"{str(action.help).removesuffix('.')}: {', '.join(sorted(choices))}"
    return parser


def _normalise(parser: Parser, arguments: Sequence[str], given: Sequence[Mapping[str, Any]]) -> list[str]:
    """The arguments as jsonargparse wants them; `given`: what the configuration files say, in their order."""
    actions = {option: action for action in parser._actions for option in action.option_strings}
    arguments = _join_nested(arguments, actions, given)
    result = []
    action: argparse.Action | None = None  # of the option before this word
    for position, argument in enumerate(arguments):
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        if not argument.startswith("--") or argument == "--":
            result.append(f"[{argument}]" if _is_list(argument, action) else argument)
            action = None
            continue
        written, equals, value = argument.partition("=")
        option = "--" + written[2:].replace("-", "_")
        option = ALIASES.get(option, option)
        action = actions.get(option) or _dictionary(actions, option)
        if action is None:
            raise UsageError(f"option {written} is not known; {_nearest(written, actions)}")
        if _is_list(value, action):
            value = f"[{value}]"
        elif _is_switch(action) and not equals and following not in BOOLEANS:
            equals, value = "=", "true"
        result.append(option + equals + value)
    return result


def _is_list(value: str, action: argparse.Action | None) -> bool:
    """Whether `value` is numbers with commas between them, or one where the option takes several."""
    hint = getattr(action, "_typehint", None)
    several = any(typing.get_origin(one) is tuple for one in (hint, *typing.get_args(hint)))
    return bool(NUMBERS.fullmatch(value) or (several and ONE_NUMBER.fullmatch(value)))


def _is_switch(action: argparse.Action) -> bool:
    return getattr(action, "_typehint", None) in (bool, bool | None)


def _join_nested(
    arguments: Sequence[str], actions: Mapping[str, argparse.Action], given: Sequence[Mapping[str, Any]]
) -> list[str]:
    """--model-args.a.b 1 --model-args.a.c 2 as one --model_args.a: jsonargparse keeps the last alone. What a
    configuration file gives in model_args.a stays, but for what is given anew."""
    result: list[str] = []
    nested: dict[str, dict[str, Any]] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        written, equals, value = word.partition("=")
        names = ("--" + written[2:].replace("-", "_")).split(".")
        deep = word.startswith("--") and len(names) > 2 and _dictionary(actions, names[0]) is not None
        if not deep or not (equals or words):
            result.append(word)
            continue
        option, key = names[0].removeprefix("--"), names[1]
        if (joined := f"{names[0]}.{key}") not in nested:
            # jsonargparse takes dictionaries of a file whole: the last one counts.
            said = next((file[option] for file in reversed(given) if option in file), None)
            before = said.get(key) if isinstance(said, dict) else None
            nested[joined] = copy.deepcopy(before) if isinstance(before, dict) else {}
        inner = nested[joined]
        for name in names[2:-1]:
            if not isinstance(inner.get(name), dict):
                inner[name] = {}
            inner = inner[name]
        inner[names[-1]] = _value(written, value if equals else words.pop(0))
    return [*result, *(f"{option}={json.dumps(value)}" for option, value in nested.items())]


def _value(option: str, text: str) -> Any:
    """The value that `text` writes down; JSON first, as YAML takes 1e-3 for a word."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"option {option}: {text!r} is no value; check its brackets and quotes") from None


def _read_config_files(parser: Parser, words: Sequence[str]) -> list[dict[str, Any]]:
    """The files after --config. Says which one is wrong, and where: jsonargparse would name neither."""
    contents = []
    actions = {option: action for action in parser._actions for option in action.option_strings}
    for position, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option != "--config" or not (equals or position + 1 < len(words)):
            continue
        path = value if equals else words[position + 1]
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(
                f"--config {path}: not a readable YAML file ({' '.join(str(error).split())})"
            ) from None
        if not isinstance(content, dict):
            raise UsageError(f"--config {path}: expected options as `name: value`, found {content!r}")
        for name in _names(content, actions):
            if f"--{name}" not in actions:
                raise UsageError(
                    f"--config {path}: option {name!r} is not known; {_nearest(f'--{name}', actions)}"
                )
        contents.append(content)
    return contents


def _names(
    content: Mapping[str, Any], actions: Mapping[str, argparse.Action], prefix: str = ""
) -> Iterator[str]:
    """The options that a configuration file sets, nested ones with dots."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        nested = any(option.startswith(f"--{name}.") for option in actions)
        if isinstance(value, dict) and nested:
            yield from _names(value, actions, f"{name}.")
        else:
            yield name


def _dictionary(actions: Mapping[str, argparse.Action], option: str) -> argparse.Action | None:
    """The option that takes a dictionary and of which `option` sets one entry: --data-args.classes FILE."""
    action = actions.get(option.partition(".")[0])
    return action if typing.get_origin(getattr(action, "_typehint", None)) is dict else None


def _nearest(written: str, known: Iterable[str]) -> str:
    spelled = [option.replace("_", "-") for option in known if option.startswith("--")]
    near = difflib.get_close_matches(written.replace("_", "-"), spelled, n=1)
    return f"did you mean {near[0]}?" if near else "see --help"


def _one_line(message: str) -> str:
    """jsonargparse's report of a wrong value, several lines of Python types, as one line of plain words."""
    message = re.sub(r'Parser key "([\w.]+)"', lambda key: "--" + key[1].replace("_", "-"), message)
    message = re.sub(r"^argument (--[\w.]+)", lambda option: option[1].replace("_", "-"), message)
    expected = re.findall(r"Expected an? (.+?)(?:\. Got value|$)", message, re.MULTILINE)
    found = re.search(r"(?:Got value|Given value): (.*)", message)
    if not message.startswith("--") or not expected or found is None:
        return " ".join(message.split())
    words = [_plain_type(text) for text in expected if "NoneType" not in text]
    option = message.partition(":")[0]
    return f"{option}: expected {' or '.join(dict.fromkeys(words))}, found {found[1]}"


def _plain_type(text: str) -> str:
    names = {
        "str": "text",
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "tuple": "numbers with commas between them",
    }
    name = re.sub(r"<class '(\w+)'>", r"\1", text)
    literal = re.fullmatch(r"typing\.Literal\[(.*)\]", name)
    return literal[1].replace("'", "").replace(", ", " or ") if literal else names.get(name, name)
