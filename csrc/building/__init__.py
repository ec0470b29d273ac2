"""What setup.py builds with: the compilers of this machine, the graph that ninja runs, and the facts that a build leaves."""

from pathlib import Path

CSRC = Path(__file__).resolve().parents[1]
ROOT = CSRC.parent
