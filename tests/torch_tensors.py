"""Tensors of every kind that a snapshot may hold, in host memory, and their bytes as the file has them."""

from __future__ import annotations

import torch

from snapstore.adapters._torch import _DTYPES


def bytes_of(tensor: torch.Tensor) -> bytes:
    whole = tensor.resolve_conj().resolve_neg().contiguous()
    return bytes(whole.view(-1).view(torch.uint8).tolist()) if whole.numel() else b""


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = torch.empty(0, dtype=dtype).element_size()
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, dtype=torch.uint8).bool()
    count = size
    for extent in shape:
        count *= extent
    return torch.randint(0, 255, (count,), dtype=torch.uint8).view(dtype).view(shape)


def variety(device: str = "cpu") -> dict[str, torch.Tensor]:
    """Every dtype of the format as a plain tensor, a scalar and an empty one, and views and modes of all kinds."""
    torch.manual_seed(0)
    tensors = {f"plain {name}": random_bits(dtype, 3, 5).to(device) for name, dtype in _DTYPES.items()}
    tensors |= {
        f"scalar {name}": random_bits(dtype, 1).to(device).reshape(()) for name, dtype in _DTYPES.items()
    }
    tensors |= {
        f"empty {name}": torch.empty((0, 3), dtype=dtype, device=device) for name, dtype in _DTYPES.items()
    }
    base = torch.randn(4, 6, 8).to(device)
    complexes = torch.randn(3, 4, dtype=torch.complex64).to(device)
    tensors |= {
        "turned": base.permute(2, 0, 1), "cut": base[::2, 1:5], "row": base[1, 2],
        "expanded": base[:1, :1].expand(3, 4, 8),
        "conj": complexes.conj(), "neg": complexes.conj().imag, "real": complexes.real,
        "parameter": torch.nn.Parameter(torch.randn(3, 3).to(device)),
        "graph": torch.nn.Parameter(torch.randn(3).to(device)) * 2,
    }  # fmt: skip
    with torch.inference_mode():
        tensors["inference"] = torch.randn(5).to(device)
    return tensors
