"""The other merging methods: pure functions in a dict, one file a family."""

from nsc.methods import arithmetic, dare, emr, fr, lego, robustmerge, spectral, ties
from nsc.methods.protocol import LowRank, Method, Place, Updates

METHODS: dict[str, Method] = {
    **arithmetic.METHODS,
    **ties.METHODS,
    **dare.METHODS,
    **spectral.METHODS,
    **lego.METHODS,
    **emr.METHODS,
    **fr.METHODS,
    **robustmerge.METHODS,
}

__all__ = ["METHODS", "LowRank", "Method", "Place", "Updates"]
