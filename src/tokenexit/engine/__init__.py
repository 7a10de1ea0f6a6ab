"""The plain ViT over packed tokens: tokens, attention, blocks, operation counts."""
