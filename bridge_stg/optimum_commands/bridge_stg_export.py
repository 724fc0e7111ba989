"""`optimum-cli export bridge-stg`: this project's own `export` command, under optimum's.

The wheel holds this file as `optimum.commands.register.bridge_stg_export`, which is where optimum looks for commands of
other packages. That folder must not have an `__init__.py`: packages share it (PEP 420).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import click
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from bridge_stg.cli import run
from bridge_stg.commands.export import export


class CollectWords(argparse.Action):
    """Collect the arguments unchanged in `words`: the command itself checks and converts them."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Add an option or argument to `words`."""
        given = [values] if isinstance(values, str) else list(values)
        namespace.words = [*getattr(namespace, "words", []), *([option] if option else []), *given]


class ExportBridgeSTG(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum has no types
    """Pass the arguments to `bridge-stg export`, whose options it shows."""

    COMMAND = CommandInfo(name="bridge-stg", help=export.get_short_help_str(limit=100))

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Give optimum's parser every argument and option that the command has."""
        for parameter in export.params:
            if not isinstance(parameter, click.Option):
                parser.add_argument(str(parameter.name), action=CollectWords)
                continue
            metavar = str(parameter.name).upper()
            if isinstance(parameter.type, click.Choice):
                metavar = "{" + ",".join(map(str, parameter.type.choices)) + "}"
            about = (parameter.help or "").replace("%", "%%")
            rest: dict[str, Any] = {"nargs": 0} if parameter.is_flag else {"metavar": metavar}
            for names in filter(None, (parameter.opts, parameter.secondary_opts)):
                required = parameter.required and not parameter.secondary_opts
                parser.add_argument(*names, action=CollectWords, help=about, required=required, **rest)

    def run(self) -> None:
        """Run the command and exit with its code."""
        words: Sequence[str] = getattr(self.args, "words", ())
        sys.exit(run(["export", *words]))


REGISTER_COMMANDS = [(ExportBridgeSTG, ExportCommand)]
