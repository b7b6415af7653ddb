"""A recipe says how adapters are merged: a method, the space it runs in, its settings, a scale, weights of tasks.

ties    core-ties    knots-dare-ties    core-tsv    nsc+ties    ...        [LEARNED+][SPACE-]METHOD
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, get_type_hints

from nsc.checks import expected, require_fraction, typed
from nsc.config import AUTO, LEARNED, MergeConfig
from nsc.errors import NSCError, clipped
from nsc.methods import METHODS, Method
from nsc.methods.ties import TiesSettings
from nsc.recipes.spaces import SPACES

COMMON = ("scale", "weights", "isotropize", "aim")  # settings of every method that learns nothing
OF_SPACE = {"ctm": ("rank", "beta")}  # and of every method in a space
OF_BASE = ("device", "dtype", "keep_modules")  # fields of MergeConfig that methods that learn nothing take too
OF_ROWS = ("max_length", "modality", "tokens_per_pass", "device_map")  # and these where the merge needs rows
OF_SEARCH = ("max_length", "max_new_tokens", "evaluation_samples", "target_modules", "target_blocks")  # and in a search


@dataclass(frozen=True)
class Recipe:
    """One method with everything chosen.

    Attributes:
        name: a key of METHODS.
        space: a key of SPACES.
        settings: the method's own.
        scale: lambda; the merge is multiplied by it once.
        weights: task -> w_k, 1 where a task is not named.
        isotropize: whether all singular values of the merged matrix are set to their mean, in core or ctm space, or in
            the full space of a method that also runs in these or is basis-free.
        aim: omega of AIM, the step after the merge that ``nsc.methods.aim`` defines and rows are needed for; None
            leaves it out.
        rank: of the merge in ctm space; None for the largest rank of each layer's adapters.
        beta: in ctm space, how far norms of the updates count when the common directions are chosen, from 0 to 1.
        learned: a key of LEARNED, whose coefficients are the weights of each layer; None without any.
    """

    name: str
    space: str
    settings: Any
    scale: float = 1.0
    weights: Mapping[str, float] = field(default_factory=dict)
    isotropize: bool = False
    learned: str | None = None
    aim: float | None = None
    rank: int | None = None
    beta: float = 0.25

    def __post_init__(self) -> None:
        for name, value in {"scale": self.scale, **{f"the weight of {t}": w for t, w in self.weights.items()}}.items():
            if not math.isfinite(value):
                raise NSCError(f"{name} must be a finite number, not {value}")
        if self.rank is not None and self.rank < 1:
            raise NSCError(f"rank must be at least 1, not {self.rank}")
        require_fraction("beta", self.beta)
        if self.aim is not None:
            require_fraction("aim", self.aim)
        counts = isinstance(self.settings, TiesSettings) and self.settings.rules.elect == "count"
        if counts and self.space != "full":
            raise NSCError(
                f"{self.full_name} cannot elect by count: signs of singular vectors are arbitrary, and a draw of counts"
                f" goes by them; give elect mass, or {self.name} without {self.space}"
            )
        in_core = "core" in self.method.spaces
        if self.isotropize and not (self.space != "knots" and (in_core or self.method.basis_free)):
            remedy = f"give core-{self.name}, or leave it out" if in_core else "leave it out"
            raise NSCError(f"isotropize does not go with {self.full_name}: it needs the core space; {remedy}")

    @property
    def method(self) -> Method:
        """The entry of METHODS."""
        return METHODS[self.name]

    @property
    def full_name(self) -> str:
        """The name with its space, as ``read_recipe`` takes it: "ties" or "core-ties"."""
        return self.name if self.space == "full" else f"{self.space}-{self.name}"

    @property
    def label(self) -> str:
        """The name as ``nsc.merge`` takes it: "ties" or "nsc+ties"."""
        return f"{self.learned}+{self.full_name}" if self.learned else self.full_name

    @property
    def of_space(self) -> dict[str, Any]:
        """The settings of the space, as its function in SPACES takes them."""
        return {key: getattr(self, key) for key in OF_SPACE.get(self.space, ())}

    @property
    def needs_rows(self) -> bool:
        """Whether it is made from unlabeled rows, without learning."""
        return self.method.inputs is not None or self.aim is not None

    @property
    def is_dense(self) -> bool:
        """Whether a layer's update is not a product of small factors, so that no adapter holds it exactly."""
        factored = self.method.on_factors or self.method.equations or self.method.basis_free
        return self.space == "full" and not factored

    @property
    def merges_whole_layers(self) -> bool:
        """Whether it also merges layers that adapters fine-tuned whole, which have no factors."""
        return self.space == "full" and self.method.whole_layers and not self.isotropize

    def to_dict(self) -> dict[str, Any]:
        """Write the recipe as plain values; ``read_recipe(**recipe.to_dict())`` is the recipe again.

        Returns:
            "method" and every setting. What ``learned`` names is not in it.
        """
        own = {k: _plain(v) for k, v in asdict(self.settings).items() if not hasattr(v, "shape")}
        return {
            "method": self.full_name,
            **own,
            "scale": self.scale,
            "weights": dict(self.weights),
            "isotropize": self.isotropize,
            "aim": self.aim,
            **self.of_space,
        }


def names() -> list[str]:
    """List every name that ``read_recipe`` takes.

    Returns:
        The methods, and each with the prefix of every other space in which it can run.
    """
    return [name if space == "full" else f"{space}-{name}" for name, m in METHODS.items() for space in m.spaces]


def read_recipe(method: str, **settings: Any) -> Recipe:
    """Return the recipe of a name and its settings.

    Args:
        method: [SPACE-]METHOD.
        settings: the method's own, scale, weights, isotropize and aim, and those of the space.

    Returns:
        The recipe, with defaults for the settings that are not given.

    Raises:
        NSCError: if there is no such method (the message suggests the nearest) or setting, or a value does not fit.
    """
    space, name = _split(method)
    chosen = METHODS[name]
    own = {f.name for f in fields(chosen.settings)}
    kinds = get_type_hints(chosen.settings) | get_type_hints(Recipe)
    common = (*COMMON, *OF_SPACE.get(space, ()))
    _require_known(method, settings, {*own, *common})
    for key, value in settings.items():
        try:
            settings[key] = typed(value, kinds[key])
        except TypeError:
            raise NSCError(f"{key} must be {expected(kinds[key])}, not {clipped(repr(value))}") from None
    mine = chosen.settings(**{key: value for key, value in settings.items() if key in own})
    return Recipe(name, space, mine, **{key: value for key, value in settings.items() if key in common})


def split_learned(method: str) -> tuple[str | None, str | None]:
    """Split a name into what learns coefficients and what takes them as weights.

    Args:
        method: such as "nsc+ties", "nsc" or "ties".

    Returns:
        A key of LEARNED and the name of a recipe; None for one that is not there.

    Raises:
        NSCError: if there is no such method (the message suggests the nearest), or the parts are in another order or
            number.
    """
    learned, plus, recipe = method.partition("+") if method not in METHODS else ("", "", "")
    unknown = learned not in LEARNED or learned == AUTO
    if plus and (unknown or recipe in ("", *LEARNED) or "+" in recipe.removesuffix("++")):
        raise NSCError(
            f"{method} must name a method that learns coefficients and one that takes them, such as nsc+ties;"
            f" coefficients are learned by {', '.join(name for name in LEARNED if name != AUTO)}"
        )
    if plus:
        _split(recipe)
        return learned, recipe
    if method in LEARNED:
        return method, None
    _split(method)
    return None, method


def method_of(method: str) -> Method:
    """Look up a method.

    Args:
        method: [SPACE-]METHOD.

    Returns:
        The entry of METHODS.

    Raises:
        NSCError: if there is none; the message suggests the nearest.
    """
    return METHODS[_split(method)[1]]


def config_fields(method: str, searches: bool, aims: bool) -> tuple[str, ...]:
    """Return which fields of MergeConfig a method takes that learns no coefficients.

    Args:
        method: [SPACE-]METHOD.
        searches: whether its scale is searched.
        aims: whether AIM follows it.

    Returns:
        Names of fields.
    """
    of_rows = OF_ROWS if method_of(method).inputs or aims else ()
    return tuple(dict.fromkeys((*OF_BASE, *of_rows, *(OF_SEARCH if searches else ()))))


def settings_of(method: str) -> dict[str, Any]:
    """List every setting that a method takes, those of a scale search included.

    Args:
        method: [LEARNED+][SPACE-]METHOD, or a key of LEARNED.

    Returns:
        Setting -> its type.

    Raises:
        NSCError: if there is no such method.
    """
    learned, name = split_learned(method)
    kinds = get_type_hints(MergeConfig)
    kinds = kinds if learned else {key: kinds[key] for key in config_fields(method, searches=True, aims=True)}
    if name:
        of_recipe, common = get_type_hints(Recipe), (*COMMON, *OF_SPACE.get(_split(name)[0], ()))
        own = get_type_hints(method_of(name).settings)
        kinds = own | {key: of_recipe[key] for key in common} | kinds
    return kinds


def read_settings(
    method: str, settings: Mapping[str, Any], searches: bool = False
) -> tuple[Recipe | None, dict[str, Any]]:
    """Divide settings between the recipe and MergeConfig.

    With a learning method such as "nsc+dare", a seed belongs to both; "weights" is that of MergeConfig, the form of the
    base's weights, for the tasks' weights are the learned coefficients.

    Args:
        method: [LEARNED+][SPACE-]METHOD, or a key of LEARNED.
        settings: setting -> value.
        searches: whether the scale is searched, which reads rows and so takes some settings of MergeConfig.

    Returns:
        The recipe, None where the method learns coefficients and does nothing else with them; and the settings that
        are MergeConfig's.

    Raises:
        NSCError: if the method has no such setting, or a value does not fit.
    """
    learned, name = split_learned(method)
    aims = settings.get("aim") is not None
    config = {f.name for f in fields(MergeConfig)} if learned else {*config_fields(method, searches, aims)}
    kinds = set(settings_of(method)) - (set() if learned else {*config_fields(method, True, True)} - config)
    _require_known(method, settings, kinds)
    ours = {key: value for key, value in settings.items() if key in config}
    if name is None:
        return None, ours
    own = {f.name for f in fields(method_of(name).settings)}
    recipe = read_recipe(name, **{key: v for key, v in settings.items() if key in own or key not in ours})
    return replace(recipe, learned=learned), ours


def write_settings(recipe: Recipe | None, config: MergeConfig) -> dict[str, Any]:
    """Write all settings of a merge as plain values, ready for YAML; the inverse of ``read_settings``.

    Args:
        recipe: the recipe, if any.
        config: the settings of MergeConfig.

    Returns:
        Setting -> value; of MergeConfig only what the method takes.
    """
    of_config = config.to_dict()
    if recipe is None:
        return of_config
    own = {key: value for key, value in recipe.to_dict().items() if key != "method"}
    kept = of_config if recipe.learned else {key: of_config[key] for key in OF_BASE}
    kept |= {key: of_config[key] for key in OF_ROWS} if recipe.needs_rows else {}
    return own | kept


def with_scale(recipe: Recipe, scale: float) -> Recipe:
    """Change the scale of a recipe.

    Args:
        recipe: the recipe.
        scale: lambda.

    Returns:
        Another recipe.
    """
    return replace(recipe, scale=scale)


def _require_known(method: str, settings: Mapping[str, Any], known: Collection[str]) -> None:
    if strange := [key for key in settings if key not in known]:
        raise NSCError(f"method {method} has no setting {strange[0]}; it has {', '.join(sorted(known))}")


def _split(method: str) -> tuple[str, str]:
    """Return the space and the key of METHODS that a name means."""
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
