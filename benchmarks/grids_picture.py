"""Draw the grids of the 4-bit schemes over the histogram of one layer's weights, as docs/images/grids.svg.

Each weight is divided by the largest magnitude of its group of 64. The histogram is shaded by the level that each
weight goes to, and the levels stand over it. The error in a panel is that of rounding the layer to nearest by the
scheme itself, with the blocks and scales that it stores.

    python benchmarks/grids_picture.py --model reports/smollm2/source
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from quantkit.checkpoint import CheckpointReader
from quantkit.numerics.grid_search import encode, quantized, range_grid
from quantkit.report.axes import Axis
from quantkit.schemes import Fp4Scheme, IntScheme, Mxfp4Scheme, Nf4Scheme, Scheme

LAYER = "model.layers.10.mlp.down_proj"
GROUP = 64
BINS = 100
REACH = 1.1
WIDTH, HEIGHT, HEAD, FOOT = 400.0, 214.0, 40.0, 26.0
MARGIN = 20.0
STYLE = """
svg { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.paper { fill: #ffffff; } .name { fill: #1c2126; font-size: 15px; font-weight: 600; }
.note { fill: #5b6570; } .axis { stroke: #aab3bc; stroke-width: 1.2; } .tick { fill: #5b6570; font-size: 11.5px; }
.even { fill: #a9c8ec; } .odd { fill: #d3e3f5; } .level { stroke: #c4561a; stroke-width: 1.2; } .pin { fill: #c4561a; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
"""


@dataclass(frozen=True, slots=True)
class Grid:
    """A scheme, and its levels where the largest magnitude of a group is 1."""

    name: str
    words: str
    scheme: Scheme
    levels: list[float]


def grids() -> list[Grid]:
    """The grids of the picture; E2M1 is drawn as if the largest weight took its largest level."""
    even = IntScheme(bits=4, group_size=GROUP)
    nf4, fp4, mxfp4 = Nf4Scheme(), Fp4Scheme(), Mxfp4Scheme()
    integers = [(code - even.zero) * 2 / (even.levels - 1) for code in range(even.levels)]
    return [
        Grid("int4", "evenly spaced", even, integers),
        Grid("nf4", "quantiles of a normal", nf4, sorted(nf4.table)),
        Grid("fp4", "bitsandbytes' 4-bit float", fp4, sorted(set(fp4.table))),
        Grid("mxfp4", "4-bit float E2M1", mxfp4, sorted({level / max(mxfp4.table) for level in mxfp4.table})),
    ]


def histogram(weight: torch.Tensor) -> list[float]:
    """Shares of the weights in each bin of ``-1 .. 1``, each over the largest magnitude of its group."""
    groups = weight.reshape(-1, GROUP)
    shares = groups / groups.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    counts = torch.histc(shares, BINS, -1, 1)
    return [float(count) for count in counts / counts.sum()]


def relative_error(weight: torch.Tensor, scheme: Scheme) -> float:
    """Root mean square of what rounding to nearest changes, over that of the weights."""
    grid = range_grid(weight, scheme, torch.float16)
    rounded = quantized(encode(weight, grid, scheme), grid, scheme).dequantize(torch.float32)
    return float((weight - rounded).norm() / weight.norm())


def cell(bins: list[float], low: float, high: float, x: Axis, y: Axis) -> str:
    """The histogram between two values as a path."""
    step = 2 / len(bins)
    path = f"M{x(low):.1f} {y(0):.1f}"
    for index, share in enumerate(bins):
        left, right = max(low, -1 + index * step), min(high, -1 + (index + 1) * step)
        if left < right:
            path += f"L{x(left):.1f} {y(share):.1f}H{x(right):.1f}"
    return f"{path}V{y(0):.1f}Z"


def panel(grid: Grid, bins: list[float], error: float, bits: float) -> list[str]:
    """One grid over the histogram."""
    x = Axis(-REACH, REACH, MARGIN, WIDTH - MARGIN)
    y = Axis(0, max(bins) * 1.12, HEIGHT - FOOT, HEAD)
    edges = [-1.0, *((low + high) / 2 for low, high in pairwise(grid.levels)), 1.0]
    facts = f"{bits:.4g} bits, error {100 * error:.1f} %"
    name = f'<text class="name" x="{x.start:.1f}" y="24">{grid.name}<tspan class="note" dx="8" '
    found = [f'{name}font-size="12" font-weight="400">{grid.words}</tspan></text>']
    found.append(f'<text class="note end" x="{x.stop:.1f}" y="24">{facts}</text>')
    for index, (low, high) in enumerate(pairwise(edges)):
        found.append(f'<path class="{"odd" if index % 2 else "even"}" d="{cell(bins, low, high, x, y)}"/>')
    for level in grid.levels:
        found.append(f'<path class="level" d="M{x(level):.1f} {y.stop + 4:.1f}V{y.start:.1f}"/>')
        found.append(f'<circle class="pin" cx="{x(level):.1f}" cy="{y.stop + 4:.1f}" r="2.4"/>')
    found.append(f'<path class="axis" d="M{x.start:.1f} {y.start:.1f}H{x.stop:.1f}"/>')
    for value, label in ((-1, "\N{MINUS SIGN}1"), (-0.5, "\N{MINUS SIGN}0.5"), (0, "0"), (0.5, "0.5"), (1, "1")):
        found.append(f'<path class="axis" d="M{x(value):.1f} {y.start:.1f}v4"/>')
        found.append(f'<text class="tick middle" x="{x(value):.1f}" y="{y.start + 17:.1f}">{label}</text>')
    return found


def picture(weight: torch.Tensor, title: str) -> str:
    """The whole drawing."""
    bins, drawn = histogram(weight), grids()
    width, height = 2 * WIDTH, 2 * HEIGHT + 28
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img">',
        f"<title>{title}</title>",
        f"<style>{STYLE}</style>",
        '<rect class="paper" width="100%" height="100%" rx="8"/>',
    ]
    for index, grid in enumerate(drawn):
        rows, columns = weight.shape
        bits = grid.scheme.bits_per_weight(columns, 16, rows)
        lines.append(f'<g transform="translate({index % 2 * WIDTH:g} {index // 2 * HEIGHT:g})">')
        lines += [*panel(grid, bins, relative_error(weight, grid.scheme), bits), "</g>"]
    caption = f"weight over the largest magnitude of its group of {GROUP}"
    lines.append(f'<text class="note middle" x="{width / 2:g}" y="{height - 14:g}">{caption}</text>')
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("reports/smollm2/source"), help="float checkpoint folder")
    parser.add_argument("--layer", default=LAYER, help="full name of a linear layer")
    parser.add_argument("--out", type=Path, default=Path("docs/images/grids.svg"))
    given = parser.parse_args()
    weight = CheckpointReader(given.model).read_finite(f"{given.layer}.weight").float()
    given.out.write_text(picture(weight, f"4-bit grids over the weights of {given.layer}"), encoding="utf-8")
    print(given.out)


if __name__ == "__main__":
    main()
