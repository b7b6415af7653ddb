"""Learning coefficients: objectives, passes, the optimizer loop and its checkpoint."""
