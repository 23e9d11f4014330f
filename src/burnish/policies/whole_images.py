"""SmolVLM's patch embeddings for images without padding: the host of a GPU need not look at a mask."""

from typing import Any

from torch import Tensor, nn


def see_whole(embeddings: nn.Module) -> None:
    """Let transformers' SmolVLMVisionEmbeddings know the place of every patch from the size of the image alone.

    It finds places by a mask, and the host waits to learn how many there are, at every image of every step; LeRobot
    hands over no mask. The first image of a size goes the old way, and its places are kept: the numbers are the same.
    """
    kind: Any = type(embeddings)

    class WholeImages(kind):
        def forward(self, pixel_values: Tensor, patch_attention_mask: Tensor) -> Tensor:
            key = (*pixel_values.shape[-2:], pixel_values.dtype)
            if key not in self.places:
                seen: list[Tensor] = []
                note = self.position_embedding.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
                with note:
                    embedded = super().forward(pixel_values, patch_attention_mask)
                self.places[key] = seen[0][0].cpu()
                return embedded
            places = self.places[key]
            if places.device != pixel_values.device:  # once: a CUDA graph may hold no copy from the host
                places = self.places[key] = places.to(pixel_values.device)
            patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
            return patches + self.position_embedding(places.expand(len(patches), -1))

    embeddings.__class__ = WholeImages
    embeddings.places = {}
