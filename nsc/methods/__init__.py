"""The other merging methods: pure functions in a dict, one file a family."""

from nsc.methods import arithmetic, lego, robustmerge, spectral
from nsc.methods.method import LowRank, Method, Place, Updates

METHODS: dict[str, Method] = {**arithmetic.METHODS, **lego.METHODS, **robustmerge.METHODS, **spectral.METHODS}

__all__ = ["METHODS", "LowRank", "Method", "Place", "Updates"]
