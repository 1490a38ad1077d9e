"""Send the metrics of a run to a tracker, also while the run goes on.

    python extras/track.py runs/tiny-biglake-1 --to tensorboard

follows metrics.jsonl and steps.jsonl until the run is finished. Ctrl-C stops it, and the same command continues where it
stopped. The x-axis counts the optimizer steps of all rounds. `tracked-NAME.json` in the run's folder lists the rows
that were sent, by file, round and step. A row is listed before it is sent: a kill can lose the row that it meets,
but no row is sent twice, not even one that a resumed run writes again.
"""

import argparse
import json
import sys
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oel

FILES = {"metrics.jsonl": "evaluation", "steps.jsonl": "training"}  # and the group of their charts


def to_tensorboard(run: Path, name: str, config: dict):
    """What sends the values of a row at a step, and what ends the connection."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run / "tensorboard")

    def send(values: dict, step: int) -> None:
        for tag, value in values.items():
            writer.add_scalar(tag, value, step)
        writer.flush()

    return send, writer.close


def to_trackio(run: Path, name: str, config: dict):
    import trackio

    tracker = trackio.init(project="oel", name=name, config=config, resume="allow")
    return tracker.log, tracker.finish


def to_wandb(run: Path, name: str, config: dict):
    import wandb

    tracker = wandb.init(project="oel", id=name, name=name, config=config, resume="allow", dir=run)
    # wandb's own step may not repeat or go back; rows of two files do both.
    tracker.define_metric("*", step_metric="optimizer_step")
    return lambda values, step: tracker.log({**values, "optimizer_step": step}), tracker.finish


TRACKERS = {"tensorboard": to_tensorboard, "trackio": to_trackio, "wandb": to_wandb}


def new_rows(run: Path, sent: list, steps: int) -> list[tuple[int, list, dict]]:
    """The rows that were not sent yet, in order, each as (x, [file, round, step], values)."""
    found = []
    for file, group in FILES.items():
        for row in oel.read_jsonl(run / file):
            key = [file, row["round"], row["step"]]
            values = {f"{group}/{k}": v for k, v in row.items() if k not in ("round", "step") and v is not None}
            if key not in sent:
                found.append((max(row["round"] - 1, 0) * steps + row["step"], key, values))
    return sorted(found, key=lambda entry: (entry[0], entry[1][0] == "metrics.jsonl"))


def finished(run: Path, config: dict) -> bool:
    last = (config["rounds"], config["steps"] if config["rounds"] else 0)
    evaluated = [(row["round"], row["step"]) for row in oel.read_jsonl(run / "metrics.jsonl")]
    return last in evaluated or bool(config["logs"]) and (run / f"round{last[0]}/model").exists()


def track(run: Path, tracker: str, once: bool = False, pause: float = 5) -> int:
    """Send all rows that are not sent yet, and those to come unless `once`; return how many were sent."""
    try:
        config = json.loads((run / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise oel.UsageError(f"{run} is not a run ({error}): name the folder of one that has begun") from None
    path, count = run / f"tracked-{tracker}.json", 0
    if path.exists():
        record = json.loads(path.read_bytes())
    else:
        record = {"name": f"{run.resolve().name}-{uuid.uuid4().hex[:6]}", "sent": []}
    try:
        send, close = TRACKERS[tracker](run, record["name"], config)
    except ImportError as error:
        raise oel.UsageError(f"--to {tracker} needs its package: pip install {tracker} ({error})") from None
    try:
        while True:
            done = once or finished(run, config)  # before the rows are read: none can be missed
            for step, key, values in new_rows(run, record["sent"], config["steps"]):
                record["sent"].append(key)
                oel.atomic(path, lambda part: part.write_text(json.dumps(record) + "\n"))
                send(values, step)
                count += 1
            if done:
                return count
            time.sleep(pause)
    finally:
        close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run that has begun")
    parser.add_argument("--to", choices=TRACKERS, required=True, help="where to send the rows")
    parser.add_argument("--once", action="store_true", help="send what is there and do not wait for more")
    args = parser.parse_args()
    try:
        print(f"{track(args.run, args.to, args.once)} rows sent to {args.to}")
    except (oel.UsageError, OSError) as error:
        print(f"track.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("track.py: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
