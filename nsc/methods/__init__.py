"""Merging methods that learn no coefficients: pure functions in a dict, one file for each family."""

from nsc.methods import arithmetic, dare, emr, fr, lego, regression, robustmerge, spectral, ties
from nsc.methods.protocol import LayerInfo, LowRank, Method, Updates

METHODS: dict[str, Method] = {
    **arithmetic.METHODS,
    **ties.METHODS,
    **dare.METHODS,
    **spectral.METHODS,
    **lego.METHODS,
    **emr.METHODS,
    **fr.METHODS,
    **robustmerge.METHODS,
    **regression.METHODS,
}

__all__ = ["METHODS", "LayerInfo", "LowRank", "Method", "Updates"]
