"""`optimum-cli l4pack ...`: optimum looks for commands in this namespace, which must hold no `__init__.py`."""

from __future__ import annotations

import sys
from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class L4packCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """Hands everything after `optimum-cli l4pack` to l4pack's own command line."""

    COMMAND = CommandInfo(name="l4pack", help="Quantize Llama 4 on hardware far smaller than the model.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Take all words as they are, options too."""
        parser.prefix_chars = "\0"
        parser.add_argument("arguments", nargs=REMAINDER)

    def run(self) -> None:
        """Run l4pack; ends the process with its exit code."""
        from l4pack.__main__ import main

        sys.argv = ["l4pack", *self.args.arguments]
        main()


REGISTER_COMMANDS = [L4packCommand]
