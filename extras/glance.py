"""One map before and after: a lost episode of a run, the lessons written about it, and the reply after learning.

    python extras/glance.py runs/tiny-biglake-1

prints Markdown. The episode is the first lost one that was read in round 1, or the first of --logs that is not marked
as won. Its lessons are written anew by the policy of that time, and its first board is shown to the policy of the last
round.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from report import UNSEEN

import oel
import prompts


def visible(text: str) -> str:
    """Text whose control characters are visible escapes, so that a terminal obeys none of them."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def block(text: str) -> str:
    return f"```\n{visible(text.strip())}\n```\n"


def lost(trajectory: dict) -> bool:
    """Whether an episode is not marked as won. In the logs of others, `outcome` can be anything."""
    outcome = trajectory["outcome"]
    return not (outcome.get("won") if isinstance(outcome, dict) else outcome == "won")


def read_run(folder: Path) -> tuple[oel.Config, list[dict], list[Path]]:
    """Settings, lost episodes of round 1 and models of a run. UsageError if one of them is missing."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        names = {f.name for f in dataclasses.fields(oel.Config)} & set(config)  # the rest are checksums
        cfg = oel.Config(**{name: config[name] for name in names})
    except (OSError, ValueError, TypeError) as error:
        raise oel.UsageError(f"{folder}/config.json: {error}; name the folder of a run") from None
    episodes = oel.read_jsonl(folder / "round1/trajectories.jsonl", prompts.parse_log)
    models = [path for r in range(cfg.rounds) if (path := folder / f"round{r + 1}/model").exists()]
    episodes = [t for t in episodes if lost(t)]
    if not models:
        raise oel.UsageError(f"{folder} has no finished round: let the run go on, and look again")
    if not episodes:
        raise oel.UsageError(f"{folder}/round1/trajectories.jsonl has no lost episode: take another run")
    return cfg, episodes, models


def glance(folder: Path) -> None:
    cfg, episodes, models = read_run(folder)
    trajectory, first = episodes[0], episodes[0]["turns"][0]

    def reply(source: str, message: str, limit: int) -> str:
        policy = oel.load_policy(source, oel.find_device(cfg.device), cfg.thinking)
        how = oel.sampling(policy, cfg, oel.Phase([], cfg.seed, nucleus=True), "glance")
        (response,) = oel.sample(policy.model, [policy.encode(message)], max_new_tokens=limit, **how)
        return policy.decode(response.ids)

    lessons = reply(
        cfg.model, prompts.extraction_prompt(trajectory, "", cfg.form, cfg.reasoning), cfg.experience_budget
    )
    after = reply(str(models[-1]), first["prompt"], cfg.reply_limit)
    if cfg.logs:
        print("The first message of the log, and the reply in it:\n")
    else:
        print("What it reads, and what it replies before it has learned anything:\n")
    print(block(first["prompt"] + "\n\n" + first["response"]))
    print("How the episode ends:\n")
    print(block(trajectory["turns"][-1]["feedback"]))
    print("The lesson that it writes about this episode:\n")
    print(block(prompts.parse_lessons(lessons, cfg.form)))
    print(f"What it replies to the same board after {models[-1].parent.name}, told nothing:\n")
    print(block(after))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run with at least one round")
    try:
        glance(parser.parse_args().run)
    except (oel.UsageError, OSError) as error:
        print(f"glance.py: error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
