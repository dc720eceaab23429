"""What a replay needs to repeat a forward pass: the replay context, buffers, random numbers and checksums."""
