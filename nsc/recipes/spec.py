"""What to do with adapters, by name: a method, the space that it runs in, its settings, one scale, weights of tasks.

ties    core-ties    knots-dare-ties    core-tsv    nsc+ties    ...        [LEARNED+][SPACE-]METHOD
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, get_type_hints

from nsc.checks import expected, typed
from nsc.config import LEARNED, MergeConfig
from nsc.errors import NSCError
from nsc.methods import METHODS, Method
from nsc.recipes.spaces import SPACES

COMMON = ("scale", "weights", "isotropize")
OF_BASE = ("device", "dtype", "keep_modules")  # of MergeConfig, which methods that learn nothing have too
OF_SEARCH = ("max_length", "evaluation_samples", "target_modules", "target_blocks")  # likewise, where they search


@dataclass(frozen=True)
class Recipe:
    """One method with everything chosen.

    name: of METHODS.  space: of SPACES.  settings: the method's own.  scale: lambda, outside of everything, once.
    weights: task -> w_k, 1 where it is not named.  isotropize: all singular values of the merged matrix become their
    mean, in core space, or in full where the method is basis-free.  learned: of LEARNED, whose coefficients are the
    weights of each layer.
    """

    name: str
    space: str
    settings: Any
    scale: float = 1.0
    weights: Mapping[str, float] = field(default_factory=dict)
    isotropize: bool = False
    learned: str | None = None

    def __post_init__(self) -> None:
        for name, value in {"scale": self.scale, **{f"the weight of {t}": w for t, w in self.weights.items()}}.items():
            if not math.isfinite(value):
                raise NSCError(f"{name} must be a finite number, not {value}")
        if self.isotropize and self.space != "core" and not (self.space == "full" and self.method.basis_free):
            remedy = f"give core-{self.name}, or leave it out" if "core" in self.method.spaces else "leave it out"
            raise NSCError(f"isotropize does not go with {self.full_name}: it needs the core space; {remedy}")

    @property
    def method(self) -> Method:
        """The row of METHODS."""
        return METHODS[self.name]

    @property
    def full_name(self) -> str:
        """As ``read_recipe`` takes it."""
        return self.name if self.space == "full" else f"{self.space}-{self.name}"

    @property
    def label(self) -> str:
        """As ``nsc.merge`` takes it: "ties", or "nsc+ties"."""
        return f"{self.learned}+{self.full_name}" if self.learned else self.full_name

    @property
    def is_dense(self) -> bool:
        """Whether a layer's update is no product of small factors, so that no exact adapter holds it."""
        return self.space == "full" and not (self.method.on_factors or self.method.basis_free)

    @property
    def merges_whole_layers(self) -> bool:
        """Whether it also merges layers that adapters fine-tuned whole, which have no factors."""
        return self.space == "full" and self.method.whole_layers and not self.isotropize

    def to_dict(self) -> dict[str, Any]:
        """Plain values: ``read_recipe(**recipe.to_dict())`` is the recipe again."""
        own = {k: _plain(v) for k, v in asdict(self.settings).items() if not hasattr(v, "shape")}
        return {
            "method": self.full_name, **own, "scale": self.scale, "weights": dict(self.weights),
            "isotropize": self.isotropize,
        }  # fmt: skip


def names() -> list[str]:
    """Every name that ``read_recipe`` takes: methods, and with its prefix each other space that they can run in."""
    return [name if space == "full" else f"{space}-{name}" for name, m in METHODS.items() for space in m.spaces]


def read_recipe(method: str, **settings: Any) -> Recipe:
    """The recipe of a name and its settings, each in its place.

    Raises NSCError for a method or setting that there is not, naming the nearest, and for a value that cannot be.
    """
    space, name = _split(method)
    chosen = METHODS[name]
    own = {f.name: f for f in fields(chosen.settings)}
    kinds = get_type_hints(chosen.settings) | get_type_hints(Recipe)
    for key, value in settings.items():
        if key not in own and key not in COMMON:
            there = sorted([*own, *COMMON])
            raise NSCError(f"method {method} has no setting {key}; it has {', '.join(there)}")
        try:
            settings[key] = typed(value, dict[str, float] if key == "weights" else kinds[key])
        except TypeError:
            raise NSCError(f"{key} must be {expected(kinds[key])}, not {value!r}") from None
    mine = chosen.settings(**{key: value for key, value in settings.items() if key in own})
    return Recipe(name, space, mine, **{key: value for key, value in settings.items() if key in COMMON})


def split_learned(method: str) -> tuple[str | None, str | None]:
    """What learns coefficients, of LEARNED, and the recipe that takes them: of "nsc+ties", or "nsc" or "ties" alone.

    Raises NSCError for a name that there is not, naming the nearest, and for parts in another order or number.
    """
    learned, plus, recipe = method.partition("+")
    if plus and (learned not in LEARNED or recipe in ("", *LEARNED) or "+" in recipe):
        raise NSCError(
            f"{method} is not what learns coefficients and one method that takes them, such as nsc+ties; they are"
            f" learned by {', '.join(LEARNED)}"
        )
    if plus:
        _split(recipe)
        return learned, recipe
    if method in LEARNED:
        return method, None
    _split(method)
    return None, method


def method_of(method: str) -> Method:
    """The row of METHODS that a name, with its space or without, means. Raises NSCError where there is none."""
    return METHODS[_split(method)[1]]


def settings_of(method: str) -> dict[str, Any]:
    """Every setting that a method takes, in a search or without -> its type, as ``read_settings`` takes it apart."""
    learned, name = split_learned(method)
    kinds = get_type_hints(MergeConfig)
    kinds = kinds if learned else {key: kinds[key] for key in OF_BASE + OF_SEARCH}
    if name:
        of_recipe = get_type_hints(Recipe)
        own = get_type_hints(method_of(name).settings)
        kinds = own | {key: of_recipe[key] for key in COMMON} | kinds
    return kinds


def read_settings(
    method: str, settings: Mapping[str, Any], searches: bool = False
) -> tuple[Recipe | None, dict[str, Any]]:
    """What a method makes of adapters, and those of ``settings`` that are MergeConfig's.

    There is no recipe where learned coefficients are all. Of "nsc+dare" a seed is of both, and weights are those of the
    base: the coefficients are those of the tasks. searches: whether the scale is searched, for which rows are read.
    Raises NSCError for a setting that the method does not have.
    """
    learned, name = split_learned(method)
    config = {f.name for f in fields(MergeConfig)} if learned else {*OF_BASE, *(OF_SEARCH if searches else ())}
    kinds = set(settings_of(method)) - (set() if learned or searches else set(OF_SEARCH))
    if strange := [key for key in settings if key not in kinds]:
        raise NSCError(f"method {method} has no setting {strange[0]}; it has {', '.join(sorted(kinds))}")
    ours = {key: value for key, value in settings.items() if key in config}
    if name is None:
        return None, ours
    own = {f.name for f in fields(method_of(name).settings)}
    recipe = read_recipe(name, **{key: v for key, v in settings.items() if key in own or key not in ours})
    return replace(recipe, learned=learned), ours


def write_settings(recipe: Recipe | None, config: MergeConfig) -> dict[str, Any]:
    """The inverse of ``read_settings``: plain values, ready for YAML."""
    of_config = config.to_dict()
    if recipe is None:
        return of_config
    own = {key: value for key, value in recipe.to_dict().items() if key != "method"}
    kept = of_config if recipe.learned else {key: of_config[key] for key in OF_BASE}
    return own | kept


def with_scale(recipe: Recipe, scale: float) -> Recipe:
    """The same at another scale."""
    return replace(recipe, scale=scale)


def _split(method: str) -> tuple[str, str]:
    space, dash, rest = method.partition("-")
    space, name = (space, rest) if dash and space in SPACES and space != "full" else ("full", method)
    if name not in METHODS or space not in METHODS[name].spaces:
        close = difflib.get_close_matches(method.lower(), [*LEARNED, *names()], n=1, cutoff=0.0)
        raise NSCError(f"there is no method {method}; did you mean {close[0]}? `nsc methods` lists all")
    return space, name


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
