"""Learning coefficients: objectives, passes, the optimiser loop and its checkpoint."""
