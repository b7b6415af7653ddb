"""Recipes, a method with its settings, space, scale and weights; and the updates that they make of adapters."""
