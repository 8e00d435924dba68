"""A GPU that is only pretended: tensors say cuda:0 and keep their numbers on the CPU.

What is real: autograd, CUDA's autocast rules, the numbers. What is checked as CUDA's kernels check it: that operands
stand on one device, the types the variable-length attention and the grouped products take. What is counted, with the
line of ours that caused it: launches (operations a GPU would be given) and waits (moments in which the CPU needs
something from the GPU and stands still until all that was queued is done).

What it cannot show: real kernels and their speed, float16 experts, NCCL, CUDA graphs. It needs g++ and a torch built
for the CPU, whose place for CUDA is free.
"""

import contextlib
import ctypes
import subprocess
import tempfile
import traceback
from collections import Counter
from importlib import metadata, util
from pathlib import Path


def load_hooks() -> None:
    """Compiles cuda_hooks.cpp against the installed torch, once, and loads it: before torch, which looks for a GPU when
    it is imported."""
    base = Path(util.find_spec("torch").origin).parent
    library = Path(tempfile.gettempdir()) / f"pretended_gpu-{metadata.version('torch')}.so"
    if not library.exists():
        includes = [f"-I{base}/include", f"-I{base}/include/torch/csrc/api/include"]
        links = [f"-L{base}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{base}/lib"]
        source = Path(__file__).with_name("cuda_hooks.cpp")
        part = library.with_suffix(".part")
        command = ["g++", "-O1", "-std=c++20", "-fPIC", "-shared", *includes, str(source), "-o", str(part), *links]
        subprocess.run(command, check=True)
        part.rename(library)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


load_hooks()

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

ROOT = Path(__file__).resolve().parent.parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
# Operations that move no numbers: on a GPU they launch nothing.
VIEWS = """view _unsafe_view reshape transpose t expand slice select unsqueeze squeeze permute detach alias as_strided
    split split_with_sizes chunk unbind lift_fresh _reshape_alias is_same_size unfold empty empty_like empty_strided
    new_empty new_empty_strided diagonal view_as_real set_ resize_""".split()  # noqa: SIM905
# Operations whose result the CPU needs to go on: a number, or a shape that depends on the values.
WAITING = "_local_scalar_dense nonzero masked_select unique _unique2 unique_consecutive equal is_nonzero".split()  # noqa: SIM905
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Counts:
    """What the GPU would have been given since the last reset."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.launches = 0
        self.waits = Counter()  # (why, our line) -> how often
        self.attention = Counter()  # the types of queries, keys and values that the variable-length kernel was given

    def wait(self, why: str) -> None:
        self.waits[f"{why} at {our_line()}"] += 1

    def snapshot(self) -> dict:
        return {"launches": self.launches, "waits": dict(self.waits), "attention": list(self.attention)}


COUNTS = Counts()


def our_line() -> str:
    """The innermost line of the project on the stack, tests left out."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests") and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "?"


class OnGpu(torch.Tensor):
    """A tensor on the pretended GPU; `here` holds its numbers on the CPU."""

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            layout=here.layout, device=CUDA, requires_grad=False,
        )  # fmt: skip

    def __init__(self, here):
        self.here = here

    def tolist(self):
        COUNTS.wait("tolist")
        return self.here.tolist()

    def __repr__(self):
        return f"OnGpu({self.here})"

    def __reduce_ex__(self, protocol):
        return self.here.__reduce_ex__(protocol)  # saved, and loaded on the CPU as map_location would have it

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


class Mode(TorchDispatchMode):
    """Sees the operations that make tensors on the GPU from none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and function._can_decompose():
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return run(function, args, kwargs)


# --------------------------------------------------------------------------------------------------- one operation
def run(function, args, kwargs):
    """The operation, computed on the CPU; its result stands where CUDA would leave it."""
    name = function._schema.name.split("::")[1]
    if name in ("_to_copy", "copy_"):
        return copy(function, name, args, kwargs)
    tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, torch.Tensor)]
    there = any(isinstance(t, OnGpu) for t in tensors)
    target = kwargs.get("device")
    if not there and (target is None or torch.device(target).type != "cuda"):
        return function(*args, **kwargs)
    if there:
        check_devices(name, tensors)
        check_kernel(name, args, kwargs)
        count_waits(name, args, kwargs)
    COUNTS.launches += name not in VIEWS
    a, k = tree_map(as_cpu, (args, kwargs))
    result = KERNELS.get(name, function)(*a, **k)
    if name in ("_local_scalar_dense", "equal", "is_same_size"):
        return result
    result = tree_map(lambda x: OnGpu(x) if isinstance(x, torch.Tensor) else x, result)
    if there and any(r.alias_info is not None for r in function._schema.returns):
        return return_and_correct_aliasing(function, args, kwargs, result)
    return result


def as_cpu(x):
    if isinstance(x, OnGpu):
        return x.here
    return CPU if isinstance(x, torch.device) else x


def copy(function, name: str, args, kwargs):
    """Between types and devices: from pinned memory, asked for without waiting, is the only way up that is no wait."""
    if name == "copy_":
        target, source = args[0], args[1]
        to_gpu, from_gpu = isinstance(target, OnGpu), isinstance(source, OnGpu)
        with torch.no_grad():
            function(as_cpu(target), as_cpu(source), *args[2:], **kwargs)
        result, free = target, False
    else:
        source, target = args[0], kwargs.get("device")
        from_gpu = isinstance(source, OnGpu)
        to_gpu = from_gpu if target is None else torch.device(target).type == "cuda"
        result = function(as_cpu(source), *args[1:], **(kwargs | {"device": CPU, "pin_memory": False}))
        result = OnGpu(result) if to_gpu else result
        free = kwargs.get("non_blocking") and getattr(source, "pinned", False)
    if from_gpu and not to_gpu:
        COUNTS.wait("copy from the GPU")
    if to_gpu and not from_gpu and not free:
        COUNTS.wait("copy to the GPU that is not from pinned memory")
    COUNTS.launches += to_gpu
    return result


def check_devices(name: str, tensors) -> None:
    """CUDA takes single numbers of the CPU, and nothing else of it."""
    for t in tensors:
        if not isinstance(t, OnGpu) and t.dim() > 0:
            if name not in INDEXING:
                raise RuntimeError(f"Expected all tensors to be on the same device: {name} at {our_line()}")
            COUNTS.wait("index on the CPU")


def check_kernel(name: str, args, kwargs) -> None:
    """What two kernels insist on, and CPU code does not."""
    if name == "_varlen_attn":
        q, k, v, ends = args[:4]
        COUNTS.attention[f"{q.dtype} {k.dtype} {v.dtype}"] += 1
        if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError(f"FlashAttention takes one type, fp16 or bf16, not {q.dtype} {k.dtype} {v.dtype}")
        if ends.dtype != torch.int32:
            raise RuntimeError(f"cumulative lengths must be int32, not {ends.dtype}")
    if name == "_grouped_mm":
        half = args[0].dtype == torch.bfloat16
        for matrix in args[:2]:
            wide = [stride for stride in matrix.stride()[-2:] if stride != 1]
            if matrix.dtype != args[0].dtype or any(stride * matrix.element_size() % 16 for stride in wide):
                raise RuntimeError(
                    f"grouped_mm takes one type with strides of 16 bytes, not {matrix.dtype} {matrix.stride()}"
                )
        if not half or torch.cuda.get_device_capability() < (9, 0):
            COUNTS.wait("grouped_mm's way for older GPUs and other types, which copies the group sizes")


def count_waits(name: str, args, kwargs) -> None:
    if name in WAITING:
        COUNTS.wait(name)
    indices = args[1] if name in INDEXING else ()
    if any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices):
        COUNTS.wait("boolean index")
    if name == "repeat_interleave" and kwargs.get("output_size") is None and isinstance(args[-1], OnGpu):
        COUNTS.wait(name)


# ------------------------------------------------------------------------------------ kernels that a CPU does not have
def varlen_attention(q, k, v, ends, ends_k, longest, longest_k, is_causal=False, *more):
    """q (N, H, h), k and v (N, G, h), documents between ends -> as torch_attn::_varlen_attn; causal."""
    out = torch.empty_like(q)
    for begin, end in documents(ends):
        part = (x[begin:end].transpose(0, 1).float()[None] for x in (q, k, v))
        found = F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)[0]
        out[begin:end] = found.transpose(0, 1).to(q.dtype)
    return out, torch.zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64)


def varlen_attention_backward(d_out, q, k, v, out, lse, ends, *more):
    H, G, h = q.shape[1], k.shape[1], q.shape[2]
    gradients = [torch.zeros_like(x) for x in (q, k, v)]
    for begin, end in documents(ends):
        n = end - begin
        Q, K, V, D = (x[begin:end].transpose(0, 1).float() for x in (q, k, v, d_out))
        K, V = K.repeat_interleave(H // G, 0), V.repeat_interleave(H // G, 0)
        later = torch.ones(n, n, dtype=torch.bool).triu(1)
        p = (Q @ K.mT / h**0.5).masked_fill(later, float("-inf")).softmax(-1)  # (H, n, n)
        d_p = D @ V.mT
        d_scores = p * (d_p - (d_p * p).sum(-1, keepdim=True)) / h**0.5
        parts = d_scores @ K, (d_scores.mT @ Q).view(G, H // G, n, h).sum(1), (p.mT @ D).view(G, H // G, n, h).sum(1)
        for gradient, part in zip(gradients, parts, strict=True):
            gradient[begin:end] = part.transpose(0, 1).to(gradient.dtype)
    return tuple(gradients)


def documents(ends):
    ends = ends.tolist()
    return [(begin, end) for begin, end in zip(ends, ends[1:], strict=False) if end > begin]


def fused_rms_norm_backward(d_out, x, shape, rstd, weight, *more):
    """CUDA has one kernel where the CPU decomposes."""
    x32, g32 = x.float(), d_out.float()
    normed, weighted = x32 * rstd, g32 * weight.float()
    d_x = rstd * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    return d_x.to(x.dtype), (g32 * normed).flatten(0, -2).sum(0).to(weight.dtype)


def histogram(x, *args, **kwargs):
    """CUDA counts integers too."""
    return torch.histc(x.float(), *args, **kwargs).to(x.dtype)


KERNELS = {
    "_varlen_attn": varlen_attention, "_varlen_attn_backward": varlen_attention_backward,
    "_fused_rms_norm_backward": fused_rms_norm_backward, "histc": histogram,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ switching it on
class Properties:
    """Of the pretended device, as torch.cuda.get_device_properties has them."""

    total_memory, multi_processor_count, name = 24 * 2**30, 82, "NVIDIA GeForce RTX 3090"

    def __init__(self, capability):
        self.major, self.minor = capability


def pretend(capability: tuple[int, int]) -> None:
    """From here on torch.cuda speaks of one GPU of this compute capability."""
    generator = torch.Generator()
    answers = {
        "_lazy_init": None, "is_available": True, "get_device_capability": capability, "set_device": None,
        "is_bf16_supported": capability >= (8, 0), "get_device_name": Properties.name, "current_device": 0,
        "device_count": 1, "max_memory_allocated": 0, "synchronize": None, "is_current_stream_capturing": False,
        "get_device_properties": Properties(capability), "manual_seed": None, "manual_seed_all": None,
        "reset_peak_memory_stats": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.graphs.is_current_stream_capturing = lambda: False
    torch.cuda.get_rng_state = lambda device=None: generator.get_state()
    torch.cuda.set_rng_state = lambda state, device=None: generator.set_state(state)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.autograd.set_multithreading_enabled(False)  # the backward pass in this thread, in which the mode is on
    torch.Tensor.pin_memory = pinned
    torch.tensor = on_device(torch.tensor)


@contextlib.contextmanager
def gpu(capability: tuple[int, int]):
    """Within, there is such a GPU and its work is counted. For a process of its own: nothing is put back."""
    pretend(capability)
    with Mode():
        yield COUNTS


def pinned(tensor, *args):
    copy = tensor.clone()
    copy.pinned = True
    return copy


def on_device(make):
    """torch.tensor(..., device=) makes its tensor before any mode sees it."""

    def tensor(data, *, dtype=None, device=None, requires_grad=False):
        made = make(data, dtype=dtype)
        made = made if device is None else made.to(device)
        return made.requires_grad_(requires_grad)

    return tensor
