"""How a forward runs: processes, shards, placement, quantization, CUDA graphs, memory."""
