"""Every sentence the method adds to what the model reads, the parsers of what it writes, and text as token ids.

deploy       play_prompt(task, observations)                      one user message a turn
extract      extraction_prompt(trajectory, previous, ...)         one user message an episode
             parse_lessons(reply) -> accumulate(...)              the list of lessons grows
consolidate  with_experience(prompt, experience)                  what the teacher reads, the student not
--logs       parse_log(line)                                      a trajectory that somebody else recorded
"""

import bisect
import json
import re

MARKER = "- EXPERIENCE ITEM:"
# Models decorate their lists: "* **EXPERIENCE ITEM 2:** text" and "2. Experience item: text" are items too.
ITEM = re.compile(r"(?i)(?:(?:^|(?<=[.;!?]))\s*\d+[.)])?[\s*_`#>•-]{0,20}EXPERIENCE[ _]ITEM[\W\d_]{0,20}?[:：][*_`]*")
NOTES = "Notes from earlier episodes, which may be incomplete or wrong:\n{}\nEnd of the notes."


# --- playing ----------------------------------------------------------------------------------------------
def play_prompt(task: str, observations: list[str]) -> str:
    """The user message of one turn: the task, then all that the game has said. No replies, as in the paper."""
    return "\n\n".join(filter(None, [task, *observations]))


def with_experience(prompt: str, experience: str) -> str:
    """The same message behind the experience block: the only difference between teacher and student.
    It stands first, so that its keys and values can be computed once for many prompts. ValueError if it is empty."""
    if not experience.strip():
        raise ValueError("the experience is empty: there is nothing for the teacher to know")
    return f"{NOTES.format(experience.strip())}\n\n{prompt}"


def as_items(lessons: list[str]) -> str:
    """Sentences as an experience list."""
    return "\n".join(f"{MARKER} {lesson}" for lesson in lessons)


# --- extraction -------------------------------------------------------------------------------------------
EXTRACT = (
    "Below is the log of one episode: a task, the replies to it, and what came back. Find out what it teaches that "
    "will hold in other episodes too: what a symbol means, what an action does, what is wanted, what leads to "
    "success and what to failure. Leave out what is true of this episode alone."
)
FORMS = {
    "items": f"Write every lesson on a line of its own, as a short sentence in this form:\n{MARKER} <lesson>",
    "free": "Write the lessons in plain words, each on a line of its own, and nothing else.",
}
PREVIOUS = "Write only what these notes do not say yet, and correct what they say wrong."


def answer(reply: str) -> str:
    """A reply without its reasoning: all after the last closing think tag, or the whole if it never closes."""
    return reply.rpartition("</think>")[2].strip()


def transcript(trajectory: dict, reasoning: bool = True) -> str:
    """The log that the extractor reads. Without `reasoning` each reply is cut to its answer; the paper shows all."""
    parts = [trajectory["turns"][0]["prompt"]]
    for i, turn in enumerate(trajectory["turns"], 1):
        reply = turn["response"].strip() if reasoning else answer(turn["response"])
        parts += [f"Reply {i}: {reply}", f"What came back: {turn['feedback'] or 'nothing'}"]
    return "\n\n".join(parts)


def extraction_prompt(trajectory: dict, previous="", form="items", reasoning: bool = True) -> str:
    """The user message that asks for the lessons of an episode; `previous` is the list so far (E_{i-1}), or ""."""
    known = [NOTES.format(previous.strip()), PREVIOUS] if previous.strip() else []
    log = ["The log:", transcript(trajectory, reasoning), "End of the log. Now write the lessons."]
    return "\n\n".join([EXTRACT, FORMS[form], *known, *log])


def parse_lessons(reply: str, form: str = "items") -> str:
    """The lessons in an extractor's reply, a line each; "" if there are none. An item is what follows a marker, up to
    the next one or the end of the line. Free-form lessons are all lines that have a word. A bare <lesson> is none."""
    if form == "free":
        lines = (line.strip() for line in answer(reply).splitlines())
        return "\n".join(line for line in lines if not re.fullmatch(r"\W*|<think>|```\w*", line))
    items = (item for line in answer(reply).splitlines() for item in ITEM.split(line)[1:])
    return as_items([text for item in items if (text := re.sub("</?lesson>", "", item).strip())])


def accumulate(experience: str, lessons: str, budget: int, count_tokens) -> str:
    """E_i = truncate(E_{i-1} + lessons): the oldest lines go, whole, until the rest is within `budget` tokens."""
    lines = [line for line in f"{experience}\n{lessons}".splitlines() if line.strip()]
    fits = lambda dropped: count_tokens("\n".join(lines[dropped:])) <= budget
    return "\n".join(lines[bisect.bisect_left(range(len(lines)), True, key=fits) :])


def raw_experience(trajectories: list[dict], reasoning: bool, budget: int, count_tokens) -> str:
    """The baseline without lessons: the logs themselves, the newest whole ones within `budget` tokens."""
    logs = [transcript(trajectory, reasoning) for trajectory in trajectories]
    while logs and count_tokens("\n\n".join(logs)) > budget:
        logs.pop(0)
    return "\n\n".join(logs)


# --- logs of somebody else ----------------------------------------------------------------------------------
def parse_log(line: str | bytes) -> dict:
    """A trajectory from a JSON line: {"turns": [...]} or {"messages": [{"role", "content"}, ...]}."""
    log = json.loads(line)
    if not isinstance(log, dict) or not ({"turns", "messages"} & log.keys()):
        raise ValueError('it is no object with "turns" or "messages"')
    turns = log["turns"] if "turns" in log else chat_turns(log["messages"])
    turns = checked(turns, ("prompt", "response", "feedback"), "turn")
    if not turns or not all(turn["prompt"].strip() for turn in turns):
        raise ValueError("it has no turn, or one without a prompt")
    kept = {"outcome": log.get("outcome"), "anchor": bool(log.get("anchor"))}  # an anchor's teacher is told nothing
    return {"id": str(log.get("id", "")), "turns": turns, **kept}


def chat_turns(messages) -> list[dict]:
    """The turns of a chat. A prompt is all that was said so far but the replies; feedback is what follows a reply."""
    said, turns = [], []
    for i, message in enumerate(checked(messages, ("role",), "message"), 1):
        text = message_text(message, f"message {i}")
        if sum(map(len, said)) > 1_000_000:  # each prompt repeats all that was said before
            raise ValueError(f"message {i}: the chat is longer than a million characters; split it")
        if message["role"] == "assistant" and said:  # a greeting is no reply, and opens the prompt
            turns.append({"prompt": "\n\n".join(said), "response": text, "feedback": ""})
        elif message["role"] in ("system", "developer", "user", "tool", "assistant"):
            said.append(text)
            if turns:
                turns[-1]["feedback"] = "\n\n".join([turns[-1]["feedback"], text]).strip()
        else:
            raise ValueError(f"message {i}: {message['role']!r} is not system, developer, user, assistant or tool")
    return turns


def message_text(message: dict, name: str) -> str:
    """The content of a message, a string or a list of text parts, and its tool calls as JSON."""
    content, calls = message.get("content"), message.get("tool_calls") or []
    parts = content if isinstance(content, list) else [{"text": "" if content is None and calls else content}]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise TypeError(f'{name} has no text under "content", or a part that is no text, such as an image')
    calls = [json.dumps(call, ensure_ascii=False) for call in (calls if isinstance(calls, list) else [calls])]
    return "\n".join([part["text"] for part in parts if part["text"] or not calls] + calls)


def parse_jsonl(data: bytes, parse=json.loads) -> list[dict]:
    """The objects of JSON lines; empty lines are skipped. ValueError names a line that holds no object."""
    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):  # not splitlines: text may hold other separators
        try:
            row = parse(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise TypeError("it is not a JSON object")
            json.dumps(row, ensure_ascii=False).encode()  # refuses half a surrogate pair
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}; fix or remove the line") from None
        rows += [row] if line.strip() else []
    return rows


def checked_text(text) -> str:
    """A game's text, if it can be logged; AssertionError if it is no text, UnicodeError for half a surrogate pair."""
    assert isinstance(text, str), f"{text!r} is not text"
    return text.encode().decode()


def checked(entries, keys: tuple[str, ...], name: str) -> list[dict]:
    """The entries of a log, if each is an object that has text under every key."""
    if not isinstance(entries, list):
        raise TypeError(f"its {name}s are not a list")
    for i, entry in enumerate(entries, 1):
        for key in keys:
            if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
                raise TypeError(f'{name} {i} has no text under "{key}"')
    return entries


# --- messages as token ids --------------------------------------------------------------------------------
def plain_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of texts that are data: a chat marker in one never becomes a special token, because it is encoded in
    two pieces, its first character and the rest, which are no markers. All are encoded in one call, on all cores."""
    markers = "|".join(re.escape(token) for token in tokenizer.get_added_vocab() if len(token) > 1) or "(?!)"
    pieces = [re.split(f"(?s)(?<=(?={markers}).)", text) for text in texts]  # behind a marker's first character
    ids = iter(tokenizer([piece for cut in pieces for piece in cut], add_special_tokens=False)["input_ids"])
    return [[i for _ in cut for i in next(ids)] for cut in pieces]


def chat_ids(tokenizer, messages: list[str], thinking: bool = True) -> list[list[int]]:
    """Token ids of each user message in the tokenizer's own chat template, up to where the reply begins.
    The template is rendered around a placeholder, and the message takes its place as plain text."""
    slot = "MESSAGE-GOES-HERE"
    how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    chat = tokenizer.apply_chat_template([{"role": "user", "content": slot}], **how)
    before, found, after = chat.partition(slot)
    if not found or slot in after:
        raise ValueError("the chat template does not show a user message exactly once")
    cut = max((before.rfind(x) + len(x) for x in tokenizer.get_added_vocab() if x in before), default=0)
    start, end = (tokenizer.encode(part, add_special_tokens=False) for part in (before[:cut], after))
    messages = [before[cut:] + x for x in messages]  # one token may span the two, as in the chat
    return [start + ids + end for ids in plain_ids(tokenizer, messages)]


def common_prefix(sequences: list[list[int]]) -> int:
    """The number of token ids with which all sequences begin."""
    low, high = min(sequences), max(sequences)  # in dictionary order, all others lie between these two
    return next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
