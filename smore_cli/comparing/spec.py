"""What a comparison says: a recipe, whose adapter is what the others are held against, and a section `compare`.

    adapter: {method: lora, rank: 32}
    compare:
      methods:
        mola: {method: mola, num_experts: 8}      target_modules: as the recipe's adapter, where it says nothing
        slow: {method: smore, ..., train: {router_learning_rate: 1e-4}}

Everything else of the recipe (model, data, train, eval) is shared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from smore_cli.errors import RecipeError, UsageError
from smore_cli.methods import load_method
from smore_cli.recipe.document import Document, Loc
from smore_cli.recipe.explain import explain
from smore_cli.recipe.load import checked
from smore_cli.recipe.overrides import apply_overrides
from smore_cli.recipe.reading import read_document
from smore_cli.recipe.ready import find_ready_recipe
from smore_cli.recipe.schema import Recipe, Section, Source

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["CompareConfig", "Comparison", "Contender", "is_comparison", "read_comparison"]

Objective = Literal["completion", "choice_ranking"]
LABEL = r"[\w.-]+"
_OWN_KEYS = ("train", "vary")


class CompareConfig(Section):
    """`compare:` what is compared and how."""

    methods: Annotated[
        dict[str, dict[str, Any]],
        Field(
            description="by label: an `adapter` section, with `train` for settings of its own and `vary` for the "
            "settings that are changed to match its size",
            min_length=1,
        ),
    ]
    baseline: Annotated[str, Field(description="label of the recipe's adapter", pattern=rf"^{LABEL}$")] = "lora"
    match: Annotated[
        Literal["trainable", "active", "none"],
        Field(description="which number of parameters is made equal: all that train, or those of one token"),
    ] = "trainable"
    tolerance: Annotated[float, Field(description="how far that may be off, as a share", gt=0, lt=1)] = 0.02
    seeds: Annotated[int, Field(description="runs of each method, with seeds 0, 1, ...", ge=1)] = 3
    objectives: (
        Annotated[
            list[Objective],
            Field(description="each method is trained with each; default: data.objective", min_length=1),
        ]
        | None
    ) = None
    learning_rate_factors: (
        Annotated[
            list[Annotated[float, Field(gt=0)]],
            Field(
                description="each method is tried with these multiples of its learning rates on the first seed, and "
                "keeps the one with the least held-out loss; default: the given rates",
                min_length=2,
            ),
        ]
        | None
    ) = None
    benchmarks: Annotated[list[str], Field(description="names as in `smore eval --benchmark`")] = Field(
        default_factory=list
    )
    data_dir: Annotated[str | None, Field(description="folder with the questions; default: the hub")] = None
    limit: Annotated[int | None, Field(description="the first so many questions of each task", ge=1)] = None
    general_text: Annotated[
        Source | None, Field(description="held-out general text, whose perplexity shows what is forgotten")
    ] = None
    general_tokens: Annotated[int, Field(description="how much of it is read", ge=1)] = 8192
    dividend_tokens: Annotated[
        int,
        Field(description="tokens that the best static update is fitted to, for the routing dividend; 0: none", ge=0),
    ] = 8192

    @field_validator("learning_rate_factors")
    @classmethod
    def _different(cls, factors: list[float] | None) -> list[float] | None:
        if factors is not None and len({f"{factor:g}" for factor in factors}) < len(factors):
            raise ValueError("two are the same to six digits, and each names the folder of a run")
        return factors


class _File(Section):
    compare: CompareConfig


@dataclass(frozen=True)
class Contender:
    """One method in a comparison.

    Attributes:
        label: its name there.
        recipe: of its runs; output_dir, seed and objective are of the run.
        vary: the settings that may be changed to match its size.
        loc: where it stands in the file.
    """

    label: str
    recipe: Recipe
    vary: tuple[str, ...]
    loc: Loc


@dataclass(frozen=True)
class Comparison:
    """A comparison as it was read.

    Attributes:
        config: its section.
        contenders: the baseline first.
        document: knows where everything stands.
    """

    config: CompareConfig
    contenders: list[Contender]
    document: Document

    @property
    def baseline(self) -> Contender:
        """What the others are held against."""
        return self.contenders[0]

    @property
    def objectives(self) -> list[Objective]:
        """What the methods are trained with, one after the other."""
        return self.config.objectives or [self.baseline.recipe.data.objective]


def is_comparison(path: Path) -> bool:
    """Whether a file has the section.

    Raises:
        RecipeError: it cannot be read.
    """
    return "compare" in read_document(path).values


def read_comparison(path: Path, overrides: Sequence[str] = (), methods: Sequence[str] = ()) -> Comparison:
    """Reads a comparison.

    Args:
        path: a YAML file.
        overrides: `--set` values, as for a recipe.
        methods: of a recipe without the section: names of methods, with the settings of their ready recipes.

    Raises:
        RecipeError: with every problem, each as `file:line:column: what` and the source line.
        UsageError: there is no ready recipe of a method, or the file has the section already.
    """
    document = read_document(path)
    if methods:
        if "compare" in document.values:
            raise UsageError(f"{path} names its methods itself, in compare.methods", "leave out --methods")
        document.values["compare"] = {"methods": {name: _ready(name) for name in methods}}
    apply_overrides(document, overrides)
    values: dict[str, Any] = dict(document.values)
    section = {"compare": values.pop("compare")} if "compare" in values else {}
    try:
        config = _File.model_validate(section).compare
    except ValidationError as error:
        explain(error, document, section, _File)
        config = None
    baseline = _checked(values, document)
    contenders = [
        contender
        for label, entry in _methods(section).items()
        for contender in _contender(str(label), entry, values, document)
    ]
    if config is not None and config.baseline in config.methods:
        place: Loc = ("compare", "methods", config.baseline)
        document.add(place, f"'{config.baseline}' is the recipe's own adapter: choose another label")
    document.fail_if_any()
    assert config is not None and baseline is not None  # or there were problems
    first = Contender(config.baseline, baseline, baseline.adapter.size_fields, ("adapter",))
    return Comparison(config, [first, *contenders], document)


def _ready(name: str) -> dict[str, Any]:
    """Returns the adapter section of a method's ready recipe; where it only can be on other modules, with these."""
    adapter: dict[str, Any] = dict(read_document(find_ready_recipe(f"methods/{name}").path).values["adapter"])
    config = load_method(adapter["method"])
    if "linear" in config.sites and len(config.sites) == 1:
        del adapter["target_modules"]
    experts = ["num_experts"] if type(adapter.get("num_experts")) is int else []
    return {**adapter, "vary": [*config.size_fields, *experts]}


def _methods(section: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    """Returns the methods of a section that may have other mistakes."""
    compare = section.get("compare")
    methods = compare.get("methods") if isinstance(compare, dict) else None
    return {k: v for k, v in methods.items() if isinstance(v, dict)} if isinstance(methods, dict) else {}


def _contender(label: str, entry: dict[str, Any], values: dict[str, Any], document: Document) -> list[Contender]:
    """Returns a method of the section; where something is wrong with it that is noted, and nothing returned."""
    loc: Loc = ("compare", "methods", label)
    if not re.fullmatch(LABEL, label):
        document.add(loc, f"'{label}' cannot be a label: it names folders, so use letters, digits, '-', '_' and '.'")
    shared = values.get("adapter")
    own = {k: v for k, v in shared.items() if k == "target_modules"} if isinstance(shared, dict) else {}
    adapter = own | {key: value for key, value in entry.items() if key not in _OWN_KEYS}
    train = entry.get("train", {})
    common = values.get("train", {})
    merged = common | train if isinstance(train, dict) and isinstance(common, dict) else train
    recipe = _checked(values | {"adapter": adapter, "train": merged}, _moved(document, loc))
    if recipe is None:
        return []
    vary = entry.get("vary", list(recipe.adapter.size_fields))
    settings = recipe.adapter.model_dump()
    if not isinstance(vary, list) or not vary:
        document.add((*loc, "vary"), "'vary' must be a list of settings, as in [rank, num_experts]")
        return []
    for name in vary:
        if not _is_size(settings.get(name)):
            document.add((*loc, "vary"), f"'{name}' is no whole number of {recipe.adapter.method} that could be varied")
    return [Contender(label, recipe, tuple(vary), loc)]


def _checked(values: dict[str, Any], document: Document) -> Recipe | None:
    """Returns the recipe of some values; None where there is something wrong, which the document then knows."""
    apart = replace(document, problems=[])  # what is wrong elsewhere says nothing of this recipe
    try:
        return checked(values, apart)
    except RecipeError:
        document.problems += [problem for problem in apart.problems if problem not in document.problems]
        return None


def _is_size(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(type(entry) is int for entry in value)
    return type(value) is int


def _moved(document: Document, loc: Loc) -> Document:
    """Returns the document of a recipe whose adapter stands at `loc`; problems are shared."""

    def moved(places: dict[Loc, Any]) -> dict[Loc, Any]:
        found = {place: mark for place, mark in places.items() if place[:1] != ("adapter",)}
        for place, mark in places.items():
            if place[: len(loc)] == loc:
                rest = place[len(loc) :]
                found[rest if rest[:1] == ("train",) else ("adapter", *rest)] = mark
        return found

    overrides = moved(document.overrides)
    return replace(document, keys=moved(document.keys), places=moved(document.places), overrides=overrides)
