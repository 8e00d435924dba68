"""DeepSpeed in the place of the plain engine: the same losses, the same files, and one truth between file and flags."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from stage import ROOT, STAGES, last_json, load, run, run_flags
from test_dist import TORCHRUN, assert_same_losses, flags_of, free_port

from common.errors import UserError
from model.weights import load_model
from trainer.deepspeed_config import fill, read_config
from trainer.stage_flags import DEEPSPEED_CONFIG, parse, stage_parser

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
pytest.importorskip("deepspeed", reason="deepspeed cannot be imported here", exc_type=ImportError)
LAUNCHER = shutil.which("deepspeed", path=os.path.dirname(sys.executable)) or shutil.which("deepspeed")


def config_file(folder, **changes):
    path = folder / "ds.json"
    path.write_text(json.dumps(json.loads(DEEPSPEED_CONFIG.read_text()) | changes))
    return path


def args_of(*flags, **defaults):
    return parse(stage_parser("pretrain", "", **defaults), [str(f) for f in ("--device", "cpu", *flags)])


# ------------------------------------------------------------------------------------------------- file and flags
def test_auto_values_come_from_the_flags():
    args = args_of("--batch_size", 3, "--accumulation_steps", 5, "--learning_rate", 0.002, "--grad_clip", 0.5)
    args.deepspeed = str(DEEPSPEED_CONFIG)
    for dtype, low in ((torch.float32, None), (torch.bfloat16, "torch_autocast"), (torch.float16, "fp16")):
        config = fill(read_config(args.deepspeed), args, 2, dtype)
        assert config["train_micro_batch_size_per_gpu"] == 3 and config["gradient_accumulation_steps"] == 5
        assert config["train_batch_size"] == 30 and config["gradient_clipping"] == 0.5
        assert config["optimizer"]["params"] == {
            "lr": 0.002, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True
        }  # fmt: skip
        enabled = [name for name in ("bf16", "fp16", "torch_autocast") if config.get(name, {}).get("enabled")]
        assert enabled == [low] * (low is not None)


@pytest.mark.parametrize(("changes", "flags", "words"), [
    ({"train_micro_batch_size_per_gpu": 4}, [], ["train_micro_batch_size_per_gpu is 4", "--batch_size is 8"]),
    ({"gradient_accumulation_steps": 3}, [], ["gradient_accumulation_steps is 3", "--accumulation_steps is 4"]),
    ({"train_batch_size": 64}, [], ["train_batch_size is 64", "processes is 32"]),
    ({"gradient_clipping": 2}, [], ["gradient_clipping is 2", "--grad_clip is 1"]),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, [], ["lr is 0.0001", "--learning_rate is 0.001"]),
    ({"optimizer": {"type": "Lamb"}}, [], ["type is Lamb", "--optimizer"]),
    ({"optimizer": {"params": {"betas": [0.8, 0.999]}}}, [], ["betas is [0.8, 0.999]", "[0.9, 0.95]"]),
    ({"bf16": {"enabled": True}}, [], ["bf16 enabled", "--dtype is float32"]),
    ({"torch_autocast": {"enabled": False}}, ["--dtype", "bfloat16"], ["none of bf16", "--dtype is bfloat16"]),
    ({"scheduler": {"type": "WarmupLR"}}, [], ["scheduler", "--schedule"]),
    ({"zero_optimization": {"stage": 2, "overlap_com": True}}, [], ["ds.json: ", "overlap_com"]),
    ({"zero_optimization": {"stage": 7}}, [], ["ds.json: ", "stage", "7"]),
    ({"zero_optimization": 2}, [], ["zero_optimization must be a JSON object, not 2"]),
    ({"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}}, ["--dtype", "bfloat16"],
     ["torch_autocast and bf16 enabled", "--dtype is bfloat16"]),
    ({}, ["--optimizer", "muon"], ["--optimizer muon does not work with --deepspeed"]),
    ({}, ["--compile"], ["--compile does not work with --deepspeed"]),
])  # fmt: skip
def test_what_is_wrong_is_one_line(changes, flags, words, tmp_path):
    with pytest.raises(UserError) as error:
        args_of("--deepspeed", config_file(tmp_path, **changes), *flags)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_files_that_are_no_config(tmp_path):
    (tmp_path / "bad.json").write_text("{stage: 2}")
    (tmp_path / "list.json").write_text("[2]")
    for path, words in (
        (tmp_path / "bad.json", "cannot be read as JSON"),
        (tmp_path / "list.json", "must hold a JSON object"),
        (tmp_path / "no.json", "cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            args_of("--deepspeed", path)


def test_adamw_is_the_default_there_and_only_there():
    assert args_of(optimizer="muon").optimizer == "muon"
    assert args_of("--deepspeed", DEEPSPEED_CONFIG, optimizer="muon").optimizer == "adamw"


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        args_of("--deepspeed", DEEPSPEED_CONFIG)


# --------------------------------------------------------------------------------------------------------- runs
def launched(processes: int, script: str, *flags, **kwargs) -> subprocess.CompletedProcess:
    """The script as `deepspeed --num_gpus N` starts it."""
    command = [LAUNCHER, "--num_gpus", str(processes), "--master_port", str(free_port()), script, *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=300, **kwargs)


def environment() -> dict:
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}


def zero(folder, stage: int, **changes):
    """A config file of ZeRO `stage`."""
    path = folder / f"zero{stage}{''.join(changes)}.json"
    shutil.copy(config_file(folder, zero_optimization={"stage": stage, **changes}), path)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a run of one process, and its flags without the place of its output."""
    folder = tmp_path_factory.mktemp("plain")
    load("1-pretrain.py").main(flags_of("pretrain", folder, "plain", "--optimizer", "adamw"))
    return folder


def shared_flags(plain, out, processes=2, *more) -> list[str]:
    return [*flags_of("pretrain", plain, out, "--accumulation_steps", 4 // processes), *map(str, more)]


def assert_same_run(plain, out) -> None:
    assert_same_losses(plain / "plain" / "pretrain_32.jsonl", plain / out / "pretrain_32.jsonl")
    one, two = (load_model(plain / d / "pretrain_32.pth")[0].state_dict() for d in ("plain", out))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4, msg=name)
        assert two[name].dtype == torch.float32
    assert not list((plain / out).glob("*_resume*"))  # what was needed to go on is gone with the run


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_of_deepspeed_learn_what_a_plain_run_does(stage, plain):
    done = launched(2, "1-pretrain.py", *shared_flags(plain, f"zero{stage}"), "--deepspeed", zero(plain, stage))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "adamw in place of muon" in done.stdout and last_json_of(done)["steps"] == 8
    assert_same_run(plain, f"zero{stage}")


def last_json_of(done) -> dict:
    """Of what the program printed; the launcher's own lines begin with the date."""
    return last_json("\n".join(line for line in done.stdout.splitlines() if not line.startswith("[")))


@pytest.mark.slow
def test_the_moments_may_be_kept_on_the_cpu(plain):
    config = zero(plain, 2, offload_optimizer={"device": "cpu"})
    changed = json.loads(config.read_text()) | {"zero_force_ds_cpu_optimizer": False}
    config.write_text(json.dumps(changed))
    done = launched(2, "1-pretrain.py", *shared_flags(plain, "offload"), "--deepspeed", config)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(plain, "offload")


@pytest.mark.slow
def test_the_launcher_without_the_flag_is_ddp_and_says_so(plain):
    flags = shared_flags(plain, "ddp", 2, "--optimizer", "adamw")
    command = [LAUNCHER, "--master_port", str(free_port()), "--num_gpus=2", "1-pretrain.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 processes by DistributedDataParallel (DDP); started by the deepspeed launcher without" in done.stdout
    assert_same_run(plain, "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["lora", "dpo"])
def test_other_stages_run_under_zero_2(stage, tmp_path):
    exact = ["--dropout", "0", *(["--lora_dropout", "0"] if stage == "lora" else []), "--out_dir"]
    flags, script = [*run_flags(stage, tmp_path, steps=3), *exact], STAGES[stage]
    alone = last_json(run(script, *flags, tmp_path / "one", "--optimizer", "adamw").stdout)
    done = launched(2, script, *flags, tmp_path / "two", "--accumulation_steps", 1, "--deepspeed")
    assert done.returncode == 0, done.stderr[-2000:]
    two = last_json_of(done)
    assert (two["tokens"], two["steps"]) == (alone["tokens"], 3)
    for key in ("loss", "val_loss"):
        assert two[key] == pytest.approx(alone[key], rel=1e-5)


# ------------------------------------------------------------------------------------------------------ stop and go
def killed(command, state, delay: float) -> None:
    """Starts the launcher and its processes, and kills them all with SIGKILL `delay` seconds after the first save."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=environment(), start_new_session=True)  # fmt: skip
    while process.poll() is None and not state.exists():
        time.sleep(0.01)
    time.sleep(delay)
    kill_tree(process)


def kill_tree(process) -> None:
    import psutil

    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def interrupted(plain, out, launcher, flags, delay) -> None:
    killed([*launcher, "1-pretrain.py", *flags], plain / out / "pretrain_32_resume.pth", delay)


def deepspeed_launcher(processes=2) -> list[str]:
    return [LAUNCHER, "--num_gpus", str(processes), "--master_port", str(free_port())]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.05, 0.2, 0.4])
def test_killed_under_zero_1_and_resumed(delay, plain):
    out, config = f"killed{delay}", zero(plain, 1)
    flags = [*shared_flags(plain, out), "--save_interval", "1", "--deepspeed", str(config)]
    interrupted(plain, out, deepspeed_launcher(), flags, delay)
    done = launched(2, "1-pretrain.py", *flags, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed   at step" in done.stdout
    assert_same_run(plain, out)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "before", "after"), [(2, 2, 2), (3, 2, 2), (1, 2, 1), (2, 1, 2), (0, 2, 1)])
def test_resumed_with_the_same_or_another_number_of_processes(stage, before, after, plain):
    """With another number by DeepSpeed's universal checkpoint, made by --resume itself (ZeRO-0 needs none)."""
    out, config = f"other{stage}{before}{after}", zero(plain, stage)
    interrupted(plain, out, deepspeed_launcher(before),
                [*shared_flags(plain, out, before), "--deepspeed", str(config)], 0.05)  # fmt: skip
    done = launched(after, "1-pretrain.py", *shared_flags(plain, out, after), "--deepspeed", config, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed   at step" in done.stdout
    assert_same_run(plain, out)


@pytest.mark.slow
def test_a_state_of_one_engine_is_refused_by_the_other(plain):
    for out, first, second in (("mixed1", ["--deepspeed"], []), ("mixed2", [], ["--deepspeed"])):
        flags = shared_flags(plain, out, 1, "--optimizer", "adamw")
        interrupted(plain, out, deepspeed_launcher(1), [*flags, *first], 0)
        done = launched(1, "1-pretrain.py", *flags, *second, "--resume")
        assert done.returncode == 2 and "was saved with" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.05, 0.2, 0.4])
def test_two_plain_processes_killed_and_resumed(delay, plain):
    out = f"gloo{delay}"
    flags = [*shared_flags(plain, out), "--save_interval", "1", "--optimizer", "adamw"]
    interrupted(plain, out, TORCHRUN, flags, delay)
    resume_in_two(flags)
    assert_same_run(plain, out)


def resume_in_two(flags) -> None:
    done = subprocess.run([*TORCHRUN, "1-pretrain.py", *flags, "--resume"], cwd=ROOT, capture_output=True, text=True,
                          env=environment(), timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed   at step" in done.stdout


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_killed(plain):
    flags = [*shared_flags(plain, "grown", 1), "--save_interval", "1", "--optimizer", "adamw"]
    interrupted(plain, "grown", [sys.executable], flags, 0.05)
    resume_in_two([*flags, "--accumulation_steps", "2"])
    assert_same_run(plain, "grown")


@pytest.mark.slow
def test_two_processes_with_dropout_go_on_to_the_last_bit(plain):
    """Each draws what it would have drawn: its random numbers are part of the state."""
    weights = []
    for out in ("whole", "halves"):
        flags = [*shared_flags(plain, out), "--save_interval", "1", "--optimizer", "adamw", "--dropout", "0.1"]
        if out == "halves":
            interrupted(plain, out, TORCHRUN, flags, 0.1)
            resume_in_two(flags)
        else:
            subprocess.run([*TORCHRUN, "1-pretrain.py", *flags], cwd=ROOT, check=True, capture_output=True,
                           env=environment(), timeout=300)  # fmt: skip
        weights.append(load_model(plain / out / "pretrain_32.pth")[0].state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_an_adapter_killed_under_zero_2_goes_on_in_one_process(tmp_path):
    """The universal checkpoint of a model most of which is frozen."""
    flags = [*run_flags("lora", tmp_path, steps=8), "--dropout", "0", "--lora_dropout", "0", "--save_interval", "1",
             "--optimizer", "adamw"]  # fmt: skip
    alone = last_json(run(STAGES["lora"], *flags, "--out_dir", tmp_path / "one").stdout)
    flags += ["--out_dir", str(tmp_path / "two"), "--deepspeed"]
    state = tmp_path / "two" / "lora" / "x_32_resume.pth"
    killed([*deepspeed_launcher(), STAGES["lora"], *flags, "--accumulation_steps", "1"], state, 0.05)
    done = launched(1, STAGES["lora"], *flags, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed   at step" in done.stdout
    for key in ("loss", "val_loss"):
        assert last_json_of(done)[key] == pytest.approx(alone[key], rel=1e-5)
