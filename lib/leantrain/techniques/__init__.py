"""One file a paper: techniques in plain PyTorch and Lightning."""
