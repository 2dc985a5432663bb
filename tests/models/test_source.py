"""Where a model name leads, and what a user is told when it leads nowhere; no test leaves this machine."""

from __future__ import annotations

import shutil
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from smore_cli.errors import ModelError
from smore_cli.models.source import ModelSource, find_source
from smore_cli.recipe.schema import ModelConfig


def _config(name: str | Path, revision: str | None = None) -> ModelConfig:
    return ModelConfig(name_or_path=str(name), revision=revision)


def test_a_local_folder_is_used_as_it_is_and_only_locally(tiny_llama: Path) -> None:
    assert find_source(_config(tiny_llama)) == ModelSource(str(tiny_llama), None, local=True)


def test_a_missing_folder_names_the_nearest_sibling(tiny_llama: Path) -> None:
    wrong = tiny_llama.with_name(tiny_llama.name[:-1])
    with pytest.raises(ModelError, match=r"^model folder .* does not exist$") as caught:
        find_source(_config(wrong))
    assert caught.value.hint == f"did you mean {tiny_llama}?"


def test_a_mistyped_bundled_name_is_recognised() -> None:
    with pytest.raises(ModelError, match="offline mode is on") as caught:
        find_source(_config("smolm2-135m"))
    assert caught.value.hint == "did you mean smollm2-135m?"


def test_an_unknown_hub_name_says_that_offline_mode_is_on() -> None:
    with pytest.raises(ModelError, match="no hub model of that name in the cache, and offline mode is on") as caught:
        find_source(_config("some-org/some-model"))
    assert "smollm2-135m" in caught.value.hint


class _Hub(BaseHTTPRequestHandler):
    """Answers every request with one status and error code, as the hub does."""

    status, code = 404, "RepoNotFound"

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("X-Error-Code", self.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def _use_hub(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)


def test_an_unreachable_hub_fails_at_once_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _use_hub(monkeypatch, "http://127.0.0.1:9")  # nothing listens there
    start = time.monotonic()
    with pytest.raises(ModelError, match="and the hub cannot be reached"):
        find_source(_config("some-org/some-model"))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "there is no folder and no hub model 'some-org/some-model'"),
        (404, "RevisionNotFound", "hub model 'some-org/some-model' has no revision 'v9'"),
        (403, "GatedRepo", "is gated and this login may not read it"),
        (500, "", "500"),
    ],
)
def test_what_the_hub_answers_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str, message: str
) -> None:
    monkeypatch.setattr(_Hub, "status", status)
    monkeypatch.setattr(_Hub, "code", code)
    with HTTPServer(("127.0.0.1", 0), _Hub) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            _use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}")
            with pytest.raises(ModelError, match=message) as caught:
                find_source(_config("some-org/some-model", revision="v9"))
        finally:
            server.shutdown()
            thread.join()
    assert "\n" not in caught.value.message


def test_a_hub_model_in_the_cache_is_used_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0" * 40
    snapshot = tmp_path / "models--some-org--some-model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    references = tmp_path / "models--some-org--some-model" / "refs"
    references.mkdir()
    (references / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_source(_config("some-org/some-model")) == ModelSource(str(snapshot), None, local=True)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        find_source(_config(tmp_path))


def test_an_adapter_folder_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        find_source(_config(tmp_path))
    assert "it is an adapter" in caught.value.hint


def test_a_folder_one_level_too_high_is_recognised(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "inner")
    with pytest.raises(ModelError) as caught:
        find_source(_config(tmp_path))
    assert caught.value.hint == f"did you mean {tmp_path / 'inner'}?"


def test_a_file_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        find_source(_config(tiny_llama / "config.json"))


def test_a_revision_of_something_local_is_refused(tiny_llama: Path) -> None:
    for name in (tiny_llama, "smollm2-135m"):
        with pytest.raises(ModelError, match="has no revisions"):
            find_source(_config(name, revision="main"))
