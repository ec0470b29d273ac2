"""Benchmarks: `python -m bench` measures every case and rewrites the README's tables from what it measured."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
