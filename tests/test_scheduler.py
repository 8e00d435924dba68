"""The scheduler: equal answers, who waits and how long, cancelling, limits, failures."""

import threading
import time

import pytest
import torch

import inference.batch
from inference.engine import Engine
from inference.sampling import SamplingParams
from inference.scheduler import Closed, QueueFull, Scheduler
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer

LONG = SamplingParams(max_tokens=900, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    config = LMConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=128, max_seq_len=1024, initializer_range=0.2)
    return Engine(MiniMindForCausalLM(config).eval(), load_tokenizer())


def prompts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(20, 6400, (n,), generator=generator).tolist() for n in lengths]


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


def test_answers_equal_those_of_a_run_alone(engine, monkeypatch):
    monkeypatch.setattr(inference.batch, "CHUNK", 32)  # the longest prompts are read in chunks
    asked = prompts(3, 50, 7, 120, 1, 31, 80, 12, 9, 64)
    params = [
        SamplingParams(max_tokens=4 + 3 * i, temperature=i % 2, seed=i, n=1 + i % 3, ignore_eos=True) for i in range(10)
    ]
    with Scheduler(engine, slots=4) as scheduler:
        handles = [scheduler.submit(prompt, p) for prompt, p in zip(asked, params, strict=True)]
        results = [handle.result() for handle in handles]
        stats = scheduler.stats()
    for prompt, p, result in zip(asked, params, results, strict=True):
        alone = engine.generate([prompt], p)
        assert [r.text for r in result] == [r.text for r in alone]
        assert [(r.token_ids, r.finish_reason, r.index) for r in result] == [
            (r.token_ids, r.finish_reason, r.index) for r in alone
        ]
    assert stats["finished"] == 10 and stats["waiting"] == stats["running"] == stats["rows"] == 0
    assert stats["new_tokens"] == sum(len(r.token_ids) for result in results for r in result)


@pytest.mark.parametrize("long_prompt", [5, 600])
def test_a_short_request_does_not_wait_for_a_long_one(engine, long_prompt):
    """Its first token comes within five steps, whether the long one is generating or still being read in chunks."""
    long, short = prompts(long_prompt, 6)
    with Scheduler(engine, slots=2) as scheduler:
        running = scheduler.submit(long, SamplingParams(max_tokens=400, temperature=0, ignore_eos=True))
        if long_prompt == 5:
            next(iter(running))
        at_submission = scheduler.stats()["steps"]
        handle = scheduler.submit(short, SamplingParams(max_tokens=1, temperature=0))
        next(iter(handle))
        assert scheduler.stats()["steps"] - at_submission <= 5
        assert running.finished is None
        running.cancel()


def test_cancelling_frees_the_rows_at_once(engine):
    (prompt,) = prompts(5)
    with Scheduler(engine, slots=2, queue=5) as scheduler:
        first, second, third = (scheduler.submit(prompt, LONG) for _ in range(3))
        next(iter(first)), next(iter(second))
        assert scheduler.stats()["waiting"] == 1 and scheduler.stats()["rows"] == 2
        third.cancel()  # has not begun
        assert third.result()[0].finish_reason == "cancelled" and scheduler.stats()["waiting"] == 0
        before = scheduler.stats()["steps"]
        first.cancel()
        (cancelled,) = first.result()
        assert cancelled.finish_reason == "cancelled" and 0 < cancelled.completion_tokens < 900
        wait_until(lambda: scheduler.stats()["rows"] == 1)
        assert scheduler.stats()["steps"] - before <= 2
        (fourth,) = scheduler.submit(prompt, SamplingParams(max_tokens=3, temperature=0)).result()
        common = min(3, cancelled.completion_tokens)
        assert fourth.token_ids[:common] == cancelled.token_ids[:common]
        first.cancel()  # twice is harmless
        assert second.finished is None
    assert second.result()[0].finish_reason == "cancelled"  # closing ends those who run
    assert scheduler.stats()["cancelled"] == 3
    with pytest.raises(Closed):
        scheduler.submit(prompt)


def test_the_queue_has_a_limit(engine):
    (prompt,) = prompts(5)
    with Scheduler(engine, slots=1, queue=2) as scheduler:
        running = scheduler.submit(prompt, LONG)
        next(iter(running))
        waiting = [scheduler.submit(prompt, LONG) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 requests wait"):
            scheduler.submit(prompt, LONG)
        waiting[0].cancel()
        scheduler.submit(prompt, LONG)
    with Scheduler(engine, slots=1, queue=0) as scheduler:  # no waiting at all: only who can run at once
        assert scheduler.submit(prompt, SamplingParams(max_tokens=2)).result()


def test_requests_that_cannot_be_answered_are_refused_at_once(engine):
    with Scheduler(engine, slots=2) as scheduler:
        for prompt, params, message in (
            ([], None, "empty"),
            (prompts(1024)[0], None, "context of 1024"),
            ([5], SamplingParams(n=3), "only 2 answers"),
            ([5], SamplingParams(stop_token_ids=[9999]), "9999"),
        ):
            with pytest.raises(ValueError, match=message):
                scheduler.submit(prompt, params)
        assert scheduler.stats()["requests"] == 0


def test_a_failed_step_is_told_and_the_next_request_works(engine, monkeypatch):
    (prompt,) = prompts(5)
    with Scheduler(engine, slots=2) as scheduler:
        running = scheduler.submit(prompt, LONG)
        pieces = iter(running)
        next(pieces)

        def fail(*_, **__):
            raise MemoryError("no room")

        monkeypatch.setattr(scheduler.batch, "step", fail)
        with pytest.raises(MemoryError, match="no room"):
            for _ in pieces:
                pass
        after = scheduler.submit(prompt, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
        assert len(after.result()[0].token_ids) == 4 and scheduler.stats()["failed"] == 1


def test_many_threads(engine):
    asked = prompts(*range(1, 25))
    alone = [r.token_ids for r in engine.generate(asked, SamplingParams(max_tokens=12, temperature=0))]
    got = [None] * 24
    with Scheduler(engine, slots=5) as scheduler:

        def ask(i):
            got[i] = scheduler.submit(asked[i], SamplingParams(max_tokens=12, temperature=0)).result()[0].token_ids

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == alone
