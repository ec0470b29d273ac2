"""Hooks of the documentation site: notebooks become pages, formulas MathML, so that a page needs no script for them."""

from __future__ import annotations

import html
import re
from pathlib import PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

# An entry of the reference, and the formula that its page puts after it: shown at the entry's head.
ENTRY = re.compile(
    r'(<div class="doc doc-contents first">)((?:(?!doc-contents first).)*?)(<div class="formula">(?:(?!</div>).)*</div>)',
    re.DOTALL,
)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\(?:\(|\[)(.*?)\\(?:\)|\])</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Beside each notebook, which stays there to be taken away, a page of its text, code, output and pictures."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        path = PurePosixPath(notebook.src_uri)
        text, found = MarkdownExporter().from_filename(notebook.abs_src_path, resources={"unique_key": path.stem})
        text = text.replace("\n", f"\n\n[This page as a notebook]({path.name})\n", 1)  # after its title
        files.append(File.generated(config, str(path.with_suffix(".md")), content=text))
        for name, picture in found["outputs"].items():
            files.append(File.generated(config, str(path.parent / name), content=picture))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """The page with every formula as MathML."""
    return ENTRY.sub(r"\1\3\2", FORMULA.sub(_formula, content))


def _formula(match: re.Match[str]) -> str:
    display = "block" if match[1] == "div" else "inline"
    return f'<{match[1]} class="formula">{convert(html.unescape(match[2]), display=display)}</{match[1]}>'
