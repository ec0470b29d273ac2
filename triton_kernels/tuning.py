"""Tile shapes."""
import torch
def epilogue(device: torch.device):
    return {"BM": 64, "BN": 64, "num_warps": 4}
