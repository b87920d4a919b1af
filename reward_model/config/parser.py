# SPDX-License-Identifier: Apache-2.0
"""Groups of flags → a parser of command lines, by Transformers' ``HfArgumentParser``."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.config.groups import GROUPS

HINT = " (--help lists the flags)"
EXAMPLE = "deepspeed main.py --model_name_or_path facebook/opt-350m --data_path Dahoas/rm-static --output_dir output"


def words_of(values: dict[str, Any]) -> list[str]:
    """Flags and values as a command line has them; None says nothing.

    >>> words_of({"data_path": ["a", "b"], "seed": 7, "offload": True, "output_dir": None})
    ['--data_path', 'a', 'b', '--seed=7', '--offload=true']
    """
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(_word, value)] if value else []
        elif value is not None:
            words.append(f"--{name}={_word(value)}")
    return words


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def require_known(name: str, known: Iterable[str], where: str) -> None:
    """Raises UserError for a name that is not known; names the nearest one that is."""
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    raise UserError(f"{where}no option {name}" + (f"; did you mean {near[0]}?" if near else ""))


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows one spelling of each flag, and the default of each whose sentence does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = action.default in (None, [], argparse.SUPPRESS) or action.default is False or "Default:" in text
        if silent:
            return text
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return f"{text} Default: {default}."

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        own = f"--{action.dest}"  # the name that usage lines and guides have, not an alias of another program
        name = own if own in action.option_strings else max(action.option_strings, key=lambda text: text[:2] == "--")
        if action.nargs == 0 or (action.nargs == "?" and action.const is True):
            return name
        return f"{name} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


def build_parser(groups: Sequence[type], **kwargs: Any):
    """Transformers' parser for groups of flags, which reports a wrong one as one line, without the page of usage.

    A function, since importing Transformers takes most of a second that ``import reward_model`` need not take.
    """
    from transformers.hf_argparser import HfArgumentParser, string_to_bool

    class Parser(HfArgumentParser):
        def error(self, message: str):
            message = re.sub(r"(--\w+)(/--[\w-]+)+", r"\1", " ".join(message.split()))
            raise UserError(message + self._meant(message) + HINT)

        def _meant(self, message: str) -> str:
            """The flag that is nearest to the one that nothing knows."""
            unknown = re.match(r"unrecognized arguments: (-[^\s=]+)", message)
            known = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown[1], known, n=1) if unknown else []
            return f"; did you mean {near[0]}?" if near else ""

    parser = Parser(list(groups), allow_abbrev=False, formatter_class=Help, **kwargs)
    for action in parser._actions:
        if action.type is string_to_bool:  # a flag that may be left open, too, is true without a value
            action.nargs, action.const = "?", True
    return parser


def run_parser():
    """The parser of ``main.py``'s flags."""
    started = Path(sys.argv[0]).name
    as_command = {"__main__.py": "python -m reward_model train", "reward-model": "reward-model train"}
    parser = build_parser(
        list(GROUPS.values()),
        prog=as_command.get(started, started),
        description="Train a reward model on preference pairs, ranked lists or scores with DeepSpeed.",
        usage="%(prog)s --model_name_or_path MODEL [--config FILE] [FLAG [VALUE …] …]",
        epilog=f"A flag without a value can be given true or false. Hyphens may stand for underscores.\n"
        "Exit status: 0, the run is finished; 75, it was asked to end and the same command goes on; else, an error.\n"
        f"example: {EXAMPLE}",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="Read flags from a YAML or JSON file, such as the run.json of an earlier run; flags given here win.",
    )
    return parser


def given_names(parser: argparse.ArgumentParser, words: Sequence[str]) -> frozenset[str]:
    """The names of the flags that a command line gives."""
    flags = {word.split("=")[0] for word in words}
    return frozenset(action.dest for action in parser._actions if flags.intersection(action.option_strings))


def split_at_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What a command line names before its first flag, and the rest. ``-``, standard input, is a name.

    >>> split_at_flags(["output", "-", "--best"])
    (['output', '-'], ['--best'])
    """
    at = next((i for i, word in enumerate(words) if word.startswith("-") and word != "-"), len(words))
    return list(words[:at]), list(words[at:])


def read_words(parser, words: Sequence[str], last_wins: bool = False) -> tuple:
    """A command line → one object of each of the parser's groups, and the namespace of the flags beside them.

    A flag that is given twice has its last value, as in every program, which is said.

    Args:
        last_wins: of a flag of one value it is meant: a recipe's flags come before the user's. Of a list it is said.

    Raises:
        UserError: an unknown flag, with the nearest one, or a wrong value.
    """
    *groups, rest = parser.parse_args_into_dataclasses(
        list(words), return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    lists = {action.dest for action in parser._actions if action.nargs == "+"}
    for name, times in _given_differently(parser, words):
        if last_wins and name not in lists:
            continue
        logger.warning(f"--{name} is given {times} times: what follows the last is taken, and no more")
    return tuple(groups)


def _given_differently(parser: argparse.ArgumentParser, words: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Flags that a command line gives several times with several values, and how many times."""
    flags = {name: action.dest for action in parser._actions for name in action.option_strings}
    given: dict[str, list[list[str]]] = {}
    values: list[str] = []
    for word in words:
        flag, is_one_word, value = word.partition("=")
        if flag in flags:
            values = [value] if is_one_word else []
            given.setdefault(flags[flag], []).append(values)
        else:
            values.append(word)
    for name, each in given.items():
        if len({tuple(values) for values in each}) > 1:
            yield name, len(each)
