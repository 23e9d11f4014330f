"""The few pieces of HTML that the pages share: the document around them, tables, data URIs."""

import base64
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from PIL import Image

MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".mp4": "video/mp4"}


def document(title: str, head: str, body: str) -> str:
    """A complete page of a `header` and what is below it; everything it needs is inside it."""
    style = files("burnish.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{style}</style></head>\n'
        f'<body><a class="skip" href="#content">Skip to the content</a>{head}'
        f'<main id="content" tabindex="-1">{body}</main></body></html>\n'
    )


def header(brand: str, title: str, below: str, more: str = "") -> str:
    """The head of a page: whose it is, what it shows, a line below, and HTML after that."""
    return (f'<header><div class="brand">{escape(brand)}</div><h1>{escape(title)}</h1>'
            f'<div class="sub">{escape(below)}</div>{more}</header>')  # fmt: skip


def section(title: str, *parts: str, lead: str = "") -> str:
    """A card with a heading and an explaining line; empty when all its parts are."""
    content = "".join(parts)
    if not content:
        return ""
    lead_html = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{lead_html}{content}</section>\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of ready-made HTML cells, the first of a row its name; columns in `numbers` are set to the right."""
    kind = [' class="n"' if column in numbers else "" for column in range(len(head))]
    names = [f'<th scope="col"{of}>{escape(text)}</th>' for of, text in zip(kind, head, strict=True)]
    top = "".join(name if text else "<td></td>" for name, text in zip(names, head, strict=True))
    cells = ["".join(f"<td{kind[i]}>{cell}</td>" for i, cell in enumerate(row) if i) for row in rows]
    body = "".join(f'<tr><th scope="row">{row[0]}</th>{rest}</tr>' for row, rest in zip(rows, cells, strict=True))
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def tile_row(tiles: Sequence[tuple[str, str, str]]) -> str:
    """Large figures: class ("main" or ""), figure and text of each."""
    cells = "".join(
        f'<div class="tile {kind}"><b>{escape(figure)}</b><span>{escape(text).replace(chr(10), "<br>")}</span></div>'
        for kind, figure, text in tiles
    )
    return f'<div class="tiles">{cells}</div>' if cells else ""


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values in two columns; values are escaped."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs if v) + "</dl>"


def data_uri(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def file_uri(path: Path) -> str:
    """The file itself as a data URI."""
    return data_uri(path.read_bytes(), MIME[path.suffix.lower()])


def png_uri(image) -> str:
    """An image [H, W, 3] uint8 (or [H, W]) as a PNG data URI."""
    import io

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return data_uri(buffer.getvalue(), "image/png")
