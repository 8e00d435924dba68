"""Downloads MiniMind's published data and weights, and the exams, by name.

    python scripts/download_data.py                                    what there is
    python scripts/download_data.py pretrain_hq sft_mini_512           into dataset/
    python scripts/download_data.py ceval --source huggingface         into dataset/exams/ceval
    python scripts/download_data.py weights minimind2                  MiniMind's releases, into weights/MiniMind2
    HF_ENDPOINT=https://MIRROR python scripts/download_data.py ...     a mirror of Hugging Face
    MODELSCOPE_ENDPOINT=https://HOST python scripts/download_data.py --source modelscope ...

Without --source Hugging Face is asked, and where that does not answer ModelScope, if its client is installed (pip
install modelscope-hub); it has no exams. The sources' own client libraries do the transfer. A broken transfer goes on
where it stopped, also when the command is given again. Sizes and licences are shown, and the free disk is checked,
before anything is fetched. If the source publishes a file's SHA-256, the file is compared with it.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import RunFailed, UserError, disk_fault, run_main
from common.files import lock
from common.flags import Parser
from exams.published import arrange


@dataclass(frozen=True)
class Item:
    """Something that can be fetched: files of a repository that match patterns, and where they go."""

    about: str
    huggingface: str
    modelscope: str | None
    files: tuple[str, ...]
    folder: str = "dataset"
    kind: str = "dataset"  # or "model"
    exam: bool = False


def _data(about: str, file: str) -> Item:
    return Item(about, "jingyaogong/minimind_dataset", "gongjy/minimind_dataset", (file,))


def _weights(about: str, name: str, modelscope: str) -> Item:
    files = ("*.json", "*.jinja", "*.safetensors", "*.bin", "*.pth", "*.txt")  # no *.py: its code is not run
    return Item(about, f"jingyaogong/{name}", f"gongjy/{modelscope}", files, f"weights/{name}", "model")


def _exam(about: str, repo: str, folder: str, *files: str) -> Item:
    return Item(about, repo, None, files, f"dataset/exams/{folder}", exam=True)


# Sizes here are for orientation, as MiniMind's README gives them; the sources are asked before a download.
ITEMS = {
    "pretrain_hq": _data("MiniMind 2, pretraining, 1.6 GB", "pretrain_hq.jsonl"),
    "sft_mini_512": _data("MiniMind 2, conversations, 1.2 GB", "sft_mini_512.jsonl"),
    "sft_512": _data("MiniMind 2, conversations, 7.5 GB", "sft_512.jsonl"),
    "sft_1024": _data("MiniMind 2, conversations, 5.6 GB", "sft_1024.jsonl"),
    "sft_2048": _data("MiniMind 2, conversations, 9 GB", "sft_2048.jsonl"),
    "r1_mix_1024": _data("MiniMind 2, reasoning traces, 340 MB", "r1_mix_1024.jsonl"),
    "dpo": _data("preference pairs", "dpo.jsonl"),
    "lora_identity": _data("who the assistant is, 23 KB", "lora_identity.jsonl"),
    "lora_medical": _data("medical questions, 34 MB", "lora_medical.jsonl"),
    "tokenizer_train": _data("text for a tokenizer, 1 GB", "tokenizer_train.jsonl"),
    "pretrain_t2t_mini": _data("MiniMind 3, pretraining, 1.2 GB", "pretrain_t2t_mini.jsonl"),
    "pretrain_t2t": _data("MiniMind 3, pretraining, 10 GB", "pretrain_t2t.jsonl"),
    "sft_t2t_mini": _data("MiniMind 3, conversations, 1.6 GB", "sft_t2t_mini.jsonl"),
    "sft_t2t": _data("MiniMind 3, conversations, 14 GB", "sft_t2t.jsonl"),
    "rlaif": _data("MiniMind 3, prompts for reinforcement, 24 MB", "rlaif.jsonl"),
    "rlaif-mini": _data("MiniMind 2.5, prompts for reinforcement", "rlaif-mini.jsonl"),
    "agent_rl": _data("MiniMind 3, tasks with tools, 86 MB", "agent_rl.jsonl"),
    "agent_rl_math": _data("MiniMind 3, sums with tools, 18 MB", "agent_rl_math.jsonl"),
    "minimind2": _weights("104M, transformers format", "MiniMind2", "MiniMind2"),
    "minimind2-pth": _weights("all MiniMind 2 weights as .pth", "MiniMind2-Pytorch", "MiniMind2-PyTorch"),
    "minimind-3": _weights("64M, transformers format", "minimind-3", "minimind-3"),
    "minimind-3-pth": _weights("all MiniMind 3 weights as .pth", "minimind-3-pytorch", "minimind-3-pytorch"),
    "ceval": _exam("C-Eval, 52 subjects", "ceval/ceval-exam", "ceval", "*.parquet", "*.zip"),
    "cmmlu": _exam("CMMLU, 67 subjects", "haonan-li/cmmlu", "cmmlu", "*.zip", "*.parquet"),
    "aclue": _exam("ACLUE, old Chinese, 15 subjects", "tyouisen/aclue", "aclue", "*.zip", "*.parquet"),
    "tmmluplus": _exam("TMMLU+, traditional Chinese, 66 subjects", "ikala/tmmluplus", "tmmluplus", "data/*.csv"),
    "openbookqa": _exam("OpenBookQA", "allenai/openbookqa", "openbookqa", "main/*.parquet"),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ sources
@dataclass(frozen=True)
class Remote:
    """A file at its source; size in bytes, sha256 where the source tells it."""

    path: str
    size: int
    sha256: str | None

    def __post_init__(self):
        if not isinstance(self.path, str) or not isinstance(self.size, int) or self.size < 0:
            raise ValueError(f"it lists a file of the name {self.path!r} and the size {self.size!r}")


class NoAnswer(RunFailed):
    """A source could not be reached, or sent something else than was asked for."""


class HuggingFace:
    """Through huggingface_hub; HF_ENDPOINT names a mirror."""

    name = "huggingface"

    def __init__(self):
        from huggingface_hub import constants

        self.endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")

    def repository(self, item: Item) -> str:
        return item.huggingface

    def listing(self, item: Item) -> tuple[str, list[Remote]]:
        from huggingface_hub import HfApi

        hub = HfApi(endpoint=self.endpoint)
        info = hub.repo_info(item.huggingface, repo_type=item.kind, files_metadata=True, timeout=CONNECT)
        licence = (info.card_data or {}).get("license") or "not stated"
        return str(licence), [Remote(f.rfilename, f.size or 0, f.lfs.sha256 if f.lfs else None) for f in info.siblings]

    def fetch(self, item: Item, file: Remote, folder: Path) -> None:
        """Uses the client's http_get: `hf_hub_download` (2.4.0) would begin anew each time the command is given."""
        from huggingface_hub.file_download import hf_hub_url, http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(item.huggingface, file.path, repo_type=item.kind, endpoint=self.endpoint)
        part = folder / f"{file.path}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        with lock(part, f"another download of {folder / file.path} is under way; wait for it") as there:
            # Without a checksum nobody would notice that the part is of a file that the source has replaced since.
            if file.sha256 is None or (file.size and there.seek(0, os.SEEK_END) > file.size):
                there.truncate(0)
            done = there.seek(0, os.SEEK_END)
            http_get(url, there, resume_size=done, headers=build_hf_headers(), expected_size=file.size or None)
        os.replace(part, folder / file.path)

    def address(self, item: Item, path: str) -> str:
        prefix = "datasets/" if item.kind == "dataset" else ""
        return f"{self.endpoint}/{prefix}{item.huggingface}/resolve/main/{path}"


class ModelScope:
    """Through modelscope_hub, the client of modelscope; MODELSCOPE_ENDPOINT names another host."""

    name = "modelscope"

    def __init__(self):
        try:
            from modelscope_hub.api import HubApi
        except ImportError:
            raise UserError("--source modelscope needs its client: pip install modelscope-hub") from None
        self.api = HubApi()

    def repository(self, item: Item) -> str:
        if item.modelscope is None:
            raise UserError(f"{item.huggingface} is fetched from --source huggingface only")
        return item.modelscope

    def listing(self, item: Item) -> tuple[str, list[Remote]]:
        licence = self.api.get_repo(item.modelscope, item.kind).license or "not stated"
        files = self.api.list_repo_files(item.modelscope, item.kind)
        return str(licence), [Remote(f.path, f.size, f.sha256) for f in files if not f.is_dir]

    def fetch(self, item: Item, file: Remote, folder: Path) -> None:
        self.api.download_file(item.modelscope, item.kind, file.path, local_dir=folder, expected_sha256=file.sha256,
                               file_size=file.size or None)  # fmt: skip

    def address(self, item: Item, path: str) -> str:
        host = os.environ.get("MODELSCOPE_ENDPOINT", "https://www.modelscope.cn")
        return f"{host.rstrip('/')}/{item.kind}s/{item.modelscope}/resolve/master/{path}"


SOURCES = {source.name: source for source in (HuggingFace, ModelScope)}
CONNECT = 20.0  # seconds to wait for Hugging Face: where it is blocked the system alone would wait for minutes


def sources_of(name: str | None) -> list:
    """The source of that name; without one all, in the order in which they are asked, whose clients are installed."""
    if name:
        return [SOURCES[name]()]
    with contextlib.suppress(UserError):
        return [HuggingFace(), ModelScope()]
    return [HuggingFace()]


def other_ways(source, item: Item) -> str:
    """For a source that does not answer: where else the same files may be had."""
    mirror = "a mirror of Hugging Face (HF_ENDPOINT=https://MIRROR before the command)"
    other = "modelscope (pip install modelscope-hub)" if source.name == "huggingface" else "huggingface"
    return f"{mirror} or --source {other}" if item.modelscope else mirror


# ----------------------------------------------------------------------------------------------------------- download
def download(names: list[str], sources: list, out_dir: str | None, overwrite: bool) -> dict:
    """Fetches the named items, each from the first source that answers -> what was fetched, verified, there before."""
    if unknown := [name for name in names if name not in ITEMS]:
        raise UserError(f"unknown: {', '.join(unknown)}; there are {', '.join(ITEMS)}")
    plan = []  # (source, item, file, where it goes)
    for name in names:
        item = ITEMS[name]
        folder = Path(out_dir or item.folder)
        source, licence, files = _first_answer(sources, item, folder)
        print(f"{name}: {item.about}; from {source.name}, {source.repository(item)}; licence: {licence}")
        for file in files:
            print(f"  {file.size / 2**20:>12,.1f} MB  {folder / file.path}")
            plan.append((source, item, file, folder))
    missing = [entry for entry in plan if not _is_there(*entry[2:], overwrite)]
    needed = sum(file.size for *_, file, _ in missing)
    _check_disk({folder for *_, folder in plan}, needed)
    print(f"{len(missing)} of {len(plan)} files to fetch, {needed / 2**30:.2f} GB")
    verified = 0
    for source, item, file, folder in missing:
        _attempt(source, item, folder, file.path, partial(source.fetch, item, file, folder))
        verified += _verify(folder / file.path, file)
    for folder in sorted({folder for _, item, _, folder in plan if item.exam}):
        print(f"{folder}: {arrange(folder)} files of questions")
    return {
        "stage": "download", "source": ", ".join(dict.fromkeys(source.name for source, *_ in plan)),
        "files": [str(folder / file.path) for *_, file, folder in plan],
        "fetched": len(missing), "bytes": needed, "verified": verified,
    }  # fmt: skip


def _first_answer(sources: list, item: Item, folder: Path) -> tuple:
    """-> (the first source that answers, licence, files of the item)."""
    *first, last = [source for source in sources if item.modelscope or source.name != "modelscope"] or sources
    for source in first:
        try:
            return source, *_listing(source, item, folder)
        except NoAnswer as error:
            print(f"{str(error).partition(';')[0]}; asking {last.name}", flush=True)
    return last, *_listing(last, item, folder)


def _listing(source, item: Item, folder: Path) -> tuple[str, list[Remote]]:
    source.repository(item)
    licence, there = _attempt(source, item, folder, item.files[0], partial(source.listing, item))
    files = [f for f in there if any(fnmatch.fnmatch(f.path, pattern) for pattern in item.files)]
    if astray := [f.path for f in files if not _inside(folder, f.path)]:
        repository = source.repository(item)
        raise RunFailed(f"{repository} lists {astray[0]!r}, which lies outside {folder}: nothing was fetched")
    if not files:
        names = ", ".join(sorted(f.path for f in there)[:30])
        raise RunFailed(f"{source.repository(item)} has no {' or '.join(item.files)} any more; it holds {names}")
    return licence, files


def _inside(folder: Path, path: str) -> bool:
    """Whether a path that a source lists lies inside the folder, on every system: not above it, not from the root or a
    drive, and not through a link."""
    if set(path) & set("\\:\0") or path.startswith("/") or ".." in path.split("/"):
        return False
    return (folder / path).parent.resolve().is_relative_to(folder.resolve())


def _attempt(source, item: Item, folder: Path, path: str, action):
    """action(), or one line that tells where to fetch the file by hand."""
    try:
        return action()
    except (UserError, RunFailed, KeyboardInterrupt):
        raise
    except Exception as error:  # each client has its own errors; all but a full disk mean that nothing was received
        if disk_fault(error):
            raise OSError(error.errno, error.strerror, str(folder / path)) from None
        said = str(error).strip().splitlines() or [""]
        raise NoAnswer(
            f"{source.name} did not answer ({type(error).__name__}: {said[0][:200].replace(';', ',')}); the same "
            f"command goes on where it stopped. Other ways: {other_ways(source, item)}. By hand: fetch "
            f"{source.address(item, path)} and put it at {folder / path}"
        ) from None


def _is_there(file: Remote, folder: Path, overwrite: bool) -> bool:
    """Whether the whole file is in place. Another file of its name is not replaced unasked."""
    path = folder / file.path
    if not path.exists():
        return False
    same = path.stat().st_size == file.size and (file.sha256 is None or sha256_of(path) == file.sha256)
    if not same and not overwrite:
        raise UserError(f"{path} exists and is another file than the source's; --overwrite replaces it")
    if not same:
        path.unlink()
    return same


def _check_disk(folders: set[Path], needed: int):
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise UserError(
                f"{needed / 2**30:.2f} GB are needed and {free / 2**30:.2f} GB are free in {folder}; "
                "make room, or name another disk with --out_dir"
            )


def _verify(path: Path, file: Remote) -> bool:
    """True if the source tells a checksum and it fits; a wrong file is deleted."""
    wrong = path.stat().st_size != file.size if file.size else False
    if file.sha256:
        wrong = wrong or sha256_of(path) != file.sha256
    if wrong:
        path.unlink()
        raise RunFailed(f"{path} came damaged (its size or SHA-256 is not the source's) and was deleted; try again")
    return file.sha256 is not None


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to fetch; without any the list is shown")
    parser.add_argument("--source", choices=tuple(SOURCES), help="(huggingface, else modelscope)")
    parser.add_argument("--out_dir", metavar="FOLDER", help="default: dataset, dataset/exams/NAME, weights/NAME")
    parser.flag(parser, "overwrite", False, "replace files of the same name that are not the source's")
    args = parser.parse_args(argv)
    if not args.names:
        for name, item in ITEMS.items():
            print(f"{name:<20}{item.about:<48}{item.folder}")
        print(json.dumps({"stage": "download", "names": list(ITEMS)}))
        return
    if args.names[0] == "weights":
        releases = [name for name, item in ITEMS.items() if item.kind == "model"]
        args.names = args.names[1:]
        if not args.names or set(args.names) - set(releases):
            raise UserError(f"weights of which release? There are {', '.join(releases)}")
    result = download(args.names, sources_of(args.source), args.out_dir, args.overwrite)
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    run_main(main)
