"""Several seeds of one setting as a table and a figure.

    python extras/curves.py runs/tiny-biglake-{1,2,3,4,5} --svg assets/biglake.svg

prints mean and spread (standard deviation over the runs) of each round as Markdown, with every seed's pass rate,
and draws the learning curve. `--forgetting 512` plays the forgetting probe again, with so many games: once for the
policy that all runs began with, and for the last policy of each. The figure needs matplotlib; the table nothing.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import NoReturn

COLUMNS = {  # name in metrics.jsonl -> heading
    "pass_rate": "pass rate",
    "reply_tokens": "reply tokens",
    "in_context_pass_rate": "in context",
    "unseen_pass_rate": "unseen boards",
    "forgetting_pass_rate": "forgetting probe",
}


def fail(message: str) -> NoReturn:
    """End with one line about what the user can fix."""
    print(f"curves.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """The settings of a run, and the rows of its metrics.jsonl that end a round. Fails if some are missing."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
        steps, rounds = config["steps"], config["rounds"]
        if config.get("logs"):
            fail(f"{folder} learned from --logs and played nothing, so there is no pass rate: leave it out")
        path = folder / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        ends = [{key: row[key] for key in ("round", *COLUMNS)} for row in rows if row["step"] in (0, steps)]
    except (OSError, ValueError, LookupError, TypeError) as error:
        fail(f"{path} is not that of a run ({type(error).__name__}: {error}): name folders of finished runs")
    if len(ends) != rounds + 1:
        fail(f"{folder} has {max(len(ends) - 1, 0)} of {rounds} rounds: let it finish first")
    return config, ends


def check_alike(configs: dict[Path, dict]) -> None:
    """Fails, naming the settings, if runs differ in more than the seed: no setting has their mean."""
    (first, one), *others = configs.items()
    for folder, other in others:
        names = sorted({*one, *other} - {"seed", "out", "device"})
        differ = [f"{k} {one.get(k)!r} and {other.get(k)!r}" for k in names if one.get(k) != other.get(k)]
        if differ:
            differ = ", ".join(differ)
            fail(f"{first} and {folder} differ in {differ}: name runs that differ in the seed alone")


def shown(key: str, values: list) -> str:
    """Mean and spread of a column, as percentages or as a number; a dash where nothing was measured."""
    if None in values:
        return "-"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    mean = statistics.mean(values)
    return f"{mean:.1f} ({spread:.1f})" if key == "reply_tokens" else f"{mean:.1%} ({spread:.1%})"


def table(runs: list[list[dict]]) -> str:
    used = [key for key in COLUMNS if any(row[key] is not None for run in runs for row in run)]
    lines = ["| round | " + " | ".join(COLUMNS[key] for key in used) + " | pass rate of each seed |"]
    lines.append("|---" * (len(used) + 2) + "|")
    for rows in zip(*runs, strict=True):
        cells = [shown(key, [row[key] for row in rows]) for key in used]
        each = ", ".join(f"{row['pass_rate']:.1%}" for row in rows)
        lines.append(f"| {rows[0]['round']} | {' | '.join(cells)} | {each} |")
    return "\n".join(lines)


def forgetting(runs: dict[Path, dict], n: int) -> str:
    """The forgetting probe of `n` games: of the policy that the runs began with, and of each run's last one."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import oel

    known = {f.name for f in dataclasses.fields(oel.Config)}  # the rest are checksums
    configs = {
        folder: oel.Config(**{name: value for name, value in config.items() if name in known})
        for folder, config in runs.items()
    }

    def probe(source: str, cfg: oel.Config) -> float:
        policy = oel.load_policy(source, oel.find_device(cfg.device), cfg.thinking)
        phase = oel.phases(dataclasses.replace(cfg, probe_games=n), 0)["probes"]
        return oel.pass_rate(oel.deploy(policy, cfg, phase, variant="renamed"))

    first = next(iter(configs.values()))
    try:
        before = probe(first.model, first)
        after = [probe(str(folder / f"round{cfg.rounds}/model"), cfg) for folder, cfg in configs.items()]
    except oel.UsageError as error:  # no such model or device here
        fail(str(error))
    shown = ", ".join(f"{rate:.1%}" for rate in after)
    lost = 100 * (before - statistics.mean(after))
    return f"Forgetting probe, {n} games each: {before:.1%} before; {shown} after: {lost:.1f} points lost."


def draw(runs: list[list[dict]], path: Path) -> None:
    """Pass rates (left) and reply length (right) over rounds: a thin line a seed, a thick one the mean."""
    try:
        import matplotlib
    except ImportError:
        fail("the figure needs matplotlib: pip install matplotlib")
    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "oel", "font.size": 9, "axes.spines.top": False})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    rounds = [row["round"] for row in runs[0]]
    series = [(left, "pass_rate", "C0-"), (left, "in_context_pass_rate", "C1--"), (left, "unseen_pass_rate", "C2:")]
    for axes, key, style in [*series, (right, "reply_tokens", "C0-")]:
        if any(row[key] is None for run in runs for row in run[1:]):
            continue
        known = [r for r, row in zip(rounds, runs[0], strict=True) if row[key] is not None]
        lines = [[row[key] for row in run if row[key] is not None] for run in runs]
        for line in lines:
            axes.plot(known, line, style, linewidth=0.6, alpha=0.5)
        mean = [statistics.mean(values) for values in zip(*lines, strict=True)]
        axes.plot(known, mean, style, linewidth=2, marker="o", markersize=4, label=COLUMNS[key])
    left.set(xlabel="round", ylabel="episodes won", ylim=(-0.03, 1.03), xticks=rounds)
    left.legend(frameon=False, loc="lower right")
    right.set(xlabel="round", ylabel="tokens a reply", xticks=rounds)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs that differ in the seed alone")
    parser.add_argument("--svg", type=Path, help="draw the learning curve into this file")
    parser.add_argument("--forgetting", type=int, metavar="N", help="play the forgetting probe with N games")
    args = parser.parse_args()
    found = {folder: read_run(folder) for folder in args.runs}
    configs, runs = ({folder: run[i] for folder, run in found.items()} for i in (0, 1))
    check_alike(configs)
    runs = list(runs.values())
    print(table(runs))
    if args.forgetting:
        print("\n" + forgetting(configs, args.forgetting))
    if args.svg:
        draw(runs, args.svg)


if __name__ == "__main__":
    main()
