"""Each file of the corpus is answered with one line that says what, where, and what to do."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from smore_cli.data.build import build_rows
from smore_cli.errors import DataError
from smore_cli.recipe.schema import DataConfig
from tests.data.conftest import TEMPLATES, byte_level, wrap
from tests.data.stock_templates import STOCK

TEXT = (Path(__file__).parent / "broken_data.txt").read_text(encoding="utf-8")
CASES = re.findall(r"^=== (\S+), (\S+), (\w+)((?:, .*)?)\n((?:(?![!=?] ).*\n)*?)! (.*)\n\? (.*)\n", TEXT, re.MULTILINE)
LONG = {"{deep}": '{"a": ' * 100_000, "{huge}": "1" * 5000}


def content(text: str) -> bytes:
    for name, long in LONG.items():
        text = text.replace(name, long)
    parts = re.split(r"<([0-9a-f]{2})>", text)
    return b"".join(bytes.fromhex(part) if place % 2 else part.encode() for place, part in enumerate(parts))


def write(path: Path, text: str, options: list[str]) -> None:
    rows = [line for line in text.splitlines() if line]
    if path.suffix in (".parquet", ".arrow") and "raw" not in rows:
        datasets.Dataset.from_list([json.loads(line) for line in rows]).to_parquet(str(path))
        return
    data = content(text[:-1] if text.endswith("\n\n") else text)  # the empty line before the next case
    for encoding in ("utf-16", "utf-16-le"):
        data = data.decode().encode(encoding) if encoding in options else data
    if path.suffix == ".gz":
        data = gzip.compress(data) if data.strip() else b""
    if "link" in options:
        path.symlink_to("nowhere.jsonl")
        return
    path.write_bytes(data[:-12] if "cut" in options else data)


def settings(options: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the options say for the source, and for the data section."""
    given = {key: yaml.safe_load(value) for key, value in (option.split("=", 1) for option in options if "=" in option)}
    of_data = {key: given.pop(key) for key in ("max_length", "loss_on") if key in given}
    return given, of_data


def said(folder: Path, file: str, form: str, options: list[str], text: str) -> DataError:
    parts = re.split(r"^--- (\S+)\n", text, flags=re.MULTILINE)
    for name, part in zip(parts[1::2] or [file], parts[2::2] or [text], strict=True):
        write(folder / name, part, options)
    template = next((STOCK[option] for option in options if option in STOCK), TEMPLATES["chatml"])
    tokenizer = wrap(byte_level(), bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=template)
    of_source, of_data = settings(options)
    data = DataConfig.model_validate({"train": [{"path": file, "format": form, **of_source}], **of_data})
    with pytest.raises(DataError) as caught:
        build_rows(data, tokenizer, data.train)
    return caught.value


def test_the_corpus_is_read_whole() -> None:
    assert len(CASES) == TEXT.count("\n=== ") - 1 >= 70  # the first describes the form


@pytest.mark.parametrize(
    ("file", "form", "options", "text", "error", "hint"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_broken_file_is_one_line_and_what_to_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    form: str,
    options: str,
    text: str,
    error: str,
    hint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found = said(tmp_path, file, form, re.split(r", (?![^{]*})", options)[1:], text)
    shown = [part.replace(str(tmp_path), "FOLDER") for part in (found.message, found.hint)]
    assert shown == [error, hint]
