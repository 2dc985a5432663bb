"""Finding the centroids of a prior: k-means on the embeddings of the training prompts, or a file of finished ones.

Embeddings and centroids are kept in the cache folder under a hash of everything they depend on, so that a second run,
or a resumed one, starts at once and from the same bytes.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from smore_cli.errors import DataError, UsageError
from smore_cli.models.cache import built_once, cache_folder
from smore_cli.models.source import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from smore_cli.nn.prior import SequencePrior

__all__ = ["CentroidFile", "KMeans", "fit_prior", "read_centroids"]

TOGETHER = 256
"""Prompts that are embedded between two looks at the clock."""
REPORT_SECONDS = 15

_LAYOUT = 2  # raise it when the same inputs give other numbers, so that old caches are not taken for new ones


@dataclass(frozen=True)
class KMeans:
    """Lloyd's k-means of scikit-learn from k-means++ starts; a centroid is the plain mean of its unit vectors.

    Attributes:
        num_clusters: K.
        seed: of the starts, and of the sample.
        n_init: starts, of which the best result counts.
        max_prompts: how many different prompts are clustered at most, a random sample of all; None: all.
    """

    num_clusters: int
    seed: int = 0
    n_init: int = 4
    max_prompts: int | None = None

    def sample(self, count: int) -> list[int]:
        """Returns which of `count` different prompts are clustered, in order."""
        if self.max_prompts is None or count <= self.max_prompts:
            return list(range(count))
        return sorted(random.Random(self.seed).sample(range(count), self.max_prompts))

    def __call__(self, embeddings: Tensor, counts: Sequence[int]) -> Tensor:
        """Returns (K, d) float32; see `smore_cli.nn.prior.Clustering`.

        Raises:
            DataError: there are fewer different embeddings than clusters.
        """
        from sklearn.cluster import KMeans as Lloyd
        from threadpoolctl import threadpool_limits

        found = len(torch.unique(embeddings, dim=0))
        if found < self.num_clusters:
            raise DataError(
                f"the prior's {self.num_clusters} clusters need as many different prompts, there are {found}",
                "lower num_down or num_up, add data, or give finished centroids",
            )
        solver = Lloyd(self.num_clusters, random_state=self.seed, n_init=self.n_init)
        with threadpool_limits(1):  # several threads add up in the order they finish, which changes the last bits
            solver.fit(embeddings.double().numpy(), sample_weight=torch.tensor(counts).double().numpy())
        return torch.from_numpy(solver.cluster_centers_).float()


@dataclass(frozen=True)
class CentroidFile:
    """Finished centroids.

    Attributes:
        path: see `read_centroids`.
        num_clusters: K.
    """

    path: str
    num_clusters: int

    def sample(self, count: int) -> list[int]:
        """Returns no prompt: nothing is clustered."""
        return []

    def __call__(self, embeddings: Tensor, counts: Sequence[int]) -> Tensor:
        """Returns the file's centroids, (K, d) float32.

        Raises:
            DataError: they are not K vectors of the embeddings' width.
        """
        centroids, wanted = read_centroids(self.path), (self.num_clusters, embeddings.shape[1])
        if centroids.shape != wanted:
            raise DataError(
                f"{self.path} holds centroids {tuple(centroids.shape)}, the adapter and its embedder need {wanted}",
                "one for each pair of a down and an up vector, made with the same embedder",
            )
        return centroids


def read_centroids(path: str | Path) -> Tensor:
    """Reads (K, d) float32 from a `.pt` (a tensor, or a list of vectors), `.npy` or `.safetensors` (one tensor) file.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    path = Path(path).expanduser()
    try:
        found = _read(path)
        if isinstance(found, list | tuple) and found and all(isinstance(row, Tensor) for row in found):
            found = torch.stack([row.reshape(-1) for row in found])
    except UnpicklingError as error:  # the unpickler is not allowed to run anything
        raise DataError(f"centroids {path}: it holds more than tensors", "save a plain tensor, or .npy") from error
    except (OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
        raise DataError(f"centroids {path}: {one_line(error) or type(error).__name__}", "is it damaged?") from error
    if not isinstance(found, Tensor) or found.dim() != 2 or not found.is_floating_point():
        raise DataError(f"centroids {path}: it does not hold one matrix of floating-point numbers, a row a centroid")
    if not found.isfinite().all():
        raise DataError(f"centroids {path}: some numbers are not finite")
    return found.float()


def _read(path: Path) -> object:
    if path.suffix == ".npy":
        import numpy as np

        return torch.from_numpy(np.load(path, allow_pickle=False))
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        return next(iter(tensors.values())) if len(tensors) == 1 else None
    if path.suffix in (".pt", ".pth", ".bin"):
        return torch.load(path, map_location="cpu", weights_only=True)
    raise DataError(f"centroids {path}: unknown kind of file '{path.suffix}'", "use .pt, .npy or .safetensors")


def fit_prior(
    model: nn.Module,
    prior: SequencePrior,
    prompts: Sequence[Sequence[int]],
    used: Sequence[int],
    say: Callable[[str], None],
) -> None:
    """Finds a prior's centroids from the training rows' prompts, and scores those of the run once and for all.

    Args:
        model: the backbone with its adapter.
        prior: the adapter's.
        prompts: token ids, one for each training row; rows with equal prompts count as often as they occur.
        used: numbers of the rows that the run will see.
        say: told what takes time.

    Raises:
        UsageError: there are too few different prompts, or the embedder or the file of centroids cannot be used.
    """
    if isinstance(prior.clustering, CentroidFile):
        read_centroids(prior.clustering.path)  # a mistake in it shows before anything is embedded
    counts = Counter(tuple(prompt) for prompt in prompts)  # in the order of the rows
    different = list(counts)
    clustered = [different[i] for i in prior.clustering.sample(len(different))]
    embedded = list(dict.fromkeys([*clustered, *(tuple(prompts[row]) for row in used)]))
    if not embedded:
        raise UsageError("a prior cannot be fitted to no prompt at all")
    key = hashlib.sha256(f"{_LAYOUT} {prior.embedder.identity(model, embedded)}".encode()).hexdigest()

    def embed() -> Tensor:
        fewer = "; adapter.kmeans_max_prompts takes a sample" if len(clustered) > 1000 else ""
        say(f"embedding {len(embedded):,} prompts for the prior, a forward pass each{fewer}")
        return _embedded(model, prior, embedded, say)

    embeddings = _kept(key, "embeddings", embed)
    occurrences = [counts[prompt] for prompt in clustered]

    def cluster() -> Tensor:
        return prior.clustering(embeddings[: len(clustered)], occurrences)

    if isinstance(prior.clustering, CentroidFile):  # it may change under its name, and needs no copy
        prior.centroids = cluster()
    else:
        found = hashlib.sha256(f"{key} {prior.clustering!r} {occurrences}".encode()).hexdigest()
        prior.centroids = _kept(found, "centroids", cluster)
    prior.remember(embedded, embeddings)


def _embedded(
    model: nn.Module, prior: SequencePrior, prompts: Sequence[Sequence[int]], say: Callable[[str], None]
) -> Tensor:
    """Returns the prompts' vectors, (P, d); where it takes long, says how far it is."""
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # a pass has prompts of similar length
    vectors: list[Tensor] = [torch.empty(0)] * len(prompts)
    started = said = time.monotonic()
    for first in range(0, len(prompts), TOGETHER):
        some = by_length[first : first + TOGETHER]
        for i, vector in zip(some, prior.embedder(model, [prompts[i] for i in some]), strict=True):
            vectors[i] = vector
        done, now = first + len(some), time.monotonic()
        if now - said > REPORT_SECONDS and done < len(prompts):
            said = now
            tokens = [len(prompts[i]) for i in by_length]
            left = (now - started) * sum(tokens[done:]) / max(sum(tokens[:done]), 1)
            say(f"embedded {done:,} of {len(prompts):,} prompts, about {left:,.0f} s left")
    return torch.stack(vectors)


def _kept(key: str, name: str, make: Callable[[], Tensor]) -> Tensor:
    """Returns the cached tensor, made first if need be."""

    def build(folder: Path) -> None:
        save_file({name: make().contiguous()}, folder / f"{name}.safetensors")

    return load_file(built_once(cache_folder() / "priors" / key, build) / f"{name}.safetensors")[name]
