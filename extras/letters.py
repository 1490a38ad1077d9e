"""What the embedded policy comes to believe about each letter of the lake, and what its lessons had said about it.

    python extras/letters.py runs/tiny-biglake-{1,2,3,4,5}

prints Markdown. One table is by round: how many lessons were true, and how often what the policy says about a letter,
in the held-out games after that round, is right. Letters are split by whether some list up to that round had named
them. The other table has every lesson that was false, and what the policy says about that letter afterwards.
"""

import argparse
import collections
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]
import teach

import oel
import prompts
from envs import BigLake

ROLES = {letter: thing for thing, letters in BigLake.things for letter in letters}
SAID = re.compile(
    r"^\(\d,\d\) (?P<letter>[A-Z]) (?P<new>is new\..*: (?P=letter) )?is (a |the )?(?P<role>[a-z]+)$", re.MULTILINE
)


def claims_of(folder: Path) -> list[tuple[str, str]]:
    """The (letter, role) of every lesson of a round that names a letter of the lake."""
    lessons = [line for file in sorted(folder.glob("*.txt")) for line in file.read_text("utf-8").splitlines()]
    claims = [teach.lesson_role(line.removeprefix(prompts.MARKER).strip()) for line in lessons]
    return [claim for claim in claims if claim and claim[0] in ROLES]


def beliefs(path: Path) -> dict[str, collections.Counter]:
    """For each letter, what the policy says that it is in held_out.jsonl; a guess that it marks as one has a "?"."""
    found = collections.defaultdict(collections.Counter)
    for trajectory in oel.read_jsonl(path):
        for said in (said for turn in trajectory["turns"] for said in SAID.finditer(turn["response"])):
            found[said["letter"]][said["role"] + "?" * bool(said["new"])] += 1
    return found


def count(says: dict, letters) -> collections.Counter:
    """Statements about these letters: how many, how many are right, how many are marked as guesses."""
    counts = collections.Counter()
    for letter in letters:
        for role, n in says.get(letter, {}).items():
            counts.update(all=n, right=n * (role.strip("?") == ROLES[letter]), guess=n * role.endswith("?"))
    return counts


def shown(counts: collections.Counter) -> str:
    if not counts["all"]:
        return "-"
    return f"{counts['right'] / counts['all']:.0%} ({counts['guess'] / counts['all']:.0%} as guesses)"


def print_table(heads: list[str], rows: list[list]) -> None:
    for row in (heads, ["---"] * len(heads), *rows):
        print("| " + " | ".join(map(str, row)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "runs", type=Path, nargs="+", help="folders of finished runs on biglake with the embedded policy"
    )
    rows, false, together = [], [], collections.defaultdict(collections.Counter)
    for run in parser.parse_args().runs:
        try:
            config = json.loads((run / "config.json").read_text())
            if config["env"] != "biglake":
                raise ValueError(f"its game is {config['env']}")
        except (OSError, ValueError, KeyError) as error:
            sys.exit(f"letters.py: error: {run} is no run on biglake ({error})")
        named, last = set(), beliefs(run / f"round{config['rounds']}/held_out.jsonl")
        for r in range(config["rounds"] + 1):
            claims = claims_of(run / f"round{r}/experience")
            named |= {letter for letter, _ in claims}
            says, never = beliefs(run / f"round{r}/held_out.jsonl"), sorted(set(ROLES) - named)
            true = sum(ROLES[letter] == role for letter, role in claims)
            known, unknown = count(says, named), count(says, never)
            rows.append(
                [run.name, r, f"{true} of {len(claims)}", " ".join(never) or "none", shown(known), shown(unknown)]
            )
            together[r, "lessons"].update(true=true, all=len(claims), never=len(never))
            together[r, "known"].update(known)
            together[r, "unknown"].update(unknown)
            for (letter, role), n in sorted(collections.Counter(claims).items()):
                if ROLES[letter] != role:
                    others = sum(claim == (letter, ROLES[letter]) for claim in claims)
                    after = shown(count(says, [letter])), shown(count(last, [letter]))
                    false.append([f"{run.name}, round {r}", f"{letter} is {role}", n, others, *after])
    for r in sorted({r for r, _ in together}):
        lessons, known, unknown = (together[r, what] for what in ("lessons", "known", "unknown"))
        counts = f"{lessons['true']} of {lessons['all']}", f"{lessons['never']} letters"
        rows.append(["all runs", r, *counts, shown(known), shown(unknown)])
    print_table(
        ["run", "round", "true lessons", "never named", "right about named letters", "right about others"], rows
    )
    print()
    print_table(
        ["where", "false lesson", "times", "true ones about it", "right after the round", "at the end"], false
    )


if __name__ == "__main__":
    main()
