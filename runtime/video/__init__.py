"""Videos, images and streams: decode, sample, resize, count tokens."""
