"""Hub datasets against a small hub of our own on this machine: the real client library, real requests, real caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "a" * 40
FILES = {
    "README.md": b"---\nconfigs:\n- config_name: easy\n  data_files:\n  - {split: train, path: train.jsonl}\n"
    b"  - {split: test, path: test.jsonl}\n---\n",
    "train.jsonl": b"".join(b'{"text": "row %d"}\n' % number for number in range(10)),
    "test.jsonl": b'{"text": "held out"}\n',
}
LISTING = [{"type": "file", "path": name, "size": len(data), "oid": "b" * 40} for name, data in FILES.items()]
INFO = {"id": "me/set", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES], "private": False}

SOURCES: dict[str, dict[str, str]] = {
    "slice": {"path": "me/set", "name": "easy", "split": "train[:3]"},
    "stream": {"path": "me/set", "name": "easy"},
    "test": {"path": "me/set", "split": "test"},
    "commit": {"path": "me/set", "split": "test", "revision": COMMIT},
    "no revision": {"path": "me/set", "revision": "v9"},
    "no name": {"path": "me/set", "name": "hard"},
    "no split": {"path": "me/set", "split": "dev"},
    "nothing": {"path": "me/none"},
    "gated": {"path": "me/gated"},
}
READ = """
import json, sys, time
from smore_cli.data.entries import entry_reader
from smore_cli.data.sources import read_source
from smore_cli.errors import DataError
from smore_cli.recipe.schema import Source
import datasets  # takes seconds, which are not the hub's
answers = {}
for key, fields in json.loads(sys.argv[1]).items():
    start = time.perf_counter()
    try:
        source = Source(format="text", **fields)
        rows = [entry.row() for entry in entry_reader(source)()] if key == "stream" else list(read_source(source))
        answers[key] = {"rows": [row["text"] for row in rows]}
    except DataError as error:
        answers[key] = {"message": error.message, "hint": error.hint}
    answers[key]["seconds"] = time.perf_counter() - start
print(json.dumps(answers))
"""


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def answer(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/api")
        if path.startswith("/datasets/me/gated"):
            return self.say(403, b"", {"X-Error-Code": "GatedRepo"})
        if not path.startswith("/datasets/me/set"):
            return self.say(404, b"", {"X-Error-Code": "RepoNotFound"})
        parts = path.removeprefix("/datasets/me/set").strip("/").split("/")  # "", resolve/REVISION/FILE, tree/REVISION
        if len(parts) > 1 and parts[1] not in ("main", COMMIT):
            return self.say(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if parts[0] == "resolve":
            if parts[2] not in FILES:
                return self.say(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return self.say(200, FILES[parts[2]], {"ETag": f'"{parts[2]}"', "X-Repo-Commit": COMMIT})
        return self.say(200, json.dumps(LISTING if parts[0] == "tree" else INFO).encode(), {})

    def say(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD = answer


def ask(endpoint: str, cache: Path, *, offline: bool = False) -> dict[str, Any]:
    """Reads every source in a process of its own, whose environment decides what the client library may reach."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE")
    }
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1" if offline else "0"}
    command = [sys.executable, "-c", READ, json.dumps(SOURCES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert done.stderr == "", "neither progress bars, nor retries, nor warnings"
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub-cache")


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def online(hub: str, cache: Path) -> dict[str, Any]:
    return ask(hub, cache)


@pytest.fixture(scope="module", params=["unreachable", "offline mode"])
def cut_off(request: pytest.FixtureRequest, online: dict[str, Any], cache: Path) -> dict[str, Any]:
    """The same after the data was downloaded once, and then with no hub: nothing listens on port 9 of this machine."""
    return ask("http://127.0.0.1:9", cache, offline=request.param == "offline mode")


def test_name_split_slice_and_revision_choose_the_rows(online: dict[str, Any]) -> None:
    assert online["slice"]["rows"] == ["row 0", "row 1", "row 2"]
    assert online["stream"]["rows"] == [f"row {number}" for number in range(10)]
    assert online["test"]["rows"] == online["commit"]["rows"] == ["held out"]


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("no revision", "hub dataset 'me/set' has no revision 'v9'"),
        ("no name", "hub dataset 'me/set': BuilderConfig 'hard' not found. Available: ['easy']"),
        ("no split", "hub dataset 'me/set': Unknown split \"dev\". Should be one of ['train', 'test']."),
        ("nothing", "there is no hub dataset 'me/none', and no local file of that name"),
        ("gated", "hub dataset 'me/gated' is gated and this login may not read it"),
    ],
)
def test_what_the_hub_has_not_is_one_line(online: dict[str, Any], key: str, problem: str) -> None:
    assert online[key]["message"] == problem


def test_what_was_downloaded_once_is_read_without_the_hub(cut_off: dict[str, Any]) -> None:
    assert cut_off["slice"]["rows"] == ["row 0", "row 1", "row 2"]
    assert cut_off["commit"]["rows"] == ["held out"]
    assert cut_off["stream"]["rows"] == [f"row {number}" for number in range(10)]


def test_cached_rows_are_not_taken_for_a_revision_they_may_not_be(cut_off: dict[str, Any]) -> None:
    assert "not surely at revision 'v9'" in cut_off["no revision"]["message"]


def test_an_unknown_name_without_the_hub_is_refused_at_once(cut_off: dict[str, Any]) -> None:
    answer = cut_off["nothing"]
    assert answer["message"].startswith("hub dataset 'me/none' is not in the cache and ")
    assert "name a local" in answer["hint"]
    assert answer["seconds"] < 5
