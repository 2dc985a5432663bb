"""Routed adapters in PEFT: loaded, called, switched, saved and loaded again by PEFT itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import smore_cli.peft  # noqa: F401
from smore_cli.errors import AdapterError, UsageError
from smore_cli.models.runs import open_run
from tests.exporting.runs import CPU, make_run
from tests.exporting.test_hf_code import ADAPTERS, _trained_prior

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # read by PEFT
IDS: Any = torch.tensor([[5, 9, 300, 77, 120, 45]])


def _peft(model: Path, folder: Path, **options: Any) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder, **options)


@pytest.mark.parametrize("method", ADAPTERS)
def test_peft_loads_computes_saves_and_loads_again(tiny_llama: Path, tmp_path: Path, method: str) -> None:
    run = make_run(tmp_path / "run", tiny_llama, ADAPTERS[method], size=0.3)
    if method == "trex":
        _trained_prior(run)
    ours, _ = open_run(run).load(CPU)
    model = _peft(tiny_llama, run)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        expected = ours(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, expected)
        assert torch.equal(
            model.generate(input_ids=IDS, do_sample=False, max_new_tokens=8),
            ours.generate(IDS, do_sample=False, max_new_tokens=8),
        )
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        assert torch.equal(model(input_ids=IDS).logits, expected)
        model.save_pretrained(tmp_path / "saved")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "saved" / name).is_file()
        assert torch.equal(_peft(tiny_llama, tmp_path / "saved")(input_ids=IDS).logits, expected)
        again, _ = open_run(tmp_path / "saved").load(CPU)  # and smore reads what PEFT saved
        assert torch.equal(again(input_ids=IDS).logits, expected)
    assert (run / "adapter_config.json").read_text().strip() == (
        tmp_path / "saved/adapter_config.json"
    ).read_text().strip()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_two_adapters_take_turns_and_one_can_train(tiny_llama: Path, tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", tiny_llama, ADAPTERS["smore"], size=0.3)
    second = make_run(tmp_path / "second", tiny_llama, ADAPTERS["mixlora"], size=0.3)
    model = _peft(tiny_llama, first)
    model.load_adapter(second, "second", is_trainable=True)
    model.set_adapter("second")
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, open_run(second).load(CPU)[0](input_ids=IDS).logits)
    model(input_ids=IDS).logits.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained
    assert all(".adapters.second." in name for name in trained)
    model.delete_adapter("second")
    model.set_adapter("default")
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, open_run(first).load(CPU)[0](input_ids=IDS).logits)


def test_a_routed_adapter_is_not_merged_and_a_wrong_one_not_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, ADAPTERS["smore"])
    with pytest.raises(UsageError, match="no single matrix equals it"):
        _peft(tiny_llama, run).merge_and_unload()
    file = run / "adapter_model.safetensors"
    file.write_bytes((make_run(tmp_path / "other", tiny_llama, ADAPTERS["mixlora"]) / file.name).read_bytes())
    with pytest.raises(AdapterError, match="does not fit this model"):
        _peft(tiny_llama, run)


def test_auto_peft_model_opens_the_folder_by_itself(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, ADAPTERS["mixlora"], size=0.3)
    with torch.no_grad():
        found = AutoPeftModelForCausalLM.from_pretrained(run)(input_ids=IDS).logits
        assert torch.equal(found, open_run(run).load(CPU)[0](input_ids=IDS).logits)


def test_an_adapter_from_before_the_peft_type_still_loads(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, ADAPTERS["mixlora"], size=0.3)
    with torch.no_grad():
        expected = open_run(run).load(CPU)[0](input_ids=IDS).logits
        path = run / "adapter_config.json"
        values = json.loads(path.read_text())
        assert values.pop("peft_type") == "SMORE_CLI"
        path.write_text(json.dumps(values))
        assert torch.equal(open_run(run).load(CPU)[0](input_ids=IDS).logits, expected)


def test_lm_eval_scores_a_routed_adapter_that_it_loads_through_peft(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, ADAPTERS["smore"], size=0.3)
    lm = HFLM(pretrained=str(tiny_llama), peft=str(run), device="cpu", batch_size=1)
    request = Instance("loglikelihood", {}, ("Question: what is ice?\nAnswer:", " frozen water"), 0)
    ((found, _),) = lm.loglikelihood([request], disable_tqdm=True)
    ours, tokenizer = open_run(run).load(CPU)
    prompt, whole = (tokenizer(text).input_ids for text in (request.args[0], "".join(request.args)))
    with torch.no_grad():
        logprobs = ours(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        plain = (
            AutoModelForCausalLM.from_pretrained(tiny_llama)(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        )
    places, tokens = range(len(prompt) - 1, len(whole) - 1), whole[len(prompt) :]
    assert found == pytest.approx(float(logprobs[places, tokens].sum()), abs=1e-4)
    assert abs(found - float(plain[places, tokens].sum())) > 0.1


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # TRL's own default
def test_trl_trains_a_routed_adapter_that_peft_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_llama, ADAPTERS["smore"], size=0.3)
    model = _peft(tiny_llama, run, is_trainable=True)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    rows = Dataset.from_list([{"text": f"ice number {number} is frozen water"} for number in range(8)])
    settings = SFTConfig(
        str(tmp_path / "trl"),
        max_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(
        model, settings, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(tiny_llama)
    )
    trainer.train()
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed and all(".adapters.default." in name for name in changed)
    trainer.save_model(str(tmp_path / "saved"))
    again, _ = open_run(tmp_path / "saved").load(CPU)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
