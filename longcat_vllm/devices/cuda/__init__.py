"""All that a GPU does differently: kernels of FFN experts that drop zero experts, what it leaves to vLLM."""
