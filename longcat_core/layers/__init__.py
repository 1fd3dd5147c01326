"""Routing, experts, latent attention and rotary embedding: pure functions over tensors."""
