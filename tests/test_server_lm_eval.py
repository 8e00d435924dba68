"""lm-evaluation-harness over the server: the figures of its own run of transformers on the exported folder."""

import logging

import pytest
from serve import learned_model, serve

from export.transformers_folder import write_transformers_folder
from inference.engine import Engine

TEXTS = ["从前有座山，山里有座庙。", "One and two make three.", "😀 is a face", "你好！我是一个小模型", "a" * 400]


def tasks():
    """A task of choices and one of whole texts, from rows in memory."""
    from datasets import Dataset

    rows = [{"question": text, "choices": ["好", " three and more", "山里", text], "right": i % 4}
            for i, text in enumerate(TEXTS)]  # fmt: skip
    choices = Dataset.from_list(rows)
    texts = Dataset.from_list([{"text": text} for text in TEXTS])
    return [
        {"task": "choices", "custom_dataset": lambda **_: {"test": choices}, "test_split": "test",
         "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
         "doc_to_target": "right", "target_delimiter": "", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        {"task": "texts", "custom_dataset": lambda **_: {"test": texts}, "test_split": "test", "doc_to_text": "",
         "output_type": "loglikelihood_rolling", "doc_to_target": "{{text}}",
         "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}]},
    ]  # fmt: skip


def put(model, args: str, **options):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    given = simple_evaluate(
        model, model_args=args, tasks=tasks(), log_samples=True, bootstrap_iters=0, verbosity="ERROR",
        task_manager=TaskManager(include_defaults=False), **options,
    )  # fmt: skip
    return given["results"], [
        list(sample["filtered_resps"])
        for name in ("choices", "texts") for sample in sorted(given["samples"][name], key=lambda s: s["doc_id"])
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["huggingface", "remote"])
def test_local_completions_gives_the_figures_of_hf(tokenizer, tmp_path, monkeypatch):
    for package in ("lm_eval", "tenacity"):
        pytest.importorskip(package, reason=f"{package} is not installed (requirements-eval.txt)")
    model, words = learned_model()
    write_transformers_folder(tmp_path, model, words, {"stage": "full_sft"}, "little")
    expected, samples = put("hf", f"pretrained={tmp_path},dtype=float32", device="cpu", batch_size=4)
    with serve(Engine(model, words)) as live:
        named = f",tokenizer={tmp_path}" if tokenizer == "huggingface" else ""
        args = f"model=tiny,base_url={live.url}/completions,tokenizer_backend={tokenizer}{named},max_length=1024"
        got, asked = put("local-completions", args + ",num_concurrent=2", batch_size=4)
    for name in ("choices", "texts"):
        figures = {key: value for key, value in expected[name].items() if isinstance(value, float)}
        assert len(figures) >= 2
        assert {key: got[name][key] for key in figures} == pytest.approx(figures, rel=1e-4)
    for ours, theirs in zip(asked, samples, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert float(one[0] if isinstance(one, list | tuple) else one) == pytest.approx(
                float(other[0] if isinstance(other, list | tuple) else other), rel=1e-4, abs=1e-3
            )
