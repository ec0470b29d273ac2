"""The command line: `fastcl COMMAND` or `python -m fastcl COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .equation.arguments import one_of
from .version import __version__

# name -> the module whose main(argv) runs it, imported only when it is asked for; and one line about it.
COMMANDS = {
    "doctor": (
        "fastcl.doctor",
        "what fastcl runs on here: versions, what was built, which backend serves what",
    ),
    "tune": (
        "fastcl.tune",
        "measure which of the processor's instructions are the quickest here, and keep the choice",
    ),
    "bench": (
        "fastcl.bench.command",
        "measure losses, yours too: time, memory and errors beside eager PyTorch",
    ),
    "cost": (
        "fastcl.bench.cost",
        "what a loss will cost at a size: milliseconds, bytes, flops, kernels",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name; None takes them from the command line.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="fastcl",
        description="Contrastive losses and their gradients at any batch size in O(n d) memory.",
        epilog="commands:\n" + "\n".join(f"  {name:<10}{line}" for name, (_, line) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastcl {__version__}")
    parser.add_argument("command", type=_command, metavar="{" + ",".join(sorted(COMMANDS)) + "}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="fastcl COMMAND --help lists them")
    chosen = parser.parse_args(argv)
    try:
        status: int = importlib.import_module(COMMANDS[chosen.command][0]).main(chosen.arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has had enough of it (`fastcl doctor | head -1`): nothing more can be said, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _command(name: str) -> str:
    try:
        return one_of("command", name, sorted(COMMANDS))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
