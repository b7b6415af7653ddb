"""The other merging methods: pure functions in a dict, one file a family."""

from nsc.methods import arithmetic, dare, emr, fr, lego, robustmerge, spectral, ties
from nsc.methods.method import LowRank, Method, Place, Updates

METHODS: dict[str, Method] = {
    name: method
    for family in (arithmetic, ties, dare, spectral, lego, emr, fr, robustmerge)
    for name, method in family.METHODS.items()
}

__all__ = ["METHODS", "LowRank", "Method", "Place", "Updates"]
