"""The RevCol architectures and their blocks."""
