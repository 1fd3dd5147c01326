"""Routing, experts, latent attention and rotary embedding: pure functions over tensors."""
# SPDX-License-Identifier: Apache-2.0
