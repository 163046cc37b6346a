"""Images that a network provably keeps: bounds of its logits over a ball, and the ledger of images."""
