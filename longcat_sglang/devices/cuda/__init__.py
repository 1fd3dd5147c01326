"""All that a GPU does differently: what it leaves to SGLang's own MLA and MoE kernels, and rotates with."""
