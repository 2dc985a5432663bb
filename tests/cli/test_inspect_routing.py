from __future__ import annotations

import json
import math
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from smore_cli.cli import main
from smore_cli.cli.console import out
from smore_cli.methods.mola import MoLAConfig
from smore_cli.models.adapter_files import save_adapter
from smore_cli.models.runs import open_run
from smore_cli.nn import adapted_modules, attach
from smore_cli.recipe.schema import ModelConfig, Source
from smore_cli.routing.inputs import choose_inputs


def smore(*args: object) -> int:
    """Runs `smore` in this process and returns its exit code."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in args])
    code = caught.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMORE_DEBUG", "0")  # main() writes it: set here, it is put back after the test
    monkeypatch.setenv("NO_COLOR", "1")


def train(folder: Path, tiny_llama: Path, adapter: dict[str, Any]) -> Path:
    """Trains for two steps and returns the run's folder."""
    recipe = {
        "version": 1,
        "model": {"name_or_path": str(tiny_llama)},
        "adapter": adapter,
        "data": {
            "train": [{"path": "quickstart", "format": "multiple_choice", "split": "train[:24]"}],
            "eval_fraction": 0.25,
            "max_length": 256,
        },
        "train": {"max_steps": 2, "per_device_batch_size": 2, "learning_rate": 0.1},
        "output_dir": str(folder / "runs" / adapter["method"]),
    }
    path = folder / f"{adapter['method']}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert smore("train", path) == 0
    return Path(str(recipe["output_dir"]))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    adapter = {
        "method": "smore",
        "rank": [2, 2],
        "num_experts": [4, 3],
        "fanout": [2, 2],
        "router_dim": 4,
        "key_dim": 4,
    }
    return train(tmp_path_factory.mktemp("smore-run"), tiny_llama, adapter)


def document(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    """What `smore inspect-routing ... --json` prints, which must be all of its stdout."""
    code = smore("inspect-routing", *args, "--json")
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return json.loads(shown.out)  # type: ignore[no-any-return]


def test_json_holds_every_router_of_a_trained_run(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, run_folder)
    assert (found["run"], found["method"]) == (str(run_folder), "smore")
    data = found["data"]
    assert (data["role"], data["rows"], data["available_rows"]) == ("held-out", 6, 6)
    assert data["sources"] == ["quickstart (train[:24])"]
    routers = found["routers"]
    assert len(routers) == 2 * 7 * 2  # layers, linear maps of a layer, levels
    assert [(r["layer"], r["projection"], r["level"]) for r in routers[:4]] == [
        (0, "q", 1), (0, "q", 0), (0, "k", 1), (0, "k", 0)
    ]  # fmt: skip
    for router in routers:
        root = router["level"] == 1
        assert (router["experts"], router["picked"]) == ((3, 2) if root else (4, 2))
        assert router["decisions"] == data["tokens"] * (1 if root else 2)
        assert sum(router["load"]) == pytest.approx(2, abs=1e-12)
        assert sum(router["share"]) == pytest.approx(1, abs=1e-6)
        assert 0 <= router["entropy"] <= 1
        assert 2 - 1e-9 <= router["effective_experts"] <= router["experts"] + 1e-9
    assert [(level["level"], level["routers"], level["experts"]) for level in found["levels"]] == [
        (1, 14, 42), (0, 14, 56)
    ]  # fmt: skip
    assert len({tuple(router["load"]) for router in routers}) > 14  # every router is counted by itself


def test_the_batch_size_changes_nothing(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = []
    for size in (1, 6):
        found = document(capsys, run_folder, "--batch-size", size)
        numbers.append([x for r in found["routers"] for x in [*r["load"], *r["share"], r["entropy"]]])
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)  # the model itself rounds in float32


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_shows_every_level_layer_and_projection(
    run_folder: Path, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(out, "width", columns)
    assert smore("inspect-routing", run_folder) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert "\x1b" not in shown
    assert max(map(len, lines)) <= columns
    titles = ["layer", "effective", "q", "k", "v", "o", "gate", "up", "down"]
    tables = [i for i, line in enumerate(lines) if line.split() == titles]
    assert [lines[i - 1] for i in tables] == ["level 1 (root)", "level 0 (leaves)"]
    for table, experts in zip(tables, (3, 4), strict=True):
        for layer in (0, 1):
            number, effective, *cells = lines[table + 1 + layer].split()
            assert int(number) == layer
            assert 2 <= float(effective) <= experts
            assert [len(cell) for cell in cells] == [experts] * 7
            assert set("".join(cells)) <= set("▁▂▃▄▅▆▇█·")
    assert "data: quickstart (train[:24]), held out from training; 6 rows;" in " ".join(lines)
    assert [line.split()[0] for line in lines if " of 3 " in line or " of 4 " in line] == ["1", "0"]


def test_on_a_terminal_it_is_coloured(run_folder: Path) -> None:
    command = [sys.executable, "-m", "smore_cli", "inspect-routing", str(run_folder), "--level", "1", "--layers", "1"]
    terminal, screen = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    subprocess.run(
        command, stdout=screen, stderr=subprocess.DEVNULL, env={**environment, "TERM": "xterm-256color"}, check=True
    )
    os.close(screen)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert "\x1b[" in shown
    assert "level 1" in shown
    assert "level 0" not in shown


def test_layers_and_a_level_can_be_chosen(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, run_folder, "--layers", "1", "--level", "0", "--limit", 2)
    assert {(router["layer"], router["level"]) for router in found["routers"]} == {(1, 0)}
    assert len(found["routers"]) == 7
    assert (found["data"]["rows"], found["data"]["available_rows"]) == (2, 6)


def test_one_linear_map_in_full(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {r["level"]: r for r in document(capsys, run_folder, "--detail", "1.down")["routers"]}
    assert smore("inspect-routing", run_folder, "--detail", "layers.1.mlp.down_proj") == 0
    shown = capsys.readouterr().out
    assert "level 1 (root) of model.layers.1.mlp.down_proj" in shown
    for level, router in numbers.items():
        assert router["level"] == level
        assert f"{router['decisions']:,} decisions, each takes 2 of {router['experts']} experts" in shown
        for expert, (load, share) in enumerate(zip(router["load"], router["share"], strict=True)):
            assert [str(expert), f"{load:.4f}", f"{share:.4f}"] in [line.split()[:3] for line in shown.splitlines()]


def test_other_data_can_be_given(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "One row of a text."}) + "\n")
    given = document(capsys, run_folder, "--data", path, "--format", "text")
    assert (given["data"]["role"], given["data"]["sources"], given["data"]["rows"]) == ("given", [str(path)], 1)
    bundled = document(capsys, run_folder, "--data", "quickstart", "--split", "test[:3]")
    assert (bundled["data"]["sources"], bundled["data"]["rows"]) == (["quickstart (test[:3])"], 3)
    shares = [[router["share"] for router in found["routers"]] for found in (given, bundled)]
    assert shares[0] != shares[1]


def test_the_newest_run_is_the_default(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run_folder.parent.parent)
    assert document(capsys, "--limit", 1)["run"] == str(Path("runs") / "smore")


def test_a_run_that_routes_nothing_is_refused(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(tmp_path, tiny_llama, {"method": "lora", "rank": 2})
    capsys.readouterr()
    assert smore("inspect-routing", folder) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        f"error: {folder} is a run of method lora, which treats every token alike: nothing is routed",
        "hint: inspect a run of a routed method, such as smore",
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--layers", "x"], "--layers: 'x' names no layers"),
        (["--layers", "1-9"], "--layers: no router in layer 2-9"),
        (["--detail", "9.q"], "--detail: no router at '9.q'"),
        (["--detail", "0.q", "--layers", "0"], "--detail names one linear map, --layers several"),
        (["--level", "7", "--limit", "1"], "--level: the trees have no level 7"),
        (["--format", "text"], "--format and --split are about --data, which is not given"),
        (["--data", "missing.jsonl"], "there is no file missing.jsonl"),
        (["--data", "quickstart", "--format", "txt"], "--format: there is no format 'txt'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    run_folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert smore("inspect-routing", run_folder, *args) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"error: {message}" in shown.err
    assert "Traceback" not in shown.err


def test_looking_leaves_the_run_as_it_was(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in run_folder.iterdir()}
    document(capsys, run_folder, "--limit", 1)
    assert {path.name: path.stat().st_mtime_ns for path in run_folder.iterdir()} == before


def test_what_experts_and_routing_are_worth_is_measured_where_it_is_asked_for(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = document(capsys, run_folder, "--limit", 2)
    assert not {"causal", "dividend"} & plain.keys()
    found = document(capsys, run_folder, "--limit", 2, "--layers", "1", "--causal", "--dividend")
    effects = found["causal"]["effects"]
    assert [(e["layer"], e["level"], e["expert"]) for e in effects] == [
        *((1, 1, expert) for expert in range(3)), *((1, 0, expert) for expert in range(4))
    ]  # fmt: skip
    assert len(found["causal"]["modules"]) == 7
    assert any(abs(effect[kind]["value"]) > 1e-6 for effect in effects for kind in ("ablated", "forced"))
    loss, dividend = found["dividend"]["loss"], found["dividend"]
    assert loss["routed"] == pytest.approx(found["causal"]["loss"])
    assert dividend["dividend"] == pytest.approx(loss["static"] - loss["routed"])
    assert dividend["supervised_tokens"] == found["causal"]["supervised_tokens"]
    assert dividend["fitted_to"] == "quickstart (train[:24])" and dividend["fitted_tokens"] > 100
    assert [layer["layer"] for layer in dividend["layers"]] == [1]


def test_worth_is_shown_by_layer_or_expert_by_expert_and_what_it_costs_is_said_before(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smore("inspect-routing", run_folder, "--limit", 2, "--causal", "--dividend") == 0
    shown = capsys.readouterr()
    assert "28 passes that come to 21 through all layers: about " in shown.err
    assert "2 fits of a layer: about " in shown.err
    lines = shown.out.splitlines()
    tables = [i for i, line in enumerate(lines) if line.split()[:3] == ["layer", "ablated", "largest"]]
    assert [lines[i - 1] for i in tables] == ["level 1 (root)", "level 0 (leaves)"]
    for table, experts in zip(tables, (3, 4), strict=True):
        for layer in (0, 1):
            number, ablated, _, _, forced, _, expert = lines[table + 1 + layer].split()
            assert (int(number), len(ablated), len(forced)) == (layer, experts, experts)
            assert int(expert) < experts
    assert "routing dividend " in shown.out
    assert smore("inspect-routing", run_folder, "--limit", 2, "--causal", "--detail", "1.down", "--level", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    [table] = [i for i, line in enumerate(lines) if line.split() == ["expert", "ablated", "±", "forced", "±"]]
    assert [line.split()[0] for line in lines[table + 1 : table + 4]] == ["0", "1", "2"]


def test_a_text_is_traced_on_the_terminal_in_the_document_and_in_a_page_and_a_picture_is_drawn(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "pages" / "routing.html"
    picture = tmp_path / "routing.png"
    files = ("--html", page, "--png", picture)
    found = document(capsys, run_folder, "--prompt", "Ice melts", *files, "--level", 1, "--layers", 1)
    trace = found["trace"]
    assert "".join(trace["tokens"]).endswith("Ice melts") and trace["style"] == "as it stands, without a template"
    assert [(r["layer"], r["level"]) for r in trace["routers"]] == [(1, 1)] * 7
    for token in trace["routers"][0]["picks"]:
        assert len(token) == 1 and len(token[0]) == 2  # one parent, a fanout of two
        assert sum(weight for _, weight in token[0]) == pytest.approx(1, abs=1e-6)
    assert '"tokens":["' in page.read_text("utf-8")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert smore("inspect-routing", run_folder, "--prompt", "Ice melts", "--detail", "1.q") == 0
    shown = capsys.readouterr().out
    assert f"trace of {len(trace['tokens'])} tokens, as it stands" in shown and "parent 1" in shown


@pytest.mark.parametrize("option", ["--html", "--png"])
def test_a_folder_is_no_file_to_write(tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert smore("inspect-routing", tmp_path, option, tmp_path) == 2
    assert f"{option}: {tmp_path} is a folder" in capsys.readouterr().err.replace("\n", "")


@pytest.fixture(scope="session")
def by_hand(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, Path, Path, Any]:
    """A run whose first router is set by hand, and two files: expert 1 for the tokens of the first, else expert 0."""
    folder = tmp_path_factory.mktemp("by-hand")
    adapter = {"method": "mola", "num_experts": 2, "top_k": 2, "rank": 2, "target_modules": ["q_proj"]}
    run = train(folder, tiny_llama, adapter)
    texts = {"digits": "7 7 7 7 7 7", "letters": "x x x x x x x x x x"}
    for name, text in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(8)))
    config = MoLAConfig(method="mola", **{key: value for key, value in adapter.items() if key != "method"})
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    attach(model, config)
    ids = {name: set(tokenizer(text).input_ids) for name, text in texts.items()}
    others = (ids["letters"] | {tokenizer.eos_token_id, tokenizer.bos_token_id}) - {None}
    first = ids["digits"] - others
    tokens = torch.tensor([*first, *others])
    wanted = torch.tensor([40.0] * len(first) + [-40.0] * len(others))
    with torch.no_grad():
        x = model.model.layers[0].input_layernorm(model.get_input_embeddings()(tokens))
        for path, module in adapted_modules(model).items():
            for parameter in module.adapter("default").parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
            weight = module.adapter("default").router.weight
            weight.zero_()
            if path.startswith("model.layers.0."):
                weight[1] = torch.linalg.lstsq(x, wanted[:, None], driver="gelsd").solution[:, 0]
    save_adapter(model, config, run, base=ModelConfig(name_or_path=str(tiny_llama)))
    return run, folder / "digits.jsonl", folder / "letters.jsonl", first


def test_a_router_set_by_hand_is_reported_exactly(
    by_hand: tuple[Path, Path, Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run, digits, letters, first = by_hand
    found = document(capsys, run, "--data", digits, "--data", letters, "--format", "text", "--detail", "0.q")
    (router,) = found["routers"]
    assert found["data"]["labels"] == found["data"]["sources"] and len(found["data"]["sources"]) == 2
    tokenizer = AutoTokenizer.from_pretrained(open_run(run).model.name_or_path)
    rows = choose_inputs([_text(digits), _text(letters)], None, tokenizer, None).rows
    tokens = [(row_number // 8, token in first) for row_number, row in enumerate(rows) for token in row.branches[0]]
    share = sum(taken for _, taken in tokens) / len(tokens)
    assert router["share"] == pytest.approx([1 - share, share], abs=1e-6)
    assert router["entropy"] < 1e-6
    expected = 0.0
    for label in (0, 1):
        for taken in (False, True):
            p = sum(pair == (label, taken) for pair in tokens) / len(tokens)
            of_label = sum(pair[0] == label for pair in tokens) / len(tokens)
            of_expert = sum(pair[1] == taken for pair in tokens) / len(tokens)
            expected += p * math.log2(p / (of_label * of_expert)) if p else 0.0
    told = router["information"]["dataset"]
    assert told["bits"] == pytest.approx(expected, abs=1e-5) and expected > 0.2
    assert told["p"] < 0.01 and told["bits"] > told["high"]
    best = router["top_tokens"][1][0]
    assert best["usage"] == pytest.approx(1, abs=1e-5) and "7" in best["token"] and best["contexts"]
    assert router["similarity"][0][0] == pytest.approx(1)


def test_a_router_that_decides_nothing_tells_nothing(
    by_hand: tuple[Path, Path, Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run, digits, letters, _ = by_hand
    found = document(capsys, run, "--data", digits, "--data", letters, "--format", "text", "--detail", "1.q")
    (router,) = found["routers"]
    assert router["share"] == pytest.approx([0.5, 0.5])
    assert all(abs(one["bits"]) < 1e-9 for one in router["information"].values())


def test_supervised_tokens_alone_and_no_batch_size_change_the_numbers(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, five = (document(capsys, run_folder, "--tokens", "supervised", "--batch-size", size) for size in (1, 5))
    everything = document(capsys, run_folder)
    for a, b, c in zip(one["routers"], five["routers"], everything["routers"], strict=True):
        assert a["load"] == pytest.approx(b["load"], abs=1e-9)
        assert a["information"]["token_class"]["bits"] == pytest.approx(
            b["information"]["token_class"]["bits"], abs=1e-6
        )
        assert 0 < a["decisions"] < c["decisions"]


def test_checkpoints_and_another_run_beside_it(
    run_folder: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["inspect-routing", str(run_folder), "--drift"])
    assert "has no checkpoint left" in capsys.readouterr().err
    shutil.copytree(run_folder, checkpoint := tmp_path / "run")
    shutil.copytree(run_folder, checkpoint / "checkpoint-1", ignore=shutil.ignore_patterns("checkpoint-*"))
    (checkpoint / "checkpoint-1" / "complete.json").write_text("{}")
    weights = load_file(checkpoint / "checkpoint-1" / "adapter_model.safetensors")
    save_file(
        {name: -tensor if "router" in name else tensor for name, tensor in weights.items()},
        checkpoint / "checkpoint-1" / "adapter_model.safetensors",
    )
    found = document(capsys, checkpoint, "--drift", "--compare", run_folder, "--parquet", tmp_path / "t.parquet")
    (drift,) = found["drift"]
    assert drift["step"] == 1 and drift["mean_total_variation"] > 0
    mine = {(router["module"], router["level"]): router for router in found["routers"]}
    for router in drift["routers"]:
        own = mine[router["module"], router["level"]]
        usage = own["load"] if own["picked"] < own["experts"] else own["share"]
        apart = sum(abs(a / sum(usage) - b) for a, b in zip(usage, router["usage"], strict=True)) / 2
        assert router["total_variation"] == pytest.approx(apart)
    assert found["compare"]["mean_total_variation"] == 0  # the very same adapter
    table = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert len(table) == sum(router["experts"] for router in found["routers"])
    line = table[0]
    assert line["load"] == mine[line["module"], line["level"]]["load"][line["expert"]]
    assert line["token_class_bits"] == mine[line["module"], line["level"]]["information"]["token_class"]["bits"]


def _text(path: Path) -> Source:
    return Source(path=str(path), format="text")
