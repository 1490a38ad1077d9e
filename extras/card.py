"""Make the newest model of a run ready to share: a model card, and settings that older readers understand.

    python extras/card.py runs/tiny-biglake-1

writes README.md into the newest round's model folder, and adds to its config.json and tokenizer_config.json what
transformers 4 reads, and what is built on it. As saved, version 4 refuses the tokenizer's class, and takes its own default
for the rotary settings, which it does not find, without a word.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from glance import visible

import oel

MEASURES = {  # name in metrics.jsonl -> what it says of a policy; {env}, {games} and {probes} are settings
    "pass_rate": "share of {games} held-out levels of {env} that it wins",
    "in_context_pass_rate": "the same with the lessons in the prompt, by the model before the round ({probes} levels)",
    "unseen_pass_rate": "a harder variant that it was never trained on ({probes} levels)",
    "forgetting_pass_rate": "games with other letters, whose rules it is told ({probes} levels)",
    "reply_tokens": "mean length of its replies",
}
CARD = """---
{header}
---

# {name}, round {r} of online experiential learning

This model is {base} after {r} of {rounds} rounds of
[Online Experiential Learning](https://arxiv.org/abs/2603.16856) on {env}. It learned from {source}, without
rewards or labels: lessons about what happened were distilled into its weights, and need not be in its prompt. {writer}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained("FOLDER OR HUB NAME") for kind in (AutoModelForCausalLM, AutoTokenizer))
```

## What was measured

{measured}

## What was not measured

{unmeasured}

## Lessons of round {r}

{lessons}

## Settings

{settings}
"""


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row has its headings."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def block(text: str) -> str:
    """Text in a fence that nothing in it can close."""
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", text)), 0)
    return f"{fence}\n{visible(text.strip())}\n{fence}"


def public(name: str) -> str:
    """A name without the folders of one's own machine; a hub name as it is."""
    return Path(name).name if Path(name).exists() or Path(name).is_absolute() else name


def newest_model(run: Path) -> tuple[dict, int]:
    """The settings of a run, and its newest round with a model. UsageError if there is none."""
    try:
        config = json.loads((run / "config.json").read_bytes())
        return config, max(r for r in range(1, config["rounds"] + 1) if (run / f"round{r}/model").exists())
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise oel.UsageError(f"{run} has no finished round ({error}): name the folder of a run") from None


def card(run: Path, config: dict, r: int, license: str = "") -> str:
    base, tiny = config["model"], Path(config["model"]) == oel.TINY
    local = public(base) != base
    header = [] if local else [f"base_model: {base}"]
    header += ["library_name: transformers", "pipeline_tag: text-generation"]
    header += ["tags:", "- online-experiential-learning", "- context-distillation"]
    header += [f"license: {license or ('mit' if tiny else 'unknown')}"]
    env = Path(config["env"].split(":")[-1]).name
    steps = {0, config["steps"]}  # rounds, without what was measured inside them
    rows = [x for x in oel.read_jsonl(run / "metrics.jsonl") if x["step"] in steps and x["round"] <= r]
    shown = [name for name in MEASURES if any(x.get(name) is not None for x in rows)]
    how = {"env": env, "games": config["eval_games"], "probes": config["probe_games"]}
    notes = [f"- `{name}`: {MEASURES[name].format(**how)}" for name in shown]
    table = [["round", *shown]]
    for x in rows:
        values = ["-" if x.get(name) is None else f"{x[name]:.3f}" for name in shown]
        table.append([str(x["round"]), *values])
    missing = [f"- `{name}`: {MEASURES[name].format(**how)}" for name in MEASURES if name not in shown]
    missing.append("- anything else: other tasks, instruction following, other languages, safety")
    lists = sorted((run / f"round{r}/experience").glob("*.txt"))
    left_out = {"out", "device", "smoke", *(name for name in config if name.startswith("content of "))}
    settings = {k: v for k, v in config.items() if k not in left_out}
    for name in ("model", "logs", "experience", "extractor", "env"):
        settings[name] = public(settings[name])
    writer = "It wrote the lessons itself."
    if config["extractor"]:
        writer = f"The lessons were written by {public(config['extractor'])}."
    if config["experience"]:
        writer = "The lessons were given to it."
    return CARD.format(
        header="\n".join(header),
        name=Path(base).name,
        base=f"`{Path(base).name}`" if local else f"[{base}](https://huggingface.co/{base})",
        r=r,
        rounds=config["rounds"],
        writer=writer,
        env="recorded logs" if config["logs"] else env,
        source="logs that were recorded elsewhere" if config["logs"] else "its own episodes",
        measured="\n".join([markdown(table), "", *notes]) if rows else "Nothing: learning from logs plays no game.",
        unmeasured="\n".join(missing),
        lessons="\n\n".join(block(path.read_text("utf-8")) for path in lists) or "None were written.",
        settings=markdown([["setting", "value"]] + [[k, f"`{v}`"] for k, v in settings.items()]),
    )


def older_form(folder: Path) -> None:
    """Add to a model's settings what transformers 4 reads, with the same meaning. Version 5 still reads its own."""
    config = json.loads((folder / "config.json").read_bytes())
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config["dtype"]
    tokenizer = json.loads((folder / "tokenizer_config.json").read_bytes())
    if tokenizer["tokenizer_class"] == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Else version 4 also makes token_type_ids, which `generate` refuses.
        tokenizer.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    for name, settings in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        oel.atomic(folder / name, lambda part, text=text: part.write_text(text, "utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run with at least one round")
    parser.add_argument("--license", default="", help="the base model's licence, as the hub abbreviates it")
    args = parser.parse_args()
    try:
        config, r = newest_model(args.run)
        folder = args.run / f"round{r}/model"
        older_form(folder)
        text = card(args.run, config, r, args.license)
        oel.atomic(folder / "README.md", lambda part: part.write_text(text, "utf-8"))
    except (oel.UsageError, OSError) as error:
        print(f"card.py: error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2)
    print(f"{folder}/README.md")


if __name__ == "__main__":
    main()
