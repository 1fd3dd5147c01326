"""What LongCat-Flash is, in torch: configuration, checkpoint, routing, experts, latent attention, reference."""
# SPDX-License-Identifier: Apache-2.0
