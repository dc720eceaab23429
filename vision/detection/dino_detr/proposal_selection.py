"""Selection of the encoder's positions that become the references of the decoder's queries."""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor, nn

from vision.detection.dino_detr.deformable_transformer import DetectionHead, ScoredBoxes
from vision.detection.dino_detr.padded_levels import FeatureSequence


class ProposalSelection(nn.Module):
    """Selects the positions with the highest class scores and predicts their boxes ("mixed query selection").

    A position of level l proposes a box with 0.05 * 2**l of the image's sides, which `head` refines. The boxes are
    used as references only; the contents of queries are embeddings that do not depend on the image.

    Args:
        dim: Channels C.
        num_classes: Number of classes without background.
        queries: Maximum number of selected positions.
    """

    def __init__(self, dim: int, num_classes: int, queries: int):
        super().__init__()
        self.queries = queries
        self.project = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.head = DetectionHead(dim, num_classes)
        nn.init.xavier_uniform_(self.project.weight)

    def forward(self, sequence: FeatureSequence) -> ScoredBoxes:
        """Return the scores (B, Q, classes) and boxes (B, Q, 4) of the best positions.

        Padding, and positions whose proposal has its center or a side outside 1 to 99 % of the image, are selected
        only if there are not enough others.
        """
        sides = [
            torch.full((height * width, 2), 0.05 * 2.0**level, device=sequence.centers.device)
            for level, (height, width) in enumerate(sequence.sizes)
        ]
        proposals = torch.cat([sequence.centers, repeat(torch.cat(sides), "s n -> b s n", b=len(sequence.centers))], -1)
        refused = ~((proposals > 0.01) & (proposals < 0.99)).all(-1)
        if sequence.padded is not None:
            refused |= sequence.padded
        features = self.norm(self.project(sequence.features.masked_fill(refused[..., None], 0)))
        scores = self.head.classes(features)
        best = scores.detach().amax(-1).masked_fill(refused, -torch.inf)
        taken = best.topk(min(self.queries, best.shape[1]), dim=1).indices

        def of_taken(values: Tensor) -> Tensor:
            return values.gather(1, repeat(taken, "b q -> b q n", n=values.shape[-1]))

        boxes = self.head.moved(of_taken(features), of_taken(proposals), eps=1e-5)
        return ScoredBoxes(of_taken(scores), boxes)
