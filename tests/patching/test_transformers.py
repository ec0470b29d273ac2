"""fastcl.patch("transformers") with the real models, tiny ones from configs: equal curves, and no logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastcl

TEXT = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 12, "projection_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
IMAGE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
         "patch_size": 4, "projection_dim": 8}  # fmt: skip
N = 7
NAMES = ("CLIPModel", "MetaClip2Model", "ChineseCLIPModel", "AltCLIPModel", "SiglipModel", "Siglip2Model")


def model(name: str) -> Any:
    """Float64, dropout as configured, the same weights each time."""
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, name)
    more = {"num_patches": 4} if name == "Siglip2Model" else {}
    made = kind(kind.config_class(text_config=dict(TEXT), vision_config=IMAGE | more, projection_dim=8))
    return made.double().train()


def batch(name: str, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 99, (N, 10), generator=g)
    ids[:, -1] = 2
    images = torch.randn(N, 3, 8, 8, generator=g, dtype=torch.float64)
    if name != "Siglip2Model":
        return {"input_ids": ids, "pixel_values": images}
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(N, 4, 48)
    return {"input_ids": ids, "pixel_values": patches, "pixel_attention_mask": torch.ones(N, 4).long(),
            "spatial_shapes": torch.full((N, 2), 2)}  # fmt: skip


def curve(name: str) -> tuple[list[float], Any]:
    """The loss over four steps, and the last output."""
    trained = model(name)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    losses = []
    torch.manual_seed(1)
    for step in range(4):
        found = trained(**batch(name, step), return_loss=True)
        losses.append(found.loss.item())
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
    return losses, found


@pytest.mark.parametrize("name", NAMES)
def test_equal_curves_without_logits(name: str) -> None:
    theirs, dense = curve(name)
    with fastcl.patch("transformers") as patch:
        assert f"{name}.forward" in repr(patch)
        ours, found = curve(name)
        assert found.logits_per_image is None and found.logits_per_text is None
        one = model(name).eval()
        plain = one(**batch(name, 0))
        assert plain.loss is None and plain.logits_per_image.shape == (N, N)
        pair = one(**batch(name, 0), return_loss=True, return_dict=False)
        assert isinstance(pair, tuple)
    assert ours == pytest.approx(theirs, rel=1e-10)
    torch.testing.assert_close(found.text_embeds, dense.text_embeds, rtol=1e-9, atol=1e-11)
    assert curve(name)[1].logits_per_image is not None


def test_on_twice_and_off() -> None:
    import transformers

    before = {name: getattr(transformers, name).forward for name in NAMES}
    first = fastcl.patch("transformers")
    second = fastcl.patch("transformers")
    assert len(first.replaced) == len(NAMES) and not second.replaced and "nothing" in repr(second)
    second.undo()
    assert transformers.CLIPModel.forward is not before["CLIPModel"]
    first.undo()
    assert {name: getattr(transformers, name).forward for name in NAMES} == before


def test_unknown_libraries_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcl import patching

    with pytest.raises(ValueError, match=r"library: expected one of .* got 'transformer'; did you mean 'transformers'"):
        fastcl.patch("transformer")
    monkeypatch.setattr(patching.metadata, "version", lambda name: "4.57.1")
    with pytest.raises(ImportError, match=r"expected transformers 5, got 4\.57\.1, whose parts are not known"):
        fastcl.patch("transformers")
    monkeypatch.setitem(patching.LIBRARIES, "transformers", ("no-such-distribution", "5", lambda: iter(())))
    monkeypatch.undo()
    monkeypatch.setitem(patching.LIBRARIES, "transformers", ("no-such-distribution", "5", lambda: iter(())))
    with pytest.raises(ImportError, match="which is not installed; pip install no-such-distribution"):
        fastcl.patch("transformers")
