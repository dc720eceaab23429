"""Former path of `revnets.nn.blocks`."""

from revnets.nn.blocks import *  # noqa: F403
