"""Is anything lost when a run is killed? Kill it again and again, at random moments, and compare.

    python extras/kill.py

plays a small run of two rounds that nobody disturbs, and then the same run in other folders, each killed up to three
times on its way by SIGKILL, SIGTERM or Ctrl-C and started again with the same command, until thirty kills have hit.
Every one of them has to end with the same metrics, lessons and trajectories, and on a CPU with the same weights, to
the byte.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMALL = "--rounds 2 --steps 3 --batch-episodes 2 --eval-games 8 --probe-games 4 --lists 2 --episodes 2 --save-every 1"
SMALL += " --eval-every 2 --reply-limit 96 --device cpu"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PHASES = {  # the newest record of a round -> what the run does next
    "trajectories.jsonl": "extract",
    "experience": "play in context",
    "in_context.jsonl": "deploy for prompts",
    "logs.jsonl": "consolidate",
    "state": "consolidate",
    "model": "evaluate",
    "held_out.jsonl": "evaluate or deploy",
}


def start(out: Path) -> subprocess.Popen:
    command = [
        sys.executable,
        str(Path(__file__).resolve().parent.parent / "oel.py"),
        *SMALL.split(),
        "--out",
        str(out),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)


def finish(out: Path) -> tuple[float, float]:
    """Run to the end; the seconds until it began to work and until it was over. SystemExit if it fails."""
    began, run, loaded = time.perf_counter(), start(out), None
    while run.poll() is None:
        if loaded is None and (out / "config.json").exists():
            loaded = time.perf_counter() - began
        time.sleep(0.01)
    if run.returncode:
        errors = run.stderr.read()
        sys.exit(f"kill.py: {out} does not go on: {errors.splitlines()[-1] if errors else run.returncode}")
    return loaded, time.perf_counter() - began


def phase(out: Path) -> str:
    found = [p for p in out.glob("round*/*") if p.name in PHASES]
    if not found:
        return "round 0: load or evaluate"
    newest = max(found, key=lambda p: p.stat().st_mtime_ns)
    return f"{newest.parent.name}: {PHASES[newest.name]}"


def content(out: Path) -> dict[str, object]:
    """Everything that a run leaves, but for times and its own name."""
    found = {}
    for file in sorted(p for p in out.rglob("*") if p.is_file()):
        name = str(file.relative_to(out))
        if name in ("metrics.jsonl", "steps.jsonl"):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
        elif name != "config.json":
            found[name] = file.read_bytes()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30, help="kills in all [30]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    args = parser.parse_args()
    draw, passed, kills = random.Random(args.seed), 0, 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell puts in the background ignores it
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        loaded, seconds = finish(whole)
        print(f"undisturbed: {seconds:.1f} s, {loaded:.1f} of them loading; {len(content(whole))} files", flush=True)
        for i in itertools.count():
            if kills >= args.kills:
                break
            out = Path(folder) / f"run{i}"
            points = sorted(draw.uniform(0, seconds - loaded) for _ in range(3))
            for k, (before, point) in enumerate(itertools.pairwise([0, *points])):
                how, moment = SIGNALS[(i + k) % 3], loaded + point - before
                run = start(out)
                try:
                    run.wait(moment)
                except subprocess.TimeoutExpired:
                    run.send_signal(how)
                _, errors = run.communicate()
                kills += run.returncode != 0  # 0: it was over before
                how = how if run.returncode else None
                if how == signal.SIGINT and "continues" not in errors and "Traceback" in errors:
                    print(f"run {i}: Ctrl-C was not answered: {errors.splitlines()[-1]}")
                print(f"run {i}: {how.name if how else 'over'} after {moment:.1f} s, {phase(out)}", flush=True)
            finish(out)
            theirs, ours = content(whole), content(out)
            wrong = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
            passed += not wrong
            print(f"run {i}: {'the same' if not wrong else 'DIFFERS in ' + ', '.join(wrong)}", flush=True)
    print(f"{passed} of {i} runs end like the one that nobody killed, after {kills} kills in all")
    sys.exit(passed < i)


if __name__ == "__main__":
    main()
