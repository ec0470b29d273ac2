"""The command line: `fastcl COMMAND` or `python -m fastcl COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from .version import __version__

# name -> the module whose main(argv) runs it, imported only when it is asked for; and one line about it.
COMMANDS = {
    "doctor": (
        "fastcl.doctor",
        "what fastcl runs on here: versions, what was built, which backend serves what",
    ),
    "bench": (
        "bench.__main__",
        "measure one case or all: time, errors and memory beside the strongest baselines (in a checkout)",
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
    parser.add_argument("command", choices=sorted(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="fastcl COMMAND --help lists them")
    chosen = parser.parse_args(argv)
    checkout = Path(__file__).resolve().parent.parent
    if chosen.command == "bench":
        if not (checkout / "bench" / "__main__.py").is_file():
            parser.error(
                "bench: expected a checkout of the repository, got an installed package; clone it and run there"
            )
        sys.path.insert(0, str(checkout))  # a console script has its own folder there, not the checkout
    status: int = importlib.import_module(COMMANDS[chosen.command][0]).main(chosen.arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
