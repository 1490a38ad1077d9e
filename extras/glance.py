"""One map before and after: a lost episode of a run, the lessons written about it, and the reply after learning.

    python extras/glance.py runs/tiny-frozenlake-1

prints Markdown. The episode is the first lost one that was read in round 1; its lessons are written anew by the
policy of that time, and its first board is shown to the policy of the last round.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oel
import prompts


def block(text: str) -> str:
    return f"```\n{text.strip()}\n```\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run with at least one round")
    folder = parser.parse_args().run
    models = sorted(folder.glob("round*/model"), key=lambda path: int(path.parent.name.removeprefix("round")))
    lost = [t for t in oel.read_jsonl(folder / "round1/trajectories.jsonl") if not t["outcome"]["won"]]
    if not models or not lost:
        sys.exit(f"glance.py: {folder} has no finished round, or no lost episode to look at")
    cfg = oel.Config(**json.loads((folder / "config.json").read_text()))

    def reply(source: str, message: str, limit: int) -> str:
        policy = oel.load_policy(source, oel.find_device(cfg.device), cfg.thinking)
        how = oel.sampling(policy, cfg, oel.Phase([], cfg.seed, nucleus=True), "glance")
        (response,) = oel.sample(policy.model, [policy.encode(message)], max_new_tokens=limit, **how)
        return policy.decode(response.ids)

    trajectory = lost[0]
    lessons = reply(
        cfg.model, prompts.extraction_prompt(trajectory, "", cfg.form, cfg.reasoning), cfg.experience_budget
    )
    after = reply(str(models[-1]), trajectory["turns"][0]["prompt"], cfg.reply_limit)
    print("What it reads, and what it replies before it has learned anything:\n")
    print(block(trajectory["turns"][0]["prompt"] + "\n\n" + trajectory["turns"][0]["response"]))
    print("How the episode ends:\n")
    print(block(trajectory["turns"][-1]["feedback"]))
    print("The lesson that it writes about this episode:\n")
    print(block(prompts.parse_lessons(lessons, cfg.form)))
    print(f"What it replies to the same board after {models[-1].parent.name}, told nothing:\n")
    print(block(after))


if __name__ == "__main__":
    main()
