"""RevCol for images: training, evaluation and recipes on top of timm."""
