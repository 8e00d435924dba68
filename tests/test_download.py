"""Downloads from a local server that speaks a hub's protocol and drops connections half-way."""

import errno
import hashlib
import io
import json
import shutil
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from common.errors import RunFailed, run_main
from exams.exam import read_exam
from exams.published import arrange
from scripts.download_data import ITEMS, HuggingFace, Remote, download, main

REPO = "/datasets/jingyaogong/minimind_dataset"
CONTENT = b'{"text": "12345"}\n' * 2_700_000  # 49 MB: the client keeps what came in whole blocks of 10 MB


class Hub(ThreadingHTTPServer):
    """One repository with one file. `drops`: so many replies end in the middle. `sha256`: what the listing claims."""

    daemon_threads = True

    def __init__(self, drops=0, sha256=None, size=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.drops, self.ranges = drops, []
        self.sha256 = sha256 or hashlib.sha256(CONTENT).hexdigest()
        self.size = size or len(CONTENT)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def fetch(monkeypatch, tmp_path, capsys):
    """fetch(hub, *arguments) -> (exit code, stdout, stderr) of scripts/download_data.py, in this process."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # the tests' own setting forbids the hub

    def run(hub, *argv):
        endpoint = hub if isinstance(hub, str) else f"http://127.0.0.1:{hub.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", endpoint)
        code = 0
        try:
            run_main(main, [*argv, "--out_dir", str(tmp_path)])
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, path = self.server, urlsplit(self.path).path
        if path.startswith(f"/api{REPO}"):
            file = {"rfilename": "pretrain_hq.jsonl", "size": hub.size,
                    "lfs": {"sha256": hub.sha256, "size": hub.size, "pointerSize": 1}}  # fmt: skip
            info = {"_id": "1", "id": REPO[10:], "sha": "1" * 40, "siblings": [file, {"rfilename": "README.md"}],
                    "cardData": {"license": "apache-2.0"}, "tags": [], "private": False, "downloads": 0}  # fmt: skip
            self.reply(200, json.dumps(info).encode())
        elif path.startswith(REPO) and path.endswith("/pretrain_hq.jsonl"):
            self.file()
        else:
            self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def file(self):
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        headers = {"ETag": f'"{self.server.sha256}"', "X-Repo-Commit": "1" * 40, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        if self.command == "GET":
            self.server.ranges.append(start)
        self.reply(206 if start else 200, CONTENT[start:], headers)

    def reply(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if len(body) > 10_000 and self.server.drops:
            self.server.drops -= 1
            self.wfile.write(body[: len(body) // 3])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_a_dropped_connection_is_taken_up_where_it_broke(fetch, tmp_path):
    hub, path = Hub(drops=2), tmp_path / "pretrain_hq.jsonl"
    code, out, err = fetch(hub, "pretrain_hq")
    assert code == 0, err
    assert path.read_bytes() == CONTENT
    assert hub.ranges[0] == 0 and len(hub.ranges) == 3 and 0 < hub.ranges[1] < hub.ranges[2]
    assert "licence: apache-2.0" in out and f"{len(CONTENT) / 2**20:,.1f} MB" in out
    result = json.loads(out.strip().splitlines()[-1])
    assert result["fetched"] == 1 and result["verified"] == 1 and result["bytes"] == len(CONTENT)

    code, out, _ = fetch(hub, "pretrain_hq")
    assert json.loads(out.strip().splitlines()[-1])["fetched"] == 0 and len(hub.ranges) == 3
    path.write_bytes(b"mine")
    code, _, err = fetch(hub, "pretrain_hq")
    assert code == 2 and "--overwrite" in err and path.read_bytes() == b"mine"


def test_weights_are_releases_only(fetch):
    for names in ((), ("pretrain_hq",)):
        code, _, err = fetch(Hub(), "weights", *names)
        assert code == 2 and "There are minimind2, minimind2-pth, minimind-3" in err
    code, _, err = fetch(Hub(), "weights", "minimind2", "--source", "huggingface")  # which the stub does not have
    assert code == 1 and "jingyaogong/MiniMind2/resolve" in err


def test_what_no_checksum_would_tell_is_not_put_together_from_two_starts(tmp_path, monkeypatch):
    """The source may have replaced the file between them."""
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for sha256, kept in ((None, 0), (hub.sha256, 1000)):
        (tmp_path / "pretrain_hq.jsonl.part").write_bytes(CONTENT[:1000])
        HuggingFace().fetch(ITEMS["pretrain_hq"], Remote("pretrain_hq.jsonl", hub.size, sha256), tmp_path)
        assert hub.ranges.pop() == kept and (tmp_path / "pretrain_hq.jsonl").read_bytes() == CONTENT


@pytest.mark.parametrize(("path", "size"), [(5, 1), (None, 1), ("a", "12"), ("a", -5), ("a", 1.5)])
def test_a_listing_of_no_names_and_sizes_is_refused(path, size):
    """As a ValueError, which becomes the one line that tells where to fetch the file by hand."""
    with pytest.raises(ValueError, match="it lists a file of the name"):
        Remote(path, size, None)


def test_a_file_with_another_checksum_is_not_kept(fetch, tmp_path):
    code, _, err = fetch(Hub(sha256="0" * 64), "pretrain_hq")
    assert code == 1 and "came damaged" in err
    assert not (tmp_path / "pretrain_hq.jsonl").exists()


def test_what_cannot_be_fetched_is_one_line(fetch, tmp_path):
    hub = Hub(size=shutil.disk_usage(tmp_path).free + 10**12)
    code, _, err = fetch(hub, "pretrain_hq")
    assert code == 2 and "GB are free" in err and not hub.ranges
    code, _, err = fetch(Hub(), "sft_512")
    assert code == 1 and "has no sft_512.jsonl any more; it holds README.md, pretrain_hq.jsonl" in err
    code, _, err = fetch(Hub(), "pretrain")
    assert code == 2 and "unknown: pretrain; there are pretrain_hq" in err
    code, _, err = fetch(Hub(), "ceval", "--source", "modelscope")
    assert code == 2 and err.count("\n") == 1


@pytest.mark.parametrize("source, address", [
    ("huggingface", "datasets/jingyaogong/minimind_dataset/resolve/main"),
    ("modelscope", "datasets/gongjy/minimind_dataset/resolve/master"),
])  # fmt: skip
def test_without_network_the_address_and_the_place_are_named(fetch, tmp_path, source, address):
    if source == "modelscope":
        pytest.importorskip("modelscope_hub")
    code, _, err = fetch("http://127.0.0.1:9", "lora_identity", "--source", source)
    assert code == 1 and err.strip().count("\n") == 0
    assert f"fetch http://127.0.0.1:9/{address}/lora_identity.jsonl and put it at {tmp_path}/lora_identity.jsonl" in err


@pytest.mark.parametrize(("name", "other"), [("lora_identity", " or --source modelscope"), ("openbookqa", ". By hand")])
def test_a_source_that_is_out_of_reach_names_the_other_ways(fetch, name, other):
    code, _, err = fetch("http://127.0.0.1:9", name, "--source", "huggingface")
    assert code == 1 and "a mirror of Hugging Face (HF_ENDPOINT=https://MIRROR before the command)" + other in err
    assert "By hand: fetch http://127.0.0.1:9/" in err


def test_without_a_named_source_the_other_one_is_asked(fetch, tmp_path):
    pytest.importorskip("modelscope_hub")
    code, out, err = fetch("http://127.0.0.1:9", "lora_identity")
    assert code == 1 and out.startswith("huggingface did not answer (") and "; asking modelscope\n" in out
    assert err.startswith("failed: modelscope did not answer") and "or --source huggingface" in err
    code, out, err = fetch("http://127.0.0.1:9", "openbookqa")  # which ModelScope does not have
    assert code == 1 and "asking" not in out and err.startswith("failed: huggingface did not answer")
    code, out, _ = fetch("http://127.0.0.1:9", "lora_identity", "--source", "huggingface")
    assert code == 1 and "asking" not in out


class Mirror:
    """A source that lists what it likes."""

    name = "mirror"

    def __init__(self, *paths):
        self.paths = paths

    def repository(self, item):
        return item.huggingface

    def listing(self, item):
        return "mit", [Remote("config.json", 2, None), *(Remote(path, 2, None) for path in self.paths)]

    def fetch(self, item, file, folder):
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.path).write_bytes(b"{}")


def test_each_item_comes_from_the_first_source_that_answers(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    result = download(["minimind2"], [HuggingFace(), Mirror("x.json")], str(tmp_path), False)
    assert result["fetched"] == 2 and result["source"] == "mirror" and "asking mirror" in capsys.readouterr().out
    result = download(["minimind2"], [Mirror("y.json"), HuggingFace()], str(tmp_path), False)
    assert result["fetched"] == 1 and "asking" not in capsys.readouterr().out


@pytest.mark.parametrize("path", [
    "../x.json", "a/../../x.json", "{outside}/x.json", "..\\x.json", "C:\\x.json", "C:x.json", "a/x.json:b.json",
    "link/x.json", "link/deep/x.json",
])  # fmt: skip
def test_a_source_writes_nothing_outside_its_folder(path, tmp_path):
    folder, outside = tmp_path / "in" / "weights", tmp_path / "in"
    folder.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    path = path.format(outside=outside)
    with pytest.raises(RunFailed, match="which lies outside .*weights: nothing was fetched"):
        download(["minimind2"], [Mirror(path)], str(folder), False)
    assert {p.name for p in tmp_path.rglob("*")} == {"in", "weights", "link", "elsewhere"}


def test_files_in_folders_and_a_folder_that_is_a_link_are_fetched(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "weights").symlink_to(tmp_path / "big")
    assert download(["minimind2"], [Mirror("a/b..c/x.json")], str(tmp_path / "weights"), False)["fetched"] == 2
    assert (tmp_path / "big" / "a" / "b..c" / "x.json").exists()


@pytest.mark.parametrize("name", ["ceval.zip", "logic/val-00000-of-00001.parquet"])
def test_a_damaged_exam_is_one_line(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"PK and nothing more")
    with pytest.raises(RunFailed, match=rf"{name} cannot be unpacked \([^\n]+\); delete it"):
        arrange(tmp_path)


def test_exams_are_laid_out_as_they_are_read(tmp_path):
    row = {"id": 0, "question": "1+1=?", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"}
    for split in ("dev", "val"):
        path = tmp_path / "ceval" / "logic" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist([row] * 3), path)
    assert arrange(tmp_path / "ceval") == 2
    subject = read_exam(tmp_path / "ceval", "ceval")[0]
    assert subject.name == "logic" and len(subject.questions) == len(subject.shots) == 3

    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for split in ("dev", "test"):
            archive.writestr(f"cmmlu/{split}/anatomy.csv", ",Question,A,B,C,D,Answer\n0,1+1=?,1,2,3,4,B\n")
        archive.writestr("../../outside/evil.csv", "x")
        archive.writestr("readme.txt", "x")
    (tmp_path / "cmmlu").mkdir()
    (tmp_path / "cmmlu" / "cmmlu_v1_0_1.zip").write_bytes(memory.getvalue())
    assert arrange(tmp_path / "cmmlu") == 3 and not (tmp_path.parent / "outside").exists()
    assert read_exam(tmp_path / "cmmlu", "cmmlu")[0].questions[0].answer == "B"

    choices = {"text": ["a", "b", "c", "d"], "label": list("ABCD")}
    path = tmp_path / "openbookqa" / "main" / "test-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    rows = [{"id": "1", "question_stem": "Which?", "choices": choices, "answerKey": "C"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert arrange(tmp_path / "openbookqa") == 1
    assert read_exam(tmp_path / "openbookqa", "openbookqa")[0].questions[0].options == ("a", "b", "c", "d")


def test_a_full_disk_is_no_fault_of_the_source(fetch, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HuggingFace, "fetch", full)
    code, _, err = fetch(Hub(), "pretrain_hq")
    told = "pretrain_hq.jsonl: No space left on device (the disk at /); see to it and give the same command again\n"
    assert code == 1 and err.endswith(told) and "did not answer" not in err


def test_a_second_start_goes_on_where_the_first_one_broke(fetch, tmp_path):
    hub = Hub(drops=1000)
    code, _, err = fetch(hub, "pretrain_hq")
    assert code == 1 and "goes on where it stopped" in err and not (tmp_path / "pretrain_hq.jsonl").exists()
    reached, hub.drops = len(hub.ranges), 0
    code, _, err = fetch(hub, "pretrain_hq")
    assert code == 0 and hub.ranges[reached] > 0 and (tmp_path / "pretrain_hq.jsonl").read_bytes() == CONTENT
