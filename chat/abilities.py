"""What a model was taught, by the training record in its file: what the page offers, and with which settings it begins.

    abilities({"stage": "full_sft", "taught": {"full_sft": {"turns": {"1": 0.93, "2": 0.07}, "thinking": 0, ...}}})

Records of other programs, and of before this was written down, do not tell; then nothing is ruled out.
"""

from dataclasses import dataclass

REASONING = ("reason", "grpo")  # stages whose rows always think
OFTEN = 0.1  # share of the conversations from which a form counts as taught
MOST_HISTORY = 4  # earlier exchanges that the page begins with at most


@dataclass(frozen=True)
class Abilities:
    """True: taught; False: not; None: the record does not tell.

    stage     the last one, "" where not known
    chats     answers questions; a base model continues texts
    history   earlier exchanges to begin with: as many as one in ten of the conversations had. On more the answers of a
              small model get worse: the embedded sample's has 83% of held-out questions right with none before them,
              73% after one and 38% after four (60 questions, 93% of its conversations have one)
    sampling  temperature and top_p to begin with: those that reinforcement learning sampled the rewarded answers with,
              else MiniMind's. For the embedded sample's model they make no difference: of held-out questions it has 86%
              right at temperature 0, at these and at 1 (100 questions)
    examples  questions, or beginnings of texts, of what it was taught
    """

    stage: str = ""
    chats: bool | None = None
    thinking: bool | None = None
    tools: bool | None = None
    several_turns: bool | None = None
    history: int = MOST_HISTORY
    sampling: tuple[float, float] = (0.85, 0.85)
    examples: tuple[str, ...] = ()


def abilities(record: dict) -> Abilities:
    """Of a training record; {} gives one that tells nothing."""
    stage = record.get("stage") if isinstance(record.get("stage"), str) else ""
    told = record.get("taught") if isinstance(record.get("taught"), dict) else {}
    told = [one for one in told.values() if isinstance(one, dict)]
    examples = next((tuple(map(str, one["examples"])) for one in reversed(told) if one.get("examples")), ())
    if stage == "pretrain":
        return Abilities(stage, False, False, False, False, 0, examples=examples)
    recipe = record.get("recipe") if isinstance(record.get("recipe"), dict) else {}
    temperature = recipe.get("temperature") if stage == "grpo" else None
    sampling = (min(temperature, 2.0), 1.0) if isinstance(temperature, float) else Abilities.sampling
    chats = [one for one in told if one.get("kind") == "chat"]
    thinks = True if stage in REASONING else None
    if not chats:
        return Abilities(stage, True if stage else None, thinks, sampling=sampling, examples=examples)
    history = max(_history(one.get("turns", {})) for one in chats)
    thinking, tools = (any(one.get(name, 0) >= OFTEN for one in chats) for name in ("thinking", "tools"))
    return Abilities(stage, True, thinks or thinking, tools, history > 0, history, sampling, examples)


def _history(turns: dict) -> int:
    """The most earlier exchanges that enough conversations had. turns: {"2": share of those with two questions}."""
    shares = {int(n): share for n, share in turns.items()}
    enough = [n - 1 for n in shares if sum(share for m, share in shares.items() if m >= n) >= OFTEN]
    return min(max(enough, default=0), MOST_HISTORY)
