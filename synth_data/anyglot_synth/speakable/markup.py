"""Markdown and HTML -> plain lines of text, each a sentence or more. What no voice should read is `Unspeakable`.

Every pattern takes time linear in the text: repetitions are of one class of characters and bounded, or run to the end
of a line. Says nothing about numbers and words; see `words.py`.
"""

from __future__ import annotations

import html
import re


class Unspeakable(Exception):
    """A text that should not be spoken.

    Args:
        reason: a short word for counts, such as "code".
        detail: one line: what was found.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


_FENCE = re.compile(r"^[ \t]{0,3}(?:```|~~~)", re.M)
_HTML_CODE = re.compile(r"<(?:pre|script|style|svg|math)[\s>]", re.I)
_COMMENT = re.compile(r"<!--[^>]{0,2000}-->")
_BREAK = re.compile(r"</?(?:br|p|div|li|ul|ol|h[1-6]|tr|blockquote|hr)(?:\s[^<>]{0,300})?/?>", re.I)
_TAG = re.compile(r"</?[a-zA-Z][a-zA-Z0-9-]{0,20}(?:[\s/][^<>]{0,300})?>")
_MATHS = re.compile(
    r"\$\$|\\\[|\\begin\{|\\\(|\\(?:frac|sqrt|sum|int|prod|lim|left|mathbb|mathrm|text|cdot|times|alpha)\b"
)
_CODE_LINE = re.compile(
    r"^[ \t]{0,40}(?:"
    r"(?:def|class)[ ]\w{1,80}[^\n]{0,200}:[ \t]*$|"
    r"import[ ]\w[\w.]{0,80}\w(?:[ ]as[ ]\w+)?;?$|"
    r"from[ ][\w.]{1,80}[ ]import[ ]|"
    r"\#include[ ]?[<\"]|"
    r"(?:const|let|var)[ ]\w{1,80}[ ]?=|"
    r"(?:public|private|static|function)[ ][^\n]{0,200}\{[ \t]*$|"
    r"(?:SELECT|INSERT|UPDATE|DELETE|CREATE)[ ][^\n]{0,200}[ ](?:FROM|INTO|SET|TABLE|WHERE)[ ]|"
    r"(?:if|for|while)[ ]?\([^\n]{0,200}\)[ ]?\{|"
    r"[\w.\[\]]{1,80}[ ]?(?:=|\+=)[ ][\w.]{1,80}\([^\n]{0,200}\);?$|"
    r"[\w.]{1,80}\([^\n]{0,200}\);$|"
    r"(?:\$|>>>|C:\\>)[ ]\w|"
    r"[{}][ ;,]?$)",
    re.M,
)
_SEPARATOR = re.compile(r"^[ \t]*\|?[ \t]*:?-{1,200}:?[ \t]*(?:\|[ \t]*:?-{1,200}:?[ \t]*){0,100}\|?[ \t]*$")
_LINK_DEFINITION = re.compile(r"^[ ]{0,3}\[[^\]\n]{1,200}\]:[ \t]+\S[^\n]*$", re.M)
_FOOTNOTE = re.compile(r"\[\^[^\]\n]{1,80}\]:?")
_LINK = re.compile(
    r"!?\[([^\[\]\n]{0,500})\](?:\([^()\n]{0,500}(?:\([^()\n]{0,200}\)[^()\n]{0,200})?\)|\[[^\[\]\n]{0,100}\])"
)
_CITATION = re.compile(r"[ \t]?\[\d{1,3}(?:[,–-][ ]?\d{1,3}){0,10}\]")
_HEADING = re.compile(r"^[ ]{0,3}#{1,6}[ \t]+(.*?)[ \t]*#{0,6}[ \t]*$")
_RULE = re.compile(r"^[ \t]*(?:(?:-[ \t]*){3,200}|(?:\*[ \t]*){3,200}|(?:_[ \t]*){3,200}|={3,500})$")
_QUOTE = re.compile(r"^[ \t]{0,3}(?:>[ \t]?){1,10}")
_BULLET = re.compile(r"^[ \t]{0,40}[-*+•‣◦▪●–][ \t]+(?:\[[ xX]\][ \t]+)?(.*)$")
_NUMBERED = re.compile(r"^[ \t]{0,40}(\d{1,3})[.)][ \t]+(.*)$")
_INLINE_MATHS = re.compile(r"(?<![\w$])\$(?=[A-Za-z(-])([^$\n]{1,200})\$(?![\w$])")
_CODE_SPAN = re.compile(r"`{1,2}([^`\n]{1,200})`{1,2}")
_ESCAPE = re.compile(r"\\([\\`*_{}\[\]()#+\-.!|>~$])")
_MARKS = (
    re.compile(r"(?<![\w*])\*{1,3}(?=[^\s*])([^*\n]{1,2000})(?<=[^\s*])\*{1,3}(?!\w)"),
    re.compile(r"(?<![\w_])_{1,3}(?=[^\s_])([^_\n]{1,2000})(?<=[^\s_])_{1,3}(?!\w)"),
    re.compile(r"~~(?=[^\s~])([^~\n]{1,2000})~~"),
)


def plain(text: str, max_cells: int) -> str:
    """Lines of text without markup, each line ended by punctuation where its end means a pause.

    Args:
        text: Markdown, perhaps with HTML in it.
        max_cells: of a table; a larger one is not spoken.

    Raises:
        Unspeakable: "code", "maths", "table".
    """
    if _FENCE.search(text) or _HTML_CODE.search(text):
        raise Unspeakable("code", "it holds a block of code")
    if found := _MATHS.search(text):
        raise Unspeakable("maths", f"it holds a formula ({found[0]!r})")
    text = _COMMENT.sub(" ", text)
    text = _TAG.sub(" ", _BREAK.sub("\n", text)) if "<" in text else text
    text = html.unescape(text) if "&" in text else text
    if found := _CODE_LINE.search(text):
        raise Unspeakable("code", f"a line looks like code: {found[0].strip()[:60]!r}")
    text = _INLINE_MATHS.sub(r"\1", text) if "$" in text else text
    text = _CODE_SPAN.sub(lambda match: _code_words(match[1]), text)
    if "[" in text:
        text = _FOOTNOTE.sub("", _LINK_DEFINITION.sub("", text))
        text = _CITATION.sub("", _LINK.sub(lambda match: match[1], _LINK.sub(lambda match: match[1], text)))
    text = "\n".join(_lines(text.splitlines(), max_cells))
    for marks in _MARKS:
        for _ in range(3):  # emphasis in emphasis
            text, count = marks.subn(r"\1", text)
            if not count:
                break
    return _ESCAPE.sub(r"\1", text)


def _code_words(code: str) -> str:
    """`load_data()` -> "load data"; symbols of longer code stay, and count as symbols."""
    name = re.fullmatch(r"[ ]?([A-Za-z_][\w.]*?)(?:\(\))?[ ]?", code)
    return name[1].strip("_").replace("_", " ") if name else code


def _lines(lines: list[str], max_cells: int) -> list[str]:
    """Lines without the marks at their beginnings; tables as sentences."""
    found: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        table = at + 1 < len(lines) and "|" in line and "-" in lines[at + 1] and _SEPARATOR.match(lines[at + 1])
        if table:
            end = at + 2
            while end < len(lines) and "|" in lines[end]:
                end += 1
            found += _table(lines[at], lines[at + 2 : end], max_cells)
            at = end
            continue
        at += 1
        line = _QUOTE.sub("", line)
        if _RULE.match(line):
            continue
        if heading := _HEADING.match(line):
            found.append(ended(heading[1]))
        elif bullet := _BULLET.match(line):
            _end_last(found)
            found.append(ended(bullet[1]))
        elif numbered := _NUMBERED.match(line):
            _end_last(found)
            found.append(f"{numbered[1]}: {ended(numbered[2])}")
        elif line.strip():
            found.append(line)
        else:
            _end_last(found)
    return found


def ended(line: str) -> str:
    """The line with a full stop, unless it ends with punctuation."""
    line = line.strip()
    bare = line.rstrip("*_`\"'”’)~")
    return line if not bare or bare[-1] in ".,;:!?…" else f"{line}."


def _end_last(found: list[str]) -> None:
    if found:
        found[-1] = ended(found[-1])


def _table(head: str, rows: list[str], max_cells: int) -> list[str]:
    """Each row as "Name: cell, name: cell."."""
    names = _cells(head)
    table = [_cells(row) for row in rows]
    count = sum(map(len, table))
    if count > max_cells:
        raise Unspeakable("table", f"a table of {count} cells; {max_cells} are the limit")
    said = []
    for cells in table:
        pairs = [f"{name}: {cell}" if name else cell for name, cell in zip(names, cells, strict=False) if cell]
        said.append(ended(", ".join(pairs)))
    return said


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().removeprefix("|").removesuffix("|").split("|")]
