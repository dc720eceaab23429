"""Image data: readers, samplers, transforms and loaders."""
