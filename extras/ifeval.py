"""IF-Eval, the paper's measure of forgetting: can a checkpoint still follow instructions that it was never trained on?

    pip install "lm_eval[ifeval]==0.4.13" datasets
    python -c "import nltk; nltk.download('punkt_tab')"
    python extras/ifeval.py Qwen/Qwen3-1.7B --out runs/before.jsonl
    python extras/ifeval.py runs/NAME/round3/model --out runs/after.jsonl --against runs/before.jsonl

Our sampler writes the replies, greedily, and lm-evaluation-harness judges them with the checkers of its task "ifeval".
It prints a row of a Markdown table, with 95% intervals from resampling the prompts. Every reply is saved as soon as it
ends, so the same command continues a run that was stopped. `--against` adds the difference to the replies of another
checkpoint to the same prompts.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import oel
import prompts

COLUMNS = ["prompts, strict", "instructions, strict", "prompts, loose", "instructions, loose", "reply tokens"]
SCALES = [100, 100, 100, 100, 1]


def read_prompts(path: str) -> list[dict]:
    """Rows with "key", "prompt", "instruction_id_list" and "kwargs", from a JSONL file or else from the hub."""
    if path:
        rows = oel.read_jsonl(Path(path))
    else:
        try:
            from datasets import load_dataset

            rows = list(load_dataset("google/IFEval", split="train"))
        except ImportError:
            raise oel.UsageError("give the prompts by --prompts FILE, or: pip install datasets") from None
    if not rows or not all({"key", "prompt", "instruction_id_list", "kwargs"} <= set(row) for row in rows):
        raise oel.UsageError(f"--prompts {path}: a row should have key, prompt, instruction_id_list, kwargs")
    return rows


def harness():
    """The judge of lm-evaluation-harness: judge(row, [reply]) -> which instructions are followed."""
    try:
        import langdetect
        from lm_eval.tasks.ifeval.utils import process_results
    except ImportError:
        raise oel.UsageError('the checkers are not installed: pip install "lm_eval[ifeval]==0.4.13"') from None
    langdetect.DetectorFactory.seed = 0  # else the language of a short reply is a matter of chance
    return process_results


def answer_all(rows: list[dict], args) -> list[dict]:
    """The model's greedy replies to the rows, in their order. Those that --out already holds are not written again."""
    label = {"model": args.model, "limit": args.limit, "thinking": args.thinking, "dtype": args.dtype}
    known = {row["key"]: row for row in oel.read_jsonl(args.out)}
    if any(label.items() - row.items() for row in known.values()):
        raise oel.UsageError(f"{args.out} holds replies of other settings: choose another --out")
    missing = [row for row in rows if row["key"] not in known]
    if missing:
        policy = oel.load_policy(args.model, oel.find_device(args.device), args.thinking, args.dtype)

    def reply(row: dict):
        response = yield oel.Request(policy.encode(row["prompt"]), args.limit)
        found = {"tokens": len(response.ids), "response": policy.decode(response.ids)}
        known[row["key"]] = {"key": row["key"], **label, **found}
        oel.write_jsonl(args.out, list(known.values()))

    if missing:
        how = {"stop_ids": policy.stop_ids, "vocab_size": policy.vocab_size, "temperature": 0, "rows": args.rows}
        oel.drive(policy.model, [reply(row) for row in missing], **how, desc="ifeval")
    return [known[row["key"]] for row in rows]


def scores(rows: list[dict], replies: list[dict], judge) -> np.ndarray:
    """Of every prompt and column, a sum and what it is divided by, as an array (2, prompts, columns)."""
    found = []
    for row, reply in zip(rows, replies, strict=True):
        try:
            verdict = judge(row, [prompts.answer(reply["response"])])
        except LookupError:  # nltk's data, which its own loader did not get
            what = "nltk lacks its data: python -c \"import nltk; nltk.download('punkt_tab')\""
            raise oel.UsageError(what) from None
        levels = [
            verdict[f"{level}_{how}_acc"] for how in ("strict", "loose") for level in ("prompt_level", "inst_level")
        ]
        sums = [np.sum(level) for level in levels] + [reply["tokens"]]
        found.append((sums, [np.size(level) for level in levels] + [1]))
    return np.array(found, dtype=float).transpose(1, 0, 2)


def estimate(*sides: np.ndarray, repeats: int = 4000) -> np.ndarray:
    """The mean of each column of scores, or the difference of two, and its 95% interval from resampling the prompts, as
    an array (columns, 3). Both sides of a difference get the same prompts, so how hard a prompt is cancels."""
    num_prompts = sides[0].shape[1]
    drawn = np.random.default_rng(0).integers(num_prompts, size=(repeats, num_prompts))

    def mean(picked) -> np.ndarray:  # (..., columns)
        means = [sums[picked].sum(-2) / counts[picked].sum(-2) for sums, counts in sides]
        return means[0] if len(means) == 1 else means[0] - means[1]

    return np.stack([mean(np.arange(num_prompts)), *np.quantile(mean(drawn), (0.025, 0.975), axis=0)], -1)


def cells(estimates: np.ndarray, scales: list[int], sign: str = "") -> list[str]:
    """Estimates as text; a scale of 100 makes percent."""
    rows = estimates * np.array(scales)[:, None]
    return [f"{x:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})" for x, low, high in rows]


def markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def main(argv: list[str] | None = None, judge=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="hub name or folder of a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file of its replies")
    parser.add_argument("--against", type=Path, help="replies of another checkpoint, to compare with")
    parser.add_argument("--prompts", default="", help="JSONL file of IF-Eval's prompts (default: google/IFEval)")
    parser.add_argument("--every", type=int, default=1, help="take every N-th prompt only")
    parser.add_argument("--limit", type=int, default=1280, help="most tokens of a reply (the harness has 1280)")
    parser.add_argument("--thinking", action=argparse.BooleanOptionalAction, default=True, help="as in oel.py")
    parser.add_argument("--dtype", default="", choices=["", "bfloat16", "float32"], help="as in oel.py")
    parser.add_argument("--device", default="", help="as in oel.py")
    parser.add_argument("--rows", type=int, default=0, help="as in oel.py")
    args = parser.parse_args(argv)
    oel.logging.disable_progress_bar()
    try:
        judge, rows = judge or harness(), read_prompts(args.prompts)[:: args.every]
        found = scores(rows, answer_all(rows, args), judge)
        lines = [["percent", *COLUMNS], [args.model, *cells(estimate(found), SCALES)]]
        if args.against:
            others = {row["key"]: row for row in oel.read_jsonl(args.against)}
            if not all(row["key"] in others for row in rows):
                raise oel.UsageError(f"--against {args.against} lacks a reply to some of these prompts")
            before = scores(rows, [others[row["key"]] for row in rows], judge)
            lines.append([f"minus {args.against}", *cells(estimate(found, before), SCALES, "+")])
        print(markdown(lines))
    except (oel.UsageError, OSError) as error:
        print(f"ifeval.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
