"""Tables for a notebook."""

from html import escape


def as_html(markdown: str) -> str:
    r"""A Markdown table, and the sentences below it, as HTML.

    Example:
        >>> print(as_html("| rate | |\n|---|---|\n| 0.1 | **best** |\n\nTake 0.1."))
        <table><tr><td>rate</td><td></td></tr><tr><td>0.1</td><td><b>best</b></td></tr></table><p>Take 0.1.</p>
    """
    table, _, below = markdown.partition("\n\n")
    heads, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
    lines = ("".join(f"<td>{_cell(cell)}</td>" for cell in row) for row in (heads, *rows))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table><p>{escape(below)}</p>"


def _cell(text: str) -> str:
    bold = text.startswith("**") and text.endswith("**") and len(text) > 4
    return f"<b>{escape(text[2:-2])}</b>" if bold else escape(text)
