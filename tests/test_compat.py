"""What the project takes from other libraries without their promise to keep it: where it stands, and that it is there.

A library may drop a private name in any version. Then a test here is red and says what no longer works.
"""

import ast

import pytest
import torch
from test_structure import CODE, ROOT

from inference.cpu_kernels import has_packed

# file: private names of libraries used in it. A new one wants a line here and a test below; the best is to do without.
PRIVATE = {
    "inference/compiled_step.py": {"_dynamo"},
    "inference/cpu_kernels.py": {"_linear_pointwise", "_reorder_linear_weight"},
    "trainer/deepspeed_config.py": {"__compatible_ops__"},
    "trainer/deepspeed_engine.py": {"_config"},
    "trainer/optimizers.py": {"_foreach_add_", "_foreach_lerp_", "_foreach_mul_"},
}
# What a class derived from transformers' PreTrainedModel says of itself; transformers reads these by name.
DECLARED = {"_no_split_modules", "_supports_sdpa", "_can_compile_fullgraph", "_tied_weights_keys"}
OF_PYTHON = {"_exit", "_replace", "__annotations__", "__cause__", "__context__", "__version__"}  # documented
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in CODE}


def own_names() -> set[str]:
    """Names with an underscore that this project defines itself: functions, attributes of self, globals."""
    names = set()
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            names |= {node.attr} if node.value.id == "self" else set()
    return names


def private_names(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {*node.module.split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
    return {name for name in found if name.startswith("_") and not hasattr(type, name)}


def test_private_names_of_libraries_stand_where_they_are_listed():
    ours = own_names() | OF_PYTHON
    found = {name: private_names(tree) - ours for name, tree in TREES.items()}
    assert {name: names for name, names in found.items() if names} == PRIVATE


def test_without_these_operators_answers_on_a_cpu_come_from_slower_products():
    """inference.cpu_kernels asks for them and falls back to the plain product, in silence."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch was built without oneDNN")
    assert has_packed()


def test_without_this_function_a_compiled_decode_step_is_no_cuda_graph():
    assert callable(torch._dynamo.mark_static_address)


def test_without_these_functions_muon_takes_no_step():
    """One operation on a list of tensors, as torch's own optimizers do them."""
    assert all(callable(getattr(torch, name)) for name in PRIVATE["trainer/optimizers.py"])


def test_transformers_still_reads_what_the_model_declares():
    """Without _supports_sdpa attention falls back to eager, without _tied_weights_keys the head is saved twice, without
    _no_split_modules a layer may be split between devices, without _can_compile_fullgraph generate() compiles none."""
    from transformers import PreTrainedModel

    from model.model import MiniMindForCausalLM

    declared = {name for name in DECLARED if any(name in vars(c) for c in MiniMindForCausalLM.__mro__[:3])}
    assert declared == DECLARED and all(hasattr(PreTrainedModel, name) for name in DECLARED)


@pytest.mark.slow  # DeepSpeed takes longer to import than to run
def test_without_these_deepspeed_does_not_load_what_another_number_of_processes_saved():
    """__compatible_ops__ keeps a CPU without a compiler from failing at the start; the other is tested with a run in
    test_deepspeed.py, here is only its name."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig

    from trainer.deepspeed_config import import_deepspeed

    deepspeed = import_deepspeed(torch.device("cpu"))
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    assert DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1}).load_universal_checkpoint is False
