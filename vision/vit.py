"""Former path of `vision.models.vit_blocks`, which YAML files and stored runs name."""

from vision.models.vit_blocks import PatchEmbed as PatchEmbed
from vision.models.vit_blocks import PostNormBlock as PostNormBlock
