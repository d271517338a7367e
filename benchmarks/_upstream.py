"""Encoders as their authors run them, eagerly: the networks of the packages that theirs are of, with random weights.

MONAI's own for ResNets, DenseNets, the ViT of BrainIAC, the autoencoder and SwinUNETR; torchvision's video Swin; timm's
blocks for the masked autoencoder, as `facebookresearch/mae` has them; and vit-pytorch's 3D ViT for NiT and MiNiT, whose
files have the names of its modules. MONAI alone is a dependency: `pip install torchvision timm vit-pytorch einops`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import brainfm
from brainfm.registry import network_of


class Upstream(nn.Module):
    """A network of another package, and how its output becomes the embedding."""

    def __init__(self, package: str, network: nn.Module, embedding: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.package, self.network, self.embedding = package, network, embedding

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, D, H, W] → the embedding."""
        return self.embedding(self.network, x)


def upstream(name: str) -> Upstream | None:
    """A model's network as its authors run it; None where it is not of these packages.

    Raises:
        ImportError: A package is not installed.
    """
    kind, arguments = network_of(name)
    if kind == "resnet" and set(arguments.get("dilations", (1,))) == {1}:
        return _resnet(arguments)
    if kind == "densenet":
        return _densenet(arguments)
    if kind == "vit":
        return _brainiac() if name == "brainiac_vit" else _mae(arguments)
    if kind in ("nit", "minit"):
        return _nit() if kind == "nit" else _minit()
    if kind == "kl_autoencoder":
        return _autoencoder(arguments)
    if kind == "swin":
        return _swin(name, arguments) if arguments["norm"] == "plain" else _video_swin(arguments)
    return None


def _resnet(arguments: dict[str, Any]) -> Upstream:
    from monai.networks.nets import ResNet

    network = ResNet(
        block=arguments["block"],
        layers=list(arguments["layers"]),
        block_inplanes=list(arguments["widths"]),
        spatial_dims=3,
        n_input_channels=1,
        conv1_t_stride=arguments.get("stem_stride", 1),
        shortcut_type=arguments.get("shortcut", "B"),
        feed_forward=False,
        bias_downsample=arguments.get("shortcut_bias", True),
    )
    return Upstream("MONAI", network, lambda network, x: network(x))


def _densenet(arguments: dict[str, Any]) -> Upstream:
    """y-Aware's own code is the same but for the last norm."""
    from monai.networks.nets import DenseNet

    network = DenseNet(3, 1, 1, arguments["stem"], arguments["growth"], tuple(arguments["layers"]))
    return Upstream("MONAI", network, lambda network, x: network.features(x).relu().mean(dim=(2, 3, 4)))


def _brainiac() -> Upstream:
    from monai.networks.nets import ViT

    network = ViT(1, (96, 96, 96), (16, 16, 16), 768, 3072, 12, 12)
    return Upstream("MONAI", network, lambda network, x: network(x)[0][:, 0])


def _autoencoder(arguments: dict[str, Any]) -> Upstream:
    from monai.networks.nets import AutoencoderKL

    network = AutoencoderKL(
        3, 1, 1, tuple(arguments["depths"]), tuple(arguments["widths"]), (False,) * 4, arguments["latent"],
        arguments["groups"], with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
    )  # fmt: skip
    network.decoder = nn.Identity()
    return Upstream("MONAI", network, lambda network, x: network.quant_conv_mu(network.encoder(x)).mean(dim=(2, 3, 4)))


def _swin(name: str, arguments: dict[str, Any]) -> Upstream:
    from monai.networks import nets

    in_chans = brainfm.get_pretrained_cfg(name).in_chans
    if arguments.get("bottleneck"):
        whole = nets.SwinUNETR(in_chans, 1, feature_size=arguments["dim"], use_v2=False)
        return Upstream("MONAI", whole, lambda net, x: net.encoder10(net.swinViT(x)[4]).mean(dim=(2, 3, 4)))
    network = nets.swin_unetr.SwinTransformer(
        in_chans, arguments["dim"], arguments["window"], arguments["patch_size"], arguments["depths"],
        arguments["num_heads"], spatial_dims=3,
    )  # fmt: skip
    return Upstream("MONAI", network, lambda network, x: network(x)[-1].mean(dim=(2, 3, 4)))


def _mae(arguments: dict[str, Any]) -> Upstream:
    import_without_operators()
    from timm.models.vision_transformer import Block

    dim, heads = arguments["dim"], arguments["num_heads"]
    norm = partial(nn.LayerNorm, eps=1e-6)
    blocks = [Block(dim, heads, 4.0, qkv_bias=True, norm_layer=norm) for _ in range(arguments["depth"])]
    network = nn.Module()
    patch = arguments.get("patch_size", (25, 16, 16))
    network.proj = nn.Conv3d(1, dim, patch, stride=patch)
    network.first = nn.Parameter(torch.zeros(1, 1, dim))
    network.pos_embed = nn.Parameter(torch.zeros(1, 1, dim))  # of which a sum is as long as of all
    network.blocks, network.norm = nn.Sequential(*blocks), norm(dim)

    def first_token(network: Any, x: Tensor) -> Tensor:
        patches = network.proj(x).flatten(2).transpose(1, 2) + network.pos_embed
        tokens = torch.cat([network.first.expand(len(x), -1, -1), patches], dim=1)
        return network.norm(network.blocks(tokens))[:, 0]  # type: ignore[no-any-return]

    return Upstream("timm", network, first_token)


def _nit() -> Upstream:
    network = _vit_3d(64, 8, depth=4, mlp_dim=234)
    return Upstream("vit-pytorch", network, lambda network, x: network(x))


def _minit() -> Upstream:
    """One ViT for 64 blocks of 16³ voxels, each with an embedding of its own; four of its six layers are run."""
    network = _vit_3d(16, 4, depth=4, mlp_dim=309)
    network.own = nn.Parameter(torch.zeros(64, 65, 256))

    def of_blocks(network: Any, x: Tensor) -> Tensor:
        blocks = x.unfold(2, 16, 16).unfold(3, 16, 16).unfold(4, 16, 16).reshape(-1, 1, 16, 16, 16)
        patches = network.to_patch_embedding(blocks)
        tokens = torch.cat([network.cls_token.expand(len(patches), -1, -1), patches], dim=1) + network.pos_embedding
        tokens = tokens.view(-1, 64, 65, 256) + network.own
        return network.transformer(tokens.flatten(0, 1))[:, 0].view(-1, 64, 256).mean(dim=1)

    return Upstream("vit-pytorch", network, of_blocks)


def _vit_3d(size: int, patch: int, *, depth: int, mlp_dim: int) -> Any:
    """vit-pytorch's, 256 wide with 8 heads of 32, without the norms around its patches, which MINIT has not."""
    import_without_operators()
    from vit_pytorch.vit_3d import ViT

    network = ViT(
        image_size=size, frames=size, image_patch_size=patch, frame_patch_size=patch, channels=1, num_classes=2,
        dim=256, depth=depth, heads=8, dim_head=32, mlp_dim=mlp_dim,
    )  # fmt: skip
    cut, _, matrix, _ = network.to_patch_embedding
    network.to_patch_embedding, network.mlp_head = nn.Sequential(cut, matrix), nn.Identity()
    return network


def _video_swin(arguments: dict[str, Any]) -> Upstream:
    import_without_operators()
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    network = SwinTransformer3d(
        list(arguments["patch_size"]), arguments["dim"], list(arguments["depths"]), list(arguments["num_heads"]),
        list(arguments["window"]), stochastic_depth_prob=0.0,
    )  # fmt: skip
    if brainfm.get_pretrained_cfg("swin3d_t").in_chans == 1:
        kernel = tuple(arguments["patch_size"])
        network.patch_embed.proj = nn.Conv3d(1, arguments["dim"], kernel, stride=kernel)
    network.head = nn.Identity()
    return Upstream("torchvision", network, lambda network, x: network(x))


_LIBRARIES: list[Any] = []  # of torch: what one defines is gone with it


def import_without_operators() -> None:
    """Import torchvision, which timm and vit-pytorch do too, where its operators are built for another torch (CUDA)."""
    try:
        import torchvision
    except RuntimeError:  # "operator torchvision::nms does not exist"
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
        import torchvision  # noqa: F401
