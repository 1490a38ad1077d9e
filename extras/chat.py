"""Talk to a checkpoint in the terminal, with the options of oel.py. An empty line begins a new conversation, Ctrl-D ends.
What is said is added to --logs (or chats.jsonl), and oel.py with the same options learns from it."""

import contextlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from glance import visible

import oel
import prompts


def conversations(policy: oel.Policy, reply_limit: int, log: Path):
    """One conversation after another, as a generator for `oel.drive`. Each is logged, also when it is interrupted."""
    while True:
        messages = []
        try:
            while said := input("> ").encode("utf-8", "replace").decode().strip():
                messages.append({"role": "user", "content": said})
                response = yield oel.Request(chat_ids(policy, messages), reply_limit)
                messages.append({"role": "assistant", "content": policy.decode(response.ids)})
                print(visible(messages[-1]["content"].strip()), end="\n\n", flush=True)
        finally:
            if len(messages) > 1:  # else there is no reply to learn from
                oel.write_jsonl(log, [*oel.read_jsonl(log), {"messages": messages}])


def chat_ids(policy: oel.Policy, messages: list[dict]) -> list[int]:
    """`prompts.chat_ids` of several messages: each takes the place of a placeholder, as plain text."""
    slots, ids = [{**message, "content": f"MESSAGE-{i}-GOES-HERE"} for i, message in enumerate(messages)], []
    how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": policy.thinking}
    rest, encode = policy.tokenizer.apply_chat_template(slots, **how), policy.tokenizer.encode
    for slot, message in zip(slots, messages, strict=True):
        before, _, rest = rest.partition(slot["content"])
        text = message["content"] if message["role"] == "user" else prompts.answer(message["content"])
        ids += encode(before, add_special_tokens=False) + prompts.plain_ids(policy.tokenizer, [text])[0]
    return ids + encode(rest, add_special_tokens=False)


def main(argv: list[str] | None = None) -> None:
    cfg = oel.parse_args(["--logs", "chats.jsonl", *(sys.argv[1:] if argv is None else argv)])
    oel.logging.disable_progress_bar()
    try:
        policy = oel.load_policy(cfg.model, oel.find_device(cfg.device), cfg.thinking, cfg.dtype)
        number = len(oel.read_jsonl(Path(cfg.logs), prompts.parse_log))
        phase = oel.Phase([], oel.derive_seed(cfg.seed, number), nucleus=True)
        with contextlib.closing(conversations(policy, cfg.reply_limit, Path(cfg.logs))) as talk:
            oel.drive(policy.model, [talk], **oel.sampling(policy, cfg, phase, None))
    except (EOFError, KeyboardInterrupt):
        print(f"\nThe conversations are in {cfg.logs}.")
    except (oel.UsageError, OSError) as error:
        print(f"chat.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
