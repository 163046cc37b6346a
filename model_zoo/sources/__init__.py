"""Where models come from: files, hubs, downloads, bundled checkpoints."""
