"""One file is one method, found by its name and imported only then."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

import smore_cli.methods
from smore_cli.errors import UsageError
from smore_cli.methods import MethodConfig, Site, available_methods, config_from_dict, load_method
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.smore import SMoREConfig
from smore_cli.nn import attach

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOY = '''
"""A method in one file: y = W x + c."""
from typing import ClassVar, Literal

from smore_cli.methods import MethodConfig


class ToyConfig(MethodConfig):
    title: ClassVar[str] = "a trainable shift"
    paper: ClassVar[str] = "https://example.org"
    method: Literal["toyshift"] = "toyshift"

    def build(self, site):
        import torch

        from smore_cli.nn import Adapter

        class Shift(Adapter):
            def __init__(self):
                super().__init__()
                self.shift = torch.nn.Parameter(torch.full((site.out_features,), 2.0))

            def forward(self, x, y):
                return y + self.shift

        return Shift()

    def num_parameters(self, site):
        return site.out_features
'''


def test_the_methods_are_the_files_of_the_package() -> None:
    assert {"lora", "smore"} <= set(available_methods())
    assert available_methods() == sorted(available_methods())
    assert load_method("lora") is LoRAConfig and load_method("smore") is SMoREConfig


@pytest.mark.parametrize("name", available_methods())
def test_every_method_says_what_it_is_and_builds_with_its_defaults(name: str) -> None:
    config_class = load_method(name)
    assert issubclass(config_class, MethodConfig)
    assert config_class.title and config_class.paper.startswith("https://")
    config, site = config_class(method=name), Site("site", 40, 24)
    assert config.num_parameters(site) == sum(p.numel() for p in config.build(site).parameters())
    described = {key for key, field in config_class.model_fields.items() if field.description}
    assert described >= set(config_class.model_fields) - {"method"}


def test_a_list_is_spread_over_the_depth() -> None:
    layers = [Site("x", 2, 2, layer=layer, num_layers=8) for layer in range(8)]
    assert [site.at_depth([2, 4, 6, 8]) for site in layers] == [2, 2, 4, 4, 6, 6, 8, 8]
    assert [site.at_depth([1, 2, 3]) for site in layers] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert {site.at_depth(5) for site in layers} == {5}
    assert [Site("x", 2, 2, layer=layer, num_layers=2).at_depth([2, 4, 6, 8]) for layer in range(2)] == [2, 6]


@pytest.mark.parametrize(("typo", "meant"), [("smor", "smore"), ("lorra", "lora"), ("SMORE", None), ("zzz", None)])
def test_an_unknown_method_names_the_nearest_one(typo: str, meant: str | None) -> None:
    with pytest.raises(UsageError, match=f"unknown method '{typo}'") as caught:
        load_method(typo)
    expected = f"did you mean '{meant}'?" if meant else f"there are: {', '.join(available_methods())}"
    assert caught.value.hint == expected
    assert caught.value.exit_code == 2


def test_importing_every_method_imports_no_torch() -> None:
    code = (
        "import sys; from smore_cli.methods import available_methods, load_method; "
        "[load_method(name).model_json_schema() for name in available_methods()]; "
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[MethodConfig]]:
    (tmp_path / "toyshift.py").write_text(TOY)
    monkeypatch.setattr(smore_cli.methods, "__path__", [*smore_cli.methods.__path__, str(tmp_path)])
    yield load_method("toyshift")
    del sys.modules["smore_cli.methods.toyshift"]


def test_a_method_dropped_in_as_one_file_works(toy: type[MethodConfig]) -> None:
    assert "toyshift" in available_methods()
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    x = torch.randn(5, 3)
    before = net(x)
    paths = attach(net, config_from_dict({"method": "toyshift", "target_modules": ["2"]}))
    assert paths == ["2"]
    torch.testing.assert_close(net(x), before + 2)


def test_a_file_with_two_methods_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toytwins.py").write_text(TOY + TOY.replace("ToyConfig", "OtherConfig"))
    monkeypatch.setattr(smore_cli.methods, "__path__", [*smore_cli.methods.__path__, str(tmp_path)])
    with pytest.raises(TypeError, match="must define exactly one MethodConfig, found 2"):
        load_method("toytwins")
    del sys.modules["smore_cli.methods.toytwins"]
