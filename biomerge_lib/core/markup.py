"""Knows how text of others stays text in Markdown, in tables and in pages; knows nothing of what it says."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame
    from pandas.io.formats.style import Styler

# A page with this in its head runs no script and loads nothing, whatever else stands in it.
INERT = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; img-src data:; font-src data:; style-src 'unsafe-inline'\">"
)
_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")


def in_markdown(text: object) -> str:
    r"""A text on one line, for a paragraph, a heading or a table's cell.

    >>> in_markdown("<b>a|b</b>\n*c* bc5cdr_iob")
    '&lt;b&gt;a\\|b&lt;/b&gt; \\*c\\* bc5cdr_iob'
    """
    line = " ".join(str(text).split())
    return html.escape(_MARKUP.sub(lambda found: "\\" + found[0], line), quote=False)


def code_in_markdown(text: object, *, block: bool = False) -> str:
    """A text as code: in the line, or as a block of shell commands."""
    code = str(text) if block else " ".join(str(text).split())
    longest = max(map(len, re.findall("`+", code)), default=0)
    if block:
        fence = "`" * max(3, longest + 1)
        return f"{fence}bash\n{code}\n{fence}"
    fence = "`" * (longest + 1)
    return f"{fence} {code} {fence}" if longest else f"{fence}{code}{fence}"


def escaped(table: DataFrame) -> Styler:
    """A table to be styled; pandas' own ``style`` takes texts and labels for markup."""
    style = table.style.format(escape="html")
    for axis in (0, 1):
        style = style.format_index(escape="html", axis=axis).format_index_names(escape="html", axis=axis)
    return style
