"""Two-stage detectors: region proposals, cascades of box and mask heads, and HTC."""
