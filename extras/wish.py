"""What it cost a chat model to learn its users' wish: a point for every model that was trained.

    python extras/wish.py            # draws assets/wish.svg from assets/wish.csv; needs matplotlib

A row of the file is what follow.py and ifeval.py printed about one model: how many of its replies follow the wish, and
how many more of IF-Eval's instructions it follows than before (strict), in percent, with their 95% intervals.
"""

import argparse
import csv
import sys
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--csv", type=Path, default=ASSETS / "wish.csv")
    parser.add_argument("--svg", type=Path, default=ASSETS / "wish.svg")
    args = parser.parse_args(argv)
    try:
        import matplotlib
    except ImportError:
        sys.exit("wish.py: error: it needs matplotlib (pip install matplotlib)")
    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "oel", "font.size": 8, "axes.spines.top": False})
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    seen = {}
    for row in csv.DictReader(args.csv.read_text("utf-8").splitlines()):
        x, left, right, y, low, high = (
            float(row[f"{what}{end}"]) for what in ("follow", "change") for end in ("", "_low", "_high")
        )
        label = None if row["how"] in seen else row["how"]  # once in the legend
        color = seen.setdefault(row["how"], f"C{len(seen)}")
        axes.plot(x, y, "o", color=color, markersize=4, label=label)
        axes.plot([left, right], [y, y], color=color, linewidth=0.6, alpha=0.5)
        axes.plot([x, x], [low, high], color=color, linewidth=0.6, alpha=0.5)
    axes.axhline(0, color="grey", linewidth=0.6)
    axes.set(xlabel="replies that follow the wish, %", ylabel="change in IF-Eval's instructions followed, points")
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(args.svg, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
