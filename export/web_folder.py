"""A model as a static site that chats in the reader's browser: no server computes anything.

The page is ours (export/web/). llama.cpp comes compiled to WebAssembly in the npm package wllama: one fixed version,
whose files must have the hashes below. Nothing of it lies in this repository; `npm pack` brings it, or the user does.
Version 2.3.7 is the last that runs in 32-bit memory, which every browser has: 2.4 needs Memory64, 3 a host of its own
files for Safari. The folder is flat, and fit for any host of files.
"""

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path

from export.gguf_file import write_gguf
from model.tokenizer import encode_document
from model.tokenizer_files import backend_json

PAGE = Path(__file__).parent / "web"
ROOT = PAGE.parents[1]
WLLAMA = "2.3.7"
PACKAGE = {  # a file of the package: (its name in the site, sha256)
    "esm/index.min.js": (
        "wllama.js", "29e4320f49c2d7a5b55233146d80f32a0b92443d8594fa88f06efa72f18238fa"),
    "esm/single-thread/wllama.wasm": (
        "wllama-single.wasm", "529c780d43cb57cb9ac7ef4c42e16463afb0b2dec4ecaae9a6df8179c435fd71"),
    "esm/multi-thread/wllama.wasm": (
        "wllama-multi.wasm", "c700d3d40bf9055c02a3184f9fea421fa0cbff0ecdae9b6c824e889d5a87da9e"),
    "LICENCE": (
        "wllama-LICENCE.txt", "5866e3bd7e3cbd3f7c8bea6efd8a1e7fa7cc8de68c30f428aff7c6584a0fb720"),
}  # fmt: skip
TEXTS = ("index.html", "style.css", "chat.js", "model.js")
FILES = (*TEXTS, "sw.js", "NOTICE.txt", "LICENSE.txt", "model.json", "model.gguf",
         *(name for name, _ in PACKAGE.values()))  # fmt: skip
CONTEXT = 2048  # positions, at most: the cache of keys and values lives in the page's memory


@contextmanager
def wllama_package(given: str | None):
    """The folder of the unpacked package: `given`, or one that npm fills and that is gone afterwards.

    ValueError says what fails.
    """
    if given:
        check_package(Path(given))
        yield Path(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        fetch_package(Path(folder))
        check_package(Path(folder) / "package")
        yield Path(folder) / "package"


def fetch_package(folder: Path) -> None:
    """`npm pack` downloads the archive and runs nothing of it; four files are taken out."""
    by_hand = f"or bring the unpacked package @wllama/wllama {WLLAMA} yourself: --wllama DIR"
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"--format web fetches a package by npm, which is not installed; install Node.js, {by_hand}")
    command = [npm, "pack", "--silent", f"@wllama/wllama@{WLLAMA}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    archives = list(folder.glob("*.tgz"))
    if done.returncode or not archives:
        reason = (done.stderr.strip() or "no archive came").splitlines()[0]
        raise ValueError(f"npm could not fetch the package ({reason}); try again with a network, {by_hand}")
    with tarfile.open(archives[0]) as archive:
        for name in PACKAGE:
            path = folder / "package" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.extractfile(f"package/{name}").read())


def check_package(folder: Path) -> None:
    """ValueError unless the files are, to the last bit, those that were tested."""
    for name, (_, digest) in PACKAGE.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} lacks {name}: it is not the unpacked package @wllama/wllama {WLLAMA}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{path} is not the file of @wllama/wllama {WLLAMA}; only that version was tested")


def write_web_folder(
    folder: Path, package: Path, model, tokenizer, record: dict, name: str, dtype: str = "q8_0"
) -> str:
    """Fills `folder`, which is there and empty -> the architecture of its GGUF file.

    package: the unpacked package of wllama. dtype: of the matrices, as in write_gguf.
    Raises ValueError for a base model, and for what no GGUF file can hold.
    """
    if record.get("stage") == "pretrain":
        raise ValueError("a base model continues text and cannot chat; --format web wants a later stage's weights")
    architecture = write_gguf(folder / "model.gguf", model, tokenizer, name, dtype)
    start, end = encode_document(tokenizer, "")
    special = [token["id"] for token in backend_json(tokenizer)["added_tokens"] if token["special"]]
    about = {
        "name": name, "file": "model.gguf", "bytes": (folder / "model.gguf").stat().st_size, "dtype": dtype,
        "parameters": model.config.parameter_count(), "stage": record.get("stage"),
        "context": min(model.config.max_seq_len, CONTEXT), "start": start, "end": end, "special": special,
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(about, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    for source, (target, _) in PACKAGE.items():
        shutil.copyfile(package / source, folder / target)
    for text in TEXTS:
        shutil.copyfile(PAGE / text, folder / text)
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE.txt")
    sums = "\n".join(f"        {target:<20} {digest}" for target, digest in PACKAGE.values())
    notice = (PAGE / "NOTICE.txt").read_text("utf-8").replace("@WLLAMA@", WLLAMA).replace("@SUMS@", sums)
    (folder / "NOTICE.txt").write_text(notice, encoding="utf-8")
    write_service_worker(folder)
    return architecture


def write_service_worker(folder: Path) -> None:
    """sw.js with the names of the files to keep, and a version that is another whenever a file is.

    The model is not among the names: the page fetches it itself, to show how much has come, and it is kept then.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    names = ["./", *sorted(path.name for path in folder.iterdir() if path.name != "model.gguf")]
    text = (PAGE / "sw.js").read_text("utf-8")
    text = text.replace("@VERSION@", digest.hexdigest()[:16]).replace("@FILES@", json.dumps(names))
    (folder / "sw.js").write_text(text, encoding="utf-8")
