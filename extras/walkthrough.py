# %% [markdown]
# # One lesson, from the board into the weights
#
# This is the method of `oel.py` in slow motion, on the policy that ships with it. Run it as a script
# (`python extras/walkthrough.py`, under a minute), or cell by cell: VS Code, PyCharm, Spyder and Jupyter with jupytext
# open it as a notebook. It defines no function of its own, so what you see is what `oel.py` does.

# %%
import copy
import sys
from pathlib import Path

here = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
sys.path[:0] = [str(here), str(here.parent)]

import torch

import oel
import prompts

cfg = oel.parse_args(["--env", "frozenlake", "--seed", "1"])
policy = oel.load_policy(cfg.model, oel.find_device("cpu"))
plain = oel.sampling(policy, cfg, oel.Phase([], seed=7, nucleus=True), desc=None)

# %% [markdown]
# ## 1. One episode, by hand
#
# The policy sees a board and is not told what `H` and `G` are. It reads, replies, and the game says what happened. The
# next prompt has all that the game said, but not the earlier replies.

# %%
game = oel.make_game(cfg)
observations, turns, over = [game.reset(0)], [], False
while not over:
    prompt = prompts.play_prompt(game.task, observations)
    (response,) = oel.sample(policy.model, [policy.encode(prompt)], max_new_tokens=cfg.reply_limit, **plain)
    reply = policy.decode(response.ids)
    feedback, over = game.step(reply)
    observations.append(feedback)
    turns.append({"prompt": prompt, "response": reply, "feedback": feedback})
    print(f"--- turn {len(turns)} ---\n{reply.strip()}\n\n{feedback}\n")
trajectory = {"id": "by hand", "turns": turns}

# %% [markdown]
# ## 2. One extraction
#
# The same model reads that log and writes down what it teaches (Eq. 1 adds its lessons to a list, which begins empty).

# %%
question = prompts.extraction_prompt(trajectory, form=cfg.form, reasoning=cfg.reasoning)
(response,) = oel.sample(policy.model, [policy.encode(question)], max_new_tokens=cfg.experience_budget, **plain)
lessons = prompts.parse_lessons(policy.decode(response.ids), cfg.form)
experience = prompts.accumulate("", lessons, cfg.experience_budget, policy.count_tokens)
print(experience)

# %% [markdown]
# ## 3. The two prompts, side by side
#
# Student and teacher get the same message, but for the experience that stands first in the teacher's.

# %%
student_prompt = turns[0]["prompt"]
teacher_prompt = prompts.with_experience(student_prompt, experience)
left, right = student_prompt.splitlines(), teacher_prompt.splitlines()
left = [""] * (len(right) - len(left)) + left
print(f"{'the student reads':58} the teacher reads")
for a, b in zip(left, right, strict=True):
    print(f"{a[:56]:58} {b[:56]}")

# %% [markdown]
# ## 4. The reverse KL of one reply, token by token
#
# The student answers without the experience. At each token of that answer, the KL says how far the student's choice is
# from what the teacher, who knows the lessons, would choose there. Most tokens agree; a few carry the lesson.

# %%
teacher = copy.deepcopy(policy.model).requires_grad_(False)
(response,) = oel.sample(policy.model, [policy.encode(student_prompt)], max_new_tokens=cfg.reply_limit, **plain)
sides = ((policy.model, student_prompt), (teacher, teacher_prompt))
hidden = [oel.response_hidden(model, [policy.encode(text)], [response.ids]).detach() for model, text in sides]
heads = [model.get_output_embeddings().weight[: policy.vocab_size].detach() for model, _ in sides]
kl, _, _ = oel.reverse_kl(*hidden, *heads, cfg.temperature)
for token, nats in zip(response.ids, kl.tolist(), strict=True):
    print(f"{nats:7.3f} {'#' * round(8 * min(nats, 6)):48} {policy.decode([token])!r}")
print(f"mean {kl.mean():.3f} nats")

# %% [markdown]
# ## 5. One optimizer step
#
# `distill` puts the gradient of that mean into the `.grad` of the weights. One step then makes this reply less likely at
# just the tokens where the KL is large.

# %%
optimizer = torch.optim.AdamW(policy.master, cfg.lr, (0.9, 0.999), cfg.adam_eps, cfg.weight_decay)
sample = oel.Sample(policy.encode(student_prompt), policy.encode(teacher_prompt), response.ids)
before = oel.distill(policy, teacher, [sample], cfg)
torch.nn.utils.clip_grad_norm_(policy.master, cfg.clip)
optimizer.step()
optimizer.zero_grad()
policy.copy_master()
after = oel.distill(policy, teacher, [sample], cfg)
optimizer.zero_grad()
print(f"reverse KL of this reply: {before:.3f} nats before the step, {after:.3f} after it")

# %% [markdown]
# ## 6. The same board again
#
# One step on one reply does not settle it. `consolidate` takes a dozen steps, each on fresh replies to
# many boards. Here are eight replies a step, all to the same board, with what each step's first reply says about `H`.

# %%
for step in range(2, 6):
    how = {**plain, "seed": step, "top_p": 1.0, "top_k": 0}
    prompt_ids = [sample.prompt_ids] * 8
    replies = oel.sample(policy.model, prompt_ids, max_new_tokens=cfg.reply_limit, **how)
    fresh = [oel.Sample(sample.prompt_ids, sample.teacher_ids, y.ids) for y in replies]
    loss = oel.distill(policy, teacher, fresh, cfg)
    torch.nn.utils.clip_grad_norm_(policy.master, cfg.clip)
    optimizer.step()
    optimizer.zero_grad()
    policy.copy_master()
    about = [line for line in policy.decode(replies[0].ids).splitlines() if line.startswith("(1,2)")]
    print(f"step {step}: reverse KL {loss:.3f}, it wrote {about}")

(response,) = oel.sample(policy.model, [sample.prompt_ids], max_new_tokens=cfg.reply_limit, **plain)
print("\nThe same board again, without any lesson in the prompt:\n\n" + policy.decode(response.ids).strip())
