from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from smore_cli.routing.html import TRACE_BYTES, render_page
from smore_cli.routing.inputs import Inputs
from smore_cli.routing.session import RoutingProfile
from smore_cli.routing.trace import RouterTrace, TextTrace
from tests.routing.browser import visit
from tests.routing.traces import router

EVIL = "</script><script>console.error('run')</script><!--"


def path(layer: int, projection: str = "q_proj") -> str:
    return f"model.layers.{layer}.self_attn.{projection}"


def document(**more: Any) -> dict[str, Any]:
    """Two layers with a router of three experts, the last of layer 1 dead, and the trace of three tokens."""
    routers = [router([1.0, 0.5, 0.5], module=path(0)), router([0.75, 1.25, 0.0], module=path(1))]
    gates = torch.tensor([[[0.25, 0.75, 0.0]], [[0.0, 0.4, -0.6]], [[1.0, 0.0, 0.0]]])
    trace = TextTrace(EVIL, "as it stands", [1, 2, 3], ["Ice ", EVIL, "\n"], [RouterTrace(path(0), 0, gates)])
    inputs = Inputs("held-out", [EVIL], [], 0)
    profile = RoutingProfile(Path(EVIL), "tiny", "smore", inputs, routers, {}, trace=trace)
    return {**profile.document(), **more}


@pytest.mark.browser
def test_the_page_opens_without_an_error_or_a_request_and_its_cells_have_the_numbers(tmp_path: Path) -> None:
    effect = {"layer": 0, "level": 0, "expert": 0, "ablated": {"value": 0.5, "stderr": 0.1}}
    causal = {"loss": 2.0, "supervised_tokens": 9, "modules": [], "effects": [{**effect, "forced": effect["ablated"]}]}
    layer = {"layer": 1, "static": 2.25, "value": 0.25, "stderr": 0.1}
    loss = {"base": 3.0, "static": 2.5, "routed": 2.0}
    dividend = {"loss": loss, "dividend": 0.5, "stderr": 0.125, "share": 0.5, "layers": [layer]}
    expression = """
      const text = (selector) => [...document.querySelectorAll(selector)].map((node) => node.textContent);
      const before = text("#experts tbody td");
      document.querySelectorAll("#experts input")[1].click();
      const marked = document.querySelector("#experts .marked");
      marked.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
      const background = () => getComputedStyle(document.body).backgroundColor;
      const system = background();
      document.getElementById("theme").click();
      return { before, load: text("#experts tbody td"), tip: text("#tip")[0], title: document.title,
               sections: text("nav a"), tokens: text("#trace .token"), causal: text("#causal tbody td"),
               dividend: text("#dividend .note, #dividend tbody td"),
               heaviest: text("#trace .strip tbody td"), scripts: document.scripts.length,
               system, other: background() };
    """
    html = render_page(document(causal=causal, dividend=dividend))
    found, dark = (visit(tmp_path, html, expression, dark=dark) for dark in (False, True))
    assert (found.console, found.requested) == ([], [])
    page = found.found
    assert page["before"] == ["1.500", "0.750", "0.750", "1.125", "1.875", "0.000"]  # times an even share
    assert page["load"] == ["1.000", "0.500", "0.500", "0.750", "1.250", "0.000"]
    assert page["tip"].splitlines()[:2] == ["layer 1 · q · expert 2", "load 0.000  gate weight 0.000"]
    assert page["tip"].endswith("dead")
    sections = ["Summary", "Experts", "Routers", "Trace of a text", "What an expert is worth", "What routing earned"]
    assert page["sections"] == sections
    assert page["tokens"] == ["Ice ", EVIL, "⏎"]
    assert page["heaviest"] == ["1", "2", "0"]
    assert page["causal"] == ["+0.5000", "+0.5000"]
    note, *numbers = page["dividend"]
    assert note.startswith("Routing dividend +0.5000 ± 0.1250 nats a token: 50.0 % of the adapter's gain")
    assert numbers == ["3.0000", "2.5000", "2.0000", "2.2500", "+0.2500 ± 0.1000"]
    assert (page["title"], page["scripts"]) == (f"Routing of {EVIL}", 3)  # the data, the page's script, the probe
    assert (page["system"], page["other"]) == (dark.found["other"], dark.found["system"])
    assert page["system"] != page["other"]


@pytest.mark.browser
def test_what_experts_specialise_in_and_other_runs_are_drawn(tmp_path: Path) -> None:
    told = {"bits": 0.5, "chance": 0.1, "low": 0.05, "high": 0.2, "p": 0.005, "most": 1.0, "above_chance": 0.4}
    top = [[{"token": EVIL, "count": 3, "usage": 0.75, "contexts": []}], [], []]
    shown = document()
    for entry in shown["routers"]:
        entry |= {"information": {"token_class": told}, "top_tokens": top, "together": [[1.0, 0.25, 0.0]] * 3}
    other = {"run": EVIL, "step": 4, "mean_total_variation": 0.125, "routers": [
        {"module": path(0), "level": 0, "effective_experts": 2.5, "total_variation": 0.125}]}  # fmt: skip
    expression = """
      const text = (selector) => [...document.querySelectorAll(selector)].map((node) => node.textContent);
      return { told: text("#information tbody td"), tokens: text("#tokens .token"),
               together: text("#tokens .heat tbody td"), map: text("#beside .heat tbody td"),
               beside: text("#beside .figures tbody th, #beside .figures tbody td") };
    """
    opened = visit(tmp_path, render_page({**shown, "drift": [other], "compare": None}), expression)
    assert (opened.console, opened.requested) == ([], [])
    assert opened.found["told"] == ["0.400", "0.400"]
    assert opened.found["tokens"] == [json.dumps(EVIL) + " "]
    assert opened.found["together"][:3] == ["1.00", "0.25", "0.00"]
    assert opened.found["beside"] == ["step 4", "0.1250", "2.50"]
    assert opened.found["map"] == ["0.125", ""]


@pytest.mark.browser
def test_a_branch_is_as_thick_as_its_path_is_frequent(tmp_path: Path) -> None:
    taken = {(0, 1): 0.5, (1, 0): 0.375, (1, 1): 0.125}
    leaves = replace(router([1.0, 1.0], module=path(0)), paths=taken)
    routers = [router([1.0, 1.0], module=path(0), level=1), leaves]
    profile = RoutingProfile(Path("run"), "tiny", "smore", Inputs("given", [], [], 0), routers, {})
    expression = """
      const branches = [...document.querySelectorAll("#tree path")];
      return [branches.map((branch) => Number(branch.getAttribute("stroke-width"))),
              [...document.querySelectorAll("#tree svg text")].map((label) => label.textContent),
              [...document.querySelectorAll("#experts h3")].map((head) => head.textContent)];
    """
    opened = visit(tmp_path, render_page(profile.document()), expression)
    assert opened.console == []
    widths, labels, heads = opened.found
    assert [width / widths[0] for width in widths] == pytest.approx([1, 1, 1, 0.75, 0.25])
    assert labels == ["1 · 50.0 %", "0", "0 · 37.5 %", "1 · 12.5 %", "1"]
    assert heads == ["Root", "Leaves"]


@pytest.mark.browser
def test_an_error_or_a_request_of_a_page_would_be_seen(tmp_path: Path) -> None:
    page = "<body><script src='https://example.invalid/a.js'></script><script>throw Error('broken')</script></body>"
    seen = visit(tmp_path, page, "return 1")
    assert any("broken" in line for line in seen.console)
    assert seen.requested == ["https://example.invalid/a.js"]


def test_nothing_in_the_data_ends_the_script_or_becomes_markup() -> None:
    page = render_page(document())
    assert EVIL not in page and "console.error" in page
    assert page.count("</script>") == 2
    data = page.split('id="document">')[1].split("</script>")[0]
    assert json.loads(data)["trace"]["tokens"][1] == EVIL


def test_a_page_of_a_large_model_with_a_long_text_is_under_two_megabytes() -> None:
    experts = 8
    paths = [path(layer, f"map{number}") for layer in range(32) for number in range(7)]
    places = [(module, level) for module in paths for level in (1, 0)]
    routers = [router([0.123456789] * experts, module=module, level=level) for module, level in places]
    gates = torch.zeros(250, 1, experts)
    gates[..., 3] = 0.3
    trace = TextTrace("", "", list(range(250)), ["token"] * 250, [RouterTrace(*place, gates) for place in places])
    profile = RoutingProfile(Path("run"), "tiny", "smore", Inputs("given", [], [], 0), routers, {}, trace=trace)
    page = render_page(profile.document())
    assert TRACE_BYTES < len(page) < 2_000_000
    kept = json.loads(page.split('id="document">')[1].split("</script>")[0])["trace"]
    assert kept["all_tokens"] == 250 and len(kept["tokens"]) == TRACE_BYTES // (len(places) * experts)


@pytest.mark.parametrize("key", ["run", "levels", "routers"])
def test_a_document_without_what_every_page_shows_is_no_page(key: str) -> None:
    with pytest.raises(Exception, match=key):
        render_page({name: value for name, value in document().items() if name != key})
