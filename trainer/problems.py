"""Problems: questions whose answers can be checked. Reinforcement learning learns from them.

A row is {"question": ..., "answer": ...}, or a worked example {"conversations": [...]} whose last message holds
<answer>...</answer>. Then the question is the conversation before that message; its thinking is not used.
"""

import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np

from common.errors import UserError, note
from data.answer_match import ANSWER_BLOCK
from data.reading import raw_rows
from data.row_shapes import UNUSABLE, BadRow, as_chat, parse_record, with_beside
from model.tokenizer import render


@dataclass
class Problem:
    """prompt: token ids up to where the assistant's answer begins; answer: the right one; question: the last one asked,
    for a reader. Both as text."""

    prompt: list[int]
    answer: str
    question: str = ""


class Problems:
    """The problems in the order they are posed, each `group` times in a row; epochs are shuffled by the seed."""

    caches = ()  # there are no token caches, so a run's recipe has the problems' digest instead

    def __init__(self, problems: list[Problem], group: int, seed: int):
        self.problems, self.group, self.seed = problems, group, seed
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """The number of answers in an epoch."""
        return len(self.problems) * self.group

    def __getitem__(self, index: int) -> Problem:
        """The problem of a global index (epoch * len + place in the epoch)."""
        epoch, place = divmod(index // self.group, len(self.problems))
        if epoch not in self._orders:  # the order of one epoch is kept at a time
            self._orders = {epoch: np.random.default_rng([self.seed, epoch]).permutation(len(self.problems))}
        return self.problems[self._orders[epoch][place]]

    def digest(self) -> str:
        """16 hex digits of all prompts and answers."""
        content = json.dumps([(q.prompt, q.answer) for q in self.problems])
        return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def as_problem(record: dict) -> tuple[list[dict], str]:
    """A row -> (messages that ask, known answer); raises BadRow."""
    if "question" in record:
        question, answer = record["question"], record.get("answer")
        if not isinstance(question, str) or not question.strip():
            raise BadRow('"question" must be a string that is not empty')
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)  # programs that write tables turn 2 into 2.0; a model would answer 2
        known = isinstance(answer, str | int) or isinstance(answer, float) and math.isfinite(answer)
        if isinstance(answer, bool) or not known or not str(answer).strip():
            raise BadRow('"answer" must be a string or a number')
        return with_beside([{"role": "user", "content": question}], record), str(answer).strip()
    *messages, last = as_chat(record)
    blocks = ANSWER_BLOCK.findall(last["content"]) if last["role"] == "assistant" else []
    if not messages or not blocks or not blocks[-1].strip():
        raise BadRow("no <answer>...</answer> in the conversation's last message: no answer to check against")
    return messages, blocks[-1].strip()


def read_problems(paths, tokenizer, longest: int, skip_bad_lines=False) -> list[Problem]:
    """All problems of the files. longest: tokens a prompt may have. Raises UserError naming file and line."""
    found, skipped = [], []
    # One bad line ends the run with its place, or is counted and left out with --skip_bad_lines: none is lost unseen.
    for path in paths:
        for line, raw in raw_rows(path):
            try:
                messages, answer = as_problem(parse_record(raw))
                prompt = render(tokenizer, messages, add_generation_prompt=True)[0]
                if len(prompt) > longest:
                    raise BadRow(f"the question has {len(prompt)} tokens, with --max_new_tokens more than --seq_len; "
                                 "raise --seq_len")  # fmt: skip
            except UNUSABLE as error:  # BadRow, and what render refuses
                if not skip_bad_lines:
                    raise UserError(f"{path}:{line}: {error} (--skip_bad_lines leaves such lines out)") from None
                skipped.append(f"{path}:{line}: {error}")
                continue
            found.append(Problem(prompt, answer, messages[-1]["content"]))
    if skipped:
        note(f"{len(skipped)} bad line(s) left out, the first: {skipped[0]}")
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no question in it that can be used")
    return found


def split_problems(problems: list[Problem], val_split: float) -> tuple[list[Problem], list[Problem]]:
    """(for training, held out): the prompt's hash decides, so copies fall on the same side."""

    def held_out(problem: Problem) -> bool:
        # The hash as a number in [0, 2^64): a share val_split of all prompts lies below val_split * 2^64.
        digest = hashlib.blake2b(json.dumps(problem.prompt).encode(), digest_size=8, person=b"question").digest()
        return int.from_bytes(digest, "little") < val_split * 2**64

    train = [problem for problem in problems if not held_out(problem)]
    if not train:
        raise UserError(f"--val_split {val_split} leaves no question to train on; lower it or bring more")
    return train, [problem for problem in problems if held_out(problem)]


def load_problems(files, tokenizer, args, val_files=()) -> tuple[Problems, list[Problem]]:
    """The stage's problems (training, held out); val_files: hold out these instead of a part."""
    longest = args.seq_len - args.max_new_tokens
    problems = read_problems(files, tokenizer, longest, args.skip_bad_lines)
    if val_files:
        held_out = read_problems(val_files, tokenizer, longest, args.skip_bad_lines)
    else:
        problems, held_out = split_problems(problems, args.val_split)
    return Problems(problems, args.group, args.seed), held_out


def fingerprints(problems: Problems, held_out: list[Problem]) -> dict[str, str]:
    """The digests of both sets, under the names that they have in a run's recipe."""
    return {"questions": problems.digest(), "held_out": Problems(held_out, 1, 0).digest()}
