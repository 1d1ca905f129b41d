"""Pages of one HTML file that needs no network, for a phone as for a desk, light and dark."""

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence

from repulsor_jax.files.untrusted import printable

STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1c2024;--dim:#626a73;--rule:#dfe3e8;--card:#f6f7f9}
@media(prefers-color-scheme:dark){
:root{--page:#14171a;--ink:#e4e7eb;--dim:#99a2ac;--rule:#333a41;--card:#1c2126}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;padding:1.2rem clamp(.9rem,3vw,2.2rem);
max-width:82rem;background:var(--page);color:var(--ink);overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2;margin:.2em 0}
h2{font-size:1.15rem;margin:2.2rem 0 .7rem}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;overflow-wrap:normal}
td,th{border-bottom:1px solid var(--rule);padding:.35em .9em .35em 0;text-align:left;
vertical-align:top;white-space:nowrap}
th{color:var(--dim);font-weight:500}
pre{background:var(--card);padding:1em;overflow:auto;max-width:100%;overflow-wrap:normal}
svg{fill:currentColor}
"""


def escaped(text: object) -> str:
    """Text from outside as HTML shows it: no tag, no secret, no control character."""
    return html.escape(printable(str(text)))


def table(rows: Sequence[Sequence[object]], headed: bool = True) -> str:
    """Rows of cells; the first has the headings. It scrolls by itself where it is too wide."""

    def cells(row: Iterable[object], tag: str) -> str:
        return "".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in row)

    kinds = ["th" if headed and k == 0 else "td" for k in range(len(rows))]
    lines = [f"<tr>{cells(row, kind)}</tr>" for row, kind in zip(rows, kinds, strict=True)]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def document(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page.

    Args:
      title: plain text; it is the heading of the page's tab.
      body: HTML, in which text from outside is `escaped`.
      style, script: of this page, beside `STYLE`. No other script runs in it, and it asks for
        nothing from anywhere: its Content-Security-Policy says so to the browser.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"
    policy += f"; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{STYLE}{style}</style></head>\n"
        f"<body>{body}" + (f"<script>{script}</script>" if script else "") + "</body></html>\n"
    )
