"""The same exam put by lm-evaluation-harness (EleutherAI), from local files and without a network.

The harness builds its own prompts from the task below, tokenises with the exported tokenizer and asks transformers:
nothing but the questions is shared with exams.exam, which makes it a check on all of that.
"""

import logging
import os

from exams.exam import BENCHMARKS, LETTERS, AskByCompletion, Question, Subject

QUESTION = "{{question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n"


def version() -> str:
    """Of the installed harness; ValueError where there is none."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when the libraries are imported
    try:
        import lm_eval
    except ImportError:
        raise ValueError("--lm_eval needs lm-evaluation-harness: pip install -r requirements-eval.txt") from None
    return lm_eval.__version__


def log_probabilities(folder, subjects: list[Subject], benchmark: str, shots: int, device: str = "cpu",
                      batch_size: int = 8) -> dict[str, list[list[float]]]:  # fmt: skip
    """For each subject and question the log-probability (nats) of the four choices, from a transformers folder.

    Prompts that are too long lose their beginning: the harness cuts on the left and drops no worked examples.
    """
    version()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # pages of remarks on settings that are meant so
    model = HFLM(pretrained=str(folder), device=device, batch_size=batch_size)
    given = simple_evaluate(
        model, tasks=[task(subject, benchmark, shots, i) for i, subject in enumerate(subjects)], log_samples=True,
        bootstrap_iters=0, task_manager=TaskManager(include_defaults=False), verbosity="ERROR",
    )  # fmt: skip
    result = {}
    for i, subject in enumerate(subjects):
        samples = sorted(given["samples"][f"subject_{i}"], key=lambda sample: sample["doc_id"])
        result[subject.name] = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    return result


def prompts_cut(engine, subjects: list[Subject], benchmark: str, shots: int) -> int:
    """Of how many questions the harness cuts the beginning, because prompt and longest choice exceed the context."""
    ask = AskByCompletion(engine, benchmark, shots)
    encoded = (ask.encode(s, s.shots[:shots], question) for s in subjects for question in s.questions)
    # One token more than the context fits: the last one is predicted, not fed in.
    return sum(len(prompt) + max(map(len, choices)) > engine.context + 1 for prompt, choices in encoded)


def task(subject: Subject, benchmark: str, shots: int, number: int) -> dict:
    """The harness's configuration of one subject, as its own files for the benchmark have it."""
    from datasets import Dataset

    plan = BENCHMARKS[benchmark]
    splits = {"test": subject.questions, "examples": subject.shots}
    data = {name: Dataset.from_list([row(q) for q in questions]) for name, questions in splits.items() if questions}
    words = {"doc_to_text": QUESTION + plan.cue, "doc_to_choice": list(LETTERS)}
    if benchmark == "openbookqa":  # the options themselves are the continuations
        words = {"doc_to_text": "{{question}}", "doc_to_choice": "choices"}
    few = {"fewshot_split": "examples", "fewshot_config": {"sampler": "first_n"}} if subject.shots else {}
    return {
        "task": f"subject_{number}", "custom_dataset": lambda **_: data, "test_split": "test", **words, **few,
        "num_fewshot": min(shots, len(subject.shots)), "output_type": "multiple_choice", "doc_to_target": "right",
        "description": plan.instruction.format(subject.title), "metric_list": [{"metric": "acc"}],
    }  # fmt: skip


def row(question: Question) -> dict:
    options = dict(zip(LETTERS, question.options, strict=True))
    return {
        "question": question.text,
        **options,
        "choices": list(question.options),
        "right": LETTERS.index(question.answer),
    }
