"""All that a CPU does differently: attention, FFN experts, patches of vLLM, what it refuses."""
