"""What a replay needs to repeat a forward pass: its context, its buffers, its autocast regions, and checksums."""
