"""Page of a report from the caller's sections: report.html, which needs no other file, and report.md."""
import base64
import dataclasses
import html
import io
import re
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from PIL import Image

from utils import decodable, write_text

HTML, MARKDOWN = 'report.html', 'report.md'
MOST_ROWS = 50  # rows of a table in report.md
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 76em; margin: 2em auto;
  padding: 0 1em }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } th, td { padding: .2em .8em .2em 0; text-align: left; vertical-align: top;
  white-space: pre-wrap; overflow-wrap: anywhere }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
thead th { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #aaa } tbody tr + tr { border-top:
  1px solid #eee }
.facts th { font-weight: normal; color: #666; white-space: nowrap }
.scroll { overflow: auto; max-height: 90vh } .rows { max-height: 32em }
.tiles { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: 0; width: 180px } figure img { display: block }
figcaption { font-size: 13px; line-height: 1.35; white-space: pre-wrap; overflow-wrap: anywhere }
"""


@dataclasses.dataclass
class Tile:
    """Picture with lines of text below."""
    picture: Image.Image
    lines: List[str]


@dataclasses.dataclass
class Section:
    """Part of a page, all of it optional.

    Args:
        text: sentences below the title.
        facts: values by name.
        picture: name of a PNG file in the folder of the page; left out if there is no such file.
        tiles: pictures with text, which replace `picture` in report.html.
        header, rows: names of the columns of a table, and its cells.
        texts: number of columns with text, at the left; the other columns are numbers.
    """
    title: str
    text: str = ''
    facts: Dict[str, str] = dataclasses.field(default_factory=dict)
    picture: Optional[str] = None
    tiles: Sequence[Tile] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    texts: int = 1

    def has_content(self, folder: Path) -> bool:
        return bool(self.text or self.facts or self.tiles or self.rows) or self.has_picture(folder)

    def has_picture(self, folder: Path) -> bool:
        return self.picture is not None and (folder / self.picture).is_file()


def write(folder: Path, title: str, sections: Sequence[Section]):
    """Write report.html and report.md to a folder; sections without content are left out."""
    sections = [section for section in sections if section.has_content(folder)]
    head = ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{marked_up(title)}</title><style>{STYLE}</style>'
            f'</head><body>\n<h1>{marked_up(title)}</h1>\n')
    parts = [html_of(section, folder) for section in sections]
    write_text(folder / HTML, head + '\n'.join(parts) + '\n</body></html>\n')
    parts = [markdown_of(section, folder) for section in sections]
    write_text(folder / MARKDOWN, f'# {plain(title)}\n\n' + '\n'.join(parts))


# ---------------------------------------------------------------------------------------------------------------------
# HTML

def marked_up(text: str) -> str:
    return html.escape(decodable(str(text)))


def html_of(section: Section, folder: Path) -> str:
    parts = [f'<h2>{marked_up(section.title)}</h2>']
    if section.text:
        parts.append(f'<p>{marked_up(section.text)}</p>')
    if section.facts:
        rows = ''.join(f'<tr><th scope="row">{marked_up(name)}</th><td>{marked_up(value)}</td></tr>\n'
                       for name, value in section.facts.items())
        parts.append(f'<table class="facts"><tbody>\n{rows}</tbody></table>')
    if section.tiles:
        parts.append(f'<div class="tiles">\n{"".join(map(html_of_tile, section.tiles))}</div>')
    elif section.has_picture(folder):
        source = data_uri((folder / section.picture).read_bytes(), 'png')
        parts.append(f'<div class="scroll"><img src="{source}" alt="{marked_up(section.title)}"></div>')
    if section.rows:
        parts.append(html_of_table(section))
    return '\n'.join(parts)


def html_of_table(section: Section) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        kinds = ['' if i < section.texts else ' class="number"' for i in range(len(cells))]
        return '<tr>' + ''.join(f'<{tag}{kind}>{marked_up(cell)}</{tag}>' for kind, cell in zip(kinds, cells)) + '</tr>'

    body = '\n'.join(row(cells, 'td') for cells in section.rows)
    return (f'<div class="scroll rows"><table><thead>{row(section.header, "th")}</thead><tbody>\n{body}\n'
            f'</tbody></table></div>')


def html_of_tile(tile: Tile) -> str:
    content = io.BytesIO()
    tile.picture.convert('RGB').save(content, 'jpeg', quality=90)
    width, height = tile.picture.size
    return (f'<figure><img src="{data_uri(content.getvalue(), "jpeg")}" width="{width}" height="{height}" '
            f'alt="{marked_up(tile.lines[0])}"><figcaption>{marked_up(chr(10).join(tile.lines))}</figcaption>'
            f'</figure>\n')


def data_uri(content: bytes, kind: str) -> str:
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


# ---------------------------------------------------------------------------------------------------------------------
# Markdown

def plain(text: str) -> str:
    """Escape what Markdown would read as markup."""
    text = decodable(str(text)).replace('&', '&amp;').replace('<', '&lt;').replace('\n', ' ')
    return re.sub(r'([\\`*_\[\]|~$#])', r'\\\1', text)


def markdown_of(section: Section, folder: Path) -> str:
    parts = [f'## {plain(section.title)}\n']
    if section.text:
        parts.append(f'{plain(section.text)}\n')
    if section.facts:
        parts.append(markdown_table(['', ''], section.facts.items(), texts=2))
    if section.has_picture(folder):
        parts.append(f'![{plain(section.title)}]({section.picture})\n')
    if section.rows:
        parts.append(markdown_table(section.header, section.rows[:MOST_ROWS], texts=section.texts))
    if len(section.rows) > MOST_ROWS:
        parts.append(f'The first {MOST_ROWS} of {len(section.rows)} rows; {HTML} has all.\n')
    return '\n'.join(parts)


def markdown_table(header: Sequence[str], rows, *, texts: int) -> str:
    lines = [header, ['---' if i < texts else '---:' for i in range(len(header))]]
    cells = [[plain(cell) for cell in header], lines[1], *([plain(cell) for cell in row] for row in rows)]
    return ''.join(f'| {" | ".join(row)} |\n' for row in cells)
