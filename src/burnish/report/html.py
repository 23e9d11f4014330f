"""The few pieces of HTML that the pages share: the document around them, tables, data URIs."""

import base64
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".mp4": "video/mp4"}


def document(title: str, body: str) -> str:
    """A complete page; everything it needs is inside it."""
    style = files("burnish.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{style}</style></head>\n'
        f"<body><main>{body}</main></body></html>\n"
    )


def section(title: str, *parts: str, lead: str = "") -> str:
    """A card with a heading and an explaining line; empty when all its parts are."""
    content = "".join(parts)
    if not content:
        return ""
    lead_html = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{lead_html}{content}</section>\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of ready-made HTML cells; the columns listed in `numbers` are set to the right."""
    kind = [' class="n"' if column in numbers else "" for column in range(len(head))]
    top = "".join(f"<th{kind[i]}>{escape(text)}</th>" for i, text in enumerate(head))
    cells = ["".join(f"<td{kind[i]}>{cell}</td>" for i, cell in enumerate(row)) for row in rows]
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


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

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return data_uri(buffer.getvalue(), "image/png")
