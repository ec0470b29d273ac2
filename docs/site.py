"""Hooks of the documentation site: formulas become MathML when it is built, so that a page needs no script for them."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# An entry of the reference, and the formula that its page puts after it: shown at the entry's head.
ENTRY = re.compile(
    r'(<div class="doc doc-contents first">)((?:(?!doc-contents first).)*?)(<div class="formula">(?:(?!</div>).)*</div>)',
    re.DOTALL,
)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\(?:\(|\[)(.*?)\\(?:\)|\])</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """The page with every formula as MathML."""
    return ENTRY.sub(r"\1\3\2", FORMULA.sub(_formula, content))


def _formula(match: re.Match[str]) -> str:
    display = "block" if match[1] == "div" else "inline"
    return f'<{match[1]} class="formula">{convert(html.unescape(match[2]), display=display)}</{match[1]}>'
