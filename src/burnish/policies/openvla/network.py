"""OpenVLA's network under its published tensor names: two vision towers, a projector, Llama, and OFT's parts.

The sequence is [<s> | image patches | state (OFT) | instruction | actions]. OpenVLA reads it causally and writes
action tokens; OFT fills the places of all actions with zeros, lets everything see everything, and reads actions off the
hidden states by an L1 head (arXiv 2502.19645, section 4). Instructions are padded on the left, so that the last
position of the prompt, which predicts the first action, is always a real one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.core.errors import BurnishError
from burnish.policies.discrete.network import Joint, places
from burnish.policies.openvla.configuration import OpenVLAConfig, towers
from burnish.sampling.kept import Kept
from burnish.sampling.token_model import Prompt, visible

HEADS = ("action_head", "proprio_projector")
"""Modules that OFT stores apart from the rest."""


class LayerScale(nn.Module):
    """timm's, with the parameter's published name."""

    def __init__(self, gamma: Tensor):
        super().__init__()
        self.scale_factor = nn.Parameter(gamma.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class VisionBackbone(nn.Module):
    """DINOv2 and SigLIP over one image; features of the last block but one, side by side."""

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        try:
            import timm
        except ImportError:
            raise BurnishError("OpenVLA's vision towers need timm", "the extra",
                               "pip install 'burnish[openvla]'") from None  # fmt: skip
        made = [timm.create_model(name, pretrained=False, num_classes=0, img_size=config.image_size, **sizes)
                for name, sizes in towers(config)]  # fmt: skip
        for tower in made:
            for block in tower.blocks:
                for name in ("ls1", "ls2"):
                    scale = getattr(block, name)
                    if "gamma" in scale._parameters:
                        setattr(block, name, LayerScale(scale.gamma))
        self.featurizer, self.fused_featurizer = made
        self.width = sum(tower.embed_dim for tower in made)
        self.num_patches = self.featurizer.patch_embed.num_patches

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 6, H, W] to [B, patches, width]."""
        parts = pixels.split(3, dim=1)
        found = [tower.forward_intermediates(image, indices=[len(tower.blocks) - 2], output_fmt="NLC", stop_early=True,
                                             intermediates_only=True)[0]
                 for tower, image in zip((self.featurizer, self.fused_featurizer), parts, strict=True)]  # fmt: skip
        return torch.cat(found, dim=2)


class Projector(nn.Module):
    """Image features to the language model's width."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(width, 4 * width), nn.Linear(4 * width, out), nn.Linear(out, out)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))


class ProprioProjector(nn.Module):
    """OFT: the state [B, state_dim] to one position [B, D]."""

    def __init__(self, state_dim: int, out: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(state_dim, out), nn.Linear(out, out)

    def forward(self, state: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(state)))


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class ResidualMLP(nn.Module):
    """Norm, a linear layer, two residual blocks, norm, a linear layer."""

    def __init__(self, width: int, hidden: int, out: int):
        super().__init__()
        self.layer_norm1, self.fc1 = nn.LayerNorm(width), nn.Linear(width, hidden)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(hidden) for _ in range(2))
        self.layer_norm2, self.fc2 = nn.LayerNorm(hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class ActionHead(nn.Module):
    """OFT: hidden states [B, T * A, D] to normalised actions [B, T, A], one control step at a time."""

    def __init__(self, width: int, action_dim: int):
        super().__init__()
        self.model = ResidualMLP(width * action_dim, width, action_dim)
        self.action_dim = action_dim

    def forward(self, hidden: Tensor) -> Tensor:
        return self.model(hidden.unflatten(1, (-1, self.action_dim)).flatten(2))


class OpenVLANet(Joint):
    """The whole network; also what `policies.discrete.token_model.NetTokenModel` makes a decoder's model of.

    Attributes:
        state_positions, kept: as of `policies.discrete.network.TokenNet`.
    """

    mask_id = None
    state_positions = 0
    kept: Kept | None = None

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        from transformers import LlamaForCausalLM

        self.config, text, own = config, config.text, config.settings
        self.vision_backbone = VisionBackbone(config)
        self.projector = Projector(self.vision_backbone.width, text.hidden_size)
        self.language_model = LlamaForCausalLM(text)
        self.tokens = config.space
        if own.head == "l1":
            self.action_head = ActionHead(text.hidden_size, config.action_dim)
        if own.proprio:
            self.proprio_projector = ProprioProjector(own.state_dim, text.hidden_size)

    @property
    def text_model(self) -> nn.Module:
        return self.language_model.model

    @property
    def head(self) -> nn.Module:
        return self.language_model.lm_head

    def embed_image(self, image: Tensor) -> Tensor:
        """[B, 6, H, W] to [B, patches, D]."""
        return self.projector(self.vision_backbone(image.to(self.projector.fc1.weight.dtype)))

    def prompt(self, images: list[Tensor], start: Tensor, ids: Tensor, mask: Tensor, state: Tensor | None) -> Prompt:
        """Embeddings of an observation.

        Args:
            images: of each camera, [B, 6, H, W].
            start: long [B, 1], <s>.
            ids, mask: long and bool [B, S], the instruction, padded on the left.
            state: [B, state_dim], normalised; None where it does not enter.
        """
        embed = self.text_model.embed_tokens
        parts = [embed(start), *(self.embed_image(image) for image in images)]
        if state is not None:
            parts.append(self.proprio_projector(state.to(self.proprio_projector.fc1.weight.dtype))[:, None])
        valid = mask.new_ones(len(mask), sum(part.shape[1] for part in parts))
        parts.append(embed(ids))
        return Prompt(torch.cat([part.to(parts[0].dtype) for part in parts], dim=1), torch.cat([valid, mask], dim=1))

    # OpenVLA: tokens, one after another.

    def embed_actions(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.text_model.embed_tokens(ids)

    def prompt_mask(self, valid: Tensor) -> Tensor:
        """Causal."""
        return torch.ones(valid.shape[1], valid.shape[1], dtype=torch.bool, device=valid.device).tril() & valid[:, None]

    def chunk_logits(self, prompt: Prompt, ids: Tensor, stop: bool = False) -> Tensor:
        """[B, C, L, V] logits of C chunks behind one prompt, which do not see one another; [B, C, L + 1, V] with the
        token after them.

        Args:
            ids: long [B, C, L].
            stop: also predict what follows the chunk.
        """
        (B, C, L), P = ids.shape, prompt.states.shape[1]
        index = torch.arange(L, device=ids.device)
        copies = torch.arange(C, device=ids.device)
        apart = copies[:, None, None, None] == copies[:, None]  # [C, 1, C, 1]
        seen = (apart & (index[:, None, None] >= index)).reshape(C * L, C * L)
        hidden = self.joint(prompt, ids.flatten(1), index.repeat(C).expand(B, -1), visible(prompt.valid, seen))
        read = P - 1 + torch.arange(L + stop, device=ids.device) + copies[:, None] * L
        read[:, 0] = P - 1
        return self.head(hidden[:, read.flatten()]).view(B, C, L + stop, -1)

    # OFT: all actions at once.

    def actions(self, prompt: Prompt, stop_id: int) -> Tensor:
        """Normalised actions [B, T, A] of one forward pass in which everything sees everything.

        The places of the actions hold zeros; `stop_id` is the token after them, there as in training.
        """
        B, P, D = prompt.states.shape
        stop = self.text_model.embed_tokens(torch.full((B, 1), stop_id, device=prompt.states.device))
        empty = prompt.states.new_zeros(B, self.config.length, D)
        states = torch.cat([prompt.states, empty, stop.to(empty.dtype)], dim=1)
        valid = F.pad(prompt.valid, (0, self.config.length + 1), value=True)
        hidden = self._run(states, valid[:, None].expand(-1, valid.shape[1], -1), places(valid), None)
        return self.action_head(hidden[:, P - 1 : P - 1 + self.config.length])
