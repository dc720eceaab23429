"""Commands of revnets that work on images."""
