"""Does a model do what its users wish, told nothing? Its replies to questions that no training saw, before and after:

    python extras/follow.py HuggingFaceTB/SmolLM2-135M-Instruct runs/NAME/round1/model --told extras/short_answers.txt

Every model answers each line of --questions once, told nothing. The first also answers with the lesson of --told in its
prompt, as the teacher does. A reply follows the wish if it is one sentence, or with --match if that regular expression
is found in it. The intervals are 95%, from resampling the questions.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import numpy as np
from ifeval import cells, estimate, markdown

import oel
import prompts


def sentences(reply: str) -> int:
    """The number of sentences in a reply. The end of a line ends a sentence too, and "1." alone is none."""
    parts = re.split(r"(?<=[.!?])[\"')*]*\s+|\n+", reply)
    return sum(bool(re.search(r"[^\W\d_]{2}", part)) for part in parts) or 1


def scores(policy: oel.Policy, questions: list[str], args) -> np.ndarray:
    """Tokens, sentences and 1 if the wish is followed, of the reply to each question; as `ifeval.estimate` takes it."""
    how = {"stop_ids": policy.stop_ids, "vocab_size": policy.vocab_size, "seed": args.seed}
    how |= {
        "temperature": args.temperature,
        "top_p": 0.8,
        "top_k": 20,
        "max_new_tokens": args.limit,
        "desc": "follow",
    }
    rows = []
    for response in oel.sample(policy.model, [policy.encode(question) for question in questions], **how):
        reply = prompts.answer(policy.decode(response.ids))
        follows = re.search(args.match, reply) if args.match else sentences(reply) == 1
        rows.append([len(response.ids), sentences(reply), bool(follows)])
    return np.stack([np.array(rows, dtype=float), np.ones((len(rows), 3))])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="hub names or folders of checkpoints")
    parser.add_argument("--questions", default=str(Path(__file__).with_name("questions.txt")), help="a line each")
    parser.add_argument("--told", type=Path, help="file with the lesson")
    parser.add_argument("--match", default="", help="regular expression of a reply that follows the wish")
    parser.add_argument("--limit", type=int, default=256, help="most tokens of a reply")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: greedy")
    parser.add_argument("--seed", type=int, default=1, help="seed of the replies")
    parser.add_argument("--thinking", action=argparse.BooleanOptionalAction, default=False, help="as in oel.py")
    parser.add_argument("--dtype", default="", choices=["", "bfloat16", "float32"], help="as in oel.py")
    parser.add_argument("--device", default="", help="as in oel.py")
    args = parser.parse_args(argv)
    lines = [["model", "told", "reply tokens", "sentences", "follow the wish, percent"]]
    oel.logging.disable_progress_bar()
    try:
        questions = Path(args.questions).read_text("utf-8").splitlines()
        told = prompts.with_experience("", args.told.read_text("utf-8")) if args.told else ""
        for i, model in enumerate(args.models):
            policy = oel.load_policy(model, oel.find_device(args.device), args.thinking, args.dtype)
            for prefix in ["", told] if told and i == 0 else [""]:
                found = estimate(scores(policy, [prefix + question for question in questions], args))
                lines.append([model, "the lesson" if prefix else "nothing", *cells(found, [1, 1, 100])])
        print(markdown(lines))
    except (oel.UsageError, OSError, ValueError) as error:
        print(f"follow.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
