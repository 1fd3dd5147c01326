"""What LongCat-Flash is, in torch: configuration, checkpoint, routing, experts, latent attention, reference."""
