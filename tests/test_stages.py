"""The command line: wrong input gets one clear line and exit code 2, and nothing is half-written."""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from stage import (
    SHORT,
    STAGES,
    TINY,
    chat_weights,
    last_json,
    load,
    reasoning_weights,
    run,
    run_flags,
    with_loss,
    write_chats,
    write_texts,
)

from common.errors import RunFailed, UserError, note, run_main
from common.flags import boolean
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer
from model.tokenizer_files import save_tokenizer
from model.vocabulary import train_tokenizer
from model.weights import save_weights
from trainer import setup
from trainer.checkpoint import FORMAT
from trainer.stage_flags import parse, stage_parser

COMMON = """
data_path tokenizer out_dir save_weight from_weight preset dim n_layers n_heads n_kv_heads use_moe seq_len epochs
max_steps batch_size accumulation_steps learning_rate optimizer schedule warmup weight_decay grad_clip seed device
dtype compile gradient_checkpointing deepspeed local_rank log_interval eval_interval save_interval save_minutes
val_split resume overwrite dry_run
""".split()  # noqa: SIM905


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "t.jsonl")


def test_the_default_rate_is_that_of_the_optimizer():
    parser = stage_parser("pretrain", "", learning_rate={"muon": 4e-3, "adamw": 1e-3}, optimizer="muon")
    for flags, rate in (([], 4e-3), (["--optimizer", "adamw"], 1e-3), (["--learning_rate", "0.01"], 0.01)):
        assert parse(parser, flags).learning_rate == rate
    assert parse(stage_parser("x", "", learning_rate=5e-4), ["--optimizer", "muon"]).learning_rate == 5e-4


def refused(stage, *args) -> str:
    """The message with which the stage refuses these arguments."""
    with pytest.raises(UserError) as caught:
        load(STAGES[stage]).main([str(a) for a in args])
    return str(caught.value)


def pretrain_flags(texts, tmp_path, *more):
    return [*TINY, "--max_steps", 1, "--data_path", texts, "--out_dir", tmp_path / "o", *more]


def weights_of_another_shape(path, vocab_size=6400, **fields):
    config = LMConfig(**({"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "vocab_size": vocab_size} | fields))
    save_weights(path, MiniMindForCausalLM(config), load_tokenizer(), {})
    return path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "minimind2-smal"], "preset 'minimind2-smal' does not exist"),
        (["--n_heads", "3"], "does not divide"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--learning_rate", "-1"], "--learning_rate must be above 0"),
        (["--val_split", "1.5"], "--val_split must lie in"),
        (["--tokenizer", "nowhere"], "no tokenizer folder at nowhere"),
        (["--from_weight", "nowhere/x.pth"], "no weights at nowhere/x.pth"),
        (["--from_weight", "dpo"], "no such file, and no dpo_"),
        (["--device", "gpu9"], "is no device"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--warmup", "nan"], "--warmup must be a number, not nan"),
        (["--save_minutes", "inf"], "--save_minutes must be a number, not inf"),
        (["--dropout", "1"], "--dropout must lie in [0, 1)"),
        (["--seed", "9" * 20], "--seed must lie in [0, 2^63)"),
    ],
)
def test_wrong_arguments(flags, message, texts, tmp_path):
    assert message in refused("pretrain", *pretrain_flags(texts, tmp_path, *flags))
    assert not list((tmp_path / "o").glob("*.pth")) if (tmp_path / "o").exists() else True


def test_all_faults_of_the_arguments_are_reported_at_once(texts, tmp_path):
    message = refused("pretrain", *pretrain_flags(texts, tmp_path, "--batch_size", 0, "--seq_len", 1, "--preset", "x"))
    assert all(part in message for part in ("batch_size", "seq_len", "preset"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such data file"),
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("bad.jsonl", b'{"text": "a"}\n{bad\n', "bad.jsonl:2: not JSON"),
        ("key.jsonl", b'{"content": "a"}\n', 'key.jsonl:1: no key "text"'),
        ("gbk.jsonl", '{"text": "中"}\n'.encode("gbk"), "gbk.jsonl:1: not UTF-8"),
    ],
)
def test_wrong_data(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in refused("pretrain", *pretrain_flags(tmp_path / name, tmp_path))
    assert not list((tmp_path / "o").glob("*.pth"))


def test_weights_that_do_not_fit(texts, tmp_path):
    chats = write_chats(tmp_path / "c.jsonl")
    other = weights_of_another_shape(tmp_path / "pretrain_32.pth")
    flags = ["--data_path", chats, "--out_dir", tmp_path / "o", "--from_weight", other, "--max_steps", 1]
    assert "another shape than the flags say: n_layers 2 (there: 1)" in refused("full_sft", *flags, "--n_layers", 2)
    torch.save({"model.embed_tokens.weight": torch.zeros(6400, 48)}, tmp_path / "odd.pth")
    assert "odd.pth" in refused("full_sft", "--data_path", chats, "--from_weight", tmp_path / "odd.pth")
    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    assert "garbage.pth cannot be read" in refused(
        "full_sft", "--data_path", chats, "--from_weight", tmp_path / "garbage.pth"
    )


def test_a_run_does_not_write_over_the_weights_it_needs(tmp_path):
    """An adapter would lose what it adapts, DPO its reference, and every run its start if it is killed."""
    chats = write_chats(tmp_path / "c.jsonl")
    flags = [*SHORT, "--data_path", chats, "--max_steps", 1, "--out_dir", tmp_path, "--save_weight", "x"]
    for stage, subfolder in (("full_sft", ""), ("lora", "lora")):
        base = chat_weights(tmp_path)
        first = load(STAGES[stage]).main([str(a) for a in (*flags, "--from_weight", base)])
        assert (tmp_path / subfolder / "x_32.pth").exists()
        again = refused(stage, *flags, "--from_weight", first["weights"])
        assert "x_32.pth and would write over it; use --save_weight NAME" in again
    student = ["--dim", 32, "--n_heads", 2, "--n_kv_heads", 1, "--n_layers", 1, "--overwrite"]
    assert "would write over it" in refused("full_dist", *flags, "--teacher", tmp_path / "x_32.pth", *student)


def test_the_state_of_another_stage_is_not_resumed(texts, tmp_path):
    state = {"format": FORMAT, "record": {"stage": "full_sft"}}
    (tmp_path / "o").mkdir()
    torch.save(state, tmp_path / "o" / "x_32_resume.pth")
    flags = pretrain_flags(texts, tmp_path, "--save_weight", "x", "--resume")
    assert "is the state of another stage, full_sft" in refused("pretrain", *flags)
    (tmp_path / "o" / "x_32_resume.pth").write_bytes(b"")
    assert "x_32_resume.pth cannot be read" in refused("pretrain", *flags)


def test_ctrl_c_before_training_is_one_word(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        run_main(interrupted)
    assert left.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_a_tokenizer_that_does_not_fit_the_weights(tmp_path):
    chats = write_chats(tmp_path / "c.jsonl")
    weights = weights_of_another_shape(tmp_path / "pretrain_32.pth")
    save_tokenizer(train_tokenizer(["另一个词表"] * 3, 300), tmp_path / "tok")
    flags = ["--data_path", chats, "--out_dir", tmp_path / "o", "--from_weight", weights]
    assert "is not the one" in refused("full_sft", *flags, "--tokenizer", tmp_path / "tok")


def test_an_out_dir_that_cannot_be_written(texts, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = refused("pretrain", *TINY, "--data_path", texts, "--out_dir", tmp_path / "file")
    assert "cannot write to --out_dir" in message


def test_an_output_of_another_configuration_is_kept(texts, tmp_path):
    (tmp_path / "o").mkdir()
    other = weights_of_another_shape(tmp_path / "o" / "pretrain_32.pth")
    before = other.read_bytes()
    assert "has another configuration" in refused("pretrain", *pretrain_flags(texts, tmp_path))
    assert other.read_bytes() == before
    load("1-pretrain.py").main([str(f) for f in pretrain_flags(texts, tmp_path, "--overwrite")])
    assert other.read_bytes() != before


def test_an_unfinished_run_is_not_destroyed_by_forgetting_resume(texts, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "pretrain_32_resume.pth").write_bytes(b"precious")
    assert "go on with --resume" in refused("pretrain", *pretrain_flags(texts, tmp_path))
    assert (tmp_path / "o" / "pretrain_32_resume.pth").read_bytes() == b"precious"


@pytest.mark.parametrize("stage", ["pretrain", "full_sft", "lora", "dpo", "full_dist", "reason"])
def test_a_resumed_run_must_be_the_same_run(stage, tmp_path):
    flags = [*run_flags(stage, tmp_path, steps=2), "--out_dir", str(tmp_path / "o")]
    load(STAGES[stage]).main(flags)
    data = Path(flags[flags.index("--data_path") + 1])
    data.write_text("".join(data.read_text("utf-8").splitlines(True)[:30]), "utf-8")
    message = refused(stage, *flags, "--resume", "--seed", 7)
    assert "seed was 42, is now 7" in message and "data was" in message


def test_errors_are_one_line_without_a_traceback(tmp_path):
    result = run("1-pretrain.py", "--data_path", tmp_path / "no.jsonl")
    assert result.returncode == 2
    assert result.stderr.strip() == f"error: no such data file: {tmp_path / 'no.jsonl'}"
    result = run("1-pretrain.py", "--no_such_flag", "1")
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1


def test_run_main_gives_failures_exit_code_1(capsys):
    def main(argv):
        raise RunFailed("the disk is full")

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == 1 and capsys.readouterr().err == "failed: the disk is full\n"


def test_out_of_memory_is_one_line_whose_advice_leads_to_the_same_weights(texts, tmp_path):
    """A batch of two rows needs a petabyte from the third step on, one row does not."""
    stage, calls = load("1-pretrain.py"), []

    def greedy(plain):
        def loss_fn(model, batch):
            calls.append(1)
            if len(calls) > 4 and len(batch["input_ids"]) > 1:
                torch.empty(2**48)
            return plain(model, batch)

        return loss_fn

    flags = [*TINY, "--max_steps", 6, "--save_interval", 2, "--data_path", texts]
    flags = list(map(str, flags))
    expected = stage.main([*flags, "--out_dir", str(tmp_path / "twin")])
    stage = with_loss(stage, greedy)
    flags += ["--out_dir", str(tmp_path / "o")]
    with pytest.raises(RunFailed, match=r"out of memory \(1048576.00 GiB more .* --resume goes on from it") as caught:
        stage.main(flags)
    advice = re.search(r"--batch_size 1 --accumulation_steps 4\b", str(caught.value))[0].split()
    found = stage.main([*flags, *advice, "--resume"])
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6) and found["steps"] == 6


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 "
                                "GiB"), "out of memory (2.00 GiB more were wanted)"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)"), "out of memory"),
        (MemoryError(), "out of memory"),
    ],
    ids=["cuda", "mps", "cpu"],
)  # fmt: skip
def test_run_main_tells_of_memory_that_ran_out(error, words, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == 1 and capsys.readouterr().err == f"failed: {words}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_a_full_disk_leaves_the_last_checkpoint_whole(texts, tmp_path, monkeypatch):
    """The third save meets a device without space: exit 1, one line, what was saved before can be resumed."""
    from model import weights

    saves, original = [], torch.save

    def save(content, file):
        saves.append(file)
        if len(saves) == 5:  # state, weights, state, weights, then this state
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(b"x")
        original(content, file)

    monkeypatch.setattr(weights.torch, "save", save)
    flags = [*pretrain_flags(texts, tmp_path, "--max_steps", 8, "--save_interval", 2)]
    with pytest.raises(RunFailed, match="pretrain_32_resume.pth: No space left on device"):
        load("1-pretrain.py").main([str(f) for f in flags])
    monkeypatch.undo()
    assert not list((tmp_path / "o").glob(".*tmp"))
    assert torch.load(tmp_path / "o" / "pretrain_32_resume.pth", weights_only=True)["step"] == 4
    assert load("1-pretrain.py").main([str(f) for f in flags] + ["--resume"])["steps"] == 8


def test_bare_commands_take_the_sample_and_say_so(tmp_path):
    """Pretraining, fine-tuning, a chat, each in a process of its own: `run` sees that no library warns."""
    result = run("1-pretrain.py", *TINY, "--out_dir", tmp_path / "o", "--max_steps", 1)
    assert result.returncode == 0, result.stderr
    assert "training on the embedded sample dataset/sample/pretrain.jsonl" in result.stdout
    result = run("3-full_sft.py", *TINY, "--out_dir", tmp_path / "o", "--max_steps", 1)
    assert result.returncode == 0, result.stderr
    assert "embedded sample dataset/sample/sft.jsonl" in result.stdout and "o/pretrain_32.pth" in result.stdout
    weight = ("--weight", tmp_path / "o" / "full_sft_32.pth")
    result = run("2-eval.py", *weight, "--max_new_tokens", 4, input="你好\n再来\n\n")
    assert result.returncode == 0 and result.stderr.count("[prompt ") == 2, result.stderr


def test_minimind_s_file_is_taken_with_its_size_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    (tmp_path / "dataset").mkdir()
    path = tmp_path / "dataset" / "pretrain_hq.jsonl"
    with open(path, "wb") as file:
        file.truncate(1_600_000_000)  # a hole: it takes no room on the disk
    args = argparse.Namespace(data_path=None)
    assert setup.resolve_data(args, ("pretrain_hq.jsonl",), "pretrain.jsonl") == [path]
    told = capsys.readouterr().out
    assert "training on dataset/pretrain_hq.jsonl, 1.6 GB; --data_path names another file" in told


SAMPLES = {"lora": "lora_domain", "dpo": "dpo", "full_dist": "sft", "reason": "reason", "grpo": "reason"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", SAMPLES)
def test_the_other_stages_work_bare_too(stage, tmp_path):
    """From the newest weights of the stage before, on their part of the embedded sample."""
    (reasoning_weights if stage == "grpo" else chat_weights)(tmp_path / "o")
    result = run(STAGES[stage], "--out_dir", tmp_path / "o", "--max_steps", 1)
    assert result.returncode == 0, result.stderr
    assert f"training on the embedded sample dataset/sample/{SAMPLES[stage]}.jsonl" in result.stdout
    assert last_json(result.stdout)["steps"] == 1


def test_v1s_two_steps_single_then_multi_turn(tmp_path):
    """MiniMind v1's CSV columns, then JSONL, the second step starting from the first's output."""
    single, multi = tmp_path / "single.csv", write_chats(tmp_path / "multi.jsonl")
    single.write_text("history,q,a\n" + "".join(f"[],问题{i},回答{i}。\n" for i in range(30)), encoding="utf-8")
    main = load("3-full_sft.py").main
    flags = [*TINY, "--max_steps", 2, "--val_split", 0]
    first = main(
        [
            str(f)
            for f in [*flags, "--data_path", single, "--from_weight", "none", "--out_dir", tmp_path / "single_chat"]
        ]
    )
    second = main(
        [str(f) for f in [*flags, "--data_path", multi, "--from_weight", first["weights"], "--out_dir", tmp_path]]
    )
    assert second["weights"] == str(tmp_path / "full_sft_32.pth") and second["steps"] == 2


def test_booleans_in_every_spelling():
    parser = stage_parser("pretrain", "")
    for argv, value in (([], None), (["--use_moe"], True), (["--no-use_moe"], False), (["--use_moe", "0"], False),
                        (["--use_moe", "True"], True), (["--use_moe", "false"], False)):  # fmt: skip
        assert parser.parse_args(argv).use_moe is value
    assert boolean("1") is True


@pytest.mark.parametrize("script", sorted(STAGES.values()))
def test_every_stage_has_the_common_flags_in_one_order(script, capsys):
    with pytest.raises(SystemExit):
        load(script).main(["--help"])
    text = capsys.readouterr().out
    places = [re.search(rf"^  --{name}\b", text, re.M) for name in COMMON]
    assert all(places), [n for n, p in zip(COMMON, places) if not p]
    assert [p.start() for p in places] == sorted(p.start() for p in places)


def test_minimind_names_of_flags_are_accepted():
    args = stage_parser("pretrain", "").parse_args(["--max_seq_len", "256", "--local_rank", "0", "--use_moe", "1"])
    assert args.seq_len == 256 and args.local_rank == 0


def test_last_line_is_json_with_the_promised_keys(texts, tmp_path, capsys):
    load("1-pretrain.py").main([str(f) for f in pretrain_flags(texts, tmp_path)])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["stage"] == "pretrain" and result["steps"] == 1 and os.path.exists(result["weights"])


@pytest.mark.parametrize(("answer", "kept"), [("好" * 200, 0.6), ("好" * 10, 1.0)])
def test_what_rows_cannot_hold_is_said_at_the_start_and_in_the_result(answer, kept, tmp_path, capsys):
    chat = [{"role": "user", "content": "说"}, {"role": "assistant", "content": answer}]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps({"conversations": [*chat, *chat]}) + "\n" for _ in range(9)), "utf-8")
    flags = [*TINY, "--max_steps", 1, "--val_split", 0, "--from_weight", "none", "--data_path", file]
    result = load("3-full_sft.py").main([str(f) for f in [*flags, "--out_dir", tmp_path / "o"]])
    out, err = capsys.readouterr()
    assert result["learned_kept_share"] == pytest.approx(kept, abs=0.02)
    assert f"{result['learned_kept_share']:.1%} of the learned tokens kept" in out
    warned = f"warning: answers longer than a row lose their end, {1 - result['learned_kept_share']:.1%} of what"
    assert (warned in err) == (kept < 0.95) and ("raise --seq_len 64" in err) == (kept < 0.95)


@pytest.mark.parametrize(("rank", "said"), [("0", "NOTE: once\n"), ("1", "")])
def test_a_note_is_printed_by_one_process(monkeypatch, capsys, rank, said):
    monkeypatch.setenv("RANK", rank)
    note("once")
    assert capsys.readouterr().out == said
