"""All papers, one after the other: python -m examples.papers --help."""

import sys

from . import dhel_kcl, f_micl, minc
from .command import main

if __name__ == "__main__":
    sys.exit(main([f_micl.PAPER, minc.PAPER, dhel_kcl.PAPER]))
