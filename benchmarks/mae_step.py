"""Forward and backward of the masked autoencoder on full-size volumes, against the same step with timm's blocks.

The peer is the autoencoder of `facebookresearch/mae` in three dimensions, of timm's `Block` as there: all patches are
embedded by a convolution, all are predicted, and the loss is masked. Both have the same weights and hide the same
patches; their losses are compared. timm is no dependency of brainfm: `pip install timm`.

python benchmarks/mae_step.py [--batch 1 4] [--rounds 5]
"""

import argparse
import statistics
import time
from functools import partial

import torch
from _upstream import import_without_operators
from torch import Tensor, nn

import brainfm
from brainfm.models.vit import sincos_positions
from brainfm.train import MaskedAutoencoder
from brainfm.train.mae import patchify

import_without_operators()
import timm  # noqa: E402
from timm.models.vision_transformer import Block  # noqa: E402

GRID, PATCH, MASKED = (6, 12, 12), (25, 16, 16), 0.75


class Peer(nn.Module):
    """The same autoencoder of timm's blocks, with the same names."""

    def __init__(self) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(1, 192, PATCH, stride=PATCH)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 192))
        self.pos_embed = nn.Parameter(sincos_positions(192, GRID), requires_grad=False)
        self.blocks = nn.ModuleList(Block(192, 3, 4.0, qkv_bias=True, norm_layer=norm) for _ in range(12))
        self.norm = norm(192)
        self.decoder_embed = nn.Linear(192, 512)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 512))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(512, GRID), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(512, 16, 4.0, qkv_bias=True, norm_layer=norm) for _ in range(8))
        self.decoder_norm = norm(512)
        self.decoder_pred = nn.Linear(512, 6400)

    def forward(self, volumes: Tensor, noise: Tensor) -> Tensor:
        """The loss of a batch."""
        x = self.patch_embed["proj"](volumes).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        batch, patches, dim = x.shape
        kept = int(patches * (1 - MASKED))
        shuffle = noise.argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        x = x.gather(1, shuffle[:, :kept, None].expand(-1, -1, dim))
        mask = torch.ones(batch, patches)
        mask[:, :kept] = 0
        mask = mask.gather(1, restore)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        tokens = torch.cat([x[:, 1:], self.mask_token.repeat(batch, patches - kept, 1)], dim=1)
        tokens = tokens.gather(1, restore[:, :, None].expand(-1, -1, 512))
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        prediction = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        error = ((prediction - patchify(volumes, PATCH)) ** 2).mean(dim=-1)
        return (error * mask).sum() / mask.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    ours, peer = MaskedAutoencoder(brainfm.create_model("mae_vit_tiny_3d")).train(), Peer().train()
    peer.load_state_dict(ours.state_dict())
    print("| one step of `mae_vit_tiny_3d` | batch | s | processor s | timm / this, by the clock | by processor time |")
    print("|---|---|---|---|---|---|")
    for batch in arguments.batch:
        volumes, noise = torch.randn(batch, 1, 150, 192, 192), torch.rand(batch, 864)
        ways = {
            "timm's blocks": (peer, lambda v=volumes, n=noise: peer(v, n)),
            "brainfm": (ours, lambda v=volumes, n=noise: ours(v, MASKED, n, predict_all=False)[0]),
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        losses = []
        for _ in range(arguments.rounds + 1):  # the first is not counted
            for name, (network, forward) in ways.items():
                network.zero_grad(set_to_none=True)
                start, processor = time.perf_counter(), time.process_time()
                loss = forward()
                loss.backward()
                seconds[name].append((time.perf_counter() - start, time.process_time() - processor))
                losses.append(loss.item())
        assert max(losses) - min(losses) < 1e-4 * max(losses), losses
        walls = {name: statistics.median(wall for wall, _ in found[1:]) for name, found in seconds.items()}
        busy = {name: statistics.median(processor for _, processor in found[1:]) for name, found in seconds.items()}
        for name, wall in walls.items():
            ratio, of_processor = (kind["timm's blocks"] / kind[name] for kind in (walls, busy))
            print(
                f"| {name} | {batch} | {wall:.2f} | {busy[name]:.2f} | {ratio:.2f}× | {of_processor:.2f}× |", flush=True
            )
    print(f"\n{arguments.rounds} rounds, interleaved; torch {torch.__version__}, timm {timm.__version__}")


if __name__ == "__main__":
    main()
