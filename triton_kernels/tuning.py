"""Tile shapes."""
import torch
def epilogue(device: torch.device):
    return {"BM": 64, "BN": 64, "num_warps": 4}
def programs(device): return 3
def fused_rows(device, dtype, precision, d):
    return {"BM":32,"BN":16,"BD":32 if d<=32 else 16,"KEEP":d<=32,"num_warps":4,"num_stages":2}
def fused_gradient(device, dtype, precision, d, atomic):
    return {"BM":32,"BN":16,"BD":16,"PART":32,"KEEP":d<=32,"num_warps":4,"num_stages":2}
def predicted_form(p): return "fused"
