"""Visual tokens and feature maps of video files on disk, so that the same footage is decoded and encoded once."""
