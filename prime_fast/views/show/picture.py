"""One response as a picture: its tokens coloured as on the page, the sums of its steps, and the curves under them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from prime_fast.views.report import INK, STYLE
from prime_fast.views.show.page import choose, scales
from prime_fast.views.show.record import steps_of, tokens_file, visible

POSITIVE, NEGATIVE, STRONGEST = (0x2F, 0x7F, 0xE0), (0xF0, 0x65, 0x2B), 0.78  # as in page.html
MONO, SIZE, ADVANCE = "DejaVu Sans Mono", 8.0, 0.602  # font, points, width of its characters in ems
COLUMNS, GUTTER = 92, 9  # characters of a line; of the sums to its left
LINES = 72  # of a picture; what is longer is cut off, and the picture says so
PITCH, HEAD, CURVE, GAP = 0.158, 0.36, 0.52, 0.3  # inches: a line, the title, a curve, the room above it
WORDS = {"reward": "token reward", "advantage": "advantage", "value": "value"}


class Piece(NamedTuple):
    """Part of a token on one line."""

    line: int
    column: int
    text: str
    width: int
    token: int


def draw(source: str, out: str, step: int | None = None, row: int | None = None, response: int = 1) -> Path:
    """Draw a response of the newest group (of this step and row) into the file `out`; its ending says which format.

    Colour shows the token rewards, without a PRM the advantages. Raises ValueError where there is no such response.
    """
    group = choose(tokens_file(source), step, row, limit=0).groups[-1]
    if response > len(group):
        raise ValueError(f"--response {response} is not there: the group has {len(group)}")
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE | {"font.monospace": [MONO, *_wide_fonts()]}):
        _figure(group[response - 1], scales([group])).savefig(path, dpi=200)
    return path


def layout(pieces: Sequence[str], steps: Sequence[Sequence[int]]) -> Iterator[Piece]:
    """Where every character stands: a step begins a line, and lines are COLUMNS wide."""
    line = -1
    for start, end in steps:
        line, column = line + 1, 0
        for token in range(start, end):
            text, from_column = "", column
            for character in visible(pieces[token]):
                width = _width(character)
                if column + width > COLUMNS:
                    yield Piece(line, from_column, text, column - from_column, token)
                    line, column, text, from_column = line + 1, 0, "", 0
                text += {"\n": "↵", "\t": " "}.get(character, character)
                column += width
                if character == "\n" and token < end - 1:
                    yield Piece(line, from_column, text, column - from_column, token)
                    line, column, text, from_column = line + 1, 0, "", 0
            yield Piece(line, from_column, text, column - from_column, token)


def _width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _wide_fonts() -> list[str]:
    return [name for name in sorted(font_manager.get_font_names()) if "CJK" in name][:1]


def _figure(found: dict[str, Any], scale: dict[str, float]) -> Figure:
    name = next((name for name in WORDS if name in found), None)
    if name is None:
        raise ValueError("this response has no number for its tokens, so there is nothing to colour")
    steps = steps_of(found)
    pieces = [piece for piece in layout(found["pieces"], steps) if piece.line < LINES]
    shown = max(piece.token for piece in pieces) + 1
    lines = max(piece.line for piece in pieces) + 1 + (shown < len(found["pieces"]))
    curves = [key for key in ("value", "reward") if key in found]
    width = (GUTTER + COLUMNS) * ADVANCE * SIZE / 72
    heights = [HEAD, lines * PITCH, *[GAP + CURVE] * len(curves), GAP]
    total = sum(heights)
    figure = Figure(figsize=(width + 0.2, total))
    FigureCanvasAgg(figure)
    left, span = 0.1 / (width + 0.2), width / (width + 0.2)
    text = figure.add_axes((left, 1 - (HEAD + lines * PITCH) / total, span, lines * PITCH / total))
    _draw_text(text, found, name, scale, steps, pieces, lines, shown)
    _draw_head(figure, found, name, scale, 1 - 0.18 / total)
    indent = GUTTER / (GUTTER + COLUMNS) * span
    for number, key in enumerate(curves, 1):
        bottom = total - HEAD - lines * PITCH - number * (GAP + CURVE)
        _draw_curve(figure.add_axes((left + indent, bottom / total, span - indent, CURVE / total)), found, key, steps)
    return figure


def _draw_text(
    axes: Axes, found: dict, name: str, scale: dict, steps: list, pieces: list[Piece], lines: int, shown: int
) -> None:
    axes.set(xlim=(-GUTTER, COLUMNS), ylim=(lines, 0))
    axes.axis("off")
    plain = {"family": "monospace", "fontsize": SIZE, "va": "center_baseline", "parse_math": False}
    sums = plain | {"fontsize": SIZE - 1, "ha": "right", "color": INK}
    values = [value - 0.5 for value in found[name]] if name == "value" else found[name]
    full = 0.5 if name == "value" else scale[name]
    firsts = {}
    for piece in pieces:
        firsts.setdefault(piece.token, piece.line)
        color = _color(values[piece.token] / full)
        axes.add_patch(Rectangle((piece.column, piece.line), piece.width, 1, color=color, linewidth=0))
        axes.text(piece.column, piece.line + 0.5, piece.text, color="black", **plain)
    for start, end in steps:
        if start in firsts:
            axes.text(-1.5, firsts[start] + 0.5, _of_step(name, found[name][start:end]), **sums)
    if shown < len(found["pieces"]):
        rest = f"... {len(found['pieces']) - shown:,} more tokens"
        axes.text(0, lines - 0.5, rest, color=INK, **plain)


def _of_step(name: str, values: Sequence[float]) -> str:
    """The sum of rewards; advantages have a mean, and a value is that after the last token."""
    if name == "value":
        return f"{values[-1]:.3f}"
    return f"{sum(values) / (1 if name == 'reward' else len(values)):+.3f}"


def _draw_head(figure: Figure, found: dict, name: str, scale: dict, y: float) -> None:
    words = [f"{key} {found[key]}" for key in ("step", "row") if found.get(key) is not None]
    words += [f"outcome {found['outcome']:g}"] if found.get("outcome") is not None else []
    words += [f"reward {sum(found['reward']):+.3f}"] if "reward" in found else []
    if "advantage" in found:
        words.append(f"advantage {sum(found['advantage']) / len(found['advantage']):+.2f}")
    figure.text(0.1 / figure.get_figwidth(), y, "    ".join(words), fontsize=8, weight="bold", va="center")
    full = 0.5 if name == "value" else scale[name]
    ends = ("0", "1") if name == "value" else (f"-{full:.3g}", f"+{full:.3g}")
    height = 0.1 / figure.get_figheight()
    bar = figure.add_axes((0.84, y - height / 2, 0.09, height))
    bar.imshow([[_color((x - 50) / 50) for x in range(101)]], aspect="auto")
    bar.axis("off")
    figure.text(0.835, y, f"{WORDS[name]}   {ends[0]}", fontsize=7.5, ha="right", va="center")
    figure.text(0.935, y, ends[1], fontsize=7.5, ha="left", va="center")


def _draw_curve(axes: Axes, found: dict, key: str, steps: list) -> None:
    values, total = [], 0.0
    for x in found[key]:
        total += x
        values.append(x if key == "value" else total)
    axes.step(range(len(values) + 1), [values[0], *values], where="pre", color=INK, linewidth=1.2)
    if len(steps) <= LINES:
        for _, end in steps[:-1]:
            axes.axvline(end, color="#DDDDDD", linewidth=0.8, zorder=0)
    axes.axhline(0.5 if key == "value" else 0, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_title(f"{'value' if key == 'value' else 'reward so far'}, by token", fontsize=8, pad=2, weight="normal")
    axes.set_xlim(0, len(values))
    if key == "value":
        axes.set_ylim(0, 1)
    axes.grid(visible=False)
    axes.tick_params(labelsize=7, length=2)
    axes.yaxis.set_major_locator(MaxNLocator(2))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    if key == "value" and "reward" in found:
        axes.tick_params(labelbottom=False)


def _color(strength: float) -> tuple[float, ...]:
    """Of a number as a share of the scale: white at 0, beyond -1 and 1 as there."""
    hue, share = POSITIVE if strength > 0 else NEGATIVE, STRONGEST * min(1.0, abs(strength))
    return tuple(1 + share * (channel / 255 - 1) for channel in hue)
